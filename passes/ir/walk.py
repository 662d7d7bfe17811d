"""The way from an operand to the quantizer, and back: through views and packing."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch.fx import Node

from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.quantizer import Dequantizer, Quantizer
from qcompiler.passes.ir.views import view_root
from qcompiler.runtime import ops

#: nodes that hold the codes of a source, packed or unpacked → the argument that is the source
_PACKING: Mapping[Any, str] = {ops.PACK: "codes", ops.UNPACK: "packed"}


def get_dequantizer(operand: Any) -> Dequantizer | None:
    """Return the dequantizer that an operand is itself, without views between; None for any other operand."""
    direct = isinstance(operand, Node) and operand.target is ops.DEQUANTIZE
    return Dequantizer(operand) if direct else None


def find_dequantizer(operand: Any) -> Dequantizer | None:
    """Return the dequantizer whose floats an operand is, through views; None for a float that was not quantized."""
    return get_dequantizer(view_root(operand)) if isinstance(operand, Node) else None


def find_quantizer(operand: Any) -> Quantizer | None:
    """Return the quantizer whose codes an operand holds, through views and packing; None for a float."""
    found = find_dequantizer(operand)
    return None if found is None else find_source(found.codes)


def find_source(codes: Node) -> Quantizer | None:
    """Return the quantizer that codes come from, through packing; None for codes that are an input of the graph."""
    while codes.target in _PACKING:
        codes = cast(Node, get_argument(codes, _PACKING[codes.target]))
    return Quantizer(codes) if codes.target is ops.QUANTIZE else None


def iterate_readers(codes: Node) -> Iterator[Dequantizer]:
    """Yield every dequantizer of these codes, also behind packing, in the order of users."""
    packed = [user for user in codes.users if user.target in _PACKING]
    yield from (Dequantizer(user) for user in codes.users if user.target is ops.DEQUANTIZE)
    for source in packed:
        yield from iterate_readers(source)


def list_operands(node: Node, fact: Contraction) -> list[Dequantizer]:
    """Return the dequantizers that a contraction reads, in the order of the operands."""
    found = (find_dequantizer(node.args[operand.arg]) for operand in fact.operands)
    return [reader for reader in found if reader is not None]
