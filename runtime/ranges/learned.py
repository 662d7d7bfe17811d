"""Ranges that the optimizer learns: the state is a parameter, one number for the whole tensor.

With the step Δ, codes q = clip(round(x/Δ), bottom, top) and x̂ = Δ·q, and the straight-through estimator for `round`,
∂x̂/∂Δ = q − x/Δ if x/Δ lies inside of [bottom, top], and the end of the range otherwise.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor

from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.ranges.estimator import Ends, Observed, Range


@dataclasses.dataclass(frozen=True)
class _Learned(Range):
    """The common part of learned ranges: one number, used unchanged, in evaluation mode too."""

    has_state: ClassVar[bool] = True
    by_block: ClassVar[bool] = False
    is_learned: ClassVar[bool] = True

    @property
    def is_static(self) -> bool:
        """True: nothing of the present tensor is asked."""
        return True

    @property
    def width(self) -> int:
        """The parameter."""
        return 1

    def update(self, seen: Observed, state: Tensor) -> Tensor:
        """Return the state unchanged: the optimizer moves the number."""
        return state.clone()

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the first: a parameter is not observed."""
        return one


def _spread_range(seen: Observed, high: Tensor) -> Ends:
    """(−high, high) for every block, (0, high) for unsigned formats."""
    high = high.reshape(()).expand(seen.view.counts)
    return torch.zeros_like(high) if seen.kind is Kind.UNSIGNED else -high, high


def _by_step(grad: Tensor, x: Tensor, step: Tensor, top: float, bottom: float) -> Tensor:
    """Σ grad·∂x̂/∂Δ."""
    real = x.to(torch.float32) / step
    inside = (real >= bottom) & (real <= top)
    slope = torch.where(inside, torch.round(real) - real, real.clamp(bottom, top))
    return (grad.to(torch.float32) * slope).sum()


@dataclasses.dataclass(frozen=True)
class Lsq(_Learned):
    """The step itself, from 2⟨|x|⟩/√top; the gradient is scaled by 1/√(n·top), n the elements of the tensor.

    S. K. Esser et al.: Learned Step Size Quantization, ICLR 2020, §2.
    """

    name: ClassVar[str] = "lsq"

    def meaning(self, bits: int) -> str:
        """Steps of other widths are other numbers."""
        return f"{self.name} of {bits} bits"

    def first(self, seen: Observed) -> Tensor:
        """2⟨|x|⟩/√top."""
        return (
            (2 * seen.x.to(torch.float32).abs().mean() / math.sqrt(_get_top(seen))).clamp(min=2.0**-126).reshape(1, 1)
        )

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """top·|step|."""
        return _spread_range(seen, state.abs() * _get_top(seen))

    def gradient(self, grad: Tensor, x: Tensor, step: Tensor, top: float, bottom: float) -> Tensor:
        """Σ grad·∂x̂/∂Δ / √(n·top)."""
        return (_by_step(grad, x, step, top, bottom) / math.sqrt(x.numel() * top)).reshape(1, 1)


@dataclasses.dataclass(frozen=True)
class LearnedEnd(_Learned):
    """The end of the range c, from `deviations` standard deviations; ∂x̂/∂c = (x̂ − x)/c inside, ±1 outside.

    The weight and activation quantizers of Kim et al., ECCV 2024 (§3; code): 3·std for weights, 3·std/√(1−2/π) for
    activations behind relu: a normal variable that is folded at zero has √(1−2/π) of the standard deviation.
    """

    name: ClassVar[str] = "learned"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"deviations": (0.01, 1000)}
    deviations: float = 3.0

    def first(self, seen: Observed) -> Tensor:
        """deviations·std, for unsigned formats over √(1 − 2/π)."""
        fold = math.sqrt(1 - 2 / math.pi) if seen.kind is Kind.UNSIGNED else 1.0
        return (self.deviations * seen.x.to(torch.float32).std() / fold).clamp(min=2.0**-126).reshape(1, 1)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """±|c|."""
        return _spread_range(seen, state.abs())

    def gradient(self, grad: Tensor, x: Tensor, step: Tensor, top: float, bottom: float) -> Tensor:
        """Σ grad·∂x̂/∂Δ / top, since c = top·Δ."""
        return (_by_step(grad, x, step, top, bottom) / top).reshape(1, 1)


@dataclasses.dataclass(frozen=True)
class Pact(_Learned):
    """The clip α of relu, from `start`; ∂x̂/∂α = 1 if x ≥ α, 0 elsewhere.

    J. Choi et al.: PACT: Parameterized Clipping Activation for Quantized Neural Networks, 2018, §3.
    """

    name: ClassVar[str] = "pact"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"start": (1e-6, 1e6)}
    start: float = 10.0

    def first(self, seen: Observed) -> Tensor:
        """`start`."""
        return torch.full((1, 1), self.start, device=seen.x.device)

    def ends(self, seen: Observed, state: Tensor) -> Ends:
        """(0, |α|)."""
        return _spread_range(seen, state.abs())

    def gradient(self, grad: Tensor, x: Tensor, step: Tensor, top: float, bottom: float) -> Tensor:
        """Σ grad over x ≥ α; signed formats also take −Σ grad over x < −α."""
        real = x.to(torch.float32) / step
        over = torch.where(real >= top, 1.0, torch.where(real < bottom, bottom / top, 0.0))
        return (grad.to(torch.float32) * over).sum().reshape(1, 1)


def _get_top(seen: Observed) -> int:
    return int(2**seen.magnitude_bits - 1)


#: every estimator of this file
LEARNED: Final[tuple[type[Range], ...]] = (
    LearnedEnd,
    Lsq,
    Pact,
)
