"""Fine-tune a small language model on text, in float and through a recipe, side by side.

    python examples/finetune_text.py [--recipe hyperblock-int8] [--steps 200] [--checkpoint run.pt]

Needs transformers (`pip install 'qcompiler[text]'`). Nothing is downloaded. The model is a GPT-2 made from a config,
with random weights. The script first trains the model in float on the reference manual of Python, which every Python
installation holds. Fine-tuning goes on with source code of the standard library. If the checkpoint exists, fine-tuning
resumes from there.
"""

import argparse
import copy
import dataclasses
import inspect
import json
import tarfile
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import qcompiler

#: characters of a line of text that the model sees at once
LENGTH = 64
BATCH = 16


def encode(text: str) -> Tensor:
    """Return one token a character; characters outside of ASCII become `?`."""
    return torch.tensor(list(text.encode("ascii", "replace")))


def manual() -> Tensor:
    """Return the reference manual of Python as tokens."""
    return encode("\n".join(topics.topics.values()))


def sources() -> tuple[Tensor, Tensor]:
    """Return the source code of some modules as tokens, for training and for validation."""
    modules = (argparse, dataclasses, inspect, tarfile, textwrap, zipfile)
    return encode("\n".join(inspect.getsource(module) for module in modules)), encode(inspect.getsource(json.decoder))


def make_model() -> GPT2LMHeadModel:
    """Return a small GPT-2; written-out attention lets the recipe quantize the two contractions of attention."""
    config = GPT2Config(
        vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.use_cache = False
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of each next character."""
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch_at(tokens: Tensor, step: int, seed: int = 0) -> Tensor:
    """Return the batch of one step; the step alone decides, so a resumed run sees the same batches."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=generator)
    return torch.stack([tokens[start : start + LENGTH + 1] for start in starts.tolist()])


@torch.no_grad()
def validate(model: nn.Module, tokens: Tensor, batches: int = 8) -> float:
    """Return the mean loss in evaluation mode."""
    model.eval()
    losses = [loss_of(model, batch_at(tokens, step, seed=1)) for step in range(batches)]
    model.train()
    return float(torch.stack(losses).mean())


def add_learned_ranges(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give the learned ranges of a recipe a group of their own; without such ranges do nothing."""
    if isinstance(model, qcompiler.QuantizedModule) and len(optimizer.param_groups) == 1:
        ranges = model.quantizer_parameters()
        if ranges:
            optimizer.add_param_group({"params": ranges, "lr": 1e-5, "weight_decay": 0.0})


def train(
    model: nn.Module, tokens: Tensor, steps: int, rate: float, checkpoint: Path | None = None, every: int = 50
) -> list[float]:
    """Train to `steps`, from the checkpoint if there is one; return the loss of each step that ran."""
    optimizer, start, losses = torch.optim.AdamW(model.parameters(), lr=rate), 0, []
    if checkpoint is not None and checkpoint.exists():
        start = resume(checkpoint, model, optimizer)
    for step in range(start, steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch_at(tokens, step))
        add_learned_ranges(optimizer, model)  # they exist after the first forward
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == steps):
            save(checkpoint, model, optimizer, step + 1)
    return losses


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write all that a run needs to go on: weights with kept ranges, optimizer, random state, step."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    qcompiler.save(state | {"step": step}, path)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint; return the step at which the run goes on."""
    state = torch.load(path)
    model.load_state_dict(state["model"])
    if len(state["optimizer"]["param_groups"]) > 1:
        add_learned_ranges(optimizer, model)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])  # stochastic rounding draws from it
    return int(state["step"])


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train in float, fine-tune twice, and print the loss on code that neither run has seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="hyperblock-int8", help="a name, or the path of a .yaml file")
    parser.add_argument("--pretrain", type=int, default=300, help="steps in float on the manual")
    parser.add_argument("--steps", type=int, default=200, help="steps of fine-tuning on source code")
    parser.add_argument("--checkpoint", type=Path, help="of the quantized run; written every 50 steps, and resumed")
    parser.add_argument("--backend", choices=("eager", "inductor"), default="eager")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    base, (code, unseen) = make_model(), sources()
    train(base, manual(), args.pretrain, 1e-3)
    scores = {"before": validate(base, unseen)}
    plain = copy.deepcopy(base)
    train(plain, code, args.steps, 5e-4)
    scores["float"] = validate(plain, unseen)
    quantized = qcompiler.compile(copy.deepcopy(base), args.recipe, backend=args.backend)
    train(quantized, code, args.steps, 5e-4, args.checkpoint)
    name = quantized.recipe.name
    scores[name] = validate(quantized, unseen)
    print("loss on source code that no run has seen, nats a character")
    for row, score in scores.items():
        print(f"{row:>24}  {score:.3f}")
    plan = quantized.plan(training=False)
    print(f"{len(plan.sites)} quantizers in evaluation mode; {len(plan.kept)} operands in float")
    return scores


if __name__ == "__main__":
    main()
