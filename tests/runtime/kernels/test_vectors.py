"""Kernels with the narrower vectors of AVX2, on a processor that has wider ones: the same bits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.runtime.kernels import loader

TESTS = Path(__file__).parents[2]
REASON = loader.explain_vectors()
if not REASON and loader._ask_processor().get_lanes() < 16:
    REASON = "the vectors of this processor are narrow ones"


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_narrow_vectors():
    """In a process of its own, as libraries are loaded once."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = [str(TESTS / "runtime" / name) for name in ("kernels/test_runs.py", "test_convolutions.py")]
    path = os.pathsep.join(filter(None, (str(TESTS / "helpers"), own.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", *files, "-p", "narrow_vectors", "-v"]
    done = subprocess.run(command, env={**own, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20
    assert "skipped" not in done.stdout
