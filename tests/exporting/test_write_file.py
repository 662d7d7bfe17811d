"""A file takes its name whole, with the tensors beside it, or nothing changes."""

import errno
import os

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.exporting import build


def test_a_folder_that_is_not_there(tmp_path):
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "identity", backend="eager")
    with pytest.raises(OSError, match="nowhere"):
        qcompiler.export_onnx(qmodel, tmp_path / "nowhere" / "m.onnx", (torch.randn(2, 4),))
    with pytest.raises(IsADirectoryError):
        qcompiler.export_onnx(qmodel, tmp_path, (torch.randn(2, 4),))


@pytest.mark.parametrize("part", ["save_model", "check_file"])
def test_a_good_file_stays_whole(part, tmp_path, monkeypatch):
    """A full disk, or a file that turns out not to be valid, changes nothing."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"good")
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "tensor-int8", backend="eager")

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(build, part, full)
    with pytest.raises(OSError, match="No space left"):
        qcompiler.export_onnx(qmodel, path, (torch.randn(2, 4),))
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("m.onnx", b"good")]


def test_tensors_beside_the_file(tmp_path, monkeypatch):
    """Above the limit of protobuf the tensors lie in a second file; the limit is lowered here."""
    monkeypatch.setattr("qcompiler.exporting.write_file._EXTERNAL", 0)
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(64, 64)), "channelwise-int4", backend="eager")
    path = tmp_path / "m.onnx"
    for _ in range(2):  # the second export replaces the file, and its data
        qcompiler.export_onnx(qmodel, path, (torch.randn(2, 64),))
    (data,) = [one for one in tmp_path.iterdir() if one != path]
    assert data.name.startswith("m.onnx.")
    assert data.name.endswith(".data")
    assert qcompiler.verify_onnx(qmodel, path, (torch.randn(3, 64),)).exact


def test_an_error_after_the_file_took_its_name(tmp_path, monkeypatch):
    """The disk fails once the new file is in its place: its tensors stay, since it is that file that people load."""

    def fail(folder):
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr("qcompiler.exporting.write_file._EXTERNAL", 0)
    monkeypatch.setattr("qcompiler.files._sync_folder", fail)
    qmodel = qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), "channelwise-int4", backend="eager")
    with pytest.raises(OSError, match="Input/output error"):
        qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(2, 4),))
    assert qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(3, 4),)).exact
