"""Range estimators, and the questions that an estimator can ask about a tensor."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.runtime.numbers.blocks import BlockView
from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.numbers.rounding import is_finite

Ends = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Observed:
    """The answers for an estimator about one tensor; `magnitude_bits` and `kind` belong to the format."""

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
        """The largest magnitude of each block, [*counts]; NaN if the block holds one, 0 for an empty tensor."""
        return self._none if self.x.numel() == 0 else self._reduce(torch.amax, self.x.to(torch.float32).abs())

    @property
    def ends(self) -> Ends:
        """(lowest ≤ 0, highest ≥ 0) of each block, [*counts]; symmetric formats measure one magnitude only."""
        if self.x.numel() == 0:
            return self._none, self._none
        if self.kind is Kind.SIGNED:
            high = self.largest
            return -high, high
        x = self.x.to(torch.float32)
        if self.kind is Kind.UNSIGNED:
            # negative values clip to 0, but an infinity of either sign must still show
            high = self._reduce(torch.amax, torch.where(x == -torch.inf, torch.inf, x)).clamp(min=0.0)
            return torch.zeros_like(high), high
        return self._reduce(torch.amin, x).clamp(max=0.0), self._reduce(torch.amax, x).clamp(min=0.0)

    def _reduce(self, function: Callable[[Tensor, tuple[int, ...]], Tensor], x: Tensor) -> Tensor:
        """Return one number for each block, [*counts].

        One block for the tensor is reduced as it lies: Inductor puts a tensor of which it makes a view into the order
        of its dimensions, and copies it into channels-last for the convolution that follows.
        """
        if self.view.is_whole:
            return function(x, tuple(range(x.ndim))).reshape(self.view.counts)
        return function(self.view.split(x), self.view.inner)

    def rank(self, x: Tensor, share: float) -> Tensor:
        """Return the smallest element of `x` that at most a `share` of all lies above, a scalar."""
        above = int(share * x.numel() + 1e-6)  # 1 − 90/100 is 0.09999999999999998
        return torch.kthvalue(x.flatten(), max(1, x.numel() - above))[0] if x.numel() else x.new_zeros(())

    @property
    def _none(self) -> Tensor:
        return torch.zeros(self.view.counts, dtype=torch.float32, device=self.x.device)

    def outside(self, ends: Ends) -> Tensor:
        """Return the fraction of all elements that lie outside of the ends of the block: a scalar."""
        low, high = (self.view.meet(end) for end in ends)
        x = self.x.to(torch.float32)
        return ((x < low) | (x > high)).to(torch.int32).sum() / max(1, x.numel())


@dataclasses.dataclass(frozen=True)
class Range:
    """An estimator. Fields are numbers; `str` gives `hindsight(0.9,0.01)`, which `parse_range` reads back."""

    name: ClassVar[str]
    #: True if ranges of the past are kept: one for each scale, which must then outlive a batch
    has_state: ClassVar[bool] = False
    #: True if that state belongs to the blocks of a tensor; False if one state serves the whole site
    by_block: ClassVar[bool] = True

    #: True if the state is a parameter that the optimizer moves, in place of `update` (runtime/ranges/learned.py)
    is_learned: ClassVar[bool] = False

    #: number → the smallest and the largest valid value
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}
    #: numbers that count something
    whole: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, (least, most) in self.limits.items():
            given = getattr(self, name)
            if not least <= given <= most or (name in self.whole and given != int(given)):
                kind = "a whole number" if name in self.whole else "a number"
                raise ValueError(f"{self.name}: {name}: got {given:g}; valid: {kind} from {least:g} to {most:g}")

    def check_bits(self, bits: int) -> None:
        """Raises ValueError if the estimator has no meaning for formats of so many bits."""

    @property
    def is_static(self) -> bool:
        """True if the range in use does not depend on the present tensor: one pass instead of two."""
        return False

    @property
    def refresh(self) -> int:
        """Steps between two searches for the range in the tensor itself; 0: never after the first."""
        return 0

    @property
    def width(self) -> int:
        """Numbers of the state for each unit."""
        return 0

    def meaning(self, bits: int) -> str:
        """Name the meaning of a state; a state of another meaning is not taken over, even in the same shape."""
        return self.name

    def state_shape(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a kept state: [width, blocks along each axis with several], or [width, 1].

        Axes of one block do not count: a tensor has fewer if its graph was captured for one sample, or for another
        view. For the numbers of a call see `by_axis`.
        """
        several = [count for count in counts if count > 1] if self.by_block else []
        return (self.width, *(several or [1]))

    def by_axis(self, state: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return a kept state as [width, *counts]; unchanged if one state serves the whole site."""
        return state.reshape(self.width, *counts) if self.by_block else state

    def first(self, seen: Observed) -> Tensor:
        """Return the state that a first tensor is quantized with, from the range of that tensor; states are by axis."""
        raise NotImplementedError(self.name)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """Return the range in use."""
        raise NotImplementedError(self.name)

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """Return the state of the next step."""
        raise NotImplementedError(self.name)

    def gradient(self, grad: Tensor, x: Tensor, step: Tensor, top: float, bottom: float) -> Tensor:
        """Return the gradient of a learned state, [width, 1], from the gradient of the dequantized tensor.

        Args:
            grad: dL/dx̂, of the shape of `x`.
            x: the tensor in front of the quantizer.
            step: the step of the grid in use, a scalar.
            top: the largest code.
            bottom: the smallest code.
        """
        raise NotImplementedError(self.name)

    def remark(self, state: Tensor) -> str:
        """Return a remark about a state for the user; empty if there is none. Reads the device."""
        return ""

    def frozen(self, seen: Observed, state: Tensor) -> Ends:
        """Return the range in use in evaluation mode, in which the state stays."""
        return self.ends(seen, state)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Of two states that both follow the same one: the wider."""
        return torch.stack([torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])])

    def __str__(self) -> str:
        values = [_write_shortest(getattr(self, field.name)) for field in dataclasses.fields(self)]
        return f"{self.name}({','.join(values)})" if values else self.name


def _write_shortest(number: float) -> str:
    text = f"{number:g}"
    return text if float(text) == number else repr(float(number))


def find_reach(ends: Ends, kind: Kind, magnitude_bits: int) -> Ends:
    """Return the smallest and the largest value that the codes between the ends of a block reach, by block.

    An element is clipped from half a step beyond the range, and beyond the grid, which the zero point can move by half
    a step: closer elements round to the last code. Negative elements of unsigned formats, which no range reaches, do
    not count.
    """
    low, high = ends
    levels = (2.0**magnitude_bits - 1) * (2 if kind is Kind.SIGNED else 1)
    step = (high / levels - low / levels).clamp(min=2.0**-126)
    first = torch.round(low / step)
    low, high = torch.minimum(low, first * step), torch.maximum(high, (first + levels) * step)
    low = torch.full_like(low, -torch.inf) if kind is Kind.UNSIGNED else low - step / 2
    return low, high + step / 2


def mix_states(momentum: float, old: Tensor, new: Tensor) -> Tensor:
    """Return the moving average m·old + (1 − m)·new."""
    return momentum * old + (1 - momentum) * new


def keep_finite(after: Tensor, state: Tensor) -> Tensor:
    """Return the state after a step; the state before, in a block for which the new one would not be finite."""
    return torch.where(is_finite(after).all(0, keepdim=True), after, state)
