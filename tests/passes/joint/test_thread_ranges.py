"""thread-ranges: the state of a range comes in and goes out, and readers still see what is not finite."""

import itertools

import pytest
import torch
from torch import nn
from torch.fx import Interpreter

from qcompiler.compiler import torch_compat
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import get_input, get_value, is_backward
from qcompiler.passes.ir.quantizer import list_dequantizers, list_quantizers
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.verify import VerifyError, verify_graph
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.dedupe_quantizers import DedupeQuantizers
from qcompiler.passes.joint.hoist_views import HoistViews
from qcompiler.passes.joint.place_quantizers import PlaceQuantizers
from qcompiler.passes.joint.split_convolution_backward import SplitConvolutionBackward
from qcompiler.passes.joint.thread_ranges import ThreadRanges
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops

PAST = "int8:real:tensor:nearest:pass:hindsight(0.75,1)"
PRESENT = "int8:real:tensor:nearest:pass"
THREAD = ThreadRanges()
#: one quantizer a tensor
PREPARE = (HoistViews(), DedupeQuantizers())


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


def states(captured, *, backward=None):
    """Placeholders of states, in graph order."""
    nodes = captured.module.graph.find_nodes(op="placeholder")
    found = [node for node in nodes if (fact := get_input(node)) is not None and fact.kind is InputKind.STATE]
    return [node for node in found if backward is None or is_backward(node) == backward]


def names(nodes):
    return [get_input(node).name for node in nodes]


def run(captured, *given):
    """The outputs of a threaded graph: its inputs, tangents of seed 1, and `given` states in graph order."""
    inputs = [*captured.module.meta["inputs"]]
    torch.manual_seed(1)
    tangents = [
        torch.randn(get_value(node).shape)
        for node in captured.module.graph.find_nodes(op="placeholder")[len(inputs) :]
        if get_input(node).kind is InputKind.TANGENT
    ]
    with torch.no_grad():
        return [*Interpreter(captured.module).run(*inputs, *tangents, *given, enable_io_processing=False)]


def test_golden_thread(placed, apply, settle, golden):
    captured = placed("", nn.Linear(4, 3, bias=False), torch.randn(2, 4), activation=PAST, gradient=PAST)
    apply(captured, *PREPARE)
    before = graph_text(captured.module)
    assert settle(captured, THREAD) == 2
    golden(before=before, after=graph_text(captured.module))


@pytest.mark.parametrize("spec", [PAST, "affine8:real:tensor:nearest:pass:running(0.75)"])
def test_values_and_states_follow_from_the_states(spec, placed, apply, settle):
    """Every tensor is quantized by the state that came in, and what goes out is `update` of tensor and state."""
    x, model = torch.randn(5, 4), nn.Linear(4, 3, bias=False)
    captured = placed(spec, model, x)
    apply(captured, *PREPARE)
    count = len(captured.module.graph.output_node().args[0])
    assert settle(captured, THREAD) == 3
    found = states(captured)
    assert sorted(names(found)) == ["(root)/grad", "(root)/input", "(root)/weight"]
    given = [torch.full(get_value(node).shape, 1.5) * torch.tensor([-1.0, 1, 0][: get_value(node).shape[0]]).view(-1, 1)
             for node in found]  # fmt: skip
    results = run(captured, *given)
    torch.manual_seed(1)
    tensors = {"(root)/input": x, "(root)/weight": model.weight.detach(), "(root)/grad": torch.randn(5, 3)}

    def quantized(tensor, state):
        scale = ops.SCALE(tensor, spec, "bc", state, False)
        point = ops.ZERO_POINT(tensor, scale, spec, "bc", state, False) if spec.startswith("affine") else None
        codes = ops.QUANTIZE(tensor, scale, point, None, spec, "bc", "")
        return ops.DEQUANTIZE(codes, scale, point, spec, "bc", torch.float32)

    by_name = {name: (tensors[name], state) for name, state in zip(names(found), given, strict=True)}
    qx, qw, qg = (quantized(*by_name[f"(root)/{name}"]) for name in ("input", "weight", "grad"))
    assert torch.equal(results[0], qx @ qw.t())
    assert torch.equal(results[1 + names(captured_inputs(captured)).index("weight")], (qx.t() @ qg).t())
    for name, after in zip(names(found), results[count:], strict=True):
        tensor, state = by_name[name]
        assert torch.equal(after, ops.UPDATE(tensor, state, spec, "bc", False))
        assert not torch.equal(after, state)


def captured_inputs(captured):
    return captured.module.graph.find_nodes(op="placeholder")[: len(captured.inputs)]


def test_fires_once_a_quantizer_that_looks_back(placed, apply, settle):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    captured = placed("", model, leaf(2, 4), activation=PAST, gradient=PRESENT, weight=PAST)
    apply(captured, *PREPARE)
    assert settle(captured, THREAD) == 4
    assert sorted(names(states(captured))) == ["0/input", "0/weight", "2/input", "2/weight"]


@pytest.mark.parametrize("estimator", ["", ":percentile(99)"])
def test_does_not_fire_on_ranges_of_the_present(estimator, placed, settle):
    captured = placed(PRESENT + estimator, nn.Linear(4, 3), leaf(2, 4))
    before = graph_text(captured.module)
    assert settle(captured, THREAD) == 0
    assert graph_text(captured.module) == before


def shows_what_is_not_finite(floats):
    """In the half of its codes by the tensor beside them, in the other by a checked scale."""
    codes = floats.args[0]
    if is_backward(floats) == is_backward(codes):
        return floats.args[6] is codes.args[0]
    return floats.args[1].target is ops.CHECKED and len(floats.args) == 6


def saved_readers(captured):
    """The dequantizes of backward whose codes are of forward."""
    return [
        floats
        for floats in [one.floats for one in list_dequantizers(captured.module.graph)]
        if is_backward(floats) and not is_backward(floats.args[0])
    ]


def test_a_fixed_range_has_no_state_but_is_checked(placed, apply, settle):
    captured = placed(f"{PRESENT}:fixed(-2,2)", nn.Linear(4, 3, bias=False), leaf(2, 4))
    apply(captured, *PREPARE)
    assert settle(captured, THREAD) == 3
    assert states(captured) == []
    assert all(map(shows_what_is_not_finite, [one.floats for one in list_dequantizers(captured.module.graph)]))


def test_states_of_forward_and_of_gradients_end_in_their_halves(joint, rules):
    captured = joint(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), leaf(2, 4))
    joint_pipeline(Recipe(name="past", rules=rules(PAST)))(captured.module)
    forward, backward = (names(states(captured, backward=half)) for half in (False, True))
    assert sorted(forward) == ["0/input", "0/weight", "2/input", "2/weight"]
    assert sorted(backward) == ["0/grad", "2/grad"]
    outputs = list(captured.module.graph.output_node().args[0])
    after = [node for node in outputs if node is not None and node.target is ops.UPDATE]
    assert [get_input(node.args[1]).name for node in after] == names(states(captured))
    split = [node for node in after if not is_backward(node)]
    grads = outputs[captured.forward_outputs : captured.forward_outputs + len(captured.inputs)]
    order = [*outputs[: captured.forward_outputs], *split, *grads, *(node for node in after if is_backward(node))]
    captured.module.graph.output_node().args = (tuple(order),)
    captured.module.graph.output_node().meta.pop("desc", None)
    first, second = torch_compat.split_joint(
        captured.module, captured.forward_outputs + len(split), captured.static_inputs
    )
    for half, expected in ((first, forward), (second, backward)):
        facts = [get_input(node) for node in half.graph.find_nodes(op="placeholder")]
        assert [fact.name for fact in facts if fact is not None and fact.kind is InputKind.STATE] == expected
        assert len(half.graph.find_nodes(op="call_function", target=ops.UPDATE)) == len(expected)


def test_names_are_unique_and_those_of_readers_in_order(joint, apply, settle, rules):
    """Two quantizers of one name, over one tensor in two layouts: the one that forward reads has the plain name."""
    captured = joint(nn.Linear(4, 3, bias=False), leaf(2, 4))
    # not deduplicated: forward, weight gradient and input gradient have quantizers of their own
    apply(captured, SplitConvolutionBackward(), AnnotateRoles(), PlaceQuantizers(rules(PAST)))
    assert settle(captured, THREAD) == 6
    found = names(states(captured))
    assert sorted(found) == sorted(
        f"(root)/{name}{number}" for name, number in itertools.product(("grad", "input", "weight"), ("", "#2"))
    )
    for codes in [one.codes for one in list_quantizers(captured.module.graph)]:
        name = get_input(codes.args[1].args[3]).name
        forward = not any(is_backward(user) for user in codes.users if user.target is ops.DEQUANTIZE)
        assert name.endswith(("grad", "grad#2")) or forward != name.endswith("#2")


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_graphs_read_states_and_return_none(frozen, placed, apply, settle):
    captured = placed(PAST, nn.Linear(4, 3, bias=False), leaf(2, 4))
    apply(captured, *PREPARE)
    count = len(captured.module.graph.output_node().args[0])
    assert settle(captured, ThreadRanges(frozen)) == 3
    assert len(captured.module.graph.output_node().args[0]) == count + (0 if frozen else 3)
    assert {codes.args[1].args[5] for codes in [one.codes for one in list_quantizers(captured.module.graph)]} == {
        frozen
    }
    assert len(states(captured)) == 3


def test_a_graph_without_backward_returns_no_states(joint, apply, settle, rules):
    with torch.no_grad():
        captured = joint(nn.Linear(4, 3, bias=False), torch.randn(2, 4))
    apply(captured, SplitConvolutionBackward(), AnnotateRoles(), PlaceQuantizers(rules(PAST)))
    assert settle(captured, THREAD) == 2
    assert not captured.module.graph.find_nodes(op="call_function", target=ops.UPDATE)
    assert names(states(captured)) == ["(root)/input", "(root)/weight"]


@pytest.mark.parametrize("spec", [PAST, f"{PRESENT}:fixed(-2,2)"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_readers_see_what_is_not_finite(bad, spec, placed, apply, settle):
    x = torch.randn(5, 4)
    x[2, 1] = bad
    captured = placed("", nn.Linear(4, 3, bias=False), x, activation=spec)
    apply(captured, *PREPARE)
    assert settle(captured, THREAD) == 1
    given = [torch.tensor([-2.0, 2.0, 0.0]).view(3, 1)] if spec == PAST else []
    y, dw, _, *after = run(captured, *given)
    assert y.isnan().all(1).tolist() == [False, False, True, False, False]  # as in float: the sample that holds it
    assert dw.isnan().all()
    assert all(torch.equal(new, old) for new, old in zip(after, given, strict=True))


def test_every_scale_of_a_state_is_that_of_its_codes(placed, apply, settle):
    captured = placed(PAST, nn.Linear(4, 3), leaf(2, 4))
    apply(captured, *PREPARE)
    settle(captured, THREAD)
    floats = [one.floats for one in list_dequantizers(captured.module.graph)]
    assert floats
    for node in floats:
        assert shows_what_is_not_finite(node)
    for node in saved_readers(captured):
        assert node.args[1].args[0] is node.args[0].args[1]


def test_verify_refuses_the_checked_scale_of_other_codes(placed, apply):
    captured = placed(PAST, nn.Linear(4, 3, bias=False), leaf(2, 4))
    apply(captured, *PREPARE, THREAD)
    verify_graph(captured.module)
    one, other = saved_readers(captured)[:2]
    assert one.args[0] is not other.args[0]
    one.args[1].update_arg(0, other.args[1].args[0])
    with pytest.raises(VerifyError, match="scale, zero point, spec or layout differ from those of its codes"):
        verify_graph(captured.module)


def test_verify_refuses_a_scale_checked_for_another_tensor(placed, apply):
    captured = placed(PAST, nn.Linear(4, 3, bias=False), leaf(2, 4))
    apply(captured, *PREPARE, THREAD)
    one, other = saved_readers(captured)[:2]
    one.args[1].update_arg(1, other.args[0].args[0])
    with pytest.raises(VerifyError, match="checks another tensor, spec or layout"):
        verify_graph(captured.module)


def test_verify_refuses_another_tensor_beside_the_codes(placed, apply):
    captured = placed(PAST, nn.Linear(4, 3, bias=False), leaf(2, 4))
    apply(captured, *PREPARE, THREAD)
    one, other = [
        floats for floats in [one.floats for one in list_dequantizers(captured.module.graph)] if len(floats.args) > 6
    ][:2]
    one.update_arg(6, other.args[6])
    with pytest.raises(VerifyError, match="which is not the tensor of its codes"):
        verify_graph(captured.module)
