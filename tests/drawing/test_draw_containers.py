"""A module without a forward of its own is no box of the drawing: its parts stand in the box around it."""

import re

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.drawing.drawing import list_containers, make_svg, picture_of

pytestmark = pytest.mark.usefixtures("fresh")


class Called(nn.ModuleList):
    """A list that is called: it has a forward."""

    def forward(self, x):
        for part in self:
            x = part(x)
        return x


class Model(nn.Module):
    """Containers of every kind, one in another, and a list that is called."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleDict({"wide": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "narrow": nn.Linear(4, 4)})
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2))
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(4))})
        self.space = nn.Module()
        self.space.inner = nn.Linear(4, 4)
        self.called = Called([nn.Linear(4, 4)])

    def forward(self, x):
        x = sum(branch(x) for branch in self.branches.values()) * self.scales["a"]
        for expert in self.experts:
            x = x + expert["down"](expert["up"](x).relu())
        return self.called(self.space.inner(x))


@pytest.fixture
def picture(eager):
    qmodel = eager(Model(), "hyperblock-int8")
    qmodel(torch.randn(3, 4)).sum().backward()
    return picture_of(qmodel)


def test_what_is_a_container():
    inside = {"branches", "experts", "experts.0", "experts.1", "scales", "space"}
    assert list_containers(Model()) == inside
    shared = nn.ModuleList([nn.Linear(2, 2)])
    outer = nn.Module()
    outer.first, outer.second = shared, shared
    assert list_containers(outer) == {"first", "second"}  # one module with two names
    outer.first.forward = lambda x: x
    assert list_containers(outer) == frozenset()  # it has one now
    assert list_containers(nn.ModuleList([nn.Linear(2, 2)])) == frozenset()  # the model itself is the page


def test_parts_of_a_container_stand_in_the_box_around_it(picture):
    wanted = {
        "branches.wide": "",
        "branches.wide.0": "branches.wide",
        "branches.wide.1": "branches.wide",
        "branches.narrow": "",
        **{f"experts.{index}.{name}": "" for index in range(2) for name in ("up", "down")},
        "space.inner": "",
        "called": "",
        "called.0": "called",
    }
    assert picture.parents == wanted
    assert {box.removeprefix("box ") for box in picture.ranks} == wanted.keys()
    (scale,) = {(s.module, s.label) for s in picture.shapes if s.kind == "parameter" and "scales" in s.label}
    assert scale == ("", "scales.a")


def test_every_ending_leaves_the_box_out(picture, eager, tmp_path):
    qmodel = eager(Model(), "hyperblock-int8")
    qmodel(torch.randn(3, 4)).sum().backward()
    text = qcompiler.draw(qmodel, tmp_path / "graph.dot").read_text(encoding="utf-8")
    assert set(re.findall(r'subgraph "cluster ([^"]+)"', text)) == picture.parents.keys()
    pytest.importorskip("py_mini_racer")
    shown = set(re.findall(r">▾ (?:∇ )?([^<]+)</text>", make_svg(picture, budget=10_000)))
    assert {"branches.wide", "branches.narrow", "experts.0.up", "space.inner", "called"} <= shown
    assert not shown & list_containers(Model())
    folded = set(re.findall(r">▸ (?:∇ )?([^<]+)</text>", make_svg(picture, budget=1)))
    assert folded == {path for path, outer in picture.parents.items() if outer == ""}


def test_labels_do_not_repeat_the_path_of_their_box(picture):
    shown = {s.module: {i.label for i in picture.shapes if i.module == s.module} for s in picture.shapes}
    assert {"weight", "bias", "gradient of weight", "forward", "weight gradient"} <= shown["experts.1.down"]
    assert {"gradient of scales.a", "scales.a"} <= shown[""]
