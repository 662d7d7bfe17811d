"""Patches: the codes that each position of a convolution reads, copied into the row of a matrix."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.runtime.products import find_point, make_signed


def patches(
    codes: Tensor,
    zero_point: Tensor | None,
    spec: str,
    edge: int,
    start: Sequence[int],
    count: Sequence[int],
    step: Sequence[int],
    taps: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return int8 [samples · positions, taps · channels]: at position t, tap u the code start + step·t + dilation·u.

    Outside of the tensor there is the code of zero, so a product of patches is right at the border for every zero
    point. Codes of 0 … 255 are less 128, as `make_signed` returns them.

    Args:
        codes: [samples, channels, *space], as `quantize` or `unpack` returns them.
        zero_point: one value for every `edge` samples, for formats that have one.
        spec: `str` of the `QuantSpec` of `codes`.
        edge: samples that share a zero point.
        start: for each dimension of space, the index that the first tap reads at the first position; can be negative.
        count: positions.
        step: from one position to the next.
        taps: codes that one position reads.
        dilation: from one tap to the next.
    """
    reach = [s * (n - 1) + d * (k - 1) + 1 for n, s, k, d in zip(count, step, taps, dilation, strict=True)]
    inner = make_signed(codes, spec).movedim(1, -1)
    rows = _pad_codes(inner, start, reach, lambda: find_point(zero_point, spec, len(codes), edge))
    sample, *space, channel = rows.stride()
    walk = [stride * s for stride, s in zip(space, step, strict=True)]
    skip = [stride * d for stride, d in zip(space, dilation, strict=True)]
    shape = (len(codes), *count, *taps, rows.shape[-1])
    view = rows.as_strided(shape, (sample, *walk, *skip, channel))
    return view.reshape(_find_shape(codes, count, taps))


def turn_taps(codes: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the codes [out, in, *taps] of a weight as [turned taps · out, stride · in], for the input gradient.

    Tap stride·u + r stands in row (last u − u, out) and column (r, in); zeros fill up the taps to a multiple of the
    stride. Made for weights without a zero point.
    """
    outputs, inputs, *taps = codes.shape
    turned = [-(-k // s) for k, s in zip(taps, stride, strict=True)]
    made = codes.new_zeros((*turned, outputs, *stride, inputs))
    rows = codes.movedim((0, 1), (-2, -1))
    for place in itertools.product(*map(range, taps)):
        runs = [u - 1 - k // s for u, k, s in zip(turned, place, stride, strict=True)]
        rests = [k % s for k, s in zip(place, stride, strict=True)]
        inner: Any = (*runs, slice(None), *rests)
        made[inner] = rows[place]
    return made.reshape(_find_turned(codes, stride))


def fake_turn_taps(codes: Tensor, stride: Sequence[int]) -> Tensor:
    """Return an empty matrix."""
    return codes.new_empty(_find_turned(codes, stride))


def _find_turned(codes: Tensor, stride: Sequence[int]) -> tuple[int, int]:
    rows, columns, *taps = codes.shape
    for read, step in zip(taps, stride, strict=True):
        rows, columns = rows * -(-read // step), columns * step
    return rows, columns


def fake_patches(
    codes: Tensor,
    zero_point: Tensor | None,
    spec: str,
    edge: int,
    start: Sequence[int],
    count: Sequence[int],
    step: Sequence[int],
    taps: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return an empty matrix."""
    return codes.new_empty(_find_shape(codes, count, taps), dtype=torch.int8)


def _find_shape(codes: Tensor, count: Sequence[int], taps: Sequence[int]) -> tuple[int, int]:
    rows, columns = codes.shape[0], codes.shape[1]
    for positions, read in zip(count, taps, strict=True):
        rows, columns = rows * positions, columns * read
    return rows, columns


def _pad_codes(
    codes: Tensor, start: Sequence[int], reach: Sequence[int], find_zero: Callable[[], Tensor | int | None]
) -> Tensor:
    """Return [samples, *reach, channels] in a memory order of its own: the codes from `start` on, zero outside."""
    samples, *space, channels = codes.shape
    padded = codes.new_empty((samples, *reach, channels))
    inside, taken = [slice(None)], [slice(None)]
    for first, length, extent in zip(start, reach, space, strict=True):
        low, high = max(first, 0), max(min(first + length, extent), first, 0)
        inside.append(slice(low - first, high - first))
        taken.append(slice(low, max(high, low)))
    if padded[tuple(inside)].numel() < padded.numel():
        _fill(padded, find_zero())
    padded[tuple(inside)] = codes[tuple(taken)]
    return padded


def _fill(padded: Tensor, zero: Tensor | int | None) -> None:
    """Write the code of zero everywhere; of each sample its own."""
    if not isinstance(zero, Tensor):
        padded.fill_(zero or 0)
    else:
        padded.copy_(zero.reshape(-1, *(1,) * (padded.ndim - 1)))


@dataclasses.dataclass(frozen=True)
class Rest:
    """The inputs of a convolution whose index plus padding has one remainder by the stride, in every dimension."""

    remainder: tuple[int, ...]
    #: the first of these inputs
    place: tuple[int, ...]
    #: the first output that an input reads, as for `patches`
    start: tuple[int, ...]
    #: how many taps these inputs meet
    taps: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """True if these inputs meet no tap."""
        return 0 in self.taps


@functools.lru_cache(maxsize=4096)
def list_rests(
    taps: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Rest, ...]:
    """Return the inputs of every remainder."""
    remainders = itertools.product(*map(range, stride))
    return tuple(_find_rest(taps, remainder, stride, padding, dilation) for remainder in remainders)


def _find_rest(taps: Sequence[int], remainder: tuple[int, ...], *geometry: Sequence[int]) -> Rest:
    stride, padding, dilation = geometry
    met = tuple(-(-(k - r) // s) for k, r, s in zip(taps, remainder, stride, strict=True))
    first = [-(-(p - r) // s) for p, r, s in zip(padding, remainder, stride, strict=True)]
    place = tuple(s * t + r - p for s, t, r, p in zip(stride, first, remainder, padding, strict=True))
    start = tuple(t - d * (k - 1) for t, d, k in zip(first, dilation, met, strict=True))
    return Rest(remainder, place, start, met)
