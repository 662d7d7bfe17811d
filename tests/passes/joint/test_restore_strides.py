"""restore-strides: whatever passes do, operators read the strides that they were traced with."""

import dataclasses

import pytest
import torch
from group_norm_strides import AS_TRACED
from torch import nn

from qcompiler import recipes
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.passes.base import Pipeline
from qcompiler.passes.ir.inference import infer_value
from qcompiler.passes.ir.meta import get_value, is_backward
from qcompiler.passes.ir.strides import changed_reads, get_strides, list_arguments, may_read_any, record_strides
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.ir.verify import VerifyError, finish_and_verify, verify_strides
from qcompiler.passes.joint.annotate_roles import AnnotateRoles
from qcompiler.passes.joint.restore_strides import RestoreStrides
from qcompiler.runtime import ops

RESTORE = RestoreStrides()


def norms():
    """The gradient of a group norm, which reads two tensors side by side, behind the gradient of relu."""
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()


def copies(graph):
    return list(graph.find_nodes(op="call_function", target=ops.LAY_OUT))


@pytest.fixture
def drifted(joint):
    """drifted(model, x, recipe) → the graph after all passes but the last."""

    def make(model, x, recipe="hyperblock-int8"):
        captured = joint(model, x)
        passes = joint_pipeline(recipes.get(recipe)).passes
        assert passes[-1] == RESTORE
        Pipeline(passes[:-1], finish_and_verify)(captured.module)
        return captured

    return make


@pytest.mark.skipif(not AS_TRACED, reason="torch traces the norm as contiguous, whatever its kernel returns")
def test_the_mask_of_relu_has_no_memory_format_of_its_own(drifted, settle):
    """The unpacked bits are contiguous: where(bits, 0, G) would be so too, and the norm expects channels last."""
    captured = drifted(norms(), channels_last(2, 4, 8, 8))
    with pytest.raises(VerifyError, match=r"^native_group_norm_backward_1: reads where.* with strides \(.*; traced: "):
        verify_strides(captured.module)
    assert settle(captured, RESTORE) == 1
    verify_strides(captured.module)
    (copy,) = copies(captured.module.graph)
    assert is_backward(copy)
    assert get_value(copy).is_contiguous(memory_format=torch.channels_last)
    assert not get_value(copy.args[0]).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8", "hyperblock-int4"])
def test_does_not_fire_where_everything_is_contiguous(recipe, drifted, settle):
    captured = drifted(norms(), torch.randn(2, 4, 8, 8, requires_grad=True), recipe)
    before = graph_text(captured.module)
    verify_strides(captured.module)
    assert settle(captured, RESTORE) == 0
    assert graph_text(captured.module) == before


@dataclasses.dataclass(frozen=True)
class Transpose:
    """A pass that changes the strides of a tensor and not its values."""

    name = "transpose"

    def __call__(self, module):
        """Writes every sum of the graph into memory column by column."""
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            with module.graph.inserting_after(node):
                turned = module.graph.call_function(ops.LAY_OUT, (node, [1, 3]))
            infer_value(turned)
            node.replace_all_uses_with(turned, lambda user, turned=turned: user is not turned)
        return 0


def test_outputs_and_other_readers_share_one_copy_and_contractions_need_none(joint, apply, run_graph, same_bits):
    weight = torch.randn(4, 4)
    captured = joint(lambda x: ((x + 1), (x + 1).sin(), torch.mm(x + 1, weight)), torch.randn(3, 4))
    whole = run_graph(captured)
    apply(captured, AnnotateRoles(), Transpose(), RESTORE)
    graph = captured.module.graph
    back = [copy for copy in copies(graph) if copy.args[1] == [4, 1]]
    (product,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    read = {node for copy in back for node in copy.users}
    assert {node.op for node in read} == {"output", "call_function"}
    after = run_graph(captured)
    assert same_bits(after, whole)
    assert [x.stride() for x in after] == [x.stride() for x in whole]
    assert may_read_any(product)
    assert product not in read


def test_an_expanded_tensor_stays_dense(joint, apply):
    """No copy can have elements that share memory; the reader is inferred anew."""
    captured = joint(lambda x: x.expand(3, 4).sin(), torch.randn(1, 4))
    (wide,) = captured.module.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)
    with captured.module.graph.inserting_after(wide):
        dense = captured.module.graph.call_function(torch.ops.aten.clone.default, (wide,))
    infer_value(dense)
    wide.replace_all_uses_with(dense, lambda user: user is not dense)
    assert apply(captured, RESTORE) == [0]
    (sine,) = captured.module.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert [place for place, _ in changed_reads(sine)] == [0]
    verify_strides(captured.module)


def test_a_graph_without_a_record_is_left_alone(joint, apply):
    captured = joint(norms(), channels_last(2, 4, 8, 8))
    for node in captured.module.graph.nodes:
        node.meta.pop("qcompiler_strides_read", None)
    assert apply(captured, RESTORE) == [0]


def test_strides_of_dimensions_of_one_element_do_not_count(joint):
    captured = joint(nn.Conv2d(1, 3, 1), channels_last(2, 1, 4, 4))
    record_strides(captured.module.graph)
    (node,) = captured.module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    x, w, bias, strides, *_ = list_arguments(node)
    assert [get_strides(leaf) for leaf in (x, w, bias, strides)] == [(16, 4, 1), (1,), (1,), None]
    assert get_strides(x) == (16, 4, 1)


@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8", "hyperblock-int4", "pact-w4a4"])
@pytest.mark.parametrize("layout", ["plain", "channels last", "sliced", "expanded"])
def test_every_fake_value_is_what_its_node_gives(recipe, layout, joint):
    """Inferred anew, node by node, the whole graph has the strides that it says it has."""
    x = {
        "plain": torch.randn(2, 4, 8, 8),
        "channels last": torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(2, 4, 8, 16)[..., ::2],
        "expanded": torch.randn(2, 1, 8, 8).expand(2, 4, 8, 8),
    }[layout]
    captured = joint(norms(), x)
    joint_pipeline(recipes.get(recipe))(captured.module)
    for node in captured.module.graph.nodes:
        if node.op == "call_function":
            before = strides_of(node)
            infer_value(node)
            assert strides_of(node) == before, node.format_node()


def strides_of(node):
    """The strides of each tensor that a node returns."""
    val = get_value(node)
    return [t.stride() for t in (val if isinstance(val, list | tuple) else [val]) if isinstance(t, torch.Tensor)]
