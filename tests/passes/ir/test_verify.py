"""verify: every kind of broken graph is refused, by the rule that is meant for it."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from qcompiler import recipes
from qcompiler.compiler import torch_compat
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.passes.ir.checker import list_changed, list_state
from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.meta import get_contraction, get_value, iterate_contractions, set_fact
from qcompiler.passes.ir.quantizer import list_dequantizers, list_quantizers
from qcompiler.passes.ir.verify import VerifyError, find_affected, verify_graph, verify_saved
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops

SPEC = "int8:fit:b2c2o2i2:nearest:pass"


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


@dataclasses.dataclass
class Parts:
    """A legal graph of one linear layer, and the nodes that the tests break."""

    product: torch.fx.Node  # X·Wᵀ of forward
    gradient: torch.fx.Node  # the input gradient G·W
    floats: torch.fx.Node  # X, dequantized for the product
    codes: torch.fx.Node
    scale: torch.fx.Node
    other: torch.fx.Node  # Wᵀ, dequantized for the product

    @classmethod
    def of(cls, module):
        by_gradient = {fact.gradient_of: node for node, fact in iterate_contractions(module.graph)}
        product = by_gradient[None]
        floats, other = product.args[:2]
        return cls(product, by_gradient[0], floats, floats.args[0], floats.args[1], other)


def change(node, **arguments):
    """Sets arguments by their position: change(node, a4='int8')."""
    for name, new in arguments.items():
        node.update_arg(int(name[1:]), new)


def transposed(node, reader):
    return insert_call(node.graph, aten.t.default, (node,), before=reader)


def with_value(node, tensor):
    node.meta["val"] = tensor


def with_layout(node, layout):
    fact = get_contraction(node)
    first, *rest = fact.operands
    set_fact(node, dataclasses.replace(fact, operands=(dataclasses.replace(first, layout=layout), *rest)))


#: what is broken → (how, the complaint)
BROKEN = {
    "no value": (lambda p: p.product.meta.pop("val"), "mm: no value inferred for aten.mm.default"),
    "no spec": (lambda p: change(p.codes, a4="int8"), "quantize: spec: got 'int8'; valid: format:scale:block"),
    "another text of the spec": (
        lambda p: change(p.codes, a4="int8:fit:c2b2o2i2:nearest:pass"),
        f"quantize: spec 'int8:fit:c2b2o2i2:nearest:pass' is not canonical; valid: '{SPEC}'",
    ),
    "layout of another rank": (lambda p: change(p.codes, a5="b"), "quantize: layout: got 'b' for 2 dimensions"),
    "layout with a gap": (lambda p: change(p.codes, a5="x!"), "quantize: layout: got 'x!' for 2 dimensions"),
    "codes quantized": (
        lambda p: change(p.codes, a0=p.other.args[0]),
        "quantize: quantizes quantize_1 of torch.int8; valid: a floating tensor",
    ),
    "quantized twice": (
        lambda p: change(p.codes, a0=p.other),
        "quantize: quantizes dequantize_1, which codes were turned back into: a second quantization of one tensor",
    ),
    "quantized twice, a view between": (
        lambda p: change(p.codes, a0=transposed(p.other, p.product)),
        "quantize: quantizes t_5, which codes were turned back into",
    ),
    "a number for a scale": (lambda p: change(p.codes, a1=1.0), "quantize: scale 1.0 is not a node"),
    "the scale of another tensor": (
        lambda p: change(p.codes, a1=p.other.args[1]),
        "quantize: its scale scale_1 belongs to another tensor, spec or layout",
    ),
    "a scale of another spec": (
        lambda p: change(p.scale, a1="int4:fit:b2c2o2i2:nearest:pass"),
        "quantize: its scale scale belongs to another tensor, spec or layout",
    ),
    "a scale of another layout": (
        lambda p: change(p.scale, a2="cb"),
        "quantize: its scale scale belongs to another tensor, spec or layout",
    ),
    "a tensor for a scale": (
        lambda p: change(p.codes, a1=transposed(p.codes.args[0], p.codes)),
        "quantize: its scale t_5 belongs to another tensor",
    ),
    "a zero point too many": (
        lambda p: change(p.codes, a2=p.scale),
        f"quantize: spec {SPEC} has no zero point",
    ),
    "a key too many": (lambda p: change(p.codes, a3=p.scale), f"quantize: spec {SPEC} has no use for a random key"),
    "codes of another type": (
        lambda p: with_value(p.codes, get_value(p.codes).to(torch.int16)),
        "quantize: codes are torch.int16; valid: torch.int8",
    ),
    "floats dequantized": (
        lambda p: change(p.floats, a0=transposed(p.codes.args[0], p.product)),
        "dequantize: dequantizes t_5, which is no quantize node",
    ),
    "codes of another scale": (
        lambda p: change(p.floats, a1=p.other.args[1]),
        "dequantize: scale, zero point, spec or layout differ from those of its codes quantize",
    ),
    "codes with a zero point of their own": (
        lambda p: change(p.floats, a2=p.scale),
        "dequantize: scale, zero point, spec or layout differ",
    ),
    "codes of another spec": (
        lambda p: change(p.floats, a3="int8:max:b2c2o2i2:nearest:pass"),
        "dequantize: scale, zero point, spec or layout differ",
    ),
    "codes of another layout": (
        lambda p: change(p.floats, a4="cb"),
        "dequantize: scale, zero point, spec or layout differ",
    ),
    "a scale of another shape": (
        lambda p: with_value(p.scale, get_value(p.scale)[:1]),
        "dequantize: scale is torch.uint8 [1, 2]; valid: torch.uint8 [2, 2]",
    ),
    "a scale of another type": (
        lambda p: with_value(p.scale, get_value(p.scale).float()),
        "dequantize: scale is torch.float32 [2, 2]; valid: torch.uint8 [2, 2]",
    ),
    "floats of forward read in backward": (
        lambda p: change(p.gradient, a1=p.floats),
        "dequantize: mm_2 reads it in backward; valid: a dequantize of its own, pinned to backward",
    ),
    "a view of them read in backward": (
        lambda p: change(p.gradient, a1=transposed(p.floats, p.gradient.prev)),
        "dequantize: t_5 reads it in backward",
    ),
    "an input of the name of another node": (
        lambda p: rename_input(p.codes),
        "primals_1: input of the name quantize, which is another node; valid: its own",
    ),
    "an operand of another rank": (
        lambda p: with_layout(p.product, "gbc"),
        "mm: layout 'gbc' for 2 dimensions of dequantize",
    ),
}


def rename_input(node):
    """Give the first input the name of a node that is no input."""
    next(iter(node.graph.find_nodes(op="placeholder"))).target = node.name


@pytest.mark.parametrize("name", BROKEN)
def test_refuses(name, placed):
    how, complaint = BROKEN[name]
    captured = placed(SPEC, nn.Linear(4, 3, bias=False), leaf(4, 4))
    verify_graph(captured.module)
    how(Parts.of(captured.module))
    with pytest.raises(VerifyError, match=f"^{re.escape(complaint)}"):
        verify_graph(captured.module)


@pytest.mark.parametrize("name", BROKEN)
def test_the_rules_around_what_changed_refuse_the_same(name, placed):
    how, complaint = BROKEN[name]
    module = placed(SPEC, nn.Linear(4, 3, bias=False), leaf(4, 4)).module
    before = list_state(module.graph)
    how(Parts.of(module))
    affected = find_affected(list_changed(list_state(module.graph), before))
    with pytest.raises(VerifyError, match=f"^{re.escape(complaint)}"):
        verify_graph(module, affected)


def test_rules_of_other_layers_are_not_checked_again(placed):
    module = placed(SPEC, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), leaf(4, 4)).module
    before = list_state(module.graph)
    assert list_changed(before, before) == []
    quantizers = list_quantizers(module.graph)
    quantizers[0].codes.update_arg(4, "int8")
    affected = find_affected(list_changed(list_state(module.graph), before))
    assert quantizers[0].codes in affected
    assert 0 < sum(one.codes in affected for one in quantizers) < len(quantizers) / 2


@pytest.mark.parametrize(
    ("spec", "argument", "complaint"),
    [
        ("affine8:real:tensor:nearest:pass", 2, "needs a zero point"),
        ("int8:fit:tensor:stochastic:pass", 3, "needs a random key"),
    ],
)
def test_refuses_what_is_missing(spec, argument, complaint, placed):
    captured = placed(spec, nn.Linear(4, 3), leaf(2, 4))
    verify_graph(captured.module)
    next(one.codes for one in list_quantizers(captured.module.graph)).update_arg(argument, None)
    with pytest.raises(VerifyError, match=f"^quantize.*: spec {spec} {complaint}$"):
        verify_graph(captured.module)


def test_an_operator_without_a_result_needs_no_value(joint):
    """F.one_hot checks its classes by one."""
    captured = joint(
        lambda x: x * nn.functional.one_hot(x.argmax(-1), num_classes=4), torch.randn(3, 4, requires_grad=True)
    )
    targets = [node.target for node in captured.module.graph.nodes]
    assert aten._assert_async.msg in targets
    verify_graph(captured.module)


def test_a_graph_without_quantizers_is_legal(joint):
    verify_graph(joint(nn.Linear(4, 3), leaf(2, 4)).module)


@pytest.fixture
def halves(joint):
    """halves(recipe, model, *inputs) → (forward, backward, what forward saves), after all passes."""

    def make(recipe, model, *inputs):
        captured = joint(model, *inputs)
        joint_pipeline(recipes.get(recipe))(captured.module)
        first, second = torch_compat.split_joint(captured.module, captured.forward_outputs, captured.static_inputs)
        return first, second, list(first.graph.output_node().args[0])[captured.forward_outputs :]

    return make


def network():
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


@pytest.mark.parametrize("recipe", ["hyperblock-int8", "channelwise-int4", "tensor-int4"])
def test_both_halves_are_legal_and_save_no_floats(recipe, halves):
    first, second, saved = halves(recipe, network(), leaf(4, 4, 6, 6))
    verify_graph(first)
    verify_graph(second)
    verify_saved(first, saved)
    made = [node for node in saved if node.op != "placeholder"]
    assert made
    assert {get_value(node).dtype for node in made} <= {torch.uint8, torch.int8, torch.int32}  # int32: the random key


def test_a_half_is_verified_like_a_whole(halves):
    _, second, _ = halves("hyperblock-int8", network(), leaf(4, 4, 6, 6))
    floats = next(
        node for node in [one.floats for one in list_dequantizers(second.graph)] if node.args[0].op == "placeholder"
    )
    scale = floats.args[1]
    scale.meta["val"] = get_value(scale).float()
    with pytest.raises(VerifyError, match=rf"^{floats.name}: scale is torch.float32 .*; valid: torch.uint8"):
        verify_graph(second)


@pytest.mark.parametrize("view", [False, True])
def test_a_saved_float_that_codes_would_do_for(view, halves):
    first, _, saved = halves("hyperblock-int8", network(), leaf(4, 4, 6, 6))
    floats = next(one.floats for one in list_dequantizers(first.graph))
    if view:
        floats = insert_call(first.graph, aten.clone.default, (floats,), after=floats)
    with pytest.raises(
        VerifyError, match=f"^{floats.name}: saved for backward as torch.float32, but its codes would do$"
    ):
        verify_saved(first, [*saved, floats])


def test_saved_codes_that_were_unpacked(placed):
    captured = placed(SPEC, nn.Linear(4, 3, bias=False), leaf(2, 4))
    codes = next(one.codes for one in list_quantizers(captured.module.graph))
    packed = insert_call(codes.graph, ops.PACK, (codes, 4), after=codes)
    whole = insert_call(codes.graph, ops.UNPACK, (packed, [*get_value(codes).shape], 4, True), after=packed)
    verify_saved(captured.module, [codes, codes.args[1], packed])
    with pytest.raises(VerifyError, match=r"^unpack: saved for backward as torch.int\d+, but its codes would do$"):
        verify_saved(captured.module, [whole])
