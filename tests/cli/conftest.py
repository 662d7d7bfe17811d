"""A folder with a model, recipes and a checkpoint that was cut off."""

import pytest
import torch
from command_line import FAULT, MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "mynet.py").write_text(MODEL)
    (path / "mine.yaml").write_text("name: mine\nrules:\n- {format: int8, block: b2c8o4i4}\n")
    (path / "bad.yaml").write_text(FAULT)
    torch.save({"weight": torch.ones(1000)}, path / "cut.pt")
    (path / "cut.pt").write_bytes((path / "cut.pt").read_bytes()[:2000])
    return path
