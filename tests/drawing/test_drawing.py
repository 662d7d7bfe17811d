"""draw(): every ending, the same counts in all of them, names that are markup, files that are whole or untouched."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import networkx
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.compiler.network import CARRIERS
from qcompiler.drawing.drawing import make_page, make_svg, picture_of

pytestmark = pytest.mark.usefixtures("fresh")

NAME = "</script><script>alert(1)</script>\"'&"


class Hostile(nn.Module):
    """Modules named like markup."""

    def __init__(self):
        super().__init__()
        self.add_module("<script>", nn.Linear(8, 8))
        self.add_module(NAME, nn.Linear(8, 4))

    def forward(self, x):
        for part in self.children():
            x = part(x).relu()
        return x


@pytest.fixture(scope="module")
def network(models):
    """A compiled network with a residual block and fused attention left out, after one step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    qmodel = qcompiler.compile(models.resnet20(4)[:5], "hyperblock-int4", backend="eager")
    qmodel(torch.randn(2, 3, 8, 8)).sum().backward()
    return qmodel


@pytest.fixture(scope="module")
def hostile():
    torch._dynamo.reset()
    qmodel = qcompiler.compile(Hostile(), "hyperblock-int4", backend="eager")
    qmodel(torch.randn(4, 8)).sum().backward()
    return qmodel


def last(picture):
    bit = 1 << (len(picture.stages) - 1)
    return [shape for shape in picture.shapes if shape.stages & bit], [
        line for line in picture.lines if line.stages & bit
    ]


def test_the_picture_equals_the_graph(network):
    graph, plan = network.to_networkx(), network.plan()
    shapes, lines = last(picture_of(network))
    by_kind = {kind: [s for s in shapes if s.kind == kind] for kind in {s.kind for s in shapes}}
    assert len(by_kind["quantizer"]) == len(plan.sites)
    assert sum(shape.bytes for shape in by_kind["saved"]) == plan.saved_bytes
    contractions = {node for node, data in graph.nodes(data=True) if data["kind"] == "contraction"}
    assert {shape.id for shape in by_kind["contraction"]} == contractions
    after = networkx.DiGraph([(line.source, line.target) for line in lines])
    chips = {shape.id for shape in by_kind["saved"]}
    for shape in by_kind["quantizer"]:
        direct = {node for node in after.successors(shape.id) if node not in chips}
        saved = {node for chip in after.successors(shape.id) if chip in chips for node in after.successors(chip)}
        assert (direct | saved) & contractions == set(graph.nodes[shape.id]["consumers"])
        again = {2} if graph.nodes[shape.id]["again"] else set()  # backward makes the codes again
        assert {s.lane for s in shapes if s.id in direct} <= {shape.lane, *again}
        assert {s.lane for s in shapes if s.id in saved} <= {2}


def test_every_stage_has_the_quantizers_of_its_graph(network):
    picture = picture_of(network)
    names = [name for name, _ in picture.stages]
    assert names[0] == "captured"
    assert names[-1] == "lowered"
    assert {"place-quantizers", "dedupe-quantizers"} <= set(names)
    counts = []
    for index, name in enumerate(names):
        graph = network.to_networkx(stage=name)
        drawn = [s.id for s in picture.shapes if s.kind == "quantizer" and s.stages >> index & 1]
        assert sorted(drawn) == sorted(n for n, data in graph.nodes(data=True) if data["kind"] == "quantizer")
        counts.append(len(drawn))
    assert counts[0] == 0
    assert counts[names.index("place-quantizers")] == network.plan().placed
    assert counts[-1] == len(network.plan().sites)


def test_forward_runs_down_and_backward_up(network):
    """Within a box every line that stays in a lane goes to another row, in the direction of its lane."""
    shapes, lines = last(picture_of(network))
    known = {shape.id: shape for shape in shapes}
    checked = 0
    for line in lines:
        start, end = known[line.source], known[line.target]
        if start.module == end.module and start.lane == end.lane:
            assert (end.rank - start.rank) * (1 if start.lane == 0 else -1) > 0, (start, end)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("ending", ["html", "svg", "dot", "graphml", "json"])
def test_endings(network, hostile, tmp_path, ending):
    for qmodel in (network, hostile):
        path = qcompiler.draw(qmodel, tmp_path / f"graph.{ending}")
        text = path.read_text(encoding="utf-8")
        assert text
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        if ending in ("svg", "graphml"):
            ElementTree.fromstring(text)
    if ending in ("html", "svg"):  # the other endings are no markup, or quote every name
        assert "<script>alert" not in text
    if ending == "svg":
        assert "&lt;script&gt;" in text


def test_graphml_is_the_graph(network, tmp_path):
    read = networkx.read_graphml(qcompiler.draw(network, tmp_path / "graph.graphml"), force_multigraph=True)
    graph = network.to_networkx()
    assert read.number_of_nodes() == graph.number_of_nodes()
    assert read.number_of_edges() == graph.number_of_edges()
    for node, data in graph.nodes(data=True):
        assert read.nodes[node]["kind"] == data["kind"]
        assert read.nodes[node]["saved_bytes"] == data["saved_bytes"]
        assert json.loads(read.nodes[node]["shape"]) == list(data["shape"])


def test_json_is_the_picture(network, tmp_path):
    text = qcompiler.draw(network, tmp_path / "graph.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(picture_of(network).to_dict()))


def test_operators_have_short_names(network):
    labels = {shape.label for shape in picture_of(network).shapes if shape.kind == "operator"}
    assert {"batch_norm", "batch_norm_backward"} <= labels
    assert not [label for label in labels if "native" in label or "legit" in label]


def test_dot_names_every_shape(network, tmp_path):
    text = qcompiler.draw(network, tmp_path / "graph.dot").read_text(encoding="utf-8")
    shapes, lines = last(picture_of(network))
    assert len(re.findall(r"^  \"[^\"]+\" \[label", text, re.MULTILINE)) == len(shapes)
    assert len(re.findall(r"^  \"[^\"]+\" -> \"", text, re.MULTILINE)) == len(lines)
    assert text.count("{") == text.count("}")


def test_svg_draws_every_quantizer_when_unfolded(network):
    picture = picture_of(network)
    text = make_svg(picture, budget=10_000)
    found = ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}rect")
    stars = [rect for rect in found if rect.get("class", "").startswith("shape quantizer")]
    assert len(stars) == len(network.plan().sites)
    folded = make_svg(picture, budget=5)
    assert 'class="module closed"' in folded
    assert "shape quantizer" not in folded


def test_the_page_needs_nothing_else(network):
    """No address is fetched: those in it are names of XML spaces, or text of a license."""
    text = make_page(picture_of(network))
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert "default-src 'none'" in text
    assert "url(" not in text.replace("url(#hatch)", "")
    assert len(text) < 5 * 2**20


def test_errors_leave_the_old_file(network, eager, tmp_path, monkeypatch):
    with pytest.raises(
        qcompiler.DrawError, match=r"graph\.png'; valid: a path that ends in \.html, \.svg, \.dot, \.graph"
    ):
        qcompiler.draw(network, tmp_path / "graph.png")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; valid: a folder that exists") as caught:
        qcompiler.draw(network, tmp_path / "nowhere" / "graph.html")
    assert isinstance(caught.value, qcompiler.DrawError)
    for look in (lambda given: qcompiler.draw(given, tmp_path / "graph.html"), qcompiler.explain):
        with pytest.raises(qcompiler.CompileError, match=r": got Linear; valid: what qcompiler.compile returned"):
            look(nn.Linear(2, 2))
        with pytest.raises(qcompiler.CompileError, match=r"^(draw|explain): nothing is captured yet; call the model"):
            look(eager(nn.Linear(2, 2)))
    with pytest.raises(
        qcompiler.CompileError, match=r"eval\(\) mode; training=True takes the graph of train\(\) mode$"
    ):
        qcompiler.draw(network, tmp_path / "graph.html", training=False)
    path = tmp_path / "graph.html"
    path.write_text("old")

    def full(*_):
        raise OSError("full")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="full"):
        qcompiler.draw(network, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["graph.html"]


@pytest.mark.parametrize("path", [None, 5, ".html", "x.html/", "x.html.", ""])
def test_what_is_no_path(network, path):
    with pytest.raises(
        qcompiler.DrawError, match=rf"^draw: got {re.escape(repr(path))}; valid: a path that ends in \.h"
    ):
        qcompiler.draw(network, path)


@pytest.mark.parametrize("debug", [3, True, "harm"])
def test_what_is_no_debugger(network, debug, tmp_path):
    with pytest.raises(qcompiler.DrawError, match=r"^draw: debug: got \w+; valid: a debugger of this model"):
        qcompiler.draw(network, tmp_path / "graph.html", debug=debug)


def test_svg_without_its_library(network, tmp_path, monkeypatch):
    """The check comes first: nothing is drawn."""
    monkeypatch.setitem(sys.modules, "py_mini_racer", None)
    monkeypatch.setattr(qcompiler.QuantizedModule, "stages", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(qcompiler.DrawError, match=r"needs mini-racer; install it by: pip install 'qcompiler\[draw\]'"):
        qcompiler.draw(network, tmp_path / "graph.svg")


def test_what_is_hidden_is_no_operator(network):
    drawn = {shape.id for shape in picture_of(network).shapes}
    hidden = CARRIERS | {"scale", "mask", "range", "state", "range output", "constant"}
    for node, data in network.to_networkx().nodes(data=True):
        assert (node in drawn) != (data["kind"] in hidden)
