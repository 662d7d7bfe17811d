"""The checker of a pipeline: everything that changes a graph has it checked again, and nothing else does."""

import pytest
import torch
from torch import nn

from qcompiler import recipes
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.passes.ir import checker
from qcompiler.passes.ir.checker import GraphChecker
from qcompiler.passes.ir.edit import add_output, copy_graph, insert_call
from qcompiler.passes.ir.meta import (
    get_contraction,
    get_value,
    is_backward,
    iterate_contractions,
    pin_to_backward,
    set_fact,
    set_value,
)
from qcompiler.passes.ir.quantizer import list_dequantizers, list_quantizers
from qcompiler.passes.ir.verify import VerifyError, verify_graph
from qcompiler.passes.ir.views import aten

SPEC = "int8:fit:b2c2o2i2:nearest:pass"


@pytest.fixture
def module(placed):
    """A legal graph with quantizers."""
    return placed(SPEC, nn.Linear(4, 3, bias=False), torch.randn(4, 4, requires_grad=True)).module


@pytest.fixture
def checks(monkeypatch):
    """The graphs whose rules were checked."""
    found = []

    def check(module, among):
        found.append(module)
        verify_graph(module, among)

    monkeypatch.setattr(checker, "verify_graph", check)
    return found


def product(module):
    return next(node for node, fact in iterate_contractions(module.graph) if fact.gradient_of is None)


def rename(module):
    product(module).name = "another"


def retarget(module):
    product(module).target = aten.matmul.default


def rewire(module):
    node = product(module)
    node.args = (node.args[0], node.args[1])


def reword(module):
    node = product(module)
    node.kwargs = {"out_dtype": None}


def move(module):
    first, second = list(module.graph.find_nodes(op="placeholder"))[:2]
    second.append(first)


def write_value(module):
    node = product(module)
    set_value(node, torch.empty_like(get_value(node)))


def write_fact(module):
    node = product(module)
    set_fact(node, get_contraction(node).__class__(**vars(get_contraction(node))))


def write_half(module):
    pin_to_backward(next(one.floats for one in list_dequantizers(module.graph) if not is_backward(one.floats)))


def add_call(module):
    insert_call(module.graph, aten.neg.default, (product(module),), after=product(module))


CHANGES = [rename, retarget, rewire, reword, move, write_value, write_fact, write_half, add_call]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_graph_is_checked_again(change, module, checks):
    check = GraphChecker()
    check(module)
    change(module)
    check(module)
    assert checks == [module, module]


def test_an_unchanged_graph_is_not(module, checks):
    check = GraphChecker()
    for _ in range(3):
        check(module)
    assert checks == [module]


def test_a_graph_that_lost_unread_nodes_is_not_checked_again(module, checks):
    check = GraphChecker()
    add_call(module)
    nodes = len(module.graph.nodes)
    for _ in range(2):
        check(module)
    assert len(module.graph.nodes) == nodes - 1
    assert checks == [module]


def test_a_view_without_a_value_is_named(module):
    check = GraphChecker()
    check(module)
    view = insert_call(module.graph, aten.t.default, (product(module),), after=product(module))
    add_output(module.graph, insert_call(module.graph, aten.neg.default, (view,), after=view))
    view.meta.pop("val")
    with pytest.raises(VerifyError, match=r"^t.*: no value inferred for aten.t.default"):
        check(module)


def test_graphs_are_told_apart(module, checks):
    check, copied = GraphChecker(), copy_graph(module)
    for graph in (module, copied, module, copied):
        check(graph)
    assert checks == [module, copied]


def test_an_illegal_graph_is_refused_each_time(module):
    check = GraphChecker()
    check(module)
    list_quantizers(module.graph)[0].codes.update_arg(4, "int8")
    for _ in range(2):
        with pytest.raises(VerifyError):
            check(module)


def test_pipelines_have_checkers_of_their_own():
    first, second = (joint_pipeline(recipes.get("hyperblock-int8")).verify for _ in range(2))
    assert isinstance(first, GraphChecker)
    assert first is not second
