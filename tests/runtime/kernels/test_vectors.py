"""Kernels with the narrower vectors of AVX2, on a processor that has wider ones: the same bits."""

import os
from pathlib import Path

import pytest
from own_process import run_tests

from qcompiler.runtime.kernels import loader

TESTS = Path(__file__).parents[2]


@pytest.mark.skipif(not loader.has_wide_vectors(), reason="the vectors of this processor are not wide")
def test_narrow_vectors():
    """In a process of its own, as libraries are loaded once."""
    files = [TESTS / "runtime" / name for name in ("kernels/test_runs.py", "test_convolutions.py", "test_products.py")]
    path = os.pathsep.join(filter(None, (str(TESTS / "helpers"), os.environ.get("PYTHONPATH"))))
    run_tests(files, "-p", "narrow_vectors", least=20, PYTHONPATH=path)
