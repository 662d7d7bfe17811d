"""The table of what forward saves."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.halves import Halves, check_halves
from qcompiler.passes.halves.quantize_again import QuantizeAgain
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.edit import list_outputs
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.passes.ir.views import aten
from qcompiler.passes.rules import Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec


@pytest.fixture
def halves(in_front_of):
    recipe = Recipe(name="four", rules=(Rule(spec=parse_spec("int4:fit:tensor:nearest:pass")),))
    return in_front_of(QuantizeAgain, recipe, nn.Linear(4, 2), torch.randn(3, 4, requires_grad=True))


def names(halves):
    return [node.name for node in halves.saved]


def test_inputs_of_backward_are_what_forward_saves(halves):
    table = SavedTable(halves)
    assert [*table.inputs] == halves.saved
    given = [*halves.backward.graph.find_nodes(op="placeholder")]
    assert [*table.inputs.values()] == given[: len(halves.saved)]
    for node, held in table.inputs.items():
        assert get_value(node).shape == get_value(held).shape
        assert get_value(node).dtype is get_value(held).dtype


def test_writing_without_a_change_changes_nothing(halves, text):
    before = text(halves)
    SavedTable(halves).write()
    assert text(halves) == before


def test_a_node_is_taken_once_behind_what_is_saved(halves):
    before, table = names(halves), SavedTable(halves)
    (node,) = halves.forward.graph.find_nodes(op="call_function", target=aten.addmm.default)
    held = table.take(node)
    assert table.take(node) is held
    table.write()
    assert names(halves) == [*before, node.name]
    given = [*halves.backward.graph.find_nodes(op="placeholder")]
    assert given[len(before)] is held
    assert "tangents" in given[len(before) + 1].name


def test_what_is_replaced_and_what_nobody_reads_is_saved_no_longer(halves):
    table = SavedTable(halves)
    first, second, *others = [node.name for node in table.inputs]
    saved = {node.name: node for node in table.inputs}
    table.replace(saved[first], table.inputs[saved[second]])
    unread = next(iter(halves.forward.graph.find_nodes(op="call_function", target=aten.addmm.default)))
    table.take(unread)
    table.drop_unread()
    table.write()
    assert names(halves) == [second, *others]


def test_codes_of_four_bits_are_packed_once(halves):
    table = SavedTable(halves)
    quantizer = list_quantizers(halves.forward.graph)[0]
    place = halves.backward.graph.output_node()
    made = [table.dequantize(quantizer, place) for _ in range(2)]
    assert {node.target for node in made} == {ops.DEQUANTIZE}
    assert get_value(made[0]).shape == get_value(quantizer.tensor).shape
    packs = [user for user in quantizer.codes.users if user.target is ops.PACK]
    assert len(packs) == 1
    assert packs[0] in table.inputs
    table.write()
    assert packs[0] in list_outputs(halves.forward.graph)
    check_halves(halves)


def test_refuses_a_graph_without_backward(halves):
    whole = Halves.of_forward(halves.forward, 1)
    with pytest.raises(ValueError, match="no backward half"):
        SavedTable(whole)
