"""What can go wrong while a file is written: a clear error, and what was there before stays whole."""

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler


@pytest.fixture
def small():
    """A module that needs no training to be exported."""
    return qcompiler.compile(nn.Sequential(nn.Linear(64, 64)), "tensor-int8", backend="eager")


def export(qmodel, path):
    return qcompiler.export_onnx(qmodel, path, (torch.randn(2, 64),))


def contents(folder):
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def test_a_folder_that_is_a_file(small, tmp_path):
    """Root may write where modes forbid it, but into no file."""
    (tmp_path / "file").write_bytes(b"good")
    with pytest.raises(NotADirectoryError, match="file"):
        export(small, tmp_path / "file" / "m.onnx")
    assert contents(tmp_path) == {"file": b"good"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
def test_a_folder_that_nobody_can_write(small):
    """Nothing is computed before that is known."""
    with pytest.raises(OSError, match="/proc"):
        export(small, "/proc/m.onnx")


@pytest.fixture
def full_disk():
    """No file may become longer than 2 kB: the operating system refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_is_full(beside, small, tmp_path, full_disk, monkeypatch):
    """The bytes of the file itself, and those of the tensors beside it."""
    if beside:
        monkeypatch.setattr("qcompiler.deploy.export._EXTERNAL", 0)
    path = tmp_path / "m.onnx"
    export(small, path)
    good = contents(tmp_path)
    assert max(map(len, good.values())) > 2048
    full_disk()
    with pytest.raises(OSError, match=r"is the disk full\?.*m\.onnx"):
        export(small, path)
    assert contents(tmp_path) == good


class Apart(nn.Module):
    """As many rows as are positive."""

    def forward(self, x):
        return x[: int((x.sum() > 0).item()) + 1]


class Some(nn.Module):
    """The rows whose first number is positive."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, x):
        return self.layer(x[x[:, 0] > 0])


class Special(nn.Module):
    """An operator without a form in ONNX."""

    def forward(self, x):
        return torch.special.airy_ai(x)


@pytest.mark.parametrize(
    ("model", "recipe", "match"),
    [
        (Apart(), "identity", "cannot be traced as one graph"),
        (Some(), "hyperblock-int8", "guard on data-dependent"),
        (Special(), "identity", "airy_ai"),
        (nn.Linear(64, 64), "in-hindsight-w8a8g8", "no range yet for .*/input.*; train the model for a step"),
        (nn.Linear(64, 64).to(torch.bfloat16), "tensor-int8", "weight is bfloat16.* valid: a model in float32"),
    ],
)
def test_a_good_file_stays_where_a_model_is_refused(model, recipe, match, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"good")
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    x = torch.randn(2, 64, dtype=next((p.dtype for p in model.parameters()), torch.float32))
    with pytest.raises(qcompiler.ExportError, match=match):
        qcompiler.export_onnx(qmodel, path, (x,))
    assert contents(tmp_path) == {"m.onnx": b"good"}


def test_the_folder_of_a_relative_path(small, tmp_path, monkeypatch):
    """A path without a folder is in this one; a link stays a link."""
    monkeypatch.chdir(tmp_path)
    os.symlink("real.onnx", "link.onnx")
    assert export(small, "link.onnx").path == tmp_path.resolve() / "real.onnx"
    assert Path("link.onnx").is_symlink()
    assert sorted(contents(tmp_path)) == ["link.onnx", "real.onnx"]
