"""Sums of runs in Triton: int8 codes on tensor cores, scaled between runs. Imported at the first use (cuda.py)."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.runtime.kernels.triton_support import EXACT

#: rows and columns of the result that one program computes
_TILE: Final = 64
#: most elements of a sum that one instruction reads of each row
_MOST_AT_ONCE: Final = 128


@triton.jit
def _sum_tile(
    a,
    a_row,
    a_step,
    a_factors,
    a_edge,
    b,
    b_column,
    b_step,
    b_factors,
    b_edge,
    result,
    rows,
    columns,
    length,
    run_length: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    column = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
    runs = tl.cdiv(length, run_length)
    sums = tl.zeros((tile, tile), tl.float32)
    for run in range(runs):
        end = tl.minimum((run + 1) * run_length, length)
        exact = tl.zeros((tile, tile), tl.int32)
        for start in range(run * run_length, end, chunk):
            step = (start + tl.arange(0, chunk)).to(tl.int64)
            left_inside = (row < rows)[:, None] & (step < end)[None, :]
            left = tl.load(a + row[:, None] * a_row + step[None, :] * a_step, mask=left_inside, other=0)
            right_inside = (step < end)[:, None] & (column < columns)[None, :]
            right = tl.load(b + step[:, None] * b_step + column[None, :] * b_column, mask=right_inside, other=0)
            exact = tl.dot(left, right, exact, out_dtype=tl.int32)
        of_rows = tl.load(a_factors + row // a_edge * runs + run, mask=row < rows, other=0.0)
        of_columns = tl.load(b_factors + column // b_edge * runs + run, mask=column < columns, other=0.0)
        sums = sums + exact.to(tl.float32) * (of_rows[:, None] * of_columns[None, :])
    place = result + row[:, None] * columns + column[None, :]
    tl.store(place, sums, mask=(row < rows)[:, None] & (column < columns)[None, :])


def sum_runs(a: Tensor, a_factors: Tensor, a_edge: int, b: Tensor, b_factors: Tensor, b_edge: int, run: int) -> Tensor:
    """Return the sums run by run (arguments: `multiply_runs`); operands are read in any strides."""
    (rows, length), columns = a.shape, b.shape[1]
    result = a.new_empty((rows, columns), dtype=torch.float32)
    if not result.numel():
        return result
    with torch.cuda.device_of(a):  # which Triton calls; of a CPU, in the interpreter, nothing
        _sum_tile[triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE)](
            a,
            *a.stride(),
            a_factors.contiguous(),
            a_edge,
            b,
            *reversed(b.stride()),
            b_factors.contiguous(),
            b_edge,
            result,
            rows,
            columns,
            length,
            run_length=run,
            chunk=min(_MOST_AT_ONCE, triton.next_power_of_2(run)),
            tile=_TILE,
            **EXACT,
        )
    return result
