"""Long commands say on the terminal what they are doing; what is piped, and what is quick, has none of it."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest

from qcompiler.cli.progress import show_progress

SLOW = """
import time
import torch
from torch import nn

def make():
    time.sleep(2.5)  # with the start of the process more than two seconds
    return nn.Linear(4, 4), torch.randn(2, 4)
"""


class Terminal:
    """A stream that says it is a terminal, or not."""

    def __init__(self, is_terminal=True):
        self.is_terminal, self.text = is_terminal, ""

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def screen(text):
    """What is left on a line of a terminal: a carriage return writes over it."""
    shown = ""
    for part in text.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def test_a_line_with_the_seconds_which_is_gone_in_the_end(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress("drawing graph.html", start=time.monotonic() - 100):
        time.sleep(0.8)
        assert re.fullmatch(r"drawing graph\.html: 10\d s", screen(terminal.text))
    assert screen(terminal.text) == ""
    assert "\n" not in terminal.text


def test_a_quick_command_says_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress("drawing", start=time.monotonic()):
        time.sleep(0.1)
    assert terminal.text == ""


def test_an_error_clears_the_line_and_passes(monkeypatch):
    terminal, threads = Terminal(), threading.active_count()
    monkeypatch.setattr(sys, "stderr", terminal)

    def fail():
        with show_progress("x" * 500, start=0):
            time.sleep(0.2)
            assert 0 < len(screen(terminal.text)) < 200  # no longer than the terminal is wide
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert screen(terminal.text) == ""
    assert threading.active_count() == threads


def test_what_is_no_terminal_stays_empty(monkeypatch):
    pipe = Terminal(is_terminal=False)
    monkeypatch.setattr(sys, "stderr", pipe)
    with show_progress("drawing", start=0):
        time.sleep(0.1)
    assert pipe.text == ""


def draw(folder, **streams):
    command = [sys.executable, "-m", "qcompiler", "draw", "slow.py:make", "graph.html", "--json"]
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"COLUMNS": "80"}, text=True, **streams)


@pytest.mark.full
def test_draw_on_a_terminal_and_in_a_pipe(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    ours, theirs = pty.openpty()
    with draw(tmp_path, stdout=subprocess.PIPE, stderr=theirs) as done:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while part := os.read(ours, 4096):
                shown += part
        output = done.stdout.read()
    os.close(ours)
    assert done.returncode == 0, shown
    assert "capturing the graph: " in shown.decode()
    assert screen(shown.decode()) == ""
    assert re.fullmatch(r'\{"path": "graph.html", "bytes": \d+\}\n', output)
    with draw(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        output, errors = done.communicate()
    assert errors == ""
    assert output.startswith("{")
