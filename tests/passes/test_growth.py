"""Our own work grows with the graph and not with its square: counted in calls, since seconds depend on the machine."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import recipes
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.compiler.plan import QuantPlan
from qcompiler.compiler.rewrite import split_halves

ROOTS = tuple(str(Path(qcompiler.__file__).parents[1] / folder) for folder in ("qcompiler", "passes", "runtime"))
#: twice the layers take twice the calls; inputs, output and first calls are the same for both. A square is 4 times
MOST = 2.2


class Residual(nn.Module):
    """A norm, two layers and the identity: sums in a row, of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Convolution(nn.Module):
    """A convolution with batch norm and relu beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.body(x)).relu()


def count_calls(run: Callable[[], object]) -> int:
    """Return the calls that code of ours makes, of functions of ours and of functions in C."""
    counted = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call") and frame.f_code.co_filename.startswith((*ROOTS, __file__))

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    return counted


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ["hyperblock-int8", "tensor-int4", "deploy-int8"])
@pytest.mark.parametrize(("block", "shape"), [(Residual, (4, 4)), (Convolution, (4, 4, 6, 6))])
def test_twice_the_layers_take_twice_the_calls(joint, block, shape, recipe):
    def count(layers):
        captured = joint(nn.Sequential(*(block() for _ in range(layers))), torch.randn(shape, requires_grad=True))

        def run():
            joint_pipeline(recipes.get(recipe))(captured.module)
            QuantPlan.of(captured.module)
            split_halves(captured)

        return count_calls(run)

    count(2)  # tables that are filled once
    assert count(16) <= MOST * count(8)


def test_a_square_is_found():
    def visit(count):
        for _ in range(count):
            for node in range(count):
                abs(node)

    assert count_calls(lambda: visit(160)) > MOST * count_calls(lambda: visit(80))
