"""Range estimators: the sources of the ends of a quantizer's range, one frozen class each.

An estimator is pure. Its `state`, float32 [width, *unit], is an input of the step and the state after it an output;
NaN marks a state that has seen nothing yet. *Static* estimators take the range from the state alone, so that one pass
over the tensor both quantizes it and observes it for the next step; *dynamic* ones read the tensor first.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor

from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.ranges.estimator import Ends, Observed, Range
from qcompiler.runtime.ranges.learned import LearnedEnd, Lsq, Pact
from qcompiler.runtime.ranges.statistical import Adaptive, Sawb


@dataclasses.dataclass(frozen=True)
class Current(Range):
    """The present tensor's own range: two passes, nothing kept."""

    name: ClassVar[str] = "current"

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """(lowest, highest) of each block."""
        return seen.ends


def _mix_states(momentum: float, old: Tensor, new: Tensor) -> Tensor:
    return momentum * old + (1 - momentum) * new


@dataclasses.dataclass(frozen=True)
class Running(Range):
    """Running min-max: m·state + (1−m)·present, the present tensor included, so two passes."""

    name: ClassVar[str] = "running"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"momentum": (0, 1)}
    has_state: ClassVar[bool] = True
    momentum: float = 0.9

    @property
    def width(self) -> int:
        """(low, high)."""
        return 2

    def first(self, seen: Observed) -> Tensor:
        """Return the tensor's own range."""
        return torch.stack(seen.ends)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """Return the state after the present tensor."""
        low, high = self.update(seen, state)
        return low, high

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """m·state + (1−m)·(lowest, highest)."""
        return _mix_states(self.momentum, state, torch.stack(seen.ends))

    def frozen(self, seen: Observed, state: Tensor) -> Ends:
        """Return the state alone."""
        return state[0], state[1]


@dataclasses.dataclass(frozen=True)
class Hindsight(Range):
    """In-hindsight: the state alone, q_t = m·q_{t−1} + (1−m)·(lowest, highest)_{t−1}, one pass.

    If more than `guard` of the elements were clipped (`Observed.clipped`), the range is widened by the present one, and
    the third number of the state counts that (Fournarakis & Nagel, CVPRW 2021, §3; the guard is ours). Widened, not
    replaced: a gradient that is positive in one step and negative in the next would be clipped to zero in every step.
    """

    name: ClassVar[str] = "hindsight"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"momentum": (0, 1), "guard": (0, 1)}
    has_state: ClassVar[bool] = True
    momentum: float = 0.9
    guard: float = 0.01

    @property
    def is_static(self) -> bool:
        """True."""
        return True

    @property
    def width(self) -> int:
        """(low, high, steps in which the guard fired)."""
        return 3

    def first(self, seen: Observed) -> Tensor:
        """Return the tensor's own range, the guard never fired."""
        low, high = seen.ends
        return torch.stack([low, high, torch.zeros_like(low)])

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """Return the state."""
        return state[0], state[1]

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """Return the moving average; if the guard fires, what holds both the state and the present range."""
        now = torch.stack(seen.ends)
        fired = seen.clipped((state[0], state[1])) > self.guard
        both = torch.stack([torch.minimum(state[0], now[0]), torch.maximum(state[1], now[1])])
        ends = torch.where(fired, both, _mix_states(self.momentum, state[:2], now))
        return torch.cat([ends, (state[2] + fired.to(torch.float32)).unsqueeze(0)])

    def remark(self, state: Tensor) -> str:
        """Return how often the guard has fired."""
        fired = int(state[2].nan_to_num().max())  # NaN: nothing finite has been seen yet
        return f"more than {self.guard:.2%} was clipped in {fired} steps; the range was widened" if fired else ""

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the wider range, the larger count."""
        return torch.cat([super().merge(one, other), torch.maximum(one[2:], other[2:])])


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
    it was filled up with zeros. NaN or infinite if the block is not finite.
    """

    name: ClassVar[str] = "percentile"
    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent: got {self.percent:g}; valid: above 0, at most 100")

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """Return each block's own range, cut at its percentile."""
        low, high = seen.ends
        if seen.x.numel() == 0:
            return low, high
        dims = len(seen.view.axes)
        order = [*range(0, 2 * dims, 2), *seen.view.inner]
        magnitudes = seen.blocks.abs().permute(order).reshape(*seen.view.counts, -1)
        size = magnitudes.shape[-1]
        cut = torch.kthvalue(magnitudes, size - int((1 - self.percent / 100) * size + 1e-6))[0]
        finite = torch.isfinite(low) & torch.isfinite(high)
        return torch.where(finite, torch.maximum(low, -cut), low), torch.where(finite, torch.minimum(high, cut), high)


@dataclasses.dataclass(frozen=True)
class History(Range):
    """Predicted from the maxima of the last `length` steps: headroom·(max + deviations·std), one pass.

    Autoflex (Flexpoint, Köster et al., NIPS 2017, §3) with α = headroom and β = deviations; its γκ, 100 steps of the
    16-bit grid, is 0.3 % of the range and left out. A maximum that was clipped starts the history anew at twice itself.
    The first tensor fills the history.
    """

    name: ClassVar[str] = "history"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        "length": (1, 10_000),
        "deviations": (0, 100),
        "headroom": (0.01, 100),
    }
    whole: ClassVar[tuple[str, ...]] = ("length",)
    has_state: ClassVar[bool] = True
    length: float = 16
    deviations: float = 3.0
    headroom: float = 2.0

    @property
    def is_static(self) -> bool:
        """True."""
        return True

    @property
    def width(self) -> int:
        """Past magnitudes, the oldest first."""
        return int(self.length)

    def first(self, seen: Observed) -> Tensor:
        """Return the tensor's own magnitude, throughout."""
        return self._magnitude(seen).expand(self.width, *seen.view.counts).clone()

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """±headroom·(max + deviations·std), the std that of the whole history (not of a sample of it)."""
        high = self.headroom * (state.amax(0) + self.deviations * state.std(0, correction=0))
        return -high, high

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """Return the history with the present magnitude."""
        now = self._magnitude(seen)
        _, high = self.ends(seen, state)
        return torch.where(now > high, (2 * now).expand_as(state), torch.cat([state[1:], now.unsqueeze(0)]))

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the larger, number by number."""
        return torch.maximum(one, other)

    def _magnitude(self, seen: Observed) -> Tensor:
        low, high = seen.ends
        return torch.maximum(-low, high)


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
        """Return the clip of the search over the present tensor, and what it costs."""
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
        """Return the state as it is; NaN if the search met zeros only, so that the next tensor is searched."""
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
    """γ times the largest magnitude of each block, γ moved after every step by the count of what was clipped.

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
        return torch.stack([gamma, _mix_states(self.momentum, state[1], top)])

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the larger γ (which clips less) and the larger magnitude."""
        return torch.maximum(one, other)

    def _target(self, seen: Observed) -> float:
        """α/(2^b−1): 6.7e-5 at 4 bits and α = 0.001."""
        bits = seen.magnitude_bits + (seen.kind is Kind.SIGNED)
        return self.ratio / float(2**bits - 1)


#: every estimator; `parse_range` finds them by name
ESTIMATORS: Final[tuple[type[Range], ...]] = (
    Current,
    Running,
    Hindsight,
    Fixed,
    Percentile,
    History,
    Cosine,
    LargeGradients,
    Sawb,
    Adaptive,
    LearnedEnd,
    Lsq,
    Pact,
)


def parse_range(text: str) -> Range:
    """Return the estimator that `str` wrote: `current`, `hindsight(0.9,0.01)`; numbers left out have their defaults.

    Raises:
        ValueError: an unknown name, too many numbers, or one that is none.
    """
    match = re.fullmatch(r"([a-z-]+)(?:\(([-+.\de,]*)\))?", text)
    kinds = {kind.name: kind for kind in ESTIMATORS}
    if match is None or match[1] not in kinds:
        raise ValueError(f"range: got {text!r}; valid: {', '.join(kinds)}, with numbers as in hindsight(0.9,0.01)")
    kind = kinds[match[1]]
    fields = dataclasses.fields(kind)
    given = match[2].split(",") if match[2] else []
    if len(given) > len(fields):
        raise ValueError(f"range: {kind.name} takes {len(fields)} numbers, got {text!r}")
    try:
        return kind(**{field.name: float(number) for field, number in zip(fields, given, strict=False)})
    except ValueError as error:
        raise ValueError(f"range: got {text!r}: {error}") from None
