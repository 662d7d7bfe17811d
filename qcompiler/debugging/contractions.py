"""Recorded contractions: a contraction of two float tensors that can be computed again with one tensor quantized."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.passes.ir.facts import Contraction, Operand
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.annotate_roles import MATRIX_PRODUCTS
from qcompiler.passes.joint.choose_blocks import legal_spec
from qcompiler.runtime.figures import compute_ratio, quantize_tensor
from qcompiler.runtime.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a contraction P by an error E in one operand; NaN if either is not finite."""

    #: ‖E‖²/‖P‖²
    whole: float
    #: the mean over channels of the result of ‖E_c‖²/‖P_c‖², each at most 1: the share of channels that are lost. Of a
    #: weight gradient over the input or the output channels, whichever is more. A few large channels hide in `whole`
    #: that all others are gone.
    channels: float

    @property
    def worst(self) -> float:
        """The larger of both; inf for NaN."""
        return math.inf if math.isnan(self.whole) else max(self.whole, self.channels)


@dataclasses.dataclass(frozen=True)
class RecordedContraction:
    """One contraction of a step: the multiplied tensors, in float, and the quantizer at each.

    Contractions are linear in either operand, so the error that a quantizer makes in the result is the contraction of
    the error of the operand with the other operand: P(x̂, w) − P(x, w) = P(x̂ − x, w).
    """

    label: str  # `layer1.0.conv1 weight gradient`
    fact: Contraction
    target: Any
    #: the arguments of the call; operands among them are replaced
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    #: argument → the tensor without the quantizer
    floats: dict[int, Tensor]
    #: argument → the name of the quantizer; operands in float are not here
    sites: dict[int, str]

    @classmethod
    def of(
        cls,
        node: Node,
        fact: Contraction,
        label: str,
        args: tuple[Any, ...],
        floats: dict[int, Tensor],
        sites: dict[int, str],
    ) -> "RecordedContraction":
        """Return the contraction at a node that has just run with `args`."""
        kept = tuple(None if index in floats else arg for index, arg in enumerate(args))
        return cls(label, fact, node.target, kept, dict(node.kwargs), floats, sites)

    def run(self, values: Mapping[int, Tensor]) -> Tensor:
        """Return the contraction of these operands, without bias, in float32 (float64 if the operands are)."""
        operands = {arg: _widen(value) for arg, value in values.items()}
        if self.target in MATRIX_PRODUCTS:
            left, right = (operands[arg] for arg in MATRIX_PRODUCTS[self.target])
            return torch.matmul(left, right)
        args = [operands.get(index, _widen(arg)) for index, arg in enumerate(self.args)]
        if self.target is aten.convolution.default:
            args[2] = None
            return self.target(*args, **self.kwargs)  # type: ignore[no-any-return]
        assert self.fact.gradient_of is not None
        return self.target(*args, **self.kwargs)[self.fact.gradient_of]  # type: ignore[no-any-return]

    def loss(self, arg: int, quantized: Tensor) -> Loss:
        """Return the loss of the contraction if the operand at `arg` is `quantized` and the other in float."""
        error = self.run({**self.floats, arg: _widen(quantized) - _widen(self.floats[arg])})
        return self.loss_of(error, self.run(self.floats))

    def loss_of(self, error: Tensor, exact: Tensor) -> Loss:
        """Return the loss of a result, from the error and the float value."""
        lost, held = error.to(torch.float64).square(), exact.to(torch.float64).square()
        shares = [_lost_channels(lost, held, dim) for dim in self.channel_dims()]
        return Loss(compute_ratio(float(lost.sum()), float(held.sum())), max(shares, default=0.0))

    def channel_dims(self) -> tuple[int, ...]:
        """Return the dimensions of the result that count channels: neither samples nor pixels."""
        if self.fact.operator == "convolution":
            return (0, 1) if self.fact.gradient_of == 1 else (1,)
        letters = [self.operand(arg).layout[side - 2] for side, arg in enumerate(MATRIX_PRODUCTS[self.target])]
        return tuple(side - 2 for side, letter in enumerate(letters) if letter in "coi")

    def operand(self, arg: int) -> Operand:
        """Return the facts of the operand at `arg`."""
        return next(operand for operand in self.fact.operands if operand.arg == arg)

    def try_spec(self, arg: int, spec: QuantSpec | None) -> Loss:
        """Return the loss of the contraction under another spec at one operand, with the block that is legal there.

        Float, as `spec` or because no block is legal, loses nothing.
        """
        operand = self.operand(arg)
        legal = None if spec is None else legal_spec(spec, operand)
        return (
            Loss(0.0, 0.0)
            if legal is None
            else self.loss(arg, quantize_tensor(self.floats[arg], legal, operand.layout))
        )


def _lost_channels(lost: Tensor, held: Tensor, dim: int) -> float:
    """Return the mean over one dimension of lost/held, at most 1; 0 for a channel of zeros that loses nothing."""
    others = [d for d in range(lost.ndim) if d != dim % lost.ndim]
    lost, held = (part.sum(others) if others else part for part in (lost, held))
    shares = torch.where(lost == 0, 0.0, (lost / held).clamp(max=1.0))
    return float(shares.mean()) if shares.numel() else 0.0


def _widen(value: Any) -> Any:
    """Short floats as float32, so that the contraction itself does not round; all else unchanged."""
    short = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.to(torch.float32) if short else value
