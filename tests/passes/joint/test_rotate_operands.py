"""rotate-operands: the same product, other numbers in front of the quantizers."""

import math

import pytest
import torch
from torch import nn

from qcompiler.compiler.plan import QuantPlan
from qcompiler.passes.ir.meta import iterate_contractions
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.joint.rotate_operands import RotateOperands
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward
from qcompiler.passes.rules import Product, Role, Rule
from qcompiler.runtime import ops, references
from qcompiler.runtime.spec import parse_spec

INT8 = parse_spec("int8:fit:c*b*:nearest:pass")


def rules(size=8, other=None):
    """Both operands of the weight gradient turned by `size`; the activation by another one."""
    wgrad = Product.WEIGHT_GRADIENT
    return (
        Rule(spec=INT8, role=Role.ACTIVATION, product=wgrad, rotate=size if other is None else other),
        Rule(spec=INT8, role=Role.GRADIENT, product=wgrad, rotate=size),
    )


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


@pytest.fixture
def annotated(joint, apply):
    """annotated(model, *inputs) → its joint graph with roles."""

    def make(model, *inputs):
        captured = joint(model, *inputs)
        apply(captured, SplitConvolutionBackward(), AnnotateRoles())
        return captured

    return make


def count(captured):
    return len(captured.module.graph.find_nodes(op="call_function", target=ops.ROTATE))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Linear(4, 3, bias=False), (leaf(16, 4),)),
        (nn.Linear(4, 3, bias=False), (leaf(2, 8, 4),)),
        (nn.Conv2d(2, 3, 3, bias=False), (leaf(8, 2, 5, 5),)),
        (nn.ConvTranspose1d(2, 4, 3, bias=False), (leaf(8, 2, 6),)),
    ],
    ids=["linear", "tokens", "convolution", "transposed"],
)
def test_the_product_stays(annotated, settle, run_graph, model, inputs):
    captured = annotated(model, *inputs)
    before = run_graph(captured)
    assert settle(captured, RotateOperands(rules())) == 1
    assert count(captured) == 2
    for old, new in zip(before, run_graph(captured), strict=True):
        # the terms of each sum are mixed by a matrix whose float32 entries 1/√8 are 2^−25 off, relatively, and each
        # mixed term is a sum of 8: error below (8 + 3) roundings of 2^−24, of sums of at most 8·25 terms of size 3²
        if old is not None:
            assert torch.allclose(old, new, rtol=0, atol=11 * 2.0**-24 * 200 * 9)


@pytest.mark.parametrize("size", [1, 2, 4, 16, 32])
def test_rotation_is_orthogonal_with_entries_of_one_size(size):
    rotation = references.rotate(torch.eye(size), 1, size).double()
    assert torch.allclose(rotation.abs(), torch.full_like(rotation, 1 / math.sqrt(size)), rtol=2.0**-23)
    # a sum of `size` products, each off by two roundings of 1/√size
    assert torch.allclose(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), atol=size * 2.0**-23)


def test_rotation_runs_along_one_dimension_block_by_block():
    x = torch.randn(3, 16, 5)
    by_hand = torch.stack(
        [references.rotate(x[:, :8].transpose(1, 2), 2, 8), references.rotate(x[:, 8:].transpose(1, 2), 2, 8)]
    )
    turned = references.rotate(x, 1, 8)
    assert torch.equal(turned[:, :8], by_hand[0].transpose(1, 2))
    assert torch.equal(turned[:, 8:], by_hand[1].transpose(1, 2))
    assert references.rotate(x.bfloat16(), 1, 8).dtype is torch.bfloat16


def test_an_outlier_is_spread():
    x = torch.zeros(16)
    x[3] = 16.0
    assert set(references.rotate(x, 0, 16).abs().tolist()) == {4.0}


def test_quantizers_read_the_turned_operands(annotated, apply):
    captured = annotated(nn.Linear(4, 3, bias=False), leaf(16, 4))
    apply(captured, RotateOperands(rules()), PlaceQuantizers(rules()))
    wgrad = [(n, f) for n, f in iterate_contractions(captured.module.graph) if f.product is Product.WEIGHT_GRADIENT]
    ((node, fact),) = wgrad
    for operand in fact.operands:
        assert node.args[operand.arg].args[0].args[0].target is ops.ROTATE


@pytest.mark.parametrize(
    ("given", "shape", "remarks"),
    [
        (rules(0), (16, 4), 0),
        ((), (16, 4), 0),
        (rules(8, other=4), (16, 4), 2),  # two sizes
        (rules(8, other=0), (16, 4), 2),
        (rules(8), (12, 4), 2),  # 8 does not divide 12
    ],
)
def test_does_not_fire(annotated, settle, given, shape, remarks):
    captured = annotated(nn.Linear(4, 3, bias=False), leaf(*shape))
    before = graph_text(captured.module)
    assert settle(captured, RotateOperands(given)) == 0
    assert graph_text(captured.module) == before
    assert len([note for note in QuantPlan.of(captured.module).notes if "not rotated" in note]) == remarks
