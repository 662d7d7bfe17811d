"""Export of models as the package transformers builds them: small, from random weights, trained a step."""

import os

import numpy as np
import onnx
import pytest
import torch

import qcompiler
from qcompiler.exporting import run

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded
transformers = pytest.importorskip("transformers")

TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}


def gpt2():
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=32, use_cache=False, **WORDS)
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(max_position_embeddings=32, **TINY, **WORDS))


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=8, attn_implementation="eager", **TINY)
    return transformers.ViTForImageClassification(config)


def tokens(batch, length=12):
    return (torch.randint(0, 64, (batch, length)),)


def images(batch):
    return (torch.randn(batch, 3, 32, 32),)


#: model → (how it is built, its inputs, a recipe, which dimensions are free)
BATCH, SEQUENCE = torch.export.Dim("batch"), torch.export.Dim("sequence", max=32)
MODELS = {
    "gpt2": (gpt2, tokens, "deploy-int8", {0: BATCH, 1: SEQUENCE}),
    "bert": (bert, tokens, "in-hindsight-w8a8g8", {0: BATCH, 1: SEQUENCE}),
    "vit": (vit, images, "hyperblock-int4", {0: BATCH}),
}


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(name, marks=pytest.mark.full) for name in ("bert", "vit"))])
@pytest.mark.full
def test_one_file_for_every_length(name, tmp_path):
    build, inputs, recipe, free = MODELS[name]
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    qmodel = qcompiler.compile(build(), recipe, backend="eager")
    returned = qmodel(*inputs(4))
    torch.stack([one.square().mean() for one in returned.values()]).sum().backward()
    (first,) = [name for name in ("input_ids", "pixel_values") if name in qmodel._model.forward.__annotations__]
    report = qcompiler.export_onnx(qmodel, path, inputs(4), dynamic_shapes={first: free})
    onnx.checker.check_model(str(path), full_check=True)
    given = inputs(3, 9) if inputs is tokens else inputs(3)
    found = qcompiler.verify_onnx(qmodel, path, given)
    assert found.exact
    plan = {site.name for site in qmodel.plan(training=False).sites}
    assert set(run.read_sites(path)) == plan
    assert report.trained == sum(report.exported.values()) == len(plan)
    for optimize in (False, True):
        few = run.run_file(path, given, {}, optimize=optimize)
        for batch in (1, 17):
            rows = torch.arange(batch) % 3
            many = run.run_file(path, (given[0][rows],), {}, optimize=optimize)
            for one, other in zip(few, many, strict=True):
                np.testing.assert_allclose(other, one[rows.numpy()], atol=1e-5 * np.abs(one).max())
