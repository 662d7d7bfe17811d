"""Test files in a process of their own, for what a process decides once."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_tests(files: Sequence[Path], *options: str, least: int, **variables: str) -> None:
    """Run test files with options of pytest and variables of the environment; `least` tests pass, none is skipped."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *map(str, files), *options, "-v"]
    done = subprocess.run(command, env={**own, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least
    assert "skipped" not in done.stdout
