"""The tensor as estimators see it: its ends, block by block."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from range_objects import INF, NAN

from qcompiler.runtime.numbers.blocks import TENSOR, Block, view_blocks
from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.ranges.estimator import Observed


@pytest.mark.parametrize(
    ("block", "lowest", "highest", "signed", "unsigned"),
    [
        ([1.0, 2.0], 0.0, 2.0, 2.0, 2.0),
        ([-3.0, -2.0], -3.0, 0.0, 3.0, 0.0),
        ([-3.0, 2.0], -3.0, 2.0, 3.0, 2.0),
        ([0.0, -0.0], 0.0, 0.0, 0.0, 0.0),
        ([2.0**-133, 0.0], 0.0, 2.0**-133, 2.0**-133, 2.0**-133),
        ([INF, 1.0], 0.0, INF, INF, INF),
        ([-INF, 1.0], -INF, 1.0, INF, INF),  # an unsigned block shows −inf too
        ([NAN, 1.0], NAN, NAN, NAN, NAN),
        ([NAN, -INF], NAN, NAN, NAN, NAN),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranges(
    block: list[float], lowest: float, highest: float, signed: float, unsigned: float, dtype: torch.dtype
) -> None:
    # the block of two stands between others that must not leak into it
    x = torch.tensor([[9.0, -9.0], block, [8.0, -8.0]], dtype=dtype)
    view = view_blocks((3, 2), "bc", Block(channel=2))
    low, high = Observed(x, view, Kind.AFFINE, 8).ends
    results = [low, high, *(Observed(x, view, kind, 7).ends[1] for kind in (Kind.SIGNED, Kind.UNSIGNED))]
    for result, expected in zip(results, (lowest, highest, signed, unsigned), strict=True):
        assert result.dtype == torch.float32
        assert result.shape == (3, 1)
        np.testing.assert_array_equal(result[1].numpy(), [expected])
    assert [float(result[0]) for result in results] == [-9, 9, 9, 9]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_ranges_of_nothing(shape: tuple[int, ...]) -> None:
    view = view_blocks(shape, "bco"[: len(shape)], TENSOR)
    x = torch.empty(shape)
    for result in (end for kind in Kind for end in Observed(x, view, kind, 7).ends):
        assert result.dtype == torch.float32
        assert tuple(result.shape) == view.counts
        assert not result.any()


def test_range_does_not_see_the_filling(tensor: Callable[[np.ndarray], torch.Tensor]) -> None:
    x = tensor(np.full(5, -4, np.float32))
    low, high = Observed(x, view_blocks((5,), "c", Block(channel=3)), Kind.AFFINE, 8).ends
    assert (low.tolist(), high.tolist()) == ([-4, -4], [0, 0])
