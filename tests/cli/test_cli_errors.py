"""What the command line says of wrong arguments before any work, and of errors in the user's own code."""

import logging
import sys

import pytest
import torch
from click.testing import CliRunner

from qcompiler.cli.main import main
from qcompiler.compiler import torch_compat

MODEL = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 4))

def make():
    return Net(), torch.randn(4, 8)

def image():
    return nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 5, 8, 8)

def no_key():
    raise KeyError("no key")

def spoiled():
    model, inputs = make()
    nn.init.constant_(model[0].weight, float("nan"))
    return model, inputs

def three(model, batch):
    return 3

def vector(model, batch):
    return torch.ones(2, requires_grad=True)

def wrong(model, batch):
    raise RuntimeError("boom")

def outputs(outputs, labels):
    return outputs[0].sum()

def pair():
    return Pair(), torch.randn(4, 8)

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

def labeled():
    return [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64))]

def listed():
    return [(torch.randn(4, 8), [0] * 4)]

def batches():
    yield 1 / 0
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(*arguments) → the exit code and all that was printed, on one line."""
    (tmp_path / "mynet.py").write_text(MODEL)
    (tmp_path / "imports.py").write_text("import notamodule\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "rubbish.yaml").write_bytes(b"\xff\xfegibberish")
    (tmp_path / "rubbish.pt").write_bytes(b"rubbish")
    for name, held in {"empty": {}, "epoch": {"epoch": 3}, "inner": {"model": {}}}.items():
        torch.save(held, tmp_path / f"{name}.pt")
    (tmp_path / "adir.html").mkdir()
    (tmp_path / "adir.yaml").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)

    def run(*arguments):
        made = CliRunner().invoke(main, arguments, prog_name="qcompiler")
        assert "Traceback" not in made.output
        return made.exit_code, " ".join(made.output.split())

    torch._dynamo.reset()
    yield run
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model", "data", "loss", "message"),
    [
        ("pair", "labeled", (), "the model returns a tuple, of which there is no cross entropy; valid: a tensor"),
        ("make", "listed", (), "the labels are a list, of which there is no cross entropy; valid: a tensor"),
        (
            "pair",
            "labeled",
            ("--loss", "mynet.py:outputs"),
            "--loss 'mynet.py:outputs' is called with (model, batch): Pair and tuple",
        ),
    ],
)  # fmt: skip
def test_a_loss_that_does_not_fit(call, model, data, loss, message):
    code, output = call("debug", f"mynet.py:{model}", "--data", f"mynet.py:{data}", *loss)
    assert code == 1
    assert message in output


LONG = "x" * 300 + ".dot"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("debug", "mynet.py:make", "--rate", "nan"), 2, "got nan; valid: a finite number above 0"),
        (("debug", "mynet.py:make", "--rate", "inf"), 2, "got inf; valid: a finite number above 0"),
        (("debug", "mynet.py:make", "--rate", "0"), 2, "got 0; valid: a finite number above 0"),
        (("debug", "mynet.py:make", "--draw", LONG), 2, f"{LONG}: File name too long"),
        (("search", "mynet.py:make", "f.yaml", "-b", "inf"), 2, "got inf; valid: a finite number above 0"),
        (("search", "mynet.py:make", "f.yaml", "-b", "5", "-f", "none/s.json"), 2, "none/s.json: No such file"),
        (("show", "mynet.py:make", "--after", "nopass"), 2, "stage: got 'nopass'; valid: captured, split-"),
        (("show", "mynet.py:make", "--diff", "captured", "nopass"), 2, "stage: got 'nopass'; valid: captured"),
        (("draw", "mynet.py:make", LONG), 2, f"{LONG}: File name too long"),
        (("draw", "mynet.py:make", "x.html/"), 2, "draw: got 'x.html/'; valid: a path that ends in"),
        (("draw", "mynet.py", "g.html"), 1, "no colon; valid: mynet.py:Net, mynet.py:make, mynet.py:image"),
        (("draw", "empty.py", "g.html"), 1, "no colon; valid: path.py:name"),
        (("explain", ":Net"), 1, "model ':Net': got nothing in front of the colon; valid: module:name"),
        (("explain", "mynet.py:"), 1, "got nothing behind the colon"),
        (("explain", "mynet.py:no_key"), 1, "model 'mynet.py:no_key': KeyError: 'no key'"),
        (("explain", "imports.py:Net"), 1, "model 'imports.py:Net': ModuleNotFoundError: No module named 'notamodule'"),
        (("explain", "imports:Net"), 1, "model 'imports:Net': ModuleNotFoundError: No module named 'notamodule'"),
        (("explain", "mynet.py:make", "-r", "none.yaml"), 2, "none.yaml: No such file or directory; valid: a name"),
        (("draw", "mynet.py:make", "adir.html"), 2, "got 'adir.html', which is a folder; valid: the path of a file"),
        (("search", "mynet.py:make", "adir.yaml", "-b", "5"), 2, "got 'adir.yaml', which is a folder; valid: the path"),
        (("debug", "mynet.py:make", "--draw", "adir.html"), 2, "got 'adir.html', which is a folder; valid: the path"),
        (("debug", "mynet.py:make", "--out", "nowhere/a.yaml"), 2, "no folder nowhere; valid: a folder that exists"),
        (("debug", "mynet.py:make", "-c", "empty.pt"), 1, "--checkpoint empty.pt: got an empty dict; valid: the state"),
        (("debug", "mynet.py:make", "-c", "inner.pt"), 1, "--checkpoint inner.pt: got an empty dict; valid: the state"),
        (("export", "mynet.py:make", "n.onnx", "-c", "epoch.pt"), 1, "got a dict of 'epoch' without a tensor; valid:"),
        (("explain", "mynet.py:make", "-r", "rubbish.yaml"), 2, "recipe rubbish.yaml: not a text file in UTF-8"),
        (("explain", "mynet.py:make", "-r", "hyperblock"), 2, "lists, or the path of a .yaml file; did you mean 'hyp"),
        (("explain", "mynet.py:make", "--input", "99999999,3,320,32"), 2, "12,287,999,877,120 bytes: more than can be"),
        (("explain", "mynet.py:make", "--input", f"{2**62},4"), 2, "bytes: more than can be allocated"),
        (("debug", "mynet.py:make", "-c", "rubbish.pt"), 1, "--checkpoint rubbish.pt: not a whole file of torch.save"),
        (("debug", "mynet.py:make", "--data", "mynet.py:batches"), 1, "--data 'mynet.py:batches': ZeroDivisionError"),
        (("debug", "mynet.py:make", "--loss", "mynet.py:three"), 1, "--loss 'mynet.py:three': the loss is int; valid:"),
        (("debug", "mynet.py:make", "--loss", "mynet.py:vector"), 1, "the loss is a tensor [2]; valid: a tensor of"),
        (("debug", "mynet.py:make", "--loss", "mynet.py:wrong"), 1, "--loss 'mynet.py:wrong': RuntimeError: boom"),
    ],
)  # fmt: skip
def test_before_anything_is_captured(call, monkeypatch, arguments, code, message):
    monkeypatch.setattr(sys.modules["qcompiler.compiler.graph_compiler"], "capture", lambda *_: pytest.fail("captured"))
    found, text = call(*arguments)
    assert found == code, text
    assert message in text
    assert "weights_only" not in text


def test_a_library_that_is_missing(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "py_mini_racer", None)
    monkeypatch.setattr("qcompiler.cli.models.compiled", lambda *_: pytest.fail("compiled"))
    code, text = call("draw", "mynet.py:make", "graph.svg")
    assert code == 2
    assert "draw: .svg needs mini-racer; install it by: pip install 'qcompiler[draw]'" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("explain", "mynet.py:make", "--input", "4,7"),
            "Error: model 'mynet.py:make', --input '4,7': RuntimeError: mat1 and mat2 shapes cannot be multiplied "
            "(4x7 and 8x4) (--traceback",
        ),
        (("explain", "mynet.py:image"), "Error: model 'mynet.py:image': RuntimeError: Given groups=1, weight of size"),
        (
            ("debug", "mynet.py:make", "--input", "4,7"),
            "Error: model 'mynet.py:make', --input '4,7': RuntimeError: mat",
        ),
    ],
)
def test_a_wrong_shape_is_told_in_torchs_own_words(call, arguments, message):
    code, text = call(*arguments)
    assert code == 1
    assert text.replace("addmm: ", "").startswith(message.replace("addmm: ", ""))  # torch 2.15 does not name it
    assert len(text) < 300


def test_torch_logs_no_errors_of_shapes_while_the_cli_captures():
    """Warnings pass, and afterwards everything does."""
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    try:
        with torch_compat.without_error_log():
            log.error("inside")
            log.warning("warning")
        log.error("outside")
    finally:
        log.removeHandler(handler)
    assert seen == ["warning", "outside"]


def test_what_is_not_finite_in_float_blames_no_quantizer(call, tmp_path):
    code, text = call("debug", "mynet.py:spoiled", "--out", "mended.yaml", "--steps", "1")
    assert code == 0
    assert "no quantizer is to blame: float is not finite either (parameter 0.weight, step 1)" in text
    assert "note: mended.yaml is not written, as no rule is proposed" in text
    assert "keep in float" not in text
    assert ", 1 step " in text.replace("│", " ")
    assert not (tmp_path / "mended.yaml").exists()
