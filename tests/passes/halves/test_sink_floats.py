"""Floats of saved codes are made in front of what reads them."""

import pytest
import torch
from torch import nn

from qcompiler import recipes
from qcompiler.passes.halves.call_kernels import CallKernels
from qcompiler.passes.halves.sink_floats import SinkFloats
from qcompiler.passes.ir.edit import last_placeholder
from qcompiler.passes.ir.views import list_readers, list_views
from qcompiler.recipes.saving import add_saving
from qcompiler.runtime import ops


def leaf(rows=4):
    """Of 2·4 rows the first half shares bytes with the second; blocks of 2 do not divide half of 2·3 rows."""
    return torch.randn(2, rows, 8, requires_grad=True)


def network(layers):
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(layers)])


def called(compiled_halves, layers=3, bits=4, rows=4):
    """The halves with calls of kernels, those of backward at the head: there the partitioner puts views of inputs."""
    recipe = add_saving(recipes.get(f"hyperblock-int{bits}"), f"int{bits}")
    halves = compiled_halves(recipe, network(layers), leaf(rows))
    CallKernels()(halves)
    graph = halves.backward.graph
    for target in (ops.DEQUANTIZE_BLOCKS, ops.UNPACK_CODES):
        for call in graph.find_nodes(op="call_function", target=target):
            if all(source.op == "placeholder" or source.target is ops.UNPACK_CODES for source in call.all_input_nodes):
                for view in reversed(list_views(call)):
                    last_placeholder(graph).append(view)
    graph.lint()
    return halves


def count_alive(graph):
    """The most floats of codes that are made and still to be read."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    spans = []
    for node in graph.find_nodes(op="call_function", target=ops.DEQUANTIZE_BLOCKS):
        spans.append((order[node], max(map(order.get, list_readers(node)))))
    return max(sum(first <= place < last for first, last in spans) for place in order.values())


@pytest.mark.skipif(
    torch.__version__ >= (2, 15), reason="linear layers of more dimensions end in another view since torch 2.15"
)
def test_golden_sink_floats(compiled_halves, settle_compiled, text, golden):
    halves = called(compiled_halves, layers=2, rows=3)
    before = text(halves)
    assert settle_compiled(halves, SinkFloats()) > 0
    golden(before=before, after=text(halves))


@pytest.mark.parametrize(("bits", "rows"), [(4, 3), (4, 4), (8, 4)])
@pytest.mark.sample(1)
def test_few_floats_are_alive_at_a_time(bits, rows, compiled_halves, run_halves, same_bits):
    plain, sunk = (called(compiled_halves, layers=6, bits=bits, rows=rows) for _ in range(2))
    assert SinkFloats()(sunk) > 0
    assert count_alive(plain.backward.graph) >= 6
    assert count_alive(sunk.backward.graph) <= 2
    sunk.backward.graph.lint()
    assert same_bits(*map(run_halves, (plain, sunk)))


def test_does_not_fire_without_calls(compiled_halves, text):
    halves = compiled_halves("tensor-int8", network(2), leaf())
    before = text(halves)
    assert SinkFloats()(halves) == 0
    assert text(halves) == before
