"""Ranges without a state: of the present tensor, or given."""

import dataclasses
from typing import ClassVar, Final

import torch
from torch import Tensor

from qcompiler.runtime.numbers.rounding import is_finite
from qcompiler.runtime.ranges.estimator import Ends, Observed, Range


@dataclasses.dataclass(frozen=True)
class Current(Range):
    """The present tensor's own range: two passes, nothing kept."""

    name: ClassVar[str] = "current"

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """(lowest, highest) of each block."""
        return seen.ends


@dataclasses.dataclass(frozen=True)
class Fixed(Range):
    """(low, high) as given, for the whole tensor."""

    name: ClassVar[str] = "fixed"
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (self.low <= 0 <= self.high and self.low < self.high):
            raise ValueError(f"low {self.low:g} and high {self.high:g} must have zero between them")

    @property
    def is_static(self) -> bool:
        """True."""
        return True

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """Return the two numbers, once a block."""
        low, high = (torch.full(seen.view.counts, end, device=seen.x.device) for end in (self.low, self.high))
        return low, high


@dataclasses.dataclass(frozen=True)
class Percentile(Range):
    """The percentile of the magnitudes of each block, by rank.

    Of the n elements of a whole block the largest ⌊n·(1 − percent/100)⌋ lie outside. A last, smaller block counts as if
    filled up with zeros. NaN or infinite if the block is not finite.
    """

    name: ClassVar[str] = "percentile"
    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent: got {self.percent:g}; valid: above 0, at most 100")

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """Return the range of each block, cut at the percentile."""
        low, high = seen.ends
        if seen.x.numel() == 0:
            return low, high
        dims = len(seen.view.axes)
        order = [*range(0, 2 * dims, 2), *seen.view.inner]
        magnitudes = seen.blocks.abs().permute(order).reshape(*seen.view.counts, -1)
        size = magnitudes.shape[-1]
        cut = torch.kthvalue(magnitudes, size - int((1 - self.percent / 100) * size + 1e-6))[0]
        finite = is_finite(low) & is_finite(high)
        return torch.where(finite, torch.maximum(low, -cut), low), torch.where(finite, torch.minimum(high, cut), high)


#: every estimator of this file
PRESENT: Final[tuple[type[Range], ...]] = (
    Current,
    Fixed,
    Percentile,
)
