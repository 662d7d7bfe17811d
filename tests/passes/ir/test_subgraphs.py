"""Contractions inside of higher-order operators: found at every depth, with their layers, and refused by strict."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops.scan import scan

import qcompiler
from qcompiler.passes.ir.subgraphs import contractions_inside


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


class Branches(nn.Module):
    """One of two layers, in front of a third; `nested`: within a branch of a branch."""

    def __init__(self, *, nested=False):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.nested = nested

    def choose(self, x):
        return torch.cond(x.sum() > 0, lambda y: self.first(y).relu(), lambda y: self.second(y).relu(), (x,))

    def forward(self, x):
        return self.head(torch.cond(x.sum() > 1, self.choose, torch.sin, (x,)) if self.nested else self.choose(x))


class Recurrent(nn.Module):
    """A layer in every step of a scan."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x):
        return scan(lambda h, y: (self.step(h).tanh() + y, h.sin()), torch.zeros(4), x)[1]


def rows(captured, *, backward):
    found = [one for one in contractions_inside(captured.module) if one.is_backward == backward]
    return [(one.operator.removeprefix("aten.").removesuffix(".default"), one.module, one.place) for one in found]


def test_both_branches_and_both_halves(joint):
    captured = joint(Branches(), leaf(3, 4))
    assert rows(captured, backward=False) == [
        ("addmm", "first", "addmm in true_graph_0 of cond"),
        ("addmm", "second", "addmm in false_graph_0 of cond"),
    ]
    again = [operator for operator, *_ in rows(captured, backward=True)]
    assert again == ["addmm", "mm", "mm"] * 2  # the layer anew, and the gradients of its input and weight


def test_graphs_in_graphs(joint):
    captured = joint(Branches(nested=True), torch.randn(3, 4))
    assert rows(captured, backward=False) == [
        ("addmm", "first", "addmm in true_graph_0 of cond, true_graph_0 of cond"),
        ("addmm", "second", "addmm in false_graph_0 of cond, true_graph_0 of cond"),
    ]
    assert rows(captured, backward=True)


def test_scan(joint):
    captured = joint(Recurrent(), torch.randn(5, 4))
    assert [module for _, module, _ in rows(captured, backward=False)] == ["step"]
    assert rows(captured, backward=True)


def test_a_graph_without_subgraphs(joint):
    assert list(contractions_inside(joint(nn.Linear(4, 4), leaf(3, 4)).module)) == []


@pytest.mark.parametrize(
    "model",
    [Branches(), pytest.param(Branches(nested=True), marks=pytest.mark.full), Recurrent()],
    ids=["cond", "nested", "scan"],
)
def test_the_plan_names_them_and_strict_refuses(model, fresh, eager):
    x = torch.randn(3, 4)
    compiled = eager(model, "hyperblock-int8")
    compiled(x).sum().backward()
    inside = [kept for kept in compiled.plan().kept if "inside of a higher-order operator" in kept.reason]
    assert {"forward half" in kept.reason for kept in inside} == {True, False}
    assert {kept.consumer for kept in inside} >= ({"step"} if isinstance(model, Recurrent) else {"first", "second"})
    with pytest.raises(qcompiler.CompileError, match=r"^strict: left in float: .*inside of a higher-order operator"):
        eager(model, "hyperblock-int8", strict=True)(x)


def test_values_are_those_of_plain_pytorch(fresh, eager):
    model, x = Branches(), torch.randn(3, 4)
    assert torch.equal(eager(model)(x), model(x))
