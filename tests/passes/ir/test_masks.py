"""Attention masks: the quantizer of an output stands in front of them, and sums with them are no residual sums."""

import pytest
import torch
from torch import nn

from qcompiler.passes.ir.layers import residual_sums
from qcompiler.passes.ir.masks import adds_mask
from qcompiler.passes.ir.meta import get_value, iterate_contractions
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.rules import ADDITION, Behind, Role, Rule, Sign
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

SPEC = parse_spec("int8:fit:tensor:nearest:pass")
OUTPUTS = (Rule(spec=SPEC, role=Role.OUTPUT),)
INF = float("-inf")


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def calls(captured, target):
    return list(captured.module.graph.find_nodes(op="call_function", target=target))


@pytest.fixture
def annotated(joint, apply):
    """annotated(model, *inputs) → the graph after annotate-roles."""

    def make(model, *inputs):
        captured = joint(model, *inputs)
        apply(captured, AnnotateRoles())
        return captured

    return make


def masked(beta=1, alpha=1):
    return lambda m, q, k: torch.baddbmm(m, q, k, beta=beta, alpha=alpha)


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 1), (1, 0.25), (0, 2)])
def test_the_split_gives_the_numbers_of_the_whole(beta, alpha, annotated, settle, run_graph):
    """With a format of 16 bits; each of 4 products of the sums is off by at most half a step of 2⁻¹⁴ of the range."""
    mask = torch.zeros(2, 3, 3).masked_fill(torch.eye(3).bool(), INF)
    captured = annotated(masked(beta, alpha), mask, leaf(2, 3, 4), leaf(2, 4, 3))
    whole = run_graph(captured)
    fine = Rule(spec=parse_spec("int16:fit:tensor:nearest:pass"), role=Role.OUTPUT)
    assert settle(captured, PlaceQuantizers((fine,))) == 1
    assert calls(captured, aten.baddbmm.default) == []
    after = run_graph(captured)
    assert torch.equal(after[0].isneginf(), whole[0].isneginf())
    finite = whole[0].isfinite()
    torch.testing.assert_close(after[0][finite], whole[0][finite], atol=1e-3, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(after[1:], whole[1:], strict=True) if a is not None)


def test_the_quantizer_reads_the_contraction_alone(annotated, settle):
    captured = annotated(masked(), torch.zeros(2, 3, 3), leaf(2, 3, 4), leaf(2, 4, 3))
    (before,) = [
        fact for node, fact in iterate_contractions(captured.module.graph) if node.target is aten.baddbmm.default
    ]
    settle(captured, PlaceQuantizers(OUTPUTS))
    (codes,) = calls(captured, ops.QUANTIZE)
    assert codes.args[0].target is aten.bmm.default
    (after,) = [fact for node, fact in iterate_contractions(captured.module.graph) if node is codes.args[0]]
    assert after.site == before.site
    assert [operand.arg for operand in after.operands] == [0, 1]
    (total,) = calls(captured, aten.add.Tensor)
    assert total.args[0].target is ops.DEQUANTIZE
    assert get_value(total).shape == (2, 3, 3)


def test_does_not_fire_without_a_quantized_output(annotated, settle):
    captured = annotated(masked(), torch.zeros(2, 3, 3), leaf(2, 3, 4), leaf(2, 4, 3))
    before = graph_text(captured.module)
    assert settle(captured, PlaceQuantizers((Rule(spec=None),))) == 0
    assert graph_text(captured.module) == before


class Addends(nn.Module):
    """A layer with a bias of each kind: a parameter, a view of one, a buffer, and what depends on the input."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
        self.register_buffer("mask", torch.zeros(5, 3))

    def forward(self, x):
        addend = {
            "parameter": self.bias,
            "view": self.bias.expand(5, 3),
            "scaled by a buffer": self.bias * self.mask[0],
            "buffer": self.mask,
            "input": x[:, :3],
        }
        return torch.addmm(addend[self.kind], x, self.weight)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("parameter", False), ("view", False), ("scaled by a buffer", False), ("buffer", True), ("input", True)],
)
def test_a_bias_belongs_to_the_layer(kind, expected, annotated):
    (node,) = calls(annotated(Addends(kind), leaf(5, 4)), aten.addmm.default)
    assert adds_mask(node) == expected


def test_a_relu_behind_a_mask_is_no_part_of_the_layer(annotated, settle):
    """The contraction alone can be negative: a rule for outputs that cannot does not match."""
    rules = (Rule(spec=SPEC, role=Role.OUTPUT, sign=Sign.NONNEGATIVE, behind=Behind.LAYER),)
    model = lambda m, q, k: torch.baddbmm(m, q, k).relu()  # noqa: E731
    assert settle(annotated(model, torch.zeros(2, 3, 3), leaf(2, 3, 4), leaf(2, 4, 3)), PlaceQuantizers(rules)) == 0


def scores(q, k):
    return q @ k.transpose(1, 2)


#: name → (model of q [2, 3, 4], k [2, 3, 4] and a floating mask [2, 3, 3], whether it has a residual sum)
SUMS = {
    "in front of softmax": (lambda q, k, m: (scores(q, k) + m).softmax(-1), False),
    "two masks": (lambda q, k, m: (scores(q, k) + m + m.sin()).softmax(-1), False),
    "scaled, capped and filled": (
        lambda q, k, m: ((scores(q, k) + m) / 2).tanh().masked_fill(m < 0, INF).unsqueeze(0).softmax(-1),
        False,
    ),
    "log softmax": (lambda q, k, m: (scores(q, k) + m).log_softmax(-1), False),
    "a mask as an output": (lambda q, k, m: scores(q, k) + m, False),
    "truth values": (lambda q, k, m: (scores(q, k) + (q @ k.transpose(1, 2) > 0).float()).sin(), False),
    "whole numbers": (lambda q, k, m: (scores(q, k) + (1 - m.int()).float() * -1e9).sin(), False),
    "a shortcut": (lambda q, k, m: q + scores(q, k) @ k, True),
    "a shortcut in front of softmax and a layer": (
        lambda q, k, m: (y := q + scores(q, k) @ k).softmax(-1) + scores(y, k) @ k,
        True,
    ),
    "two contractions": (lambda q, k, m: scores(q, k) + scores(k, q), True),
}


@pytest.mark.parametrize("name", SUMS)
def test_residual_sums(name, annotated):
    model, expected = SUMS[name]
    captured = annotated(model, leaf(2, 3, 4), leaf(2, 3, 4), torch.zeros(2, 3, 3))
    assert bool(list(residual_sums(captured.module.graph))) == expected


def test_an_input_image_plus_its_convolution_is_a_residual_sum(annotated):
    conv = nn.Conv2d(3, 3, 3, padding=1)
    assert list(residual_sums(annotated(lambda x: x + conv(x), leaf(1, 3, 4, 4)).module.graph))


def test_sums_are_not_quantized_in_front_of_softmax(annotated, settle):
    rules = (Rule(spec=SPEC, role=Role.OUTPUT, operator=ADDITION),)
    model = SUMS["in front of softmax"][0]
    captured = annotated(model, leaf(2, 3, 4), leaf(2, 3, 4), torch.zeros(2, 3, 3))
    assert settle(captured, PlaceQuantizers(rules)) == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_outputs_that_are_not_floating_stay(dtype, annotated, settle):
    captured = annotated(lambda x: torch.bmm(x.to(dtype), x.to(dtype)).abs(), leaf(2, 3, 3))
    assert settle(captured, PlaceQuantizers(OUTPUTS)) == 0
    kept = [o.kept for node, fact in iterate_contractions(captured.module.graph) for o in fact.operands] + [
        fact.kept for _, fact in iterate_contractions(captured.module.graph) if not fact.operands
    ]
    assert kept
    assert all(reason.startswith(f"nothing to quantize: {dtype}") for reason in kept)
