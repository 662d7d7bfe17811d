"""The command line: the demo, models by name, exports."""

import json
import sys

import pytest
import torch
from command_line import run, run_process
from torch import nn

import qcompiler


@pytest.mark.full
def test_demo(folder):
    pytest.importorskip("sklearn")
    code, text, errors = run_process(folder, "demo", "--epochs", "1", "--backend", "eager", "--json")
    assert code == 0, errors
    assert min(json.loads(text)["accuracy"]) > 20  # one epoch; one of ten by chance


def test_demo_on_few_digits(monkeypatch):
    """Both networks train on the real images, here a few of them; progress is no part of the output."""
    pytest.importorskip("sklearn")
    from click.testing import CliRunner

    from qcompiler.cli.main import main
    from qcompiler.demo import digits

    images, labels, test_images, test_labels = digits.load_digits()
    assert [*map(len, (images, labels, test_images, test_labels))] == [1408, 1408, 389, 389]
    assert (images.min(), images.max()) == (0, 1)
    few = images[:192], labels[:192], test_images[:32], test_labels[:32]
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    torch._dynamo.reset()
    made = CliRunner().invoke(main, ["demo", "--epochs", "1", "--backend", "eager", "--json"])
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["recipe"] == "hyperblock-int4"
    assert found["quantizers"] < found["placed"]
    assert found["saved_bytes"][1] < found["saved_bytes"][0]
    assert "hyperblock-int4" in made.stderr
    text = str(digits.Comparison(**found))
    assert f"{found['saved_bytes'][1]:,}" in text
    torch._dynamo.reset()


def test_demo_without_its_library(monkeypatch):
    from click.testing import CliRunner

    from qcompiler.cli.main import main

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    made = CliRunner().invoke(main, ["demo"])
    assert (made.exit_code, made.stdout) == (1, "")
    assert "pip install 'qcompiler[demo]'" in made.stderr
    assert "Traceback" not in made.stderr


def test_a_small_transformers_config(monkeypatch):
    """The type of a config is a model, here a small one, with tokens as inputs."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from qcompiler.cli.models import captured

    small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 32}
    monkeypatch.setitem(
        transformers.CONFIG_MAPPING._extra_content, "gpt2-small-test", lambda: transformers.GPT2Config(**small)
    )
    torch._dynamo.reset()
    plan = captured("gpt2-small-test", "hyperblock-int8").plan()
    assert {site.name.rpartition("/")[0] for site in plan.sites} >= {"h.0.attn.c_attn", "h.0.mlp.c_fc"}
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("debug", "mynet.py:make", "--steps", "0"), 2, "'--steps'"),
        (("debug", "mynet.py:make", "--out", "mended.txt"), 2, "valid: a path that ends in .yaml"),
        (("debug", "mynet.py:make", "--out", "nowhere/a.yaml"), 2, "there is no folder nowhere"),
        (
            ("debug", "mynet.py:make", "--draw", "harm.graphml"),
            2,
            "with the figures of a debugger: a path that ends in .html, .svg, .dot",
        ),
        (("debug", "mynet.py:make", "--data", "batches"), 1, "--data 'batches': got no colon"),
        (("debug", "mynet.py:make", "--data", "mynet.py:batch"), 1, "valid: Net, make, broken, batches"),
        (("debug", "mynet.py:make", "--data", "mynet.py:number"), 1, "got int; valid: an iterable of batches"),
        (("debug", "mynet.py:make", "--data", "mynet.py:nothing"), 1, "got no batch"),
        (("debug", "mynet.py:make", "--loss", "mynet.py:number"), 1, "got int; valid: a callable"),
        (("debug", "mynet.py:make", "--data", "mynet.py:make"), 1, "a batch is a Net; valid: a pair (inputs, labels)"),
        (("debug", "mynet.py:Net"), 1, "it gives no inputs; add --input SHAPE"),
        (("debug", "mynet.py:make", "--recipe", "identity"), 1, "recipe 'identity' places no quantizer"),
        (("search", "mynet.py:make", "found.yaml"), 2, "Missing option '--budget'"),
        (("search", "mynet.py:make", "found.txt", "-b", "5"), 2, "valid: a path that ends in .yaml"),
        (("search", "mynet.py:make", "f.yaml", "-b", "-1"), 2, "got -1; valid: a finite number above 0"),
        (("search", "mynet.py:make", "f.yaml", "-b", "5", "--format", "int99"), 1, "int99"),
        (("search", "mynet.py:make", "f.yaml", "-b", "5", "--file", "mynet.py"), 1, "no file of a search"),
        (("demo", "--epochs", "0"), 2, "'--epochs'"),
        (("demo", "--recipe", "nothing"), 2, "nothing"),
        ((), 2, "Usage:"),
        (("nothing",), 2, "No such command 'nothing'"),
        (("explain",), 2, "Missing argument 'MODEL'"),
        (("explain", "a:b", "--json", "--markdown"), 2, "do not go together"),
        (("show", "a:b", "--after", "captured", "--diff", "captured", "lowered"), 2, "do not go together"),
        (("explain", "nomodule:Net"), 1, "there is no module 'nomodule'"),
        (("explain", "nofile.py:Net"), 1, "there is no file nofile.py"),
        (("explain", "mynet.py:Nett"), 1, "mynet.py has no 'Nett'; valid: Net, make, broken"),
        (("explain", "mynet.py:number"), 1, "got int; valid: a torch.nn.Module, or (module, inputs)"),
        (("explain", "mynet.py:broken"), 1, "the model is broken (--traceback shows where)"),
        (("explain", "mynet.py:Net"), 1, "it gives no inputs; add --input SHAPE"),
        (("explain", "mynet.py:Net", "--input", "4;8"), 2, "--input: got '4;8'; valid: 8,3,32,32 or 4,16:int64"),
        (("explain", "mynet.py:Net", "--input", "4,8:int3"), 2, "--input: got '4,8:int3'"),
        (("explain", "mynet.py:make", "--recipe", "nothing"), 2, "nothing"),
        (("draw", "mynet.py:make", "nowhere/graph.html"), 2, "there is no folder nowhere"),
        (("export", "mynet.py:make", "n.onnx", "-c", "mynet.py"), 1, "--checkpoint mynet.py: not a whole file"),
        (("export", "mynet.py:make", "n.onnx", "-c", "cut.pt"), 1, "--checkpoint cut.pt: not a whole file"),
        (
            ("export", "mynet.py:make", "n.onnx", "--calibration", "mynet.py:no"),
            1,
            "--calibration 'mynet.py:no': mynet",
        ),
        (("export", "mynet.py:make", "n.onnx", "--calibration", "mynet.py:number"), 1, "got int; valid: an iterable"),
    ],
)
def test_wrong_arguments(folder, arguments, code, message, monkeypatch):
    """In this process, which has torch already; the exit codes of a process of its own are tested above."""
    from click.testing import CliRunner

    from qcompiler.cli.main import main

    monkeypatch.chdir(folder)
    made = CliRunner().invoke(main, arguments, prog_name="qcompiler")
    assert made.exit_code == code, made.output
    assert message in " ".join(made.output.split())
    assert "Traceback" not in made.output


def test_a_traceback_on_demand(folder):
    code, _, errors = run_process(folder, "--traceback", "explain", "mynet.py:broken")
    assert code == 1
    assert "Traceback" in errors
    assert 'raise RuntimeError("the model is broken")' in errors


@pytest.mark.full
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
    assert code == 3
    assert "wrong" in text


def test_options_of_export(folder, monkeypatch):
    """What they are called in Python, and that nobody takes random weights for trained ones."""
    from click.testing import CliRunner

    from qcompiler.cli.main import main
    from qcompiler.exporting import export

    seen = []
    monkeypatch.setattr(export, "export_onnx", lambda *_, **options: seen.append(options))
    monkeypatch.chdir(folder)
    given = ("export", "mynet.py:make", "net.onnx", "--recipe", "tensor-int8")
    made = CliRunner().invoke(main, given)
    assert (made.exit_code, made.stderr) == (0, "note: no --checkpoint: weights as the callable made them\n")
    CliRunner().invoke(main, (*given, "--no-dynamic-batch", "--keep-batch-norm", "--signed-weights", "--opset", "22"))
    names = ("dynamic_batch", "fold_batch_norm", "signed_weights", "opset")
    assert [[one[name] for name in names] for one in seen] == [[True, True, False, 21], [False, False, True, 22]]


def test_export_fixes_ranges_on_examples(folder, monkeypatch):
    """Examples are tensors here; the report says what each range was fixed to."""
    from click.testing import CliRunner

    from qcompiler.cli.main import main

    source = "import torch\n\ndef examples():\n    return (torch.full((4, 8), float(i)) for i in range(3))\n"
    (folder / "data.py").write_text(source)
    monkeypatch.chdir(folder)
    given = ("export", "mynet.py:make", "net.onnx", "--recipe", "current-w8a8g8", "--calibration", "data.py:examples")
    made = CliRunner().invoke(main, (*given, "--json"))
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["calibrated"]["0/input"] == [0.0, 2.0]
