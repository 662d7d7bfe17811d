"""The plan has as many contractions as plain PyTorch executes, counted by benchmarks/strict.py, or names the rest."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    # torch 2.13, of itself
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(scope="module")
def load():
    """load(name) → a module of benchmarks/, whose files import one another by their names."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def strict(load):
    """benchmarks/strict.py."""
    return load("strict")


@pytest.fixture(scope="module")
def cases(load):
    """Every model of the benchmark but those of transformers."""
    models = load("strict_models")
    return {**models.zoo(), **models.ODD}


#: model → contractions of plain PyTorch, forward/backward, known by hand
WHOLE = {
    "mlp": "2/3",
    "frozen": "3/3",
    "twice": "3/5",
    "two-inputs": "3/4",
    "transposed-grouped": "3/5",
    "x·xᵀ": "5/7",  # a, a, a·aᵀ, b and a product of all; a and b read the input
    "LoRA": "2/3",
    "autograd.Function": "3/5",
    "LSTMCell": "4/5",  # two projections a step; the state of the first step and the input need no gradient
    "checkpoint of both": "2/3 +1",
}


@pytest.mark.parametrize("name", WHOLE)
def test_equal(name, strict, cases):
    row = strict.examine(name, cases[name])
    assert (row.plain, row.named, row.unnamed, row.verdict) == (WHOLE[name], [], [], "accepts")
    assert row.planned == WHOLE[name].partition(" ")[0]


#: model → contractions of plain PyTorch, those in the plan, and what the plan says of the difference
NAMED = {
    "sdpa": ("3/3", "3/3", "2 kept: fused attention: its two products are inside one kernel"),
    "cond": ("2/4", "1/2", "3 inside of higher-order operators"),
    "break in loop": ("4/7", "2/4", "5 in graphs that run again"),
    "GRU": ("5/8", "1/2", "10 outside of the graphs"),
    "matrix and vector": ("3/3", "3/3", "4 kept: matrix-vector product"),
}


@pytest.mark.parametrize("name", NAMED)
def test_named(name, strict, cases):
    row = strict.examine(name, cases[name])
    assert (row.plain, row.planned, row.named, row.unnamed) == (*NAMED[name][:2], [NAMED[name][2]], [])
    assert row.verdict.startswith("strict: ")


def test_a_plan_with_fewer_contractions_is_found(strict, cases):
    """The comparison can fail: one layer less, or one more, is a difference without a name."""
    case = cases["mlp"]
    plain, planned = strict.count_plain(case), strict.count_planned(case)
    planned.counts["forward", "addmm"] -= 1
    planned.counts["backward", "mm"] += 1
    assert strict.compare(plain, planned)[1] == ["plan lacks 1 addmm forward", "plan has 1 mm backward too many"]


def test_an_unknown_operator_that_sounds_like_a_contraction_stops_the_count(load):
    counts = load("strict_counts")
    library = torch.library.Library("count_tests", "DEF")
    library.define("fast_mm(Tensor x) -> Tensor")
    with pytest.raises(ValueError, match=r"count_tests.fast_mm.default: a contraction\?"):
        counts.kind_of(torch.ops.count_tests.fast_mm.default)
    library._destroy()


def test_halves_are_told_apart(load):
    """Gradients that are not needed are not counted; a backward of a convolution makes one or two."""
    counts = load("strict_counts")
    model, x = (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 3, 2), nn.Flatten(), nn.LazyLinear(2)),
        torch.ones(1, 2, 4, 4),
    )
    model(x)
    recorder = counts.Recorder(model)
    with recorder:
        recorder.backward(model(x).sum())
    assert recorder.counts == Counter(
        {("forward", "convolution"): 2, ("forward", "addmm"): 1, ("backward", "convolution_backward"): 3}
        | {("backward", "mm"): 2}
    )
    assert recorder.places == Counter({("convolution", "0"): 1, ("convolution", "1"): 1, ("addmm", "3"): 1})
