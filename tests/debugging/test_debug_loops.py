"""The debugger in unusual loops, its errors and its reports."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from torch import nn
from watched_steps import fit, recipe, student

import qcompiler
from qcompiler import DebugError, Recipe, Role, Rule, parse_spec

pytestmark = pytest.mark.usefixtures("fresh")


def test_forward_without_gradients(eager):
    """torch.no_grad in train mode, and a probe whose loss nobody differentiates."""
    with qcompiler.debug(eager(student(), recipe())) as d:
        with torch.no_grad():
            d.qmodel(torch.randn(4, 16))
        d.qmodel(torch.randn(4, 16))
    assert {site.rpartition("/")[2] for site in d.recording.tallies} == {"input", "weight"}
    assert d.report().gradients == ()


def test_evaluation_is_not_watched(eager):
    with qcompiler.debug(eager(student(), recipe())) as d:
        d.qmodel.eval()(torch.randn(4, 16))
    assert d.recording.steps == 0


def test_autocast(eager):
    """In bfloat16 the products of the harm are float32."""
    with qcompiler.debug(eager(student(), recipe())) as d, torch.autocast("cpu", torch.bfloat16):
        d.qmodel(torch.randn(4, 16)).float().sum().backward()
    assert all(0 <= d.recording.harm(site) < 0.01 for site in d.recording.tallies)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_ranks_first(bad, eager):
    x = torch.randn(4, 16)
    x[0, 0] = bad
    with qcompiler.debug(eager(student(), recipe())) as d:
        d.qmodel(x).sum().backward()
    assert d.recording.harm(d.recording.ranking()[0]) == math.inf
    assert d.recording.tallies["0/input"].not_finite == 1 / 64
    json.loads(d.report().to_json())


def test_use_inside_ends_the_watching(eager):
    """apply() inside of the context goes on with the mended recipe, inside and behind it."""
    dead = Rule(spec=parse_spec("int8:real:tensor:nearest:pass:fixed(-1e6,1e6)"), role=Role.ACTIVATION, module="2")
    qmodel = eager(student(), recipe(dead))
    with qcompiler.debug(qmodel) as d:
        fit(qmodel, 1)
        mended = d.apply()
        fit(qmodel, 1)
    assert d.recording.steps == 1
    assert qmodel.recipe == mended
    assert {str(site.spec.range) for site in qmodel.plan().sites} == {"current"}
    assert Recipe.from_yaml(mended.to_yaml()) == mended


def test_an_error_inside_puts_everything_back(eager):
    qmodel = eager(student(), recipe())
    modes = qmodel._session._modes
    with pytest.raises(RuntimeError, match="fake tensor call"), qcompiler.debug(qmodel):
        qmodel(torch.randn(4, 3))
    assert qmodel._session._modes is modes


def test_errors(eager):
    with pytest.raises(DebugError, match=r"got Linear; valid: what qcompiler.compile returned"):
        qcompiler.debug(nn.Linear(2, 2))
    d = qcompiler.debug(eager(student(), recipe()))
    for ask in (d.report, d.propose, d.apply):
        with pytest.raises(DebugError, match="no training step ran inside"):
            ask()
    with pytest.raises(DebugError, match=r"no site '2/input'; valid: none, as nothing ran yet"):
        d.what_if("2/input", None)
    with d:
        fit(d.qmodel, 1)
    with pytest.raises(DebugError, match=r"no site '2/inptu'; did you mean '2/input'\?; valid: 0/grad, 0/input"):
        d.propose("2/inptu")
    with pytest.raises(ValueError, match="integer format: 99 bits"):
        d.what_if("2/input", "int99:max:tensor:nearest:pass")


def test_the_report(eager, tmp_path):
    with qcompiler.debug(eager(student(), "hyperblock-int4")) as d:
        fit(d.qmodel, 2)
    report = d.report()
    text = str(report)
    for site in d.recording.tallies:
        assert site in text
    assert [site.name for site in report.sites] == d.recording.ranking()
    found = json.loads(report.to_json())
    assert found["steps"] == 2
    assert [site["name"] for site in found["sites"]] == d.recording.ranking()
    assert all(len(site["history"]) == 2 for site in found["sites"])
    assert {layer["name"] for layer in found["layers"]} >= {"2 forward", "2 input gradient", "2 weight gradient"}
    assert {row["name"] for row in found["gradients"]} == {name for name, _ in d.qmodel.named_parameters()}
    dead = dataclasses.replace(report.gradients[0].agreement, reference=0.0)
    odd = dataclasses.replace(report, gradients=(dataclasses.replace(report.gradients[0], agreement=dead),))
    assert json.loads(odd.to_json())["gradients"][0]["error_db"] == "inf"


@pytest.mark.parametrize("name", ["grouped", "transposed", "gpt", "dropout", "tied", "twice", "two-inputs"])
def test_every_kind_of_model(name, eager, models):
    """The sites are those of the plan, every figure is a number, and no layer is missing in backward."""
    torch.manual_seed(0)
    case = models.CASES[name]
    qmodel, inputs = eager(case.build(), "hyperblock-int4"), case.inputs()
    with qcompiler.debug(qmodel) as d:
        case.loss(qmodel(*inputs)).backward()
        planned = [site.name for site in qmodel.plan().sites]
    assert {site.partition("#")[0] for site in d.recording.tallies} == {site.partition("#")[0] for site in planned}
    assert len(d.recording.tallies) == len(planned)
    assert all(math.isfinite(d.recording.harm(site)) for site in d.recording.tallies)
    assert all(math.isfinite(found.error) for found in d.recording.layers.values())
    assert str(d.report())


def test_tensorboard(eager, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with qcompiler.debug(eager(student(), recipe())) as d:
        fit(d.qmodel, 1)
    report = d.report()
    report.to_tensorboard(tmp_path, step=7)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    for site in report.sites:
        (event,) = events.Scalars(f"quantizer/sqnr/{site.name}")
        assert (event.step, event.value) == (7, pytest.approx(site.tally.sqnr, rel=1e-6))
    assert {f"layer/cosine/{row.name}" for row in report.layers} <= {*events.Tags()["scalars"]}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'qcompiler\[tensorboard\]'"):
        report.to_tensorboard(tmp_path)
