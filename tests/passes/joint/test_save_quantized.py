"""save-quantized: codes, scales and bits for backward, and how many bytes autograd really keeps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qcompiler
from qcompiler.passes.ir.meta import is_backward, is_pinned_saved
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.dedupe_quantizers import DedupeQuantizers
from qcompiler.passes.joint.hoist_views import HoistViews
from qcompiler.passes.joint.mask_gradients import MaskGradients
from qcompiler.passes.joint.save_quantized import SaveQuantized
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops

SAVE, PINNED_SAVE = SaveQuantized(), SaveQuantized(pinned=True)  # PINNED_SAVE: also of what is kept in float
EIGHT, FOUR = "int8:fit:b2c2o2i2:nearest:pass", "int4:fit:b2c2o2i2:nearest:pass"

#: spec → how many tensors are packed
PINNED = [(EIGHT, 0), (FOUR, 4), ("int5:fit:tensor:nearest:pass", 0)]
PINNED += [("e4m3:max:tensor:nearest:pass", 0), ("e2m1:real:tensor:nearest:pass", 4)]


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


def convolutions():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2))


@pytest.fixture
def merged(placed, apply):
    """merged(spec, model, *inputs) → the graph as save-quantized gets it."""

    def make(spec, model, *inputs, **roles):
        captured = placed(spec, model, *inputs, **roles)
        apply(captured, MaskGradients(), HoistViews(), DedupeQuantizers())
        return captured

    return make


def nodes(captured, operator):
    return captured.module.graph.find_nodes(op="call_function", target=operator)


def test_golden_save(merged, settle, golden):
    captured = merged("", nn.Sequential(nn.ReLU(), nn.Linear(4, 2, bias=False)), leaf(2, 4), activation=FOUR)
    before = graph_text(captured.module)
    assert settle(captured, SAVE) == 2
    golden(before=before, after=graph_text(captured.module))


@pytest.mark.parametrize(
    "spec",
    [
        EIGHT,
        FOUR,
        "int2:max:b2c2o2i2:nearest:pass",
        "int3:fit:b2c2o2i2:nearest:pass",
        "int16:fit:b2c2o2i2:nearest:pass",
        "uint4:real:b2c2o2i2:nearest:pass",
        "affine4:real:b2c2o2i2:nearest:pass",
        "int4:max:b2c2o2i2:nearest:clip",
        "int4:fit:b2c2o2i2:stochastic:pass",
        "e4m3:fit:b2c2o2i2:nearest:pass",
        "e2m1:two-level:b2c2o2i2:stochastic:clip",
        "e3m0:real:tensor:nearest:pass",
    ],
)
def test_values_do_not_change(spec, merged, settle, run_graph, same_bits):
    captured = merged(spec, convolutions(), leaf(2, 2, 6, 6))
    outputs = run_graph(captured)
    # of each layer X and W, and the relu; with a clip mask on X and W of each layer
    assert settle(captured, SAVE) == (9 if spec.endswith("clip") else 5)
    assert same_bits(run_graph(captured), outputs)


@pytest.mark.parametrize(("spec", "packed"), PINNED)
def test_what_is_pinned(spec, packed, merged, settle):
    captured = merged(spec, convolutions(), leaf(2, 2, 6, 6))
    settle(captured, SAVE)
    forward = [
        codes for codes in [one.codes for one in list_quantizers(captured.module.graph)] if not is_backward(codes)
    ]
    backward = [codes for codes in [one.codes for one in list_quantizers(captured.module.graph)] if is_backward(codes)]
    assert (len(forward), len(backward)) == (4, 2)
    assert all(is_pinned_saved(codes) for codes in forward)
    assert all(is_pinned_saved(codes.args[1]) for codes in forward)
    assert not any(is_pinned_saved(node) for codes in backward for node in (codes, codes.args[1]))
    packs = nodes(captured, ops.PACK)
    assert len(packs) == packed + 1  # and the bits of the relu
    assert not any(is_pinned_saved(node) for node in packs)  # the partitioner takes them, being smaller
    assert {node.meta["partitioner_tag"] for node in nodes(captured, ops.UNPACK)} == {"must_be_in_backward"}


def test_zero_points_are_pinned_with_their_scales(merged, settle):
    captured = merged("", nn.Linear(4, 2, bias=False), torch.randn(2, 4), activation="affine8:real:tensor:nearest:pass")
    assert settle(captured, SAVE) == 1
    (codes,) = [one.codes for one in list_quantizers(captured.module.graph)]
    assert [is_pinned_saved(node) for node in (codes, *codes.args[1:3])] == [True] * 3


@pytest.mark.parametrize(("spec", "packed"), [(spec, min(packed, 1)) for spec, packed in PINNED])
def test_codes_of_what_is_kept_in_float_are_left_to_the_partitioner(spec, packed, merged, settle):
    model = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))  # the gradient of tanh reads its result
    captured = merged("", model, leaf(2, 2, 4), activation=spec)
    assert settle(captured, SAVE) == packed
    (one,) = list_quantizers(captured.module.graph)
    assert not is_pinned_saved(one.codes)
    assert not is_pinned_saved(one.scale)
    captured = merged("", model, leaf(2, 2, 4), activation=spec)
    settle(captured, PINNED_SAVE)
    (one,) = list_quantizers(captured.module.graph)
    assert is_pinned_saved(one.codes)
    assert is_pinned_saved(one.scale)


def test_a_scale_that_depends_on_the_past_is_pinned_in_any_case(merged, settle):
    spec = "affine8:real:tensor:nearest:pass:hindsight(0.9,0.01)"
    captured = merged("", nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), leaf(2, 4), activation=spec)
    settle(captured, SAVE)
    (one,) = list_quantizers(captured.module.graph)
    assert [is_pinned_saved(node) for node in (one.codes, one.scale, one.zero_point)] == [False, True, True]


def test_what_only_forward_reads_is_not_saved(merged, settle):
    captured = merged("", nn.Linear(4, 2, bias=False), torch.randn(2, 4), weight=FOUR)
    before = graph_text(captured.module)
    assert settle(captured, SAVE) == 0
    assert graph_text(captured.module) == before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -0.0])
def test_the_bits_of_relu_are_right_for_special_values(bad, merged, settle, run_graph, same_bits):
    x = torch.randn(4, 4)
    x[1, 2] = bad
    captured = merged(EIGHT, nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), x.requires_grad_())
    outputs = run_graph(captured)
    assert settle(captured, SAVE) == 3
    assert not nodes(captured, aten.threshold_backward.default)
    assert same_bits(run_graph(captured), outputs)


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (lambda m, x: m.fc(x.relu().flatten().view(2, 4)), 2),  # quantized above the views
        (lambda m, x: m.fc(x) * F.threshold(x, 0.25, 0.0), 2),  # this gradient asks the input
        (lambda m, x: m.fc(F.threshold(x, 0.25, 0.0)), 1),  # only the output is quantized
    ],
    ids=["views", "threshold", "threshold of another"],
)
def test_kin_of_relu(forward, count, merged, settle, run_graph, same_bits, function):
    captured = merged("", function(forward, fc=nn.Linear(4, 4)), leaf(2, 4), activation=EIGHT)
    outputs = run_graph(captured)
    assert settle(captured, PINNED_SAVE) == count
    assert len(nodes(captured, ops.PACK)) == count - 1
    assert same_bits(run_graph(captured), outputs)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Softmax(-1)),
        nn.Sequential(nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2)),
    ],
    ids=["last", "before a norm"],
)
def test_relu_keeps_its_output_where_that_is_no_operand(model, merged, settle):
    captured = merged("", model, leaf(2, 4), gradient=EIGHT)
    before = graph_text(captured.module)
    assert settle(captured, SAVE) == 0
    assert graph_text(captured.module) == before
    assert len(nodes(captured, aten.threshold_backward.default)) == 1


def test_does_not_fire_without_backward(settle, merged):
    captured = merged(FOUR, nn.Sequential(nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False), torch.randn(2, 4))
    before = graph_text(captured.module)
    assert len([one.codes for one in list_quantizers(captured.module.graph)]) == 2
    assert settle(captured, SAVE) == 0
    assert graph_text(captured.module) == before


def saved(recipe, model, x):
    """The tensors that autograd keeps for the backward of the model compiled by a recipe."""
    model = qcompiler.compile(model, recipe, backend="eager")
    model(x)  # captures
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        model(x).sum().backward()
    return [*kept.values()]


@pytest.mark.parametrize(("bits", "codes", "both"), [(8, 0.27, 0.30), (4, 0.145, 0.18)])
def test_saved_bytes(bits, codes, both, rules):
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 16),
    )
    x = leaf(4, 16, 8, 8)
    operands, masks = 0, 0
    for layer, inputs in zip(model, (x, *(model[:i](x) for i in range(1, len(model)))), strict=True):
        if isinstance(layer, nn.ReLU):
            masks += inputs.numel() / 8
        elif not isinstance(layer, nn.Flatten):
            operands += 4 * inputs.numel()
    recipe = Recipe(name="saved", rules=rules(f"int{bits}:fit:b4c16o16i16:nearest:pass"))
    alive = {parameter.data_ptr() for parameter in model.parameters()}
    tensors = [tensor for tensor in saved(recipe, model, x) if tensor.data_ptr() not in alive]  # W: quantized again
    total = sum(tensor.nbytes for tensor in tensors)
    assert {tensor.dtype for tensor in tensors} == ({torch.int8, torch.uint8} if bits == 8 else {torch.uint8})
    assert bits / 32 * operands + masks < total <= codes * operands + masks  # codes, scales and one bit for each relu
    assert total <= both * operands


def test_without_rules_floats_are_saved():
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), leaf(2, 2, 6, 6)
    assert {tensor.dtype for tensor in saved("identity", model, x)} == {torch.float32}
