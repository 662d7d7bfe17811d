"""The way from an operand to its quantizer, and back: through views, packing and what forward has saved."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch.fx import Node

from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.quantizer import Dequantizer, Quantizer
from qcompiler.passes.ir.views import view_root
from qcompiler.runtime import ops

#: nodes of codes that hold the codes of their source, packed or unpacked → the argument that is the source
_PACKING: Mapping[Any, str] = {ops.PACK: "codes", ops.UNPACK: "packed"}


def get_dequantizer(operand: Any) -> Dequantizer | None:
    """Return the dequantizer that an operand is itself, without views between them; None for any other operand."""
    direct = isinstance(operand, Node) and operand.target is ops.DEQUANTIZE
    return Dequantizer(operand) if direct else None


def find_dequantizer(operand: Any) -> Dequantizer | None:
    """Return the dequantizer whose floats an operand is, through views; None for a float that was not quantized."""
    return get_dequantizer(view_root(operand)) if isinstance(operand, Node) else None


def find_quantizer(operand: Any, saved: Mapping[Node, Node] | None = None) -> Quantizer | None:
    """Return the quantizer whose codes an operand holds, through views and packing; None for a float.

    Args:
        saved: input of the backward half → the node of forward that is saved there, for walks over two halves.
    """
    found = find_dequantizer(operand)
    return None if found is None else find_source(found.codes, saved)


def find_source(codes: Node, saved: Mapping[Node, Node] | None = None) -> Quantizer | None:
    """Return the quantizer that codes come from, through packing and what is saved; None for an unknown input."""
    while codes.target is not ops.QUANTIZE:
        if codes.target in _PACKING:
            codes = cast(Node, get_argument(codes, _PACKING[codes.target]))
        elif saved is not None and codes in saved:
            codes = saved[codes]
        else:
            return None
    return Quantizer(codes)


def iterate_readers(codes: Node) -> Iterator[Dequantizer]:
    """Yield every dequantizer of these codes, also behind packing, in the order of users."""
    packed = [user for user in codes.users if user.target in _PACKING]
    yield from (Dequantizer(user) for user in codes.users if user.target is ops.DEQUANTIZE)
    for source in packed:
        yield from iterate_readers(source)


def list_operands(node: Node, fact: Contraction) -> list[Dequantizer]:
    """Return the dequantizers that a contraction reads, in the order of its operands."""
    found = (find_dequantizer(node.args[operand.arg]) for operand in fact.operands)
    return [reader for reader in found if reader is not None]
