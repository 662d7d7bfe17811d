"""benchmarks/gpu.py in a tiny form on the CPU: every section, its budget, and what is written."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
from rich.progress import Progress

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """The files of benchmarks/ import each other, and an example."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def load(name):
    return importlib.import_module(name)


def start(monkeypatch, *options):
    """Return the status with which the script ends."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit) as end:
        load("gpu").main()
    return end.value.code


def run_tasks(seconds, **measures):
    """The results of a section with these tasks."""
    section = load("gpu_section")
    tasks = [section.Task(name, measure) for name, measure in measures.items()]
    part = section.Section("part", seconds, lambda setting: tasks)
    with Progress(disable=True) as progress:
        return section.run_section(part, section.Setting("cpu", tiny=True), seconds, progress)


def test_one_run(tmp_path, monkeypatch, capsys):
    assert not start(monkeypatch, "--device", "cpu", "--tiny", "--out", str(tmp_path))
    results = json.loads((tmp_path / "gpu.json").read_text())
    checks, kernels, speed, memory, training = results["sections"]
    names = [one["section"] for one in results["sections"]]
    assert names == ["checks", "kernels", "speed", "memory", "training"]
    assert all(row.get("ms", 0) > 0 or row["detail"] for row in kernels["rows"])
    assert not [one["note"] for one in results["sections"] if one["note"]]
    assert {row["passed"] for row in checks["rows"]} <= {True, None}
    assert [row["detail"] for row in checks["rows"] if row["name"].startswith("step")] == ["all bits are equal"]
    assert all(row["step, ms"] > 0 for row in (*speed["rows"], *memory["rows"]))
    saved = [row["saved, MB"] for row in memory["rows"]]
    assert saved == sorted(saved, reverse=True)  # float32, int8, int4
    assert {row["data"] for row in training["rows"]} == {"digits of 8×8 pixels (no --data)"}
    page = (tmp_path / "gpu.md").read_text()
    assert page in capsys.readouterr().out
    assert results["device"] in page.splitlines()[0]
    assert "| × bfloat16 |" in page


def test_a_section_stops_at_its_budget():
    """In the middle of a task; nothing that catches errors keeps it going."""

    def swallow(setting):
        for _ in range(100):
            try:
                time.sleep(1)
            except Exception:
                continue
        return {}

    begin = time.monotonic()
    found = run_tasks(0.3, first=lambda setting: {"a": 1}, second=swallow, third=swallow)
    assert time.monotonic() - begin < 1
    assert [row["name"] for row in found["rows"]] == ["first"]
    assert found["note"] == "stopped after 0 s; not measured: second, third"


def test_a_failure_is_a_row():
    def fail(setting):
        raise ValueError("no | such kernel\nmore")

    found = run_tasks(5, first=fail, second=lambda setting: {"a": 1})
    assert found["note"] == ""
    assert [row.get("error") for row in found["rows"]] == ["ValueError: no | such kernel", None]
    table = load("gpu").render({"device": "d", "torch": "t", "triton": "3", "sections": [found]})
    assert "ValueError: no / such kernel" in table


@pytest.mark.parametrize("row", [{"passed": False, "detail": "different: codes"}, {"error": "RuntimeError: x"}])
def test_a_check_that_fails_is_the_status(row, tmp_path, monkeypatch):
    gpu, section = load("gpu"), load("gpu_section")
    checks = section.Section("checks", 10, lambda setting: [section.Task("one", lambda setting: row)])
    monkeypatch.setattr(gpu, "SECTIONS", (checks,))
    assert start(monkeypatch, "--device", "cpu", "--tiny", "--out", str(tmp_path)) == 1


def test_a_different_bit_is_found(monkeypatch):
    """Every check compares."""
    checks, section = load("gpu_checks"), load("gpu_section")
    monkeypatch.setattr(checks, "_are_same", lambda found, expected: False)
    setting = section.Setting("cpu", tiny=True)
    rows = [
        task.measure(setting)
        for task in checks.list_checks(setting)
        if "sums" not in task.name and "step" not in task.name
    ]
    assert len(rows) == 10
    assert not any(row["passed"] for row in rows)


@pytest.mark.usefixtures("fresh")
def test_compiled_quantizers_are_checked_too():
    checks, section = load("gpu_checks"), load("gpu_section")
    row = checks._check_references("int8:real:b1c16:nearest:pass", section.Setting("cpu"))
    assert row == {"passed": True, "detail": "all bits are equal"}


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert start(monkeypatch, "--out", str(tmp_path)) == 2
    assert "device: got cuda, and torch finds no GPU; valid: --device cpu" in capsys.readouterr().err
