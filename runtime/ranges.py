"""Range estimators: where the ends of a quantizer's range come from, one frozen class each.

An estimator is pure. Its `state`, float32 [width, *unit], is an input of the step and the state after it an output;
NaN marks a state that has seen nothing yet. *Static* estimators take the range from the state alone, so that one pass
over the tensor both quantizes it and observes it for the next step; *dynamic* ones read the tensor first.
"""

import dataclasses
import re
from typing import ClassVar, Final

import torch
from torch import Tensor

from qcompiler.runtime.blocks import BlockView
from qcompiler.runtime.formats import Kind

Ends = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Observed:
    """What an estimator can ask of the tensor in front of it; `magnitude_bits` and `kind` are those of its format."""

    x: Tensor
    view: BlockView
    kind: Kind
    magnitude_bits: int

    @property
    def blocks(self) -> Tensor:
        """float32, split into blocks: `BlockView.split`."""
        return self.view.split(self.x.to(torch.float32))

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each block, [*counts]; NaN where the block holds one, 0 for an empty tensor."""
        return self._none if self.x.numel() == 0 else self.blocks.abs().amax(self.view.inner)

    @property
    def ends(self) -> Ends:
        """(lowest ≤ 0, highest ≥ 0) of each block, [*counts]; symmetric formats measure one magnitude only."""
        if self.x.numel() == 0:
            return self._none, self._none
        if self.kind is Kind.SIGNED:
            high = self.largest
            return -high, high
        if self.kind is Kind.UNSIGNED:
            # negative values clip to 0, but an infinity of either sign must still show
            blocks = torch.where(self.blocks == -torch.inf, torch.inf, self.blocks)
            high = blocks.amax(self.view.inner).clamp(min=0.0)
            return torch.zeros_like(high), high
        blocks = self.blocks
        return blocks.amin(self.view.inner).clamp(max=0.0), blocks.amax(self.view.inner).clamp(min=0.0)

    def rank(self, x: Tensor, share: float) -> Tensor:
        """The smallest element of `x` that at most a `share` of all lies above, a scalar."""
        above = int(share * x.numel() + 1e-6)  # 1 − 90/100 is 0.09999999999999998
        return torch.kthvalue(x.flatten(), max(1, x.numel() - above))[0] if x.numel() else x.new_zeros(())

    @property
    def _none(self) -> Tensor:
        return torch.zeros(self.view.counts, dtype=torch.float32, device=self.x.device)

    def outside(self, ends: Ends) -> Tensor:
        """The fraction of all elements that lie outside of the ends of their block: a scalar."""
        low, high = (self.view.spread(end) for end in ends)
        x = self.x.to(torch.float32)
        return ((x < low) | (x > high)).to(torch.int32).sum() / max(1, x.numel())


@dataclasses.dataclass(frozen=True)
class Range:
    """An estimator. Fields are numbers; `str` gives `hindsight(0.9,0.01)`, which `parse_range` reads back."""

    name: ClassVar[str]
    #: True where ranges of the past are kept: one for each scale, which must then outlive a batch
    has_state: ClassVar[bool] = False
    #: True where that state belongs to the blocks of a tensor; False where it is one for the whole site
    by_block: ClassVar[bool] = True

    @property
    def is_static(self) -> bool:
        """True where the range in use does not depend on the present tensor: one pass instead of two."""
        return False

    @property
    def refresh(self) -> int:
        """Steps between two searches for the range in the tensor itself; 0: never after the first."""
        return 0

    @property
    def width(self) -> int:
        """Numbers of the state for each unit."""
        return 0

    def state_shape(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """[width, *counts], or [width, 1] where the state is one for the whole site."""
        return (self.width, *(counts if self.by_block else (1,)))

    def first(self, seen: Observed) -> Tensor:
        """The state that a first tensor is quantized with: its own range."""
        raise NotImplementedError(self.name)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """The range in use."""
        raise NotImplementedError(self.name)

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """The state of the next step."""
        raise NotImplementedError(self.name)

    def frozen(self, seen: Observed, state: Tensor) -> Ends:
        """The range in use in eval mode, where the state stays as it is."""
        return self.ends(seen, state)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Of two states that both follow the same one: the wider."""
        return torch.stack([torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])])

    def __str__(self) -> str:
        values = [_shortest(getattr(self, field.name)) for field in dataclasses.fields(self)]
        return f"{self.name}({','.join(values)})" if values else self.name


def _shortest(number: float) -> str:
    text = f"{number:g}"
    return text if float(text) == number else repr(float(number))


@dataclasses.dataclass(frozen=True)
class Current(Range):
    """The present tensor's own range: two passes, nothing kept."""

    name: ClassVar[str] = "current"

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """(lowest, highest) of each block."""
        return seen.ends


def _mix(momentum: float, old: Tensor, new: Tensor) -> Tensor:
    return momentum * old + (1 - momentum) * new


@dataclasses.dataclass(frozen=True)
class Running(Range):
    """Running min-max: m·state + (1−m)·present, the present tensor included, so two passes (METHODS §2.2)."""

    name: ClassVar[str] = "running"
    has_state: ClassVar[bool] = True
    momentum: float = 0.9

    @property
    def width(self) -> int:
        """(low, high)."""
        return 2

    def first(self, seen: Observed) -> Tensor:
        """The tensor's own range."""
        return torch.stack(seen.ends)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """The state after the present tensor."""
        low, high = self.update(seen, state)
        return low, high

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """m·state + (1−m)·(lowest, highest)."""
        return _mix(self.momentum, state, torch.stack(seen.ends))

    def frozen(self, seen: Observed, state: Tensor) -> Ends:
        """The state alone."""
        return state[0], state[1]


@dataclasses.dataclass(frozen=True)
class Hindsight(Range):
    """In-hindsight: the state alone, q_t = m·q_{t−1} + (1−m)·(lowest, highest)_{t−1}, one pass.

    Where more than `guard` of the elements were clipped, the next step takes the present tensor's own range, and the
    third number of the state counts that (Fournarakis & Nagel, CVPRW 2021, §3; the guard is ours).
    """

    name: ClassVar[str] = "hindsight"
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
        """The tensor's own range, the guard never fired."""
        low, high = seen.ends
        return torch.stack([low, high, torch.zeros_like(low)])

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """The state."""
        return state[0], state[1]

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """The moving average, or the present range where the guard fires."""
        now = torch.stack(seen.ends)
        fired = seen.outside((state[0], state[1])) > self.guard
        ends = torch.where(fired, now, _mix(self.momentum, state[:2], now))
        return torch.cat([ends, (state[2] + fired.to(torch.float32)).unsqueeze(0)])

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """The wider range, the larger count."""
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
        """The two numbers, once a block."""
        low, high = (torch.full(seen.view.counts, end, device=seen.x.device) for end in (self.low, self.high))
        return low, high


@dataclasses.dataclass(frozen=True)
class Percentile(Range):
    """The percentile of the magnitudes over the whole tensor, by rank; blocks with a smaller range keep their own.

    Of n magnitudes the largest ⌊n·(1 − percent/100)⌋ lie outside. NaN where the tensor holds one.
    """

    name: ClassVar[str] = "percentile"
    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent: got {self.percent:g}; valid: above 0, at most 100")

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """Each block's own range, cut at the percentile; one that is not finite stays so."""
        cut = seen.rank(seen.x.to(torch.float32).abs(), 1 - self.percent / 100)
        low, high = seen.ends
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
        """The tensor's own magnitude, throughout."""
        return self._magnitude(seen).expand(self.state_shape(seen.view.counts)).clone()

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """±headroom·(max + deviations·std), the std that of the whole history (not of a sample of it)."""
        high = self.headroom * (state.amax(0) + self.deviations * state.std(0, correction=0))
        return -high, high

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """The history with the present magnitude."""
        now = self._magnitude(seen)
        _, high = self.ends(seen, state)
        return torch.where(now > high, (2 * now).expand_as(state), torch.cat([state[1:], now.unsqueeze(0)]))

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """The larger, number by number."""
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
        """The clip."""
        return 1

    def first(self, seen: Observed) -> Tensor:
        """The clip of the search over the present tensor."""
        x = seen.x.to(torch.float32)
        top = x.abs().amax()
        clips = [top * (i / self.steps) for i in range(int(self.steps), 0, -1)]
        cosines = torch.stack([_cosine(x, _round_to(x, clip, 2**seen.magnitude_bits - 1)) for clip in clips])
        return torch.stack(clips)[cosines.argmax()].reshape(1, 1)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """±clip for every block."""
        high = state.reshape(()).expand(seen.view.counts)
        return -high, high

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """The state as it is; NaN where the search met zeros only, so that the next tensor is searched."""
        return torch.where(state > 0, state, torch.nan)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """The larger clip."""
        return torch.maximum(one, other)


def _round_to(x: Tensor, clip: Tensor, levels: int) -> Tensor:
    scale = (clip / levels).clamp(min=2.0**-126)
    return torch.round(x / scale).clamp(-levels, levels) * scale


def _cosine(x: Tensor, y: Tensor) -> Tensor:
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
        return torch.stack([gamma, _mix(self.momentum, state[1], top)])

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """The larger γ (which clips less) and the larger magnitude."""
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
)


def parse_range(text: str) -> Range:
    """The estimator that `str` wrote: `current`, `hindsight(0.9,0.01)`; numbers left out have their defaults.

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
