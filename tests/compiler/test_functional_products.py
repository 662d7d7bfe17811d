"""Functional products, forward and all gradients, against fake quantization around the float operator.

With one block a tensor and rounding to nearest, every contraction reads the same three tensors: input, weight and
gradient, each rounded once. So plain autograd gives the right value: y = g(f(q(x), q(w))), where q rounds forward and
passes gradients on, and g rounds gradients. Sums run in another order in places: hence the tolerance of float32.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.passes.rules import Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]

RECIPE = Recipe(name="nearest", rules=(Rule(spec=parse_spec("int8:fit:tensor:nearest:pass")),))

#: name → operator, shape of the input, shape of the weight
PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (5, 7), (9, 7)),
    "linear of tokens": (F.linear, (2, 3, 5, 7), (9, 7)),
    "linear of a vector": (F.linear, (7,), (9, 7)),
    "one element": (F.linear, (1, 1), (1, 1)),
    "one row": (F.linear, (1, 13), (1, 13)),
    "one column": (F.linear, (13, 1), (17, 1)),
    "weight on the left": (lambda x, w: w @ x, (3, 7, 5), (9, 7)),
    "batches": (torch.bmm, (3, 4, 7), (3, 7, 2)),
    "broadcast": (torch.matmul, (2, 1, 4, 7), (3, 7, 2)),
    "heads": (lambda x, w: torch.einsum("bid,hdk->bhik", x, w), (2, 5, 7), (3, 7, 4)),
    "channels by einsum": (lambda x, w: torch.einsum("bchw,oc->bohw", x, w), (2, 5, 3, 4), (6, 5)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([1, 2], [0, 1])), (4, 3, 5), (3, 5, 6)),
    "addmm": (lambda x, w: torch.addmm(torch.ones(9), x, w, alpha=0.5, beta=2.0), (5, 7), (7, 9)),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.ones(3, 4, 2), x, w, alpha=0.25), (3, 4, 7), (3, 7, 2)),
    "unfold": (lambda x, w: w @ F.unfold(x, 3), (2, 3, 5, 4), (4, 27)),
    "dilated": (lambda x, w: F.conv2d(x, w, dilation=2, padding=2), (2, 4, 7, 6), (5, 4, 3, 3)),
    "same": (lambda x, w: F.conv2d(x, w, padding="same"), (2, 4, 7, 6), (5, 4, 2, 3)),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2, stride=(2, 1)), (2, 4, 7, 6), (6, 2, 3, 1)),
    "image without a batch": (F.conv2d, (4, 7, 6), (5, 4, 3, 3)),
    "one pixel": (F.conv2d, (1, 1, 1, 1), (1, 1, 1, 1)),
    "filter longer than its padded signal": (lambda x, w: F.conv1d(x, w, padding=4), (2, 3, 5), (4, 3, 13)),
    "circular": (lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w), (2, 3, 5, 4), (4, 3, 3, 3)),
    "volume": (lambda x, w: F.conv3d(x, w, stride=(1, 2, 1)), (1, 2, 4, 5, 3), (3, 2, 2, 1, 3)),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1, padding=1),
        (2, 4, 5, 3),
        (4, 3, 3, 3),
    ),
    "transposed, grouped": (lambda x, w: F.conv_transpose1d(x, w, groups=2, stride=3), (2, 4, 5), (4, 3, 2)),
}


def rounded(x: Tensor) -> Tensor:
    """The nearest multiples of the smallest power of two at which 8 bits hold the largest number."""
    largest = x.abs().max().item()
    step = 2.0 ** math.ceil(math.log2(largest / 127))
    return (x.double() / step).round().mul(step).to(x.dtype)


class RoundForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class RoundBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return rounded(grad)


class Product(nn.Module):
    def __init__(self, operator: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.operator, self.weight = operator, nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.weight)


@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients(eager, name):
    operator, shape, weight_shape = PRODUCTS[name]
    model = Product(operator, *weight_shape)
    x = torch.randn(*shape, requires_grad=True)
    out = eager(model, RECIPE, strict=True)(x)
    tangent = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (x, model.weight), tangent))
    plain = RoundBackward.apply(operator(RoundForward.apply(x), RoundForward.apply(model.weight)))
    expected = (plain, *torch.autograd.grad(plain, (x, model.weight), tangent))
    for value, right in zip(found, expected, strict=True):
        # at most 150 products are summed: 150 · 2⁻²⁴ of their norm
        assert (value - right).norm() <= 1e-5 * right.norm()
