"""The windows of a pool along its dimensions, as torch and as ONNX count them with ceil_mode."""

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np

FREE_SIZE: Final = (
    "ceil_mode over a free dimension, whose size decides which windows are cut; valid: ceil_mode=False, or that "
    "dimension fixed"
)


def cut_windows(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[list[int], np.ndarray]:
    """Return how far the last window of each dimension reaches over the padding, and whole size by cut size of each."""
    starts = [_list_starts(*one) for one in zip(sizes, kernel, stride, padding, strict=True)]
    ends = [size + pad for size, pad in zip(sizes, padding, strict=True)]
    axes = list(zip(starts, kernel, ends, strict=True))
    over = [max(own[-1] + edge - end, 0) for own, edge, end in axes]
    quotients = ([edge / (min(at + edge, end) - at) for at in own] for own, edge, end in axes)
    return over, np.asarray(functools.reduce(np.multiply.outer, quotients, np.ones(())))


def _list_starts(size: int, kernel: int, stride: int, padding: int) -> list[int]:
    """Return the start of every window of one dimension, with ceil_mode: none in the padding behind the tensor."""
    windows = range(_count_windows(size, kernel, stride, padding))
    return [at for at in (stride * i - padding for i in windows) if at < size]


def _count_windows(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return how many windows ONNX counts with ceil_mode."""
    return -(-(size + 2 * padding - kernel) // stride) + 1


def counts_one_more(size: int | None, kernel: int, stride: int, padding: int) -> bool:
    """Return True if ONNX counts a window that begins behind the tensor."""
    if size is None:
        return False
    return len(_list_starts(size, kernel, stride, padding)) < _count_windows(size, kernel, stride, padding)
