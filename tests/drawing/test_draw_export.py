"""draw(export=…): the passes of an export on the slider, with every quantizer of the file."""

import json

import networkx
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.compiler.network import build_network

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def exported(eager):
    """(trained module, its stages on the way to a file): a convolution with batch norm, a view, a linear layer."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    qmodel, x = eager(model, "deploy-int8"), torch.randn(2, 3, 4, 4)
    qmodel(x).square().sum().backward()
    return qmodel, qcompiler.export_stages(qmodel, (x,))


def read_picture(qmodel, stages, path):
    return json.loads(qcompiler.draw(qmodel, path, export=stages).read_text(encoding="utf-8"))


def list_kinds(picture, stage):
    index = [name for name, _ in picture["stages"]].index(stage)
    return sorted(shape["kind"] for shape in picture["shapes"] if shape["stages"] >> index & 1)


def test_the_slider_has_every_pass_that_changed_something(exported, tmp_path):
    qmodel, stages = exported
    picture = read_picture(qmodel, stages, tmp_path / "g.json")
    changed = [[stage.name, stage.changes] for stage in stages if stage.drawn and stage.changes]
    assert picture["stages"] == [["traced", 0], *changed]
    assert changed[-1] == ["fold-batch-norms", 1]


def test_each_stage_shows_what_is_left(exported, tmp_path):
    """Constants, sizes and what nothing reads are not drawn; a folded batch norm and frozen weights are gone."""
    picture = read_picture(*exported, tmp_path / "g.json")
    ends = ["input", "operator", "output"]
    layers = ["contraction"] * 2
    floats = ["parameter"] * 5 + ["buffer"] * 2
    batch_norm = ["operator"]
    assert list_kinds(picture, "traced") == sorted([*ends, *layers, *batch_norm, *floats])
    assert list_kinds(picture, "fold-batch-norms") == sorted([*ends, *layers, *["quantizer"] * 4])
    assert {shape["module"] for shape in picture["shapes"]} == {"", "0", "1", "2", "4"}


def test_quantizers_are_those_of_eval_mode(exported, tmp_path):
    qmodel, stages = exported
    qmodel.eval()
    with torch.no_grad():
        qmodel(torch.randn(2, 3, 4, 4))
    sites = {site.name: site for site in qmodel.plan(training=False).sites}
    last = build_network([[stage.drawn for stage in stages if stage.drawn][-1]])
    found = {data["name"]: data for _, data in last.nodes(data=True) if data["kind"] == "quantizer"}
    assert found.keys() == sites.keys()
    readers = {name: sorted(last.nodes[one]["name"] for one in data["consumers"]) for name, data in found.items()}
    assert readers == {name: sorted(site.consumers) for name, site in sites.items()}


def test_a_free_dimension_has_its_symbol_and_no_bytes(exported):
    _, stages = exported
    graph = build_network([stages[0].drawn])
    data = next(data for _, data in graph.nodes(data=True) if data["kind"] == "input")
    assert isinstance(data["shape"][0], str)
    assert (data["shape"][1:], data["bytes"]) == ((3, 4, 4), 0)
    weight = next(data for _, data in graph.nodes(data=True) if data["name"] == "0.weight")
    assert (weight["shape"], weight["bytes"]) == ((4, 3, 3, 3), 4 * 27 * 4)


@pytest.mark.parametrize("ending", ["html", "dot", "graphml"])
def test_other_files(exported, ending, tmp_path):
    path = qcompiler.draw(exported[0], tmp_path / f"g.{ending}", export=exported[1])
    text = path.read_text(encoding="utf-8")
    assert "0/weight" in text or "int7" in text
    if ending == "graphml":
        kinds = [data["kind"] for _, data in networkx.read_graphml(path).nodes(data=True)]
        assert kinds.count("quantizer") == 4


def test_wrong_calls(exported, tmp_path):
    qmodel, stages = exported
    valid = r"; valid: what qcompiler\.export_stages\(qmodel, …\) returned, or a part of that list"
    for given, got in (
        (True, "bool"),
        (stages[0], "ExportStage"),
        ("traced", "str"),
        ([], "a list with no stage"),
        ((torch.ones(2),), "a list with Tensor"),
        (qmodel.stages(), "a list with list"),
        ([*stages, 3], "a list with int"),
        (stages[-3:], r"stages of ONNX alone, which are text: [\w, -]+"),
    ):
        with pytest.raises(qcompiler.DrawError, match=f"^draw: export: got {got}{valid}"):
            qcompiler.draw(qmodel, tmp_path / "g.json", export=given)
    with qcompiler.debug(qmodel) as watched:
        qmodel(torch.randn(2, 3, 4, 4)).sum().backward()
    with pytest.raises(qcompiler.DrawError, match="debug: eval mode is not watched, nor is an export; valid: "):
        qcompiler.draw(qmodel, tmp_path / "g.json", export=stages, debug=watched)
    assert list(tmp_path.iterdir()) == []


def test_stages_of_another_model(exported, eager, tmp_path):
    _, stages = exported
    with pytest.raises(qcompiler.DrawError, match=r"^draw: export: got stages of another model; valid: "):
        qcompiler.draw(eager(nn.Linear(2, 2), "deploy-int8"), tmp_path / "g.json", export=stages)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_the_stages(exported, tmp_path):
    """The slider has those stages alone."""
    qmodel, stages = exported
    picture = read_picture(qmodel, stages[:6], tmp_path / "g.json")
    assert picture["stages"] == [["traced", 0], *([one.name, one.changes] for one in stages[1:6] if one.changes)]
