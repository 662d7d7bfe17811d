"""Recorded contractions: a product of two float tensors that can be computed again with one of them quantized."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.passes.annotate_roles import MATRIX_PRODUCTS
from qcompiler.passes.choose_blocks import legal_spec
from qcompiler.passes.graph import Contraction, Operand, aten
from qcompiler.runtime.figures import simulate
from qcompiler.runtime.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Energies:
    """Σ of the squares of a product's error and of the product itself; `a + b` over steps."""

    error: float = 0.0
    signal: float = 0.0

    def __add__(self, other: "Energies") -> "Energies":
        return Energies(self.error + other.error, self.signal + other.signal)


@dataclasses.dataclass(frozen=True)
class Product:
    """One contraction of a step: the tensors that it multiplied, in float, and which quantizer stands at each.

    Contractions are linear in either operand, so the error that a quantizer makes in the result is the product of its
    own error with the other operand: P(x̂, w) − P(x, w) = P(x̂ − x, w).
    """

    label: str  # `layer1.0.conv1 weight gradient`
    fact: Contraction
    target: Any
    #: the arguments of the call, as they were; those of operands are replaced
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    #: argument → what it would be without its quantizer
    floats: dict[int, Tensor]
    #: argument → the name of its quantizer; operands in float are not here
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
    ) -> "Product":
        """The contraction at a node that has just run with `args`."""
        kept = tuple(None if index in floats else arg for index, arg in enumerate(args))
        return cls(label, fact, node.target, kept, dict(node.kwargs), floats, sites)

    def run(self, values: Mapping[int, Tensor]) -> Tensor:
        """The product of these operands, without bias, in float32 (float64 where the operands are)."""
        operands = {arg: _wide(value) for arg, value in values.items()}
        if self.target in MATRIX_PRODUCTS:
            left, right = (operands[arg] for arg in MATRIX_PRODUCTS[self.target])
            return torch.matmul(left, right)
        args = [operands.get(index, _wide(arg)) for index, arg in enumerate(self.args)]
        if self.target is aten.convolution.default:
            args[2] = None
            return self.target(*args, **self.kwargs)  # type: ignore[no-any-return]
        assert self.fact.gradient_of is not None
        return self.target(*args, **self.kwargs)[self.fact.gradient_of]  # type: ignore[no-any-return]

    def energies(self, arg: int, quantized: Tensor) -> Energies:
        """What the product loses where the operand at `arg` is `quantized` and the other in float."""
        error = _wide(quantized) - _wide(self.floats[arg])
        return Energies(_energy(self.run({**self.floats, arg: error})), _energy(self.run(self.floats)))

    def operand(self, arg: int) -> Operand:
        """What is known of the operand at `arg`."""
        return next(operand for operand in self.fact.operands if operand.arg == arg)

    def try_spec(self, arg: int, spec: QuantSpec | None) -> tuple[QuantSpec | None, Energies]:
        """What the product loses under another spec at one operand, and the spec with the block that is legal there.

        None, given or because no block is legal, is float: nothing is lost.
        """
        operand = self.operand(arg)
        legal = None if spec is None else legal_spec(spec, operand)
        if legal is None:
            return None, Energies(0.0, _energy(self.run(self.floats)))
        return legal, self.energies(arg, simulate(self.floats[arg], legal, operand.layout).values)


def _wide(value: Any) -> Any:
    """Short floats as float32, so that the product itself does not round; all else as it is."""
    short = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.to(torch.float32) if short else value


def _energy(x: Tensor) -> float:
    return float(x.to(torch.float64).square().sum())
