"""Arguments by name: schemas of our operators are the independent source."""

import pytest
import torch
from torch.fx import Graph

from qcompiler.passes.ir.arguments import (
    get_argument,
    has_argument,
    iterate_arguments,
    list_arguments,
    number_arguments,
    pack_arguments,
    replace_arguments,
    set_arguments,
)
from qcompiler.runtime import ops


@pytest.fixture
def call():
    """call(target, *args) → a call of a graph with the inputs `x`, `s` and `state`."""
    graph = Graph()
    given = {name: graph.placeholder(name) for name in ("x", "s", "state")}

    def make(target, *args):
        return graph.call_function(target, tuple(given.get(arg, arg) for arg in args))

    return make


def names(arguments):
    return [getattr(argument, "name", argument) for argument in arguments]


def test_get_by_name_and_by_default(call):
    node = call(ops.SCALE, "x", "int8", "bc")
    assert names(get_argument(node, name) for name in ("x", "spec", "layout", "state", "first", "frozen")) == [
        *("x", "int8", "bc"),
        *(None, True, False),
    ]
    assert has_argument(node, "x")
    assert not has_argument(node, "state")


def test_set_keeps_the_others_and_fills_gaps(call):
    node = call(ops.SCALE, "x", "int8", "bc")
    set_arguments(node, frozen=True)
    assert names(node.args) == ["x", "int8", "bc", None, True, True]
    set_arguments(node, layout="oi")
    assert names(node.args) == ["x", "int8", "oi", None, True, True]


def test_none_at_the_end_is_left_out(call):
    node = call(ops.DEQUANTIZE, "x", "s", None, "int8", "bc", torch.float32, "state")
    set_arguments(node, x=None)
    assert names(node.args) == ["x", "s", None, "int8", "bc", torch.float32]


def test_a_wrong_name_is_told_with_the_valid_ones(call):
    node = call(ops.PACK, "x", 4)
    with pytest.raises(ValueError, match="no argument bit; valid: codes, bits"):
        get_argument(node, "bit")
    with pytest.raises(ValueError, match="no argument bit; valid: codes, bits"):
        set_arguments(node, bit=3)
    with pytest.raises(ValueError, match="no argument a, b; valid: codes, bits"):
        pack_arguments(ops.PACK, {"a": 1, "b": 2})


def test_iterate_gives_what_stands_in_the_call(call):
    node = call(ops.PACK, "x", 4)
    assert [(name, str(value)) for name, value in iterate_arguments(node)] == [("codes", "x"), ("bits", "4")]


def test_nested_arguments_by_place():
    graph = Graph()
    a, b, c = (graph.placeholder(name) for name in "abc")
    node = graph.call_function(torch.cat, ([a, b, a], 1), {"out": c})
    assert names(list_arguments(node)) == ["a", "b", "a", 1, "c"]
    assert [(place, source.name) for place, source in number_arguments(node)] == [
        (2, "a"),
        (3, "b"),
        (4, "a"),
        (5, "c"),
    ]
    replace_arguments(node, {2: b, 4: a})
    assert names(list_arguments(node)) == ["a", "b", "b", 1, "a"]
