"""Ranges from statistics of the present tensor other than the ends."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor

from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.ranges.estimator import Ends, Observed, Range

#: bits → (c1, c2) of SAWB, fitted by the authors to six distributions
_SAWB: Final = {2: (3.212, 2.178), 4: (12.68, 12.80), 5: (17.74, 18.64)}


@dataclasses.dataclass(frozen=True)
class Sawb(Range):
    """Statistics-aware weight binning: ±|c1·√E[x²] − c2·E|x|| of each block, for 2, 4 and 5 bits.

    J. Choi et al.: Accurate and Efficient 2-bit Quantized Neural Networks, SysML 2019, §3 (one block a tensor). Never
    beyond the block's own largest magnitude; unsigned formats take (0, high). Other widths have no coefficients: an
    error. A last, smaller block takes the means over its own elements.
    """

    name: ClassVar[str] = "sawb"

    def check_bits(self, bits: int) -> None:
        """Refuses widths without coefficients."""
        if bits not in _SAWB:
            raise ValueError(f"sawb: got a format of {bits} bits; valid: {', '.join(map(str, _SAWB))} bits")

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """By block, so that in evaluation no sample's range depends on others; not finite if the block is not.

        Means are float64, so that the order of summation, which no two kernels share, does not show in float32.
        """
        c1, c2 = self.coefficients(seen.magnitude_bits + (seen.kind is Kind.SIGNED))
        inner = seen.view.inner
        blocks = seen.blocks.to(torch.float64)
        members = seen.view.split(torch.ones_like(seen.x, dtype=torch.float32)).sum(inner).clamp(min=1.0)
        root = (blocks.square().sum(inner) / members).sqrt()
        clip = (c1 * root - c2 * (blocks.abs().sum(inner) / members)).abs()
        high = torch.minimum(clip.to(torch.float32), seen.largest)
        return torch.zeros_like(high) if seen.kind is Kind.UNSIGNED else -high, high

    @staticmethod
    def coefficients(bits: int) -> tuple[float, float]:
        """(c1, c2) of formats of so many bits."""
        return _SAWB[bits]


@dataclasses.dataclass(frozen=True)
class Adaptive(Range):
    """By the shape of the distribution of each block: the largest magnitude, or a moving average of it.

    A block in which more than 30 % of the elements lie beyond one standard deviation counts as Gaussian and takes the
    maximum; any other ("inverted T") takes s_t = (1 − k·rate)·s_{t−1} + rate·max|g|, with k = 1. K. Zhao et al.:
    Distribution Adaptive INT8 Quantization for Training CNNs, AAAI 2021, §4 (from summaries).
    """

    name: ClassVar[str] = "adaptive"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"rate": (0, 1), "share": (0, 1)}
    has_state: ClassVar[bool] = True
    rate: float = 0.8
    share: float = 0.3

    @property
    def width(self) -> int:
        """The magnitude s."""
        return 1

    def first(self, seen: Observed) -> Tensor:
        """Return the largest magnitude."""
        return seen.largest.unsqueeze(0)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """±s, the present tensor included."""
        (high,) = self.update(seen, state)
        return -high, high

    def frozen(self, seen: Observed, state: Tensor) -> Ends:
        """±s of the state."""
        return -state[0], state[0]

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """Return the maximum of a Gaussian block, the moving average of any other."""
        high = seen.largest
        inner = seen.view.inner
        blocks = seen.blocks
        mean = blocks.mean(inner, keepdim=True)
        beyond = (blocks - mean).abs() > blocks.std(inner, correction=0, keepdim=True)
        gaussian = beyond.to(torch.float32).mean(inner) > self.share
        moved = (1 - self.rate) * state[0] + self.rate * high
        return torch.where(gaussian, high, moved).unsqueeze(0)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the larger."""
        return torch.maximum(one, other)


#: every estimator of this file
STATISTICAL: Final[tuple[type[Range], ...]] = (
    Sawb,
    Adaptive,
)
