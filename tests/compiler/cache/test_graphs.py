"""Graphs as bytes and back: the same calls, names, forms, shared memory and facts."""

import pickle

import pytest
import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from qcompiler.compiler.cache.graphs import NotPortableError, read_graphs, write_graphs
from qcompiler.compiler.capture import capture
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.passes.ir.edit import copy_nodes, make_module
from qcompiler.passes.ir.inference import describe_tensor
from qcompiler.recipes import RECIPES

#: facts that stay behind: objects of the tracer
LEFT = {"from_node", "creation_timestamp"}


def copy(value, mode=None):
    return read_graphs(write_graphs(value), mode or FakeTensorMode())


def describe(value):
    """A fact without objects that differ from process to process."""

    def leaf(one):
        if isinstance(one, FakeTensor):
            return ("fake", describe_tensor(one), one.storage_offset())
        if isinstance(one, Node):
            return one.name
        if isinstance(one, OpOverload):
            return str(one)  # torch notes copies of an operator as the origin of a call
        return one.__qualname__ if isinstance(one, type) and issubclass(one, nn.Module) else one

    if isinstance(value, dict):
        return {key: describe(one) for key, one in value.items()}
    return map_aggregate(value, leaf)


def list_nodes(graph):
    rows = []
    for node in graph.nodes:
        facts = {key: fact for key, fact in node.meta.items() if key not in LEFT}
        for key in {"source_fn_stack", "fwd_source_fn_stack"} & facts.keys():
            facts[key] = [name for name, _ in facts[key]]
        call = (node.op, node.name, node.target, describe(node.args), describe(dict(node.kwargs)))
        rows.append((*call, {key: describe(fact) for key, fact in facts.items()}))
    return rows


def list_memories(graph):
    """For each node the numbers of the memories of its results, in the order in which they first appear."""
    numbers, found = {}, []
    for node in graph.nodes:
        value = node.meta.get("val")
        tensors = [one for one in (value if isinstance(value, tuple | list) else [value]) if torch.is_tensor(one)]
        found.append([numbers.setdefault(one.untyped_storage()._cdata, len(numbers)) for one in tensors])
    return found


@pytest.fixture
def captured(case, fresh):
    """The joint graph of a model as a step captures it, quantized."""
    found = []

    def backend(module, inputs):
        found.append(capture(module, inputs))
        joint_pipeline(RECIPES["hyperblock-int4"])(found[0].module)
        return module.forward

    torch.compile(case.build(), backend=backend, dynamic=False)(*case.inputs())
    return found[0]


@pytest.mark.sample(4)
def test_a_graph_comes_back(captured):
    again = copy(captured)
    for row, expected in zip(list_nodes(again.module.graph), list_nodes(captured.module.graph), strict=True):
        assert row == expected
    assert list_memories(again.module.graph) == list_memories(captured.module.graph)
    assert again.module.code == make_module({}, copy_nodes(captured.module.graph)).code
    assert (again.inputs, again.writes, again.tangents) == (captured.inputs, captured.writes, captured.tangents)
    again.module.graph.lint()


def make_graph(build):
    graph = Graph()
    graph.output((build(graph),))
    return make_module({}, graph)


def test_fake_tensors_share_memory_as_before():
    with FakeTensorMode() as mode:
        whole = torch.empty(4, 6)
        views = [whole, whole[1:, ::2], torch.empty(4, 6), whole.t()]
    mode = FakeTensorMode()
    again = copy(views, mode)
    assert [describe_tensor(one) for one in again] == [describe_tensor(one) for one in views]
    assert [one.storage_offset() for one in again] == [0, 6, 0, 0]
    memories = [one.untyped_storage()._cdata for one in again]
    assert memories[0] == memories[1] == memories[3] != memories[2]
    assert [one.untyped_storage().nbytes() for one in again] == [96] * 4
    assert all(one.fake_mode is mode for one in again)


def test_one_tensor_in_two_places_stays_one():
    with FakeTensorMode():
        one = torch.empty(3)
    first, second = copy((one, one))
    assert first is second


def test_a_constant_keeps_its_values():
    with FakeTensorMode():
        one = torch.tensor(2.5)
    assert one.constant is not None
    assert copy(one).constant.item() == 2.5


@pytest.mark.parametrize(
    "target",
    [torch.ops.aten.add.Tensor, torch.ops.aten.add, torch.ops.higher_order.cond, torch.ops.qcompiler.quantize.default],
)
def test_operators_come_back(target):
    assert copy(target) is target


def test_a_graph_inside_of_a_graph():
    inner = make_graph(lambda graph: graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),)))
    graph = Graph()
    branch, x = graph.get_attr("branch"), graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.higher_order.cond, (x, branch, branch, (x,))),))
    again = copy(make_module({"branch": inner}, graph))
    assert again.branch.code == inner.code
    assert [node.name for node in again.graph.nodes] == ["branch", "x", "cond", "output"]


def test_tensors_that_a_graph_reads_come_back():
    graph = Graph()
    graph.output((graph.get_attr("table"),))
    again = copy(make_module({"table": torch.arange(5.0)}, graph))
    assert torch.equal(again.table, torch.arange(5.0))


def test_a_class_of_the_user_is_a_name():
    class Local(nn.Module):
        pass

    assert copy({"stack": ("path", Local)}) == {"stack": ("path", Local.__qualname__)}


def symbolic():
    shapes = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    return FakeTensorMode(shape_env=shapes).from_tensor(torch.empty(4, 3))


@pytest.mark.parametrize("value", [symbolic, lambda: lambda: 1])
def test_what_another_process_cannot_have_is_refused(value):
    with pytest.raises((NotPortableError, pickle.PicklingError, AttributeError)):
        write_graphs(value())


def test_a_name_that_cannot_be_given_again_is_refused():
    graph = Graph()
    node = graph.placeholder("x")
    node.name = "not a name"
    graph.output((node,))
    with pytest.raises(NotPortableError, match="'not a name'"):
        copy(make_module({}, graph))
