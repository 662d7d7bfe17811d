"""`qcompiler show`: stages of training and of an export, differences, counts, and wrong calls."""

import json

import pytest
from click.testing import CliRunner
from command_line import run

from qcompiler.cli.main import main


@pytest.fixture
def show(folder):
    """show(*arguments) → (exit code, output, errors as one line)."""

    def call(*arguments):
        code, text, errors = run(folder, "show", *arguments)
        return code, text, " ".join(errors.split())

    return call


def test_show(folder):
    code, text, errors = run(folder, "show", "mynet.py:make", "--recipe", "mine.yaml")
    assert (code, errors) == (0, "")
    assert text.count("= qcompiler.quantize(") == 6
    code, text, _ = run(folder, "show", "mynet:make", "--after", "place-quantizers", "--json")
    stages = json.loads(text)
    assert stages["place-quantizers"].count("= qcompiler.quantize(") == 12  # two of them for sums of bias gradients
    code, text, errors = run(folder, "show", "mynet:make", "--after", "dedup")
    assert (code, text) == (2, "")
    assert "did you mean 'dedupe-quantizers'" in " ".join(errors.split())
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


def test_a_diff_as_json_is_the_same_lines(show):
    given = ("mynet.py:make", "--diff", "captured", "place-quantizers")
    _, plain, _ = show(*given)
    code, text, _ = show(*given, "--json")
    assert code == 0
    assert json.loads(text) == {"diff": ["captured", "place-quantizers"], "lines": plain.splitlines()}
    added = [line for line in json.loads(text)["lines"] if line.startswith("+") and "= qcompiler.quantize(" in line]
    assert len(added) == 12
    _, text, _ = show("mynet.py:make", "--diff", "captured", "captured", "--json")
    assert json.loads(text)["lines"] == []


def test_help_of_draw_tells_the_export():
    made = CliRunner().invoke(main, ["draw", "--help"])
    first = " ".join(made.stdout.partition("Options:")[0].split())
    assert "or with --export the graph on its way to ONNX" in first


def test_list_counts_the_changes_of_every_pass(show):
    code, text, _ = show("mynet.py:make", "--list", "--json")
    changes = json.loads(text)
    assert code == 0
    assert ([*changes][:1], [*changes][-1:]) == (["captured"], ["lowered"])
    assert (changes["place-quantizers"], changes["captured"], changes["split-convolution-backward"]) == (12, 0, 0)
    code, text, _ = show("mynet.py:make", "--list")
    assert "│ place-quantizers           │ 12 " in text


def test_export(show):
    """The ONNX graph after all passes, and counts of both pipelines behind those of the joint one."""
    code, text, errors = show("mynet.py:make", "--export", "--recipe", "mine.yaml")
    assert (code, errors) == (0, "note: no --checkpoint: weights as the callable made them")
    assert text.splitlines()[0] == "%input : FLOAT[batch,8] = input"
    assert text.count(" = DequantizeLinear(") == 2
    code, text, _ = show("mynet.py:make", "--export", "--list", "--json")
    changes = json.loads(text)
    assert {name: changes[name] for name in ("place-quantizers", "freeze-quantizers", "lower-quantizers")} == {
        "place-quantizers": 4,
        "freeze-quantizers": 2,
        "lower-quantizers": 4,
    }


def test_diff_of_an_export(show):
    code, text, _ = show("mynet.py:make", "--export", "--diff", "save-quantized", "freeze-quantizers")
    assert code == 0
    added = [line for line in text.splitlines() if line.startswith("+ ")]
    assert "+   %c_1 : i8[8,8] = constant 0/weight#codes" in added
    code, text, _ = show("mynet.py:make", "--diff", "add-functions", "name-nodes", "--export")
    changed = [line.rpartition("# ")[2] for line in text.splitlines()[2:] if line[0] == "+"]
    assert changed == ["0/Gemm", "1/Relu", "2/Gemm"]


def test_a_pass_that_changes_nothing_has_an_empty_diff(show):
    for names in (("fold-batch-norms", "transpose-weights"), ("move-relus", "split-clips")):
        code, text, _ = show("mynet.py:make", "--export", "--diff", *names)
        assert (code, text) == (0, f"no difference between {names[0]} and {names[1]}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--after", "lower-quantizers"), "stage: 'lower-quantizers' is one of an export; add --export"),
        (("--diff", "captured", "freeze-biases"), "stage: 'freeze-biases' is one of an export; add --export"),
        (("--export", "--after", "captured"), "stage: got 'captured'; valid: traced, split-"),
        (("--after", "lower-quantizer", "--export"), "did you mean 'lower-quantizers'?"),
        (("--export", "--eval"), "--export and --eval do not go together; leave one out"),
        (("--list", "--after", "captured"), "--after and --list do not go together; leave one out"),
        (("--checkpoint", "cut.pt"), "--checkpoint goes with --export alone"),
    ],
)
def test_wrong_options(show, arguments, message):
    code, text, errors = show("mynet.py:make", *arguments)
    assert (code, text) == (2, "")
    assert message in errors


def test_an_export_needs_inputs_and_ranges(show):
    code, text, errors = show("mynet.py:Net", "--export")
    assert (code, text) == (1, "")
    assert "it gives no inputs; add --input SHAPE" in errors
    code, text, errors = show("mynet.py:make", "--export", "--recipe", "deploy-int8")
    assert (code, text) == (1, "")
    assert "no range yet for 0/input, 0/output; train the model for a step, or load a checkpoint" in errors


def test_draw_of_an_export(folder, monkeypatch):
    monkeypatch.chdir(folder)
    call = ["draw", "mynet.py:make", "way.json", "--export", "--recipe", "mine.yaml", "--json"]
    made = CliRunner().invoke(main, call)
    assert made.exit_code == 0
    stages = [name for name, _ in json.loads((folder / "way.json").read_text())["stages"]]
    assert (stages[0], stages[-1]) == ("traced", "freeze-quantizers")
    made = CliRunner().invoke(main, [*call, "--eval"])
    assert (made.exit_code, made.stdout) == (2, "")
    assert "--export and --eval do not go together" in made.stderr
