"""Ranges that clip gradients on purpose: the clip is sought by a measure of the error, and kept."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor

from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.ranges.estimator import Ends, Observed, Range, mix_states


@dataclasses.dataclass(frozen=True)
class Cosine(Range):
    """The clip c = i/steps·max|x| with the smallest 1 − cos(x, x̂), sought every `every` steps and kept in between.

    Direction-sensitive gradient clipping (DSGC; F. Zhu et al.: Towards Unified INT8 Training, CVPR 2020, §3.3). x̂ is x
    rounded to nearest on the symmetric grid of c. Of equal cosines the larger clip is taken.
    """

    name: ClassVar[str] = "cosine"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"every": (1, 1e9), "steps": (1, 10_000)}
    whole: ClassVar[tuple[str, ...]] = ("every", "steps")
    has_state: ClassVar[bool] = True
    by_block: ClassVar[bool] = False
    every: float = 100
    steps: float = 20

    @property
    def refresh(self) -> int:
        """`every`."""
        return int(self.every)

    @property
    def is_static(self) -> bool:
        """True: between two searches the state is the range."""
        return True

    @property
    def width(self) -> int:
        """(clip, 1 − cosine of the latest search): the deviation, by which DSGC slows the learning rate too."""
        return 2

    def first(self, seen: Observed) -> Tensor:
        """Return the clip of the search over the present tensor, and the deviation."""
        x = seen.x.to(torch.float32)
        top = x.abs().amax()
        clips = [top * (i / self.steps) for i in range(int(self.steps), 0, -1)]
        cosines = torch.stack([_search_cosine(x, _round_to(x, clip, 2**seen.magnitude_bits - 1)) for clip in clips])
        deviation = (1 - cosines.amax()).clamp(min=0.0)
        return torch.stack([torch.stack(clips)[cosines.argmax()], deviation]).unsqueeze(1)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """±clip for every block."""
        high = state[0].reshape(()).expand(seen.view.counts)
        return -high, high

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """Return the state unchanged; NaN if the search met zeros only, so that the next tensor is searched."""
        return torch.where(state[0] > 0, state, torch.nan)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the larger clip, the larger deviation."""
        return torch.maximum(one, other)


def _round_to(x: Tensor, clip: Tensor, levels: int) -> Tensor:
    scale = (clip / levels).clamp(min=2.0**-126)
    return torch.round(x / scale).clamp(-levels, levels) * scale


def _search_cosine(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum().sqrt() * y.square().sum().sqrt()
    return (x * y).sum() / norms.clamp(min=2.0**-126)


@dataclasses.dataclass(frozen=True)
class LargeGradients(Range):
    """γ times the largest magnitude of each block, γ moved after every step by the count of clipped elements.

    γ ← clip(γ + rate·sign(R − ratio/(2^b−1)), 0.001, 1) with R the fraction of elements beyond ±γ·max (Kim et al.:
    Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients, ECCV 2024, §3). γ starts at the
    percentile that leaves that fraction outside. With a `momentum` above 0 the maximum is not the present tensor's but
    the in-hindsight one, for one pass: then a block is the whole tensor.
    """

    name: ClassVar[str] = "large"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"ratio": (0, 1), "rate": (0, 1), "momentum": (0, 1)}
    has_state: ClassVar[bool] = True
    by_block: ClassVar[bool] = False
    ratio: float = 0.001
    rate: float = 0.001
    momentum: float = 0.0

    @property
    def is_static(self) -> bool:
        """True with a momentum."""
        return self.momentum > 0

    @property
    def width(self) -> int:
        """(γ), with a momentum (γ, largest magnitude of the past)."""
        return 2 if self.is_static else 1

    def first(self, seen: Observed) -> Tensor:
        """γ at the percentile, 1 for a tensor of zeros; the tensor's own magnitude."""
        low, high = seen.ends
        tops = torch.maximum(-low, high)
        share = seen.x.to(torch.float32).abs() / seen.view.spread(tops).clamp(min=2.0**-126)
        gamma = seen.rank(share, self._target(seen)).clamp(0.001, 1.0)
        gamma = torch.where(tops.amax() == 0, 1.0, gamma)
        return torch.stack([gamma, tops.amax()][: self.width]).unsqueeze(1)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """±γ·magnitude."""
        if self.is_static:
            high = (state[0] * state[1]).reshape(()).expand(seen.view.counts)
            return -high, high
        low, high = seen.ends
        return low * state[0], high * state[0]

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """γ after the count, NaN for a tensor that is not finite; and the moving average of the magnitude."""
        outside = seen.outside(self.ends(seen, state))
        low, high = seen.ends
        top = torch.maximum(-low, high).amax().reshape(1)
        gamma = (state[0] + self.rate * torch.sign(outside - self._target(seen))).clamp(0.001, 1.0)
        gamma = torch.where(torch.isfinite(top), gamma, torch.nan)
        if not self.is_static:
            return gamma.unsqueeze(0)
        return torch.stack([gamma, mix_states(self.momentum, state[1], top)])

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the larger γ (which clips less) and the larger magnitude."""
        return torch.maximum(one, other)

    def _target(self, seen: Observed) -> float:
        """α/(2^b−1): 6.7e-5 at 4 bits and α = 0.001."""
        bits = seen.magnitude_bits + (seen.kind is Kind.SIGNED)
        return self.ratio / float(2**bits - 1)


#: every estimator of this file
SEARCHED: Final[tuple[type[Range], ...]] = (
    Cosine,
    LargeGradients,
)
