"""The command line, each command in a process of its own: what it prints, its exit code, and wrong arguments."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import qcompiler

MODEL = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

def make():
    return Net(), torch.randn(4, 8)

def broken():
    raise RuntimeError("the model is broken")

number = 3
"""


def run(folder, *arguments, **environment):
    """(exit code, what was printed, errors) of one call in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "qcompiler", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "mynet.py").write_text(MODEL)
    (path / "mine.yaml").write_text("name: mine\nrules:\n- {format: int8, block: b2c8o4i4}\n")
    return path


def test_help_names_every_command_and_waits_for_nothing(folder):
    from qcompiler.cli import main

    code, text, errors = run(folder, "--help")
    assert (code, errors) == (0, "")
    assert all(f"  {name} " in text for name in main.commands)
    assert "Examples:" in text
    source = "import sys, qcompiler.cli; assert not {'torch', 'networkx', 'rich', 'yaml'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", source], check=True)


@pytest.mark.full
def test_help_is_quick(folder):
    start = time.monotonic()
    run(folder, "--help")
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("command", ["recipes", "show", "draw", "explain", "export", "verify"])
def test_every_command_explains_itself(command):
    from click.testing import CliRunner

    from qcompiler.cli import main

    made = CliRunner().invoke(main, [command, "--help"])
    assert made.exit_code == 0
    assert "--json" in made.output
    assert command == "recipes" or "module:callable" in made.output


def test_recipes(folder):
    code, text, _ = run(folder, "recipes", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(text)] == list(qcompiler.RECIPES)
    code, text, _ = run(folder, "recipes", "hyperblock-int4")
    assert qcompiler.Recipe.from_yaml(text) == qcompiler.RECIPES["hyperblock-int4"]
    code, text, errors = run(folder, "recipes", "hyperblok-int4")
    assert (code, text) == (1, "")
    assert "did you mean 'hyperblock-int4'" in errors


def test_show(folder):
    code, text, errors = run(folder, "show", "mynet.py:make", "--recipe", "mine.yaml")
    assert (code, errors) == (0, "")
    assert text.count("= qcompiler.quantize(") == 6
    code, text, _ = run(folder, "show", "mynet:make", "--diff", "captured", "place-quantizers", "--json")
    stages = json.loads(text)
    assert "quantize" not in stages["captured"]
    assert stages["place-quantizers"].count("= qcompiler.quantize(") == 12  # two of them for sums of bias gradients
    code, text, errors = run(folder, "show", "mynet:make", "--after", "dedup")
    assert (code, text) == (1, "")
    assert "did you mean 'dedupe-quantizers'" in errors
    assert "Traceback" not in errors


def test_a_diff_is_lines_that_changed(folder):
    code, text, _ = run(
        folder, "show", "mynet:Net", "--input", "4,8", "--diff", "place-quantizers", "dedupe-quantizers"
    )
    assert code == 0
    lines = text.splitlines()
    assert lines[:2] == ["--- place-quantizers", "+++ dedupe-quantizers"]
    assert {line[0] for line in lines} == {"+", "-", "@"}
    assert "\x1b[" not in text


def test_draw(folder):
    code, text, errors = run(folder, "draw", "mynet.py:make", "graph.html", "--recipe", "hyperblock-int4", "--json")
    assert (code, errors) == (0, "")
    made = json.loads(text)
    assert made == {"path": "graph.html", "bytes": (folder / "graph.html").stat().st_size}
    code, _, errors = run(folder, "draw", "mynet.py:make", "graph.png")
    assert code == 1
    assert "valid: .html, .svg, .dot, .graphml, .json" in errors
    assert not (folder / "graph.png").exists()


def test_explain(folder):
    code, text, errors = run(folder, "explain", "mynet.py:make", "--json")
    assert (code, errors) == (0, "")
    totals = json.loads(text)["totals"]
    assert (totals["placed"], totals["quantizers"]) == (10, 6)
    code, text, _ = run(folder, "explain", "mynet.py:make", "--eval", "--markdown", NO_COLOR="1")
    assert code == 0
    assert "| placed | 4 |" in text
    assert "\x1b[" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Usage:"),
        (("nothing",), 2, "No such command 'nothing'"),
        (("explain",), 2, "Missing argument 'MODEL'"),
        (("explain", "a:b", "--json", "--markdown"), 2, "do not go together"),
        (("show", "a:b", "--after", "x", "--diff", "x", "y"), 2, "do not go together"),
        (("explain", "nomodule:Net"), 1, "there is no module 'nomodule'"),
        (("explain", "nofile.py:Net"), 1, "there is no file nofile.py"),
        (("explain", "mynet.py:Nett"), 1, "mynet.py has no 'Nett'; valid: Net, make, broken"),
        (("explain", "mynet.py:number"), 1, "got int; valid: a torch.nn.Module, or (module, inputs)"),
        (("explain", "mynet.py:broken"), 1, "the model is broken (--traceback shows where)"),
        (("explain", "mynet.py:Net"), 1, "it gives no inputs; add --input SHAPE"),
        (("explain", "mynet.py:Net", "--input", "4;8"), 1, "--input: got '4;8'; valid: 8,3,32,32 or 4,16:int64"),
        (("explain", "mynet.py:Net", "--input", "4,8:int3"), 1, "--input: got '4,8:int3'"),
        (("explain", "mynet.py:make", "--recipe", "nothing"), 1, "nothing"),
        (("draw", "mynet.py:make", "nowhere/graph.html"), 1, "there is no folder nowhere"),
    ],
)
def test_wrong_arguments(folder, arguments, code, message, monkeypatch):
    """In this process, which has torch already; the exit codes of a process of its own are tested above."""
    from click.testing import CliRunner

    from qcompiler.cli import main

    monkeypatch.chdir(folder)
    made = CliRunner().invoke(main, arguments, prog_name="qcompiler")
    assert made.exit_code == code, made.output
    assert message in " ".join(made.output.split())
    assert "Traceback" not in made.output


def test_a_traceback_on_demand(folder):
    code, _, errors = run(folder, "--traceback", "explain", "mynet.py:broken")
    assert code == 1
    assert "Traceback" in errors
    assert 'raise RuntimeError("the model is broken")' in errors


def test_a_transformers_config(folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    code, text, _ = run(folder, "explain", "gpt2", "--json")
    assert code == 0
    assert json.loads(text)["totals"]["quantizers"] > 0


def test_export_and_verify(folder):
    """A checkpoint is exported; the file agrees with it, and not with another one."""
    torch.manual_seed(0)
    for name in ("run.pt", "other.pt"):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        qmodel = qcompiler.compile(model, "in-hindsight-w8a8g8", backend="eager")
        qmodel(torch.randn(4, 8)).sum().backward()
        qcompiler.save({"model": qmodel.state_dict()}, folder / name)
    given = ("mynet.py:make", "net.onnx", "--recipe", "in-hindsight-w8a8g8")
    code, text, errors = run(folder, "export", *given, "--json")
    assert code == 1
    assert "range" in errors
    assert not (folder / "net.onnx").exists()
    code, text, errors = run(folder, "export", *given, "--checkpoint", "run.pt", "--json")
    assert (code, errors) == (0, "")
    assert json.loads(text)["exported"] == {"weight": 2, "static": 4, "dynamic": 0}
    code, text, _ = run(folder, "verify", *given, "--checkpoint", "run.pt", "--json")
    assert (code, json.loads(text)["exact"]) == (0, True)
    code, text, _ = run(folder, "verify", *given, "--checkpoint", "other.pt")
    assert code == 1
    assert "wrong" in text
