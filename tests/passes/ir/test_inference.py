"""Inferred values: equal calls share the form of the result and nothing else."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompiler.passes.ir import inference
from qcompiler.passes.ir.arguments import run_call
from qcompiler.passes.ir.inference import describe_call, infer_value
from qcompiler.passes.ir.meta import get_value, set_value
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops

SPEC = "int8:fit:b2c4:nearest:pass"


@pytest.fixture
def runs(monkeypatch):
    """The targets of the calls that ran on fake tensors."""
    found = []

    def run(node, *args):
        found.append(node.target)
        return run_call(node, *args)

    monkeypatch.setattr(inference, "run_call", run)
    return found


def make_input(graph, mode, tensor):
    node = graph.placeholder("x")
    set_value(node, mode.from_tensor(tensor))
    return node


def call(graph, target, *args):
    node = graph.call_function(target, args)
    infer_value(node)
    return node


def form(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad


@pytest.mark.parametrize("tensor", [torch.randn(4, 8), torch.randn(8, 4).t(), torch.randn(4, 1).expand(4, 8)])
def test_equal_calls_run_once_and_have_equal_values(tensor, runs):
    graph, mode = Graph(), FakeTensorMode()
    x, y = (make_input(graph, mode, tensor.clone() if k else tensor) for k in range(2))
    set_value(y, mode.from_tensor(tensor))
    nodes = [[], []]
    for found, source in zip(nodes, (x, y), strict=True):
        scale = call(graph, ops.SCALE, source, SPEC, "bc")
        codes = call(graph, ops.QUANTIZE, source, scale, None, None, SPEC, "bc", f"site of {source}")
        floats = call(graph, ops.DEQUANTIZE, codes, scale, None, SPEC, "bc", torch.bfloat16)
        found += [scale, codes, floats]
    assert runs == [ops.SCALE, ops.QUANTIZE, ops.DEQUANTIZE]
    for first, second in zip(*nodes, strict=True):
        assert form(get_value(first)) == form(get_value(second))
        assert get_value(second).fake_mode is mode
        assert get_value(first).untyped_storage()._cdata != get_value(second).untyped_storage()._cdata


@pytest.mark.parametrize(
    ("other", "spec", "layout", "dtype"),
    [
        (torch.randn(8, 8), SPEC, "bc", torch.float32),
        (torch.randn(8, 4).t(), SPEC, "bc", torch.float32),
        (torch.randn(4, 8, dtype=torch.bfloat16), SPEC, "bc", torch.float32),
        (torch.randn(4, 8), "int8:real:b2c4:nearest:pass", "bc", torch.float32),
        (torch.randn(4, 8), SPEC, "cb", torch.float32),
        (torch.randn(4, 8), SPEC, "bc", torch.float64),
    ],
)
def test_other_calls_run_themselves(other, spec, layout, dtype, runs):
    graph, mode = Graph(), FakeTensorMode()
    first, second = make_input(graph, mode, torch.randn(4, 8)), make_input(graph, mode, other)
    scales = call(graph, ops.SCALE, first, SPEC, "bc"), call(graph, ops.SCALE, second, spec, layout)
    call(graph, ops.DEQUANTIZE, first, scales[0], None, SPEC, "bc", torch.float32)
    last = call(graph, ops.DEQUANTIZE, second, scales[1], None, spec, layout, dtype)
    assert runs[-1] is ops.DEQUANTIZE
    assert runs.count(ops.DEQUANTIZE) == 2
    with mode:
        assert form(get_value(last)) == form(run_call(last, get_value))


def test_a_view_shares_memory_with_its_own_tensor(runs):
    graph, mode = Graph(), FakeTensorMode()
    x, y = (make_input(graph, mode, torch.randn(4, 8)) for _ in range(2))
    views = [call(graph, aten.slice.Tensor, node, 1, 2, 6) for node in (x, y)]
    turned = [call(graph, aten.t.default, view) for view in views]
    assert runs == [aten.slice.Tensor, aten.t.default]
    for node, view, last in zip((x, y), views, turned, strict=True):
        memories = {get_value(one).untyped_storage()._cdata for one in (node, view, last)}
        assert len(memories) == 1
        assert form(get_value(last)) == form(torch.randn(4, 8)[:, 2:6].t())
        assert get_value(last).storage_offset() == 2
    assert get_value(x).untyped_storage()._cdata != get_value(y).untyped_storage()._cdata
    assert get_value(x).untyped_storage().nbytes() == 128


def test_several_views_of_one_tensor(runs):
    graph, mode = Graph(), FakeTensorMode()
    x, y = (make_input(graph, mode, torch.randn(6, 8)) for _ in range(2))
    parts = [get_value(call(graph, aten.split.Tensor, node, 4)) for node in (x, y)]
    assert runs == [aten.split.Tensor]
    assert type(parts[0]) is type(parts[1])
    assert [[(form(part), part.storage_offset()) for part in own] for own in parts] == 2 * [
        [(form(part), part.storage_offset()) for part in torch.randn(6, 8).split(4)]
    ]
    assert {part.untyped_storage()._cdata for part in parts[1]} == {get_value(y).untyped_storage()._cdata}


def test_no_result_at_all(runs):
    graph, mode = Graph(), FakeTensorMode()
    x = make_input(graph, mode, torch.randn(0, 8))
    assert [len(get_value(call(graph, aten.unbind.int, x))) for _ in range(2)] == [0, 0]
    assert runs == [aten.unbind.int] * 2


@pytest.mark.parametrize(
    ("target", "others"),
    [
        (aten.mul.Tensor, [(1.0,), (1,), (True,), (-1.0,)]),
        (aten.mul.Tensor, [(0.0,), (-0.0,)]),
        (aten.sum.dim_IntList, [([0, 1],), ([0],), ([0], True)]),
    ],
)
def test_calls_with_other_numbers_run_themselves(target, others, runs):
    graph, mode = Graph(), FakeTensorMode()
    x = make_input(graph, mode, torch.randn(4, 8))
    for arguments in others:
        node = call(graph, target, x, *arguments)
        assert form(get_value(node)) == form(target(torch.randn(4, 8), *arguments))
    assert runs == [target] * len(others)


def test_one_tensor_read_twice_is_no_two_tensors(runs):
    graph, mode = Graph(), FakeTensorMode()
    x, y = (make_input(graph, mode, torch.randn(4, 4)) for _ in range(2))
    assert describe_call(call(graph, aten.mul.Tensor, x, x)) != describe_call(call(graph, aten.mul.Tensor, x, y))


@pytest.mark.parametrize("make", [lambda x: x.conj(), lambda x: x.conj().imag], ids=["conjugate", "negative"])
def test_conjugates_run_each_time(make, runs):
    graph, mode = Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        set_value(x, make(torch.randn(4, 8, dtype=torch.complex64)))
    nodes = [call(graph, aten.clone.default, x) for _ in range(2)]
    assert runs == [aten.clone.default] * 2
    assert describe_call(nodes[0]) is None


def test_free_dimensions_run_each_time(runs):
    graph, mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())
    x = make_input(graph, mode, torch.randn(4, 8))
    scales = [call(graph, ops.SCALE, x, SPEC, "bc") for _ in range(2)]
    assert [describe_call(scale) for scale in scales] == [None, None]
    assert runs == [ops.SCALE] * 2


def test_modes_share_nothing(runs):
    for _ in range(2):
        graph, mode = Graph(), FakeTensorMode()
        scale = call(graph, ops.SCALE, make_input(graph, mode, torch.randn(4, 8)), SPEC, "bc")
        assert get_value(scale).fake_mode is mode
    assert runs == [ops.SCALE] * 2


def test_an_error_comes_each_time():
    graph, mode = Graph(), FakeTensorMode()
    x = make_input(graph, mode, torch.randn(4, 8))
    for _ in range(2):
        with pytest.raises(ValueError, match="layout: got 'b' for 2 dimensions"):
            call(graph, ops.SCALE, x, SPEC, "b")


def test_a_repeated_layer_runs_no_rule_again(placed, runs):
    """All values of the second half of a network of equal layers are known from the first."""
    counts = []
    for layers in (4, 8):
        runs.clear()
        placed(SPEC, nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))), torch.randn(4, 4))
        counts.append(sum(target.namespace == ops.NAMESPACE for target in runs))
    assert counts[0] == counts[1] > 0
