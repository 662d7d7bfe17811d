"""What can go wrong while a file is written: a clear error, and what was there before stays whole."""

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.exporting.inputs import check_inputs
from qcompiler.exporting.report import list_unread
from qcompiler.exporting.trace import trace_model
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec


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
        monkeypatch.setattr("qcompiler.exporting.write_file._EXTERNAL", 0)
    path = tmp_path / "m.onnx"
    export(small, path)
    good = contents(tmp_path)
    assert max(map(len, good.values())) > 2048
    full_disk()
    with pytest.raises(OSError, match=r"is the disk full\?.*m\.onnx"):
        export(small, path)
    assert contents(tmp_path) == good


@pytest.mark.parametrize("name", ["nowhere/m.onnx", f"{'m' * 251}.onnx"])
def test_a_path_that_cannot_be(name, small, tmp_path):
    """The error names the path as given, not that of the unfinished file."""
    path = tmp_path / name
    with pytest.raises(OSError, match=r"name too long|No such") as caught:
        export(small, path)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.float16])
def test_inputs_of_another_type(dtype, small, tmp_path):
    x = torch.ones(2, 64).to(dtype)
    message = rf"^export: the model does not run on the inputs input \({dtype} 2×64\): RuntimeError".replace(
        "torch.", ""
    )
    with pytest.raises(qcompiler.ExportError, match=message):
        qcompiler.export_onnx(small, tmp_path / "m.onnx", (x,))
    assert list(tmp_path.iterdir()) == []


class Counter(nn.Module):
    """Counts its calls, and takes one more input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *, w):
        self.calls += 1
        return x + w


def test_inputs_are_tried_on_copies():
    """Trying moves no buffer and no mode; an empty batch, another size and a missing input have names."""
    model, x = Counter(), torch.ones(2, 3)
    check_inputs(model, (x,), {"w": x})
    assert (model.calls, model.training) == (0, True)
    for kwargs, message in [
        ({"w": x[:0]}, r"^export: input w \(float32 0×3\) holds no sample; valid: at least one$"),
        ({"w": torch.ones(5)}, r"inputs x \(float32 2×3\), w \(float32 5\): RuntimeError: The size of tensor"),
        ({"w": None}, r"w \(NoneType\): TypeError"),
        ({}, "inputs: missing a required .*'w'"),
    ]:
        with pytest.raises(qcompiler.ExportError, match=message):
            check_inputs(model, (x,), kwargs)


def test_files_that_are_cut(small, tmp_path):
    """Errors of a verification name it and the file, wherever they come from."""
    path, x = tmp_path / "m.onnx", torch.randn(2, 64)
    export(small, path)
    for inputs, message in [
        ((x[:0],), r"^verify: input input \(float32 0×64\) holds no sample"),
        ((x.double(),), r"^verify: the model does not run on the inputs input \(float64 2×64\)"),
    ]:
        with pytest.raises(qcompiler.ExportError, match=message):
            qcompiler.verify_onnx(small, path, inputs)
    for name in ("example_kwargs", "kwargs"):
        with pytest.raises(qcompiler.ExportError, match=r"^verify: example_kwargs: got 'x'; valid: a mapping"):
            qcompiler.verify_onnx(small, path, (x,), **{name: "x"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(qcompiler.ExportError, match=r"^verify: .*m\.onnx is not a whole file of ONNX"):
        qcompiler.verify_onnx(small, path, (x,))


def test_ranges_of_another_recipe(tmp_path):
    """Those that no quantizer reads are counted; gradients are none of them, where the recipe has theirs."""
    torch.manual_seed(0)
    x = torch.randn(2, 4)

    def made(recipe):
        return qcompiler.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), recipe, backend="eager")

    other, own = made("in-hindsight-w8a8g8"), made("deploy-int8")
    for model in (other, own):
        model(x).sum().backward()
    unread = sorted(other.ranges().keys() - own.ranges().keys())
    assert unread
    assert all(name in own.ranges() for name in other.ranges() if name.endswith("/grad"))
    assert [*list_unread(other, trace_model(other, (x,), {}, None, frozen=False).plan)] == []
    own.load_state_dict(other.state_dict())
    (note,) = qcompiler.export_onnx(own, tmp_path / "m.onnx", (x,)).notes
    assert note.startswith(f"{len(unread)} of {len(other.ranges())} ranges belong to no quantizer of recipe 'deploy")
    assert all(name in note for name in unread)


def test_ranges_of_another_meaning():
    """Steps of 8 bits are none of 4 bits, though both are one number."""
    eight, four = (
        Recipe(
            name=f"lsq{bits}",
            rules=(Rule(role=Role.WEIGHT, spec=parse_spec(f"int{bits}:real:tensor:nearest:pass:lsq")),),
        )
        for bits in (8, 4)
    )
    x = torch.randn(2, 4)
    of_eight, of_four = (
        qcompiler.compile(nn.Sequential(nn.Linear(4, 4)), one, backend="eager") for one in (eight, four)
    )
    of_eight(x).sum().backward()
    of_four.load_state_dict(of_eight.state_dict())
    with pytest.raises(qcompiler.ExportError, match="the ranges of 0/weight belong to another recipe"):
        trace_model(of_four, (x,), {}, None)


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
        (Some(), "hyperblock-int8", "layer: reads a tensor, .* whose number of elements follows from values"),
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
