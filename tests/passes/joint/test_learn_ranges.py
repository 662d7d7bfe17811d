"""learn-ranges: the gradient of every learned range is one more output."""

import pytest
import torch
from torch import nn
from weight_layers import each_weight_layer

from qcompiler.passes.joint.learn_ranges import LearnRanges
from qcompiler.passes.joint.mask_gradients import MaskGradients
from qcompiler.runtime import ops

#: the end c of the range starts at one standard deviation, so that about a third is clipped
LEARNED = "int4:real:tensor:nearest:clip:learned(1)"
LEARN = LearnRanges()


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def differentiate(x, grad):
    """dL/dc of x̂ = c·round(7·clamp(x/c, −1, 1))/7 by autograd in float64, the gradient of round passed on."""
    step = ops.SCALE(x.detach(), LEARNED, "bcos"[: x.dim()])
    end = (7 * step.double()).reshape(()).requires_grad_()
    code = 7 * (x.detach().double() / end).clamp(-1, 1)
    (end * (code + (code.round() - code).detach()) / 7 * grad.double()).sum().backward()
    return end.grad


def check(captured, operands, settle, run_graph):
    """The pass appends one number for each operand, and changes no output."""
    output, *grads = run_graph(captured)
    assert settle(captured, LEARN) == len(operands)
    same, *found = run_graph(captured)
    ranges = found[len(grads) :]
    assert len(ranges) == len(operands)
    assert torch.equal(same, output)
    assert all(map(torch.equal, found, grads))
    for expected, operand, grad in ((differentiate(x, g), x, g) for x, g in zip(operands, grads, strict=True)):
        # a float32 sum of n terms, each at most 1.5 steps or the end, with three roundings each
        bound = operand.numel() * (operand.numel() + 3) * 2.0**-24 * 1.5 * grad.abs().max()
        assert any(got.shape == (1, 1) and (got.double() - expected).abs() <= bound for got in ranges)
        assert expected.abs() > 100 * bound


@each_weight_layer()
def test_the_gradient_of_the_range_is_that_of_the_formula(model, shape, placed, settle, run_graph):
    torch.manual_seed(0)  # a gradient of a range that is near 0 by chance would show nothing
    model.reset_parameters()
    x = leaf(*shape)
    check(placed("", model, x, weight=LEARNED, activation=LEARNED), [model.weight, x], settle, run_graph)


@pytest.mark.parametrize("columns", [False, True], ids=["G·Bᵀ and Aᵀ·G", "(B·Gᵀ)ᵀ and (Gᵀ·A)ᵀ"])
def test_both_forms_of_a_matrix_gradient(columns, placed, settle, run_graph, function):
    left, right = leaf(*(4, 3) if columns else (3, 4)), leaf(*(5, 4) if columns else (4, 5))
    model = function(lambda m, a, b: a.t() @ b.t() if columns else a @ b)
    check(placed("", model, left, right, activation=LEARNED), [left, right], settle, run_graph)


def test_a_clip_mask_does_not_hide_the_range(placed, apply, settle, run_graph):
    """Elements beyond the end have no gradient of their own, and are those that move the range."""
    model, x = nn.Linear(4, 3, bias=False), leaf(2, 4)
    captured = placed("", model, x, activation=LEARNED)
    _, _, dx = run_graph(captured)
    assert apply(captured, MaskGradients()) == [1]
    assert settle(captured, LEARN) == 1
    *_, masked, found = run_graph(captured)
    assert not torch.equal(masked, dx)
    assert torch.allclose(found.double(), differentiate(x, dx), rtol=0, atol=8 * 11 * 2.0**-24 * 1.5 * dx.abs().max())


@pytest.mark.parametrize("spec", ["int4:real:tensor:nearest:clip", "int4:real:tensor:nearest:pass:hindsight"])
def test_does_not_fire_without_a_learned_range(spec, placed, settle):
    assert settle(placed(spec, nn.Linear(4, 3, bias=False), leaf(2, 4)), LEARN) == 0


def test_does_not_fire_without_a_gradient_of_the_operand(placed, settle):
    """The input of the model needs none."""
    assert settle(placed("", nn.Linear(4, 3, bias=False), torch.randn(2, 4), activation=LEARNED), LEARN) == 0
