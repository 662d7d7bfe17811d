"""The indices that a convolution reads, and those that its gradients read."""

import dataclasses
import math
from typing import Any

from torch.fx import Node

from qcompiler.passes.ir.arguments import get_argument


@dataclasses.dataclass(frozen=True)
class Windows:
    """For each dimension of space: at position t, tap u the index start + step·t + dilation·u (runtime/patches.py)."""

    start: tuple[int, ...]
    count: tuple[int, ...]
    step: tuple[int, ...]
    taps: tuple[int, ...]
    dilation: tuple[int, ...]

    def list_arguments(self) -> dict[str, list[int]]:
        """Return the arguments of an operator that reads windows."""
        return {field: list(numbers) for field, numbers in dataclasses.asdict(self).items()}

    @property
    def positions(self) -> int:
        """Positions of one sample."""
        return math.prod(self.count)

    @property
    def reads(self) -> int:
        """Elements of one channel that one position reads."""
        return math.prod(self.taps)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution without groups: for each dimension of space the extents and the numbers of the call."""

    space: tuple[int, ...]
    result: tuple[int, ...]
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def forward(self) -> Windows:
        """The reads of the input: from −padding on."""
        return Windows(tuple(-p for p in self.padding), self.result, self.stride, self.taps, self.dilation)

    @property
    def backward(self) -> Windows:
        """The reads of the output gradient for the input gradient.

        Input y meets output o at tap i if y + padding = stride·o + dilation·i. With y + padding = stride·t + r, and
        i = r + stride·u (which needs dilation 1 if stride is above 1), o = t − dilation·u: one position t for each run
        of `stride` inputs. Taps are read in reverse, so that indices rise.
        """
        first, taps = self.first, self.turned_taps
        dims = zip(first, taps, self.dilation, strict=True)
        ends = zip(self.padding, self.space, self.stride, first, strict=True)
        return Windows(
            start=tuple(t - d * (u - 1) for t, u, d in dims),
            count=tuple((p + extent - 1) // s - t + 1 for p, extent, s, t in ends),
            step=(1,) * len(taps),
            taps=taps,
            dilation=self.dilation,
        )

    @property
    def first(self) -> tuple[int, ...]:
        """The position t of the first input."""
        return tuple(p // s for p, s in zip(self.padding, self.stride, strict=True))

    @property
    def turned_taps(self) -> tuple[int, ...]:
        """Taps that one input meets, of a kernel that zeros fill up to a multiple of the stride."""
        return tuple(-(-k // s) for k, s in zip(self.taps, self.stride, strict=True))


def read_geometry(node: Node, shapes: tuple[tuple[int, ...], ...]) -> Geometry | str:
    """Return the geometry of a convolution or of its gradient, or the reason why its codes have no patches.

    Args:
        node: the call.
        shapes: of the input, the weight and the output.
    """
    if get_argument(node, "transposed"):
        return "no kernel computes transposed convolutions on codes"
    if get_argument(node, "groups") != 1:
        return f"no kernel computes convolutions of {get_argument(node, 'groups')} groups on codes"
    space, taps, result = (tuple(shape[2:]) for shape in shapes)
    numbers = (_spread_number(get_argument(node, name), len(taps)) for name in ("stride", "padding", "dilation"))
    return Geometry(space, result, taps, *numbers)


def _spread_number(numbers: Any, dims: int) -> tuple[int, ...]:
    return tuple(numbers) * (dims if len(numbers) == 1 else 1)
