"""The picture of a debugged model: its colors and figures are those of the debugger, its ranges those of the model."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import Recipe, Role, Rule, parse_spec
from qcompiler.drawing.drawing import make_page, make_svg, picture_of

FAULT = Rule(role=Role.GRADIENT, module="2", spec=parse_spec("int8:real:tensor:stochastic:pass:fixed(-1e-5,1e-5)"))
RECIPE = Recipe(name="bad", rules=(FAULT, Rule(spec=parse_spec("int4:real:tensor:nearest:pass"))))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def watched():
    """(model, debugger) after two steps with one bad quantizer."""
    torch._dynamo.reset()
    qmodel = qcompiler.compile(network(), RECIPE, backend="eager")
    with qcompiler.debug(qmodel) as d:
        for _ in range(2):
            qmodel(torch.randn(16, 8)).square().mean().backward()
    qmodel(torch.randn(16, 8)).sum().backward()  # its own capture, whose graph has the same names
    yield qmodel, d
    torch._dynamo.reset()


def drawn(picture):
    """Name → quantizer of the last stage."""
    bit = 1 << (len(picture.stages) - 1)
    return {s.details["name"]: s for s in picture.shapes if s.kind == "quantizer" and s.stages & bit}


def heats(d, edges=(0.001, 0.01, 0.1, 0.5)):
    """How many quantizers have each color, from the recording itself."""
    return Counter(sum(d.recording.harm(site) >= edge for edge in edges) for site in d.recording.tallies)


def test_figures_are_those_of_the_debugger(watched):
    qmodel, d = watched
    picture = picture_of(qmodel, debug=d)
    shapes, tallies = drawn(picture), d.recording.tallies
    assert picture.watched == d.recording.steps == 2
    assert shapes.keys() == tallies.keys() == {site.name for site in qmodel.plan().sites}
    graph = qmodel.to_networkx()
    for name, shape in shapes.items():
        assert graph.nodes[shape.id]["name"] == name
        tally, figures = tallies[name], shape.figures
        assert figures["harm"] == d.recording.harm(name)
        assert (figures["sqnr"], figures["clipped"]) == (tally.sqnr, tally.clipped)
        assert (figures["underflowed"], figures["zeros"]) == (tally.underflowed, tally.zeros)
        assert figures["range_high_of_last_step"] == tally.history[-1].range_high
        assert figures["low_of_last_step"] == tally.history[-1].low
    assert shapes["2/grad"].figures["clipped"] > 0.1
    assert [s.figures for s in picture.shapes if s.kind != "quantizer" and s.figures] == []


def test_without_a_debugger_there_are_none(watched):
    picture = picture_of(watched[0])
    assert picture.watched == 0
    assert not any(shape.figures for shape in picture.shapes)


def test_colors_are_those_of_the_harm(watched):
    qmodel, d = watched
    pytest.importorskip("py_mini_racer")
    text = make_svg(picture_of(qmodel, debug=d), budget=10_000)
    found = Counter(int(heat) for heat in re.findall(r'<rect class="shape quantizer heat-(\d)', text))
    assert found == heats(d)
    assert len(found) > 1
    assert "role-" not in text.partition("</style>")[2]
    folded = make_svg(picture_of(qmodel, debug=d), budget=5)
    dots = re.findall(r'<circle class="dot heat-(\d)"', folded.partition("</style>")[2])
    assert set(map(int, dots)) == set(heats(d))


def test_dot_has_the_same_colors(watched, tmp_path):
    qmodel, d = watched
    text = qcompiler.draw(qmodel, tmp_path / "graph.dot", debug=d).read_text(encoding="utf-8")
    colors = Counter(re.findall(r'fillcolor="(#\w+)", tooltip="harm', text))
    assert sorted(colors.values()) == sorted(heats(d).values())
    assert text.count("{") == text.count("}")


def test_an_infinite_harm_is_json(tmp_path):
    """NaN in a tensor makes figures that JSON lacks; the page can still be read."""
    torch._dynamo.reset()
    qmodel = qcompiler.compile(network(), "tensor-int8", backend="eager")
    with qcompiler.debug(qmodel) as d:
        x = torch.randn(16, 8)
        x[0, 0] = math.inf
        qmodel(x).sum().backward()

    def refuse(text):
        raise AssertionError(text)

    text = make_page(picture_of(qmodel, debug=d))
    data = re.search(r'<script type="application/json" id="picture">(.*?)</script>', text, re.DOTALL)[1]
    figures = [shape["figures"] for shape in json.loads(data, parse_constant=refuse)["shapes"] if shape["figures"]]
    assert "inf" in [figure["harm"] for figure in figures]
    qcompiler.draw(qmodel, tmp_path / "graph.dot", debug=d)
    torch._dynamo.reset()


def test_kept_ranges_are_details():
    torch._dynamo.reset()
    qmodel = qcompiler.compile(network(), "in-hindsight-w8a8g8", backend="eager")
    for _ in range(2):
        qmodel(torch.randn(16, 8)).sum().backward()
    shapes, ranges = drawn(picture_of(qmodel)), qmodel.ranges()
    assert {name for name, shape in shapes.items() if "range_state" in shape.details} == ranges.keys() != set()
    for name, state in ranges.items():
        assert shapes[name].details["range_state"] == [f"{float(row):.4g}" for row in state.flatten()]
    torch._dynamo.reset()


def test_figures_of_something_else_are_refused(watched, tmp_path):
    qmodel, d = watched
    other = qcompiler.compile(network(), RECIPE, backend="eager")
    path = tmp_path / "graph.html"
    with pytest.raises(qcompiler.DrawError, match="watched another model"):
        qcompiler.draw(other, path, debug=d)
    with pytest.raises(qcompiler.DrawError, match="eval mode is not watched"):
        qcompiler.draw(qmodel, path, training=False, debug=d)
    with pytest.raises(qcompiler.DrawError, match=r"\.graphml'; valid with .*: .* \.html, \.svg, \.dot, \.json$"):
        qcompiler.draw(qmodel, tmp_path / "graph.graphml", debug=d)
    with pytest.raises(qcompiler.DebugError, match="no training step"):
        qcompiler.draw(other, path, debug=qcompiler.debug(other))
    qmodel.use("tensor-int8")
    try:
        with pytest.raises(qcompiler.DrawError, match="watched the recipe 'bad', the model has 'tensor-int8'"):
            qcompiler.draw(qmodel, path, debug=d)
    finally:
        qmodel.use(RECIPE)
    assert list(tmp_path.iterdir()) == []
