"""The whole pipeline on whole models: quantizers change values, and nothing else does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qcompiler.compiler import torch_compat
from qcompiler.compiler.lower import lower_graph
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.compiler.plan import QuantPlan
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.ranges.store import RangeStore

#: passes that leave every bit of every output as it is, if quantizers round to nearest
SILENT = {
    "split-convolution-backward",
    "annotate-roles",
    "hoist-views",
    "dedupe-quantizers",
    "save-quantized",
    "restore-strides",
}


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


class Attention(nn.Module):
    """A layer of a language model with tied weights, its attention written out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.head(x + self.out((weights @ v).transpose(1, 2).flatten(2)))


class Residual(nn.Module):
    """Convolutions, batch norm, a shortcut and pools; the main path is a region that is computed again in backward."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.shortcut = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def path(self, x):
        return self.second(F.relu(self.norm(self.first(x))))

    def forward(self, x):
        y = checkpoint(self.path, x, use_reentrant=False)
        y = F.max_pool2d(F.relu(y + self.shortcut(x)), 2)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class HalfPrecision(nn.Module):
    """Two layers in bfloat16, by autocast."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layers(x)


def channels_last():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 4))
    return model.to(memory_format=torch.channels_last)


MODELS = {
    "attention": (Attention, lambda: torch.arange(10).view(2, 5)),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, norm_first=True, activation="gelu"),
        lambda: leaf(5, 2, 8),
    ),
    "residual": (Residual, lambda: torch.randn(4, 4, 6, 6)),
    "half precision": (HalfPrecision, lambda: torch.randn(6, 8)),
    "channels last": (channels_last, lambda: torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)),
    "shuffled": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 4, 3), nn.Unfold(2), nn.Linear(25, 4)
        ),
        lambda: leaf(2, 4, 6, 6),
    ),
    "normalized weight": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)),
        lambda: leaf(2, 4, 7),
    ),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", ["int8:fit:b2c2o2i2:nearest:pass", "int4:max:c2i2:nearest:clip"])
def test_only_quantizers_change_values(name, spec, joint, apply, rules, run_graph, same_bits):
    model, inputs = (make() for make in MODELS[name])
    captured = joint(model, inputs)
    outputs = run_graph(captured)
    for step in joint_pipeline(Recipe(name="values", rules=rules(spec))).passes:
        apply(captured, step)
        before, outputs = outputs, run_graph(captured)
        assert same_bits(outputs, before) or step.name not in SILENT, step.name
    plan = QuantPlan.of(captured.module)
    assert plan.placed >= len(plan.sites) > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sample(3)
def test_the_halves_compute_what_the_whole_computes(name, joint, rules, arguments, run_graph, same_bits):
    model, inputs = (make() for make in MODELS[name])
    captured = joint(model, inputs)
    joint_pipeline(Recipe(name="values", rules=rules("int4:max:b2c2o2i2:stochastic:clip")))(captured.module)
    whole = run_graph(captured)
    step = lower_graph(captured, QuantPlan(), "eager", RangeStore(torch_compat.ENGINE)).step
    inputs, tangents = arguments(captured)
    results = [*step.forward(inputs)]
    outputs, saved = results[: captured.forward_outputs], results[captured.forward_outputs :]
    assert same_bits([*outputs, *step.backward([*saved, *tangents])], whole)
