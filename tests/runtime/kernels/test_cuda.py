"""The kernels of CUDA: which products they compute, and every reason. Their sums: test_runs.py, test_triton.py."""

import dataclasses

import pytest

from qcompiler.runtime.kernels import cuda, runs, table
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.numbers.formats import parse_format

INT8 = parse_format("int8")
FACTS = Facts(device="cuda", formats=(INT8, INT8), rows=17, length=64, columns=8)
needs_triton = pytest.mark.skipif(bool(cuda.explain_triton()), reason=cuda.explain_triton())


def test_whole_sums_are_those_of_torch():
    assert table.find_kernel(FACTS, faster=False) is cuda.INT_MM


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 16}, "the integer kernel of CUDA needs more than 16 rows, got 16"),
        ({"length": 60}, "the integer kernel of CUDA needs a right matrix of multiples of 8, got [60, 8]"),
        ({"columns": 10}, "the integer kernel of CUDA needs a right matrix of multiples of 8, got [64, 10]"),
        ({"columns": 0}, "the integer kernel of CUDA needs a right matrix of multiples of 8, got [64, 0]"),
        ({"length": 0}, "the integer kernel of CUDA needs a right matrix of multiples of 8, got [0, 8]"),
    ],
)
def test_shapes_that_torch_refuses(change, reason):
    assert table.find_kernel(dataclasses.replace(FACTS, **change), faster=False) == reason


@needs_triton
@pytest.mark.parametrize("run", [32, 48, 128, 1000])
def test_sums_of_runs_are_ours(run):
    assert table.find_kernel(dataclasses.replace(FACTS, rows=1, columns=1, run=run), faster=False) is cuda.RUNS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": 31}, runs.explain_short(31)),
        (
            {"run": 32, "formats": (parse_format("uint4"), INT8)},
            "the kernel of sums with several scales takes signed integers, got uint4",
        ),
    ],
)
def test_runs_that_have_no_kernel(change, reason):
    assert table.find_kernel(dataclasses.replace(FACTS, **change), faster=False) == reason


def test_without_triton(monkeypatch):
    monkeypatch.setattr(cuda, "explain_triton", lambda: "Triton is not installed")
    assert table.find_kernel(dataclasses.replace(FACTS, run=32), faster=False) == "Triton is not installed"


@pytest.mark.parametrize("run", [0, 32])
def test_no_kernel_is_chosen_for_its_speed(run):
    """Nobody has timed them."""
    row = cuda.RUNS if run else cuda.INT_MM
    assert row.weigh(dataclasses.replace(FACTS, run=run)) == (
        'integers were not timed on CUDA; valid: execution="integer"'
    )
