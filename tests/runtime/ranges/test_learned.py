"""Learned ranges: their gradients are those of the written formula, by torch's autograd in float64."""

import math

import pytest
import torch
from torch import Tensor

from qcompiler.runtime import references
from qcompiler.runtime.numbers.blocks import TENSOR, view_blocks
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.ranges.estimator import Observed, Range
from qcompiler.runtime.ranges.learned import LearnedEnd, Lsq, Pact
from qcompiler.runtime.spec import parse_spec


def rounded(x: Tensor) -> Tensor:
    """x rounded, the gradient passed on."""
    return x + (x.round() - x).detach()


def quantized(estimator: Range, x: Tensor, state: Tensor, top: int, bottom: int) -> Tensor:
    """x̂ as the papers write it, with the straight-through estimator for rounding alone."""
    if isinstance(estimator, Lsq):
        return state * rounded((x / state).clamp(bottom, top))
    if isinstance(estimator, LearnedEnd):
        unit = (x / state).clamp(bottom / top, 1.0)
        return state * rounded(unit * top) / top
    # PACT: y = ½(|x| − |x − α| + α), then rounded as a whole, so that α gets no gradient from rounding
    clipped = torch.where(x >= state, state, torch.where(x < 0, torch.zeros_like(x), x))
    return clipped + ((clipped * top / state).round() * state / top - clipped).detach()


CASES = [
    (Lsq(), "int4"),
    (Lsq(), "uint4"),
    (Lsq(), "int8"),
    (LearnedEnd(), "int4"),
    (LearnedEnd(), "uint4"),
    (LearnedEnd(), "int2"),
    (Pact(), "uint4"),
    (Pact(), "uint8"),
]


@pytest.mark.parametrize(("estimator", "name"), CASES, ids=[f"{e}-{n}" for e, n in CASES])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_gradient_is_that_of_the_formula(estimator: Range, name: str, scale: float) -> None:
    torch.manual_seed(0)
    form = parse_format(name)
    top, bottom = int(form.largest), int(form.lowest)
    x, grad = scale * torch.randn(6, 7), torch.randn(6, 7)
    text = f"{name}:real:tensor:nearest:clip:{estimator}"
    state = torch.tensor([[1.5 / top if isinstance(estimator, Lsq) else 1.5]])
    step = references.scale(x, text, "bc", state, False)
    got = references.range_gradient(grad, x, step, text)
    parameter = state.double().requires_grad_()
    (quantized(estimator, x.double(), parameter, top, bottom) * grad).sum().backward()
    expected = parameter.grad / (math.sqrt(x.numel() * top) if isinstance(estimator, Lsq) else 1.0)
    # float32 sums of 42 terms, each a number of at most top times a gradient below 4, three roundings each
    assert torch.allclose(got.double(), expected, rtol=0, atol=42 * 45 * 2.0**-24 * top * 4)
    assert got.shape == state.shape
    assert bool(expected.abs().max() > 1e-3) is not (
        isinstance(estimator, Pact) and scale < 1
    )  # of which nothing is clipped


def observed(x: Tensor, name: str) -> Observed:
    form = parse_format(name)
    return Observed(x, view_blocks(tuple(x.shape), "bc", TENSOR), form.kind, form.magnitude_bits)


def test_first_values() -> None:
    x = torch.tensor([[1.0, -3.0], [0.0, 4.0]])
    assert Lsq().first(observed(x, "int4")).item() == pytest.approx(2 * 2 / math.sqrt(7), rel=1e-6)
    std = math.sqrt(((1 - 0.5) ** 2 + 3.5**2 + 0.5**2 + 3.5**2) / 3)
    assert LearnedEnd().first(observed(x, "int4")).item() == pytest.approx(3 * std, rel=1e-6)
    folded = 3 * std / math.sqrt(1 - 2 / math.pi)
    assert LearnedEnd().first(observed(x, "uint4")).item() == pytest.approx(folded, rel=1e-6)
    assert Pact().first(observed(x, "uint4")).item() == 10.0


def test_the_sign_of_the_parameter_does_not_matter_forward() -> None:
    x = torch.randn(3, 4)
    for estimator in (Lsq(), LearnedEnd(), Pact()):
        ends = [estimator.ends(observed(x, "int4"), torch.tensor([[value]])) for value in (0.5, -0.5)]
        assert torch.equal(ends[0][1], ends[1][1])


def test_the_optimizer_moves_it_and_nothing_else() -> None:
    state = torch.tensor([[0.7]])
    for estimator in (Lsq(), LearnedEnd(), Pact()):
        assert torch.equal(estimator.update(observed(torch.randn(3, 4), "int4"), state), state)
        text = f"int4:real:tensor:nearest:clip:{estimator}"
        assert str(parse_spec(text)) == text
