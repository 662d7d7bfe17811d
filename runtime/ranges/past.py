"""Ranges that follow the ends of past tensors: moving averages, and a history of maxima."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor

from qcompiler.runtime.ranges.estimator import Ends, Observed, Range, find_reach, mix_states


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
        return mix_states(self.momentum, state, torch.stack(seen.ends))

    def frozen(self, seen: Observed, state: Tensor) -> Ends:
        """Return the state alone."""
        return state[0], state[1]


@dataclasses.dataclass(frozen=True)
class Hindsight(Range):
    """In-hindsight: the state alone, q_t = m·q_{t−1} + (1−m)·(lowest, highest)_{t−1}, one pass.

    If more than `guard` of the elements were clipped (`find_reach`), the range is widened by the present one, and the
    third number of the state counts that (Fournarakis & Nagel, CVPRW 2021, §3; the guard is ours). Widened, not
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
        return self.read(state)

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """Return the state moved by what is measured."""
        reach = find_reach(self.read(state), seen.kind, seen.magnitude_bits)
        return self.move(state, self.measure(seen, reach))

    def read(self, state: Tensor) -> Ends:
        """Return the range in use. Like `move` arithmetic on each block alone, so many sites can stand side by side."""
        return state[0], state[1]

    def measure(self, seen: Observed, reach: Ends) -> list[Tensor]:
        """Return the lowest and the highest of each block, and the fraction of all elements that was clipped.

        Args:
            seen: the tensor.
            reach: what the codes of the range in use reach (`find_reach`).
        """
        return [*seen.ends, seen.outside(reach)]

    def move(self, state: Tensor, measured: Sequence[Tensor]) -> Tensor:
        """Return the moving average; if the guard fires, the range that holds both the state and the present range."""
        low, high, clipped = measured
        now, fired = torch.stack([low, high]), clipped > self.guard
        both = torch.stack([torch.minimum(state[0], now[0]), torch.maximum(state[1], now[1])])
        ends = torch.where(fired, both, mix_states(self.momentum, state[:2], now))
        return torch.cat([ends, (state[2] + fired.to(torch.float32)).unsqueeze(0)])

    def remark(self, state: Tensor) -> str:
        """Return how often the guard has fired."""
        fired = int(state[2].nan_to_num().max())  # NaN: nothing finite has been seen yet
        return f"more than {self.guard:.2%} was clipped in {fired} steps; the range was widened" if fired else ""

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the wider range, the larger count."""
        return torch.cat([super().merge(one, other), torch.maximum(one[2:], other[2:])])


@dataclasses.dataclass(frozen=True)
class History(Range):
    """Predicted from the maxima of the last `length` steps: headroom·(max + deviations·std), one pass.

    Autoflex (Flexpoint, Köster et al., NIPS 2017, §3) with α = headroom and β = deviations; the γκ of the paper, 100
    steps of the 16-bit grid, is 0.3 % of the range and left out. A maximum that was clipped starts the history anew at
    twice itself. The first tensor fills the history.
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
        """±headroom·(max + deviations·std), std over the whole history (not the estimate from a sample)."""
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


#: every estimator of this file
PAST: Final[tuple[type[Range], ...]] = (
    Running,
    Hindsight,
    History,
)
