"""The command line, in this process or in one of its own, and what its tests give it."""

import contextlib
import os
import subprocess
import sys

import torch
from click.testing import CliRunner

from qcompiler.cli.main import main

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

def batches():
    torch.manual_seed(1)
    for _ in range(3):
        yield torch.randn(8, 8), torch.randint(4, (8,))

def regression(model, batch):
    return (model(batch[0]) - 1).square().mean()

def images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), torch.randn(2, 3, 8, 8)

number = 3
nothing = []
"""


FAULT = """
name: bad
rules:
- {role: gradient, module: '2', format: int8, scale: real, block: tensor, range: 'fixed(-1e-5,1e-5)'}
- {format: int8, scale: real, block: tensor}
"""


def run(folder, *arguments, **environment):
    """(exit code, what was printed, errors) of one call in a folder, in this process, which has torch already."""
    torch.manual_seed(0)
    with contextlib.chdir(folder):
        made = CliRunner().invoke(main, [*map(str, arguments)], env={"COLUMNS": "100"} | environment)
    return made.exit_code, made.stdout, made.stderr


def run_process(folder, *arguments, **environment):
    """The same in a process of its own."""
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
