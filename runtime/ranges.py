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
        """The largest magnitude of each block, [*counts]; NaN where the block holds one."""
        return self.blocks.abs().amax(self.view.inner)

    @property
    def ends(self) -> Ends:
        """(lowest ≤ 0, highest ≥ 0) of each block, [*counts]; symmetric formats measure one magnitude only."""
        if self.kind is Kind.SIGNED:
            high = self.largest
            return -high, high
        high = self.blocks.amax(self.view.inner).clamp(min=0.0)
        if self.kind is Kind.UNSIGNED:
            return torch.zeros_like(high), high
        return self.blocks.amin(self.view.inner).clamp(max=0.0), high

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
    #: steps between two refreshes, in which the range is sought anew from the tensor; 0: never
    every: ClassVar[int] = 0

    @property
    def is_static(self) -> bool:
        """True where the range in use does not depend on the present tensor: one pass instead of two."""
        return False

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
        values = [f"{getattr(self, field.name):g}" for field in dataclasses.fields(self)]
        return f"{self.name}({','.join(values)})" if values else self.name


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


#: every estimator; `parse_range` finds them by name
ESTIMATORS: Final[tuple[type[Range], ...]] = (Current, Running, Hindsight)


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
