"""Small models of the package transformers, from random weights: nothing is loaded."""

import functools
from collections.abc import Mapping
from typing import Any, Final

import torch
import transformers
from strict_models import Case, tokens
from torch import Tensor, nn

SMALL: Final = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
WORDS: Final = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
T5: Final = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART: Final = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART_REST: Final = {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


def build(name: str, config: str, **options: Any) -> nn.Module:
    """Return a model in train mode, of a configuration with these options."""
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options)).train()


def case(name: str, config: str, call: Any, **options: Any) -> Case:
    """Return a case of a model; by default with attention as two contractions, not as a kernel."""
    options = {"attn_implementation": "eager", **options}
    return Case(functools.partial(build, name, config, **options), call)


def pairs() -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return token ids for the encoder and for the decoder."""
    ids = torch.randint(2, 64, (2, 8))
    return (), {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False}


def images(size: int = 32) -> Any:
    """Return images."""
    return lambda: ((torch.randn(2, 3, size, size),), {})


def clip() -> tuple[tuple[Tensor, ...], Mapping[str, Any]]:
    """Return texts and images."""
    return (torch.randint(2, 64, (2, 8)), torch.randn(2, 3, 32, 32)), {}


def whisper() -> tuple[tuple[Tensor, ...], Mapping[str, Any]]:
    """Return a spectrogram and the tokens so far."""
    ids = torch.randint(2, 64, (2, 5))
    return (torch.randn(2, 8, 32),), {"decoder_input_ids": ids, "use_cache": False}


CAUSAL: Final = tokens(use_cache=False)
TEXT: Final = {**SMALL, **WORDS, "max_position_embeddings": 32}
GROUPED: Final = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS: Final = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2: Final = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, **WORDS}
VIT: Final = {**SMALL, "image_size": 32, "patch_size": 8}
STAGES: Final = {"num_channels": 3, "depths": [1, 1], "num_stages": 2}

TRANSFORMERS: Final[dict[str, Case]] = {
    "GPT2": case("GPT2LMHeadModel", "GPT2", CAUSAL, **GPT2),
    "GPT2, sdpa": case("GPT2LMHeadModel", "GPT2", CAUSAL, attn_implementation="sdpa", attn_pdrop=0.0, **GPT2),
    "BERT": case("BertModel", "Bert", tokens(), **TEXT),
    "RoBERTa": case("RobertaForMaskedLM", "Roberta", tokens(), **TEXT),
    "DistilBERT": case(
        "DistilBertModel", "DistilBert", tokens(), dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=64
    ),
    "ALBERT": case("AlbertModel", "Albert", tokens(), embedding_size=16, **TEXT),
    "DeBERTa": case("DebertaV2Model", "DebertaV2", tokens(), **TEXT),
    "T5": case("T5ForConditionalGeneration", "T5", pairs, **T5, **WORDS),
    "BART": case(
        "BartForConditionalGeneration", "Bart", pairs, max_position_embeddings=32, **BART, **BART_REST, **WORDS
    ),
    "Llama": case("LlamaForCausalLM", "Llama", CAUSAL, **GROUPED),
    "Llama, sdpa": case("LlamaForCausalLM", "Llama", CAUSAL, attn_implementation="sdpa", **GROUPED),
    "Mistral": case("MistralForCausalLM", "Mistral", CAUSAL, sliding_window=4, **GROUPED),
    "Qwen2": case(
        "Qwen2ForCausalLM", "Qwen2", CAUSAL, **{key: size for key, size in GROUPED.items() if key != "head_dim"}
    ),
    "Gemma": case("GemmaForCausalLM", "Gemma", CAUSAL, **GROUPED),
    "OPT": case(
        "OPTForCausalLM",
        "OPT",
        CAUSAL,
        word_embed_proj_dim=32,
        ffn_dim=64,
        max_position_embeddings=32,
        **WORDS,
        **{key: size for key, size in SMALL.items() if key != "intermediate_size"},
    ),
    "Mixtral": case("MixtralForCausalLM", "Mixtral", CAUSAL, experts_implementation="batched_mm", **EXPERTS),
    "Mixtral, loop": case("MixtralForCausalLM", "Mixtral", CAUSAL, experts_implementation="eager", **EXPERTS),
    "Mixtral, grouped": case("MixtralForCausalLM", "Mixtral", CAUSAL, experts_implementation="grouped_mm", **EXPERTS),
    "Mamba": case(
        "MambaForCausalLM",
        "Mamba",
        CAUSAL,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        time_step_rank=4,
        use_associative_scan=False,  # with it the model multiplies less often under Dynamo than in plain PyTorch
        **WORDS,
    ),
    "ViT": case("ViTForImageClassification", "ViT", images(), **VIT),
    "ViT, sdpa": case("ViTForImageClassification", "ViT", images(), attn_implementation="sdpa", **VIT),
    "CLIP": case("CLIPModel", "CLIP", clip, projection_dim=16, text_config=TEXT, vision_config=VIT),
    "Whisper": case(
        "WhisperModel",
        "Whisper",
        whisper,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        decoder_start_token_id=1,
        **BART,
        **BART_REST,
        **WORDS,
    ),
    "ConvNeXt": case("ConvNextForImageClassification", "ConvNext", images(), hidden_sizes=[16, 32], **STAGES),
    "Swin": case(
        "SwinForImageClassification",
        "Swin",
        images(),
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "SegFormer": case(
        "SegformerForSemanticSegmentation",
        "Segformer",
        images(),
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    ),
    "ResNet": case(
        "ResNetForImageClassification", "ResNet", images(), embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
    ),
}
