"""mask-gradients: no gradient where a quantizer clipped."""

import pytest
import torch
from torch import nn
from weight_layers import each_weight_layer

from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import is_backward
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.mask_gradients import MaskGradients
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops

#: 3 magnitude bits: with amax in [½, 1)·2^E a step of 2^(E−3), so that all above 7·2^(E−3) is clipped
CLIPPING = "int4:max:tensor:nearest:clip"
MASK = MaskGradients()


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


def inside(x):
    """True where `CLIPPING` clips nothing, by its words: |x| ≤ 7 steps."""
    exponent = torch.frexp(x.abs().max()).exponent
    return x.abs() <= 7 * 2.0 ** (exponent - 3)


def wide(*shape, requires_grad=True):
    """Values in ±1, a quarter of them beyond ⅞: `CLIPPING` clips these."""
    x = torch.empty(shape).uniform_(-0.8, 0.8)
    x.view(-1)[::4] = 0.95
    return x.requires_grad_(requires_grad)


def widened(model):
    with torch.no_grad():
        model.weight.copy_(wide(*model.weight.shape))
    return model


def test_golden_mask(placed, settle, golden):
    captured = placed("", nn.Linear(4, 3, bias=False), leaf(2, 4), activation=CLIPPING)
    before = graph_text(captured.module)
    assert settle(captured, MASK) == 1
    golden(before=before, after=graph_text(captured.module))


@each_weight_layer()
def test_gradients_are_masked_where_their_operand_was_clipped(model, shape, placed, settle, run_graph, same_bits):
    x = wide(*shape)
    captured = placed(CLIPPING, widened(model), x)
    output, dw, dx = run_graph(captured)
    assert settle(captured, MASK) == 2
    masks = [inside(model.weight.detach()), inside(x.detach())]
    assert not any(mask.all() for mask in masks)
    zero = torch.zeros(())
    expected = [torch.where(mask, grad, zero) for mask, grad in zip(masks, (dw, dx), strict=True)]
    assert same_bits(run_graph(captured), [output, *expected])


#: steps of 1/8, so that x/step is exact; δ = 2
SCALING = "int4:real:tensor:nearest:ewgs(2):fixed(-0.875,0.875)"


def scaled(x, grad):
    """g·(1 + δ·sign(g)·(x − x̂)/(high − low)) within the range, 0 beyond it, in float64."""
    x, grad = x.detach().double(), grad.double()
    error = (x - torch.round(x * 8) / 8) / 1.75
    return torch.where(x.abs() <= 0.875, grad * (1 + 2 * grad.sign() * error), 0.0)


@each_weight_layer()
def test_gradients_are_scaled_by_the_error_of_rounding(model, shape, placed, settle, run_graph):
    x = wide(*shape)
    captured = placed(SCALING, widened(model), x)
    output, *grads = run_graph(captured)
    assert settle(captured, MASK) == 2
    same, *found = run_graph(captured)
    assert torch.equal(same, output)
    for operand, plain, grad in zip((model.weight, x), grads, found, strict=True):
        # a quotient, a difference, a quotient, two products and a sum in float32, of terms of at most 2·grad
        assert torch.allclose(grad.double(), scaled(operand, plain), rtol=0, atol=12 * 2.0**-24 * plain.abs().max())
        assert not torch.equal(grad, plain)


@pytest.mark.parametrize("columns", [False, True], ids=["G·Bᵀ and Aᵀ·G", "(B·Gᵀ)ᵀ and (Gᵀ·A)ᵀ"])
def test_both_forms_of_a_scaled_gradient(columns, placed, settle, run_graph, function):
    left, right = wide(*(4, 3) if columns else (3, 4)), wide(*(5, 4) if columns else (4, 5))
    captured = placed(SCALING, function(lambda m, a, b: a.t() @ b.t() if columns else a @ b), left, right)
    _, *grads = run_graph(captured)
    assert settle(captured, MASK) == 2
    _, *found = run_graph(captured)
    for operand, plain, grad in zip((left, right), grads, found, strict=True):
        assert torch.allclose(grad.double(), scaled(operand, plain), rtol=0, atol=12 * 2.0**-24 * plain.abs().max())


@pytest.mark.parametrize("columns", [False, True], ids=["G·Bᵀ and Aᵀ·G", "(B·Gᵀ)ᵀ and (Gᵀ·A)ᵀ"])
def test_both_forms_of_a_matrix_gradient(columns, placed, settle, run_graph, same_bits, function):
    # torch computes the transpose of the gradient where the operand lies in memory by columns
    left, right = wide(*(4, 3) if columns else (3, 4)), wide(*(5, 4) if columns else (4, 5))
    captured = placed(CLIPPING, function(lambda m, a, b: a.t() @ b.t() if columns else a @ b), left, right)
    output, *grads = run_graph(captured)
    assert settle(captured, MASK) == 2
    expected = [torch.where(inside(x.detach()), g, torch.zeros(())) for x, g in zip((left, right), grads, strict=True)]
    assert same_bits(run_graph(captured), [output, *expected])


def test_batches_of_matrices(placed, settle, run_graph, same_bits, function):
    left, right = wide(2, 3, 4), wide(2, 4, 5)
    captured = placed(CLIPPING, function(lambda m, a, b: torch.bmm(a, b)), left, right)
    output, *grads = run_graph(captured)
    assert settle(captured, MASK) == 2
    expected = [torch.where(inside(x.detach()), g, torch.zeros(())) for x, g in zip((left, right), grads, strict=True)]
    assert same_bits(run_graph(captured), [output, *expected])


def test_a_sum_of_masked_gradients_is_the_masked_sum(placed, settle, run_graph, function):
    x = wide(3, 4)
    model = function(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(4, 2, bias=False), b=nn.Linear(4, 2, bias=False))
    captured = placed("", model, x, activation=CLIPPING)
    of_x = captured.forward_outputs + [fact.kind for fact in captured.inputs].index(InputKind.INPUT)
    whole = run_graph(captured)[of_x]
    assert settle(captured, MASK) == 2
    assert torch.equal(run_graph(captured)[of_x], torch.where(inside(x.detach()), whole, 0.0))


def test_a_product_of_one_tensor(placed, settle, run_graph, function):
    x = wide(3, 4)
    captured = placed("", function(lambda m, x: x @ x.t()), x, activation=CLIPPING)
    _, whole = run_graph(captured)
    assert settle(captured, MASK) == 2
    assert torch.equal(run_graph(captured)[1], torch.where(inside(x.detach()), whole, 0.0))


def test_the_mask_is_computed_in_forward(placed, apply):
    captured = placed(CLIPPING, nn.Linear(4, 3), leaf(2, 4))
    apply(captured, MASK)
    masks = captured.module.graph.find_nodes(op="call_function", target=ops.IN_RANGE)
    assert [is_backward(mask) for mask in masks] == [False, False]


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("int4:max:tensor:nearest:clip", 2),
        ("uint4:fit:tensor:nearest:clip", 2),  # negative values clip
        ("uint4:real:tensor:nearest:clip", 2),
        ("int4:max:tensor:nearest:pass", 0),
        ("int4:fit:tensor:nearest:clip", 0),
        ("int4:real:tensor:nearest:clip", 0),
        ("affine4:real:tensor:nearest:clip", 0),
    ],
)
def test_fires_only_where_a_format_clips_and_the_spec_asks(spec, count, placed, settle):
    captured = placed(spec, nn.Linear(4, 3), leaf(2, 4))
    before = graph_text(captured.module)
    assert settle(captured, MASK) == count
    assert (graph_text(captured.module) == before) is (count == 0)


@pytest.mark.parametrize("role", ["gradient", "weight", "activation"])
def test_a_role_in_float_is_not_masked(role, placed, settle):
    captured = placed("", nn.Linear(4, 3), leaf(2, 4), **{role: CLIPPING})
    assert settle(captured, MASK) == (0 if role == "gradient" else 1)


def test_an_operand_without_a_legal_block_is_neither_quantized_nor_masked(joint, run_graph, same_bits, rules):
    captured = joint(nn.Linear(4, 3), wide(2, 4))
    outputs = run_graph(captured)
    recipe = Recipe(name="illegal", rules=rules("int4:max:each:nearest:clip"))
    joint_pipeline(recipe)(captured.module)
    assert same_bits(run_graph(captured), outputs)


def test_does_not_fire_without_quantizers(joint, apply, settle):
    captured = joint(nn.Linear(4, 3), leaf(2, 4))
    apply(captured, SplitConvolutionBackward(), AnnotateRoles(), PlaceQuantizers())
    before = graph_text(captured.module)
    assert settle(captured, MASK) == 0
    assert graph_text(captured.module) == before


def test_an_unused_gradient_has_no_mask(placed, apply):
    captured = placed(CLIPPING, nn.Conv2d(2, 3, 2), torch.randn(2, 2, 3, 3))
    assert apply(captured, MASK) == [1]
    (where,) = captured.module.graph.find_nodes(op="call_function", target=aten.where.ScalarOther)
    assert where.args[0].args[0].name == "primals_1"
