"""benchmarks/steps.py in a tiny form, and the pages that show its results."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHAPE = {"threads": 1, "batch": 2, "width": 0.25, "depth": 1.0}
ROW = {
    "model": "a",
    **SHAPE,
    "peak": 2_000_000,
    "saved": 4_000_000,
    "cold": 3.0,
    "warm": 1.0,
    "quantizers": 0,
    "loss": 0.5,
}


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """The files of benchmarks/ import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def load(name):
    return importlib.import_module(name)


def row(contender, *seconds, **other):
    return {**ROW, "contender": contender, "seconds": list(seconds), **other}


def test_pages_show_what_the_results_say():
    table, results = load("step_table"), json.loads((ROOT / "benchmarks" / "results" / "steps.json").read_text())
    assert table.render_summary(results) in (ROOT / "README.md").read_text()
    assert table.render(results) in (ROOT / "docs" / "measurements.md").read_text()


def test_ratios_are_to_the_fastest_float_round_by_round():
    rows = [row("float", 4.0, 4.0, 4.0), row("float, eager", 2.0, 4.0, 1.0), row("tensor-int8, auto", 1.0, 1.0, 1.0)]
    table = load("step_table")
    assert table.find_best(rows) is rows[1]
    assert table.find_ratio(rows[2], rows[1]) == 0.5  # of 1/2, 1/4, 1/1
    line = table.render_summary({"rows": rows}).splitlines()[2]
    assert line == "| a, batch 2, width × 0.25 | 2000 ms | 2.00 | – | – | 0.50 | – | – | – | – | – | – |"


def test_of_both_orders_of_memory_the_faster_is_shown():
    rows = [row("float", 1.0), row("QPyTorch", 11.0), row("QPyTorch, channels-last", 9.0)]
    assert "| 9.00 |" in load("step_table").render_summary({"rows": rows})


def test_a_failure_is_a_line_with_its_reason():
    rows = [row("float", 1.0), {"model": "a", **SHAPE, "contender": "torchao", "error": "no module | torchao"}]
    lines = load("step_table").render({"rows": rows}).splitlines()
    assert lines[-1] == "| torchao | failed: no module / torchao |  |  |  |  |  |  |  |"


def test_the_floor_of_integers():
    """3 operations at 2 a second and 4 MB, written and read, at 16 MB a second: 2 s of 4."""
    table, machine = load("step_table"), {"float": 1.0, "int8": 2.0, "copy": 16e6}
    rows = [row("float", 4.0, operations=3), row("tensor-int8, auto", 3.0, operations=3)]
    assert table.find_floor(rows[1], rows[0], machine) == 0.5
    assert table.find_floor(rows[0], rows[0], machine) is None
    assert table.find_floor(rows[1], rows[0], None) is None
    lines = table.render({"machine": {"1": machine}, "rows": rows}).splitlines()
    assert [line.split(" | ")[2] for line in lines[-2:]] == ["–", "0.50"]


def test_rows_that_are_measured_again_replace_the_old_ones():
    """What is left is still divided by the float of its own rounds; other models stay where they are."""
    table, names = load("step_table"), ["float", "tensor-int8", "torchao", "QPyTorch"]
    failed = {"model": "a", **SHAPE, "contender": "QPyTorch", "error": "no module"}
    old = [row("float", 4.0, 4.0), row("torchao", 2.0, 2.0), failed, row("float", 1.0, model="b")]
    rows = table.replace_rows(old, [row("tensor-int8", 1.0), row("float", 2.0)], names)
    assert [one["contender"] for one in rows] == ["float", "tensor-int8", "torchao", "QPyTorch", "float"]
    assert [table.find_ratio(one, rows[0]) for one in rows[:3]] == [1.0, 0.5, 0.5]
    assert rows[-1] is old[-1]
    assert table.replace_rows([], rows[:1], names) == rows[:1]


def test_no_float_no_table():
    with pytest.raises(ValueError, match="no rival in float ran on a"):
        load("step_table").find_best([row("tensor-int8", 1.0)])


def test_a_page_without_a_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="no place for the table"):
        load("step_table").write_into(page, "| |\n")
    assert page.read_text() == "text"


def test_names_of_contenders_are_different():
    names = [one.name for one in load("step_contenders").CONTENDERS]
    assert len(set(names)) == len(names)
    assert {"float", "float, bfloat16, eager, channels-last", "hyperblock-int8, save int8", "tensor-int8, auto"} <= {
        *names
    }


@pytest.mark.full
def test_one_run(tmp_path, monkeypatch, capsys):
    """Both start, take turns, and stand in the results; a second run measures nothing."""
    steps, results = load("steps"), tmp_path / "steps.json"
    name = "MLP 1024-4096-1024"
    options = ["--models", name, "--contenders", "float, eager", "QPyTorch", "--batch", "2", "--width", "0.02"]
    monkeypatch.setattr(sys, "argv", ["steps.py", *options, "--rounds", "2", "--results", str(results)])
    steps.main()
    first = results.read_text()
    one, peer = json.loads(first)["rows"]
    assert (one["contender"], len(one["seconds"]), one["quantizers"]) == ("float, eager", 2, 0)
    assert one["saved"] > 0
    assert one["operations"] == 2 * 2 * (5 * 20 * 82)  # forward, two gradients of the weights, one of an input
    assert peer["contender"] == "QPyTorch"  # installed or not: it has a row
    assert "float, eager" in capsys.readouterr().out
    steps.main()
    assert results.read_text() == first


def test_an_unknown_contender(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["steps.py", "--contenders", "floot"])
    with pytest.raises(SystemExit):
        load("steps").main()
    assert "contender: got floot; valid: float;" in capsys.readouterr().err
