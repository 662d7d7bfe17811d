"""Files are there whole or not at all: after a kill, a full disk, an error."""

import os
import signal
import subprocess
import sys

import pytest
import torch

import qcompiler
from qcompiler.files import check_writable, replace_file

KILLED = """
import os, signal, sys, torch, qcompiler

class Killer:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

qcompiler.save({"weight": torch.ones(3), "killer": Killer()}, sys.argv[1])
"""
FULL = """
import resource, signal, sys, torch, qcompiler

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    qcompiler.save({"weight": torch.ones(100_000)}, sys.argv[1])
except (OSError, RuntimeError):
    sys.exit(7)
"""


def run(script, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment, capture_output=True, timeout=120, check=False
    )
    return done.returncode


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    qcompiler.save({"weight": torch.arange(4.0)}, path)
    return path


def holds(path, weight):
    return torch.equal(torch.load(path, weights_only=True)["weight"], weight)


def test_errors_name_the_path_of_the_user(tmp_path):
    """Before the work, and where the work is done; nothing is left behind, and what was there stays."""
    held = tmp_path / "held.json"
    held.write_text("held")
    check_writable(held)
    for path, error in (
        (tmp_path / "none" / "x.json", FileNotFoundError),
        (tmp_path / ("x" * 300), OSError),
        (held / "x.json", NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ):
        with pytest.raises(error) as found:
            check_writable(path)
        assert found.value.filename == str(path)
        with pytest.raises(error) as found, replace_file(path) as part:
            part.write_text("new")
        assert found.value.filename == str(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("held.json", "held")]


def test_save_replaces(checkpoint):
    qcompiler.save({"weight": torch.zeros(2)}, checkpoint)
    assert holds(checkpoint, torch.zeros(2))
    assert [file.name for file in checkpoint.parent.iterdir()] == ["run.pt"]


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_a_kill_while_saving_loses_nothing(checkpoint):
    assert run(KILLED, checkpoint) == -signal.SIGKILL
    assert holds(checkpoint, torch.arange(4.0))
    # what is left over is in nobody's way
    assert [file.suffix for file in checkpoint.parent.iterdir() if file != checkpoint] == [".part"]
    qcompiler.save({"weight": torch.zeros(2)}, checkpoint)
    assert holds(checkpoint, torch.zeros(2))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
def test_a_full_disk_loses_nothing(checkpoint):
    assert run(FULL, checkpoint) == 7
    assert holds(checkpoint, torch.arange(4.0))
    assert [file.name for file in checkpoint.parent.iterdir()] == ["run.pt"]


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "text"
    path.write_text("old")

    def fail():
        with replace_file(path) as part:
            part.write_text("half")
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_permissions_and_links_stay(tmp_path):
    path, link = tmp_path / "text", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)
    with replace_file(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("write", [lambda path: qcompiler.save({}, path), check_writable])
def test_paths_that_cannot_be(tmp_path, write):
    """Errors name the path, not the unfinished file; the name of that is never longer."""
    for name in ("nowhere/run.pt", "m" * 256):
        with pytest.raises(OSError, match=r"No such file|name too long") as caught:
            write(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / ("m" * 255))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files on this system")
def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    """A device, or a pipe as here."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        check_writable(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        qcompiler.save({}, tmp_path / "pipe")
    assert not (tmp_path / "pipe").is_file()
