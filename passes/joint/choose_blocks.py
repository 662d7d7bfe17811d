"""Give every quantizer a block that is legal for the reading contraction."""

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.facts import Operand
from qcompiler.passes.ir.meta import iterate_contractions, record_operand
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.passes.ir.site_name import SiteName
from qcompiler.passes.ir.walk import get_dequantizer
from qcompiler.passes.rules import Role
from qcompiler.runtime.numbers.blocks import Block
from qcompiler.runtime.spec import QuantSpec


def is_legal(block: Block, operand: Operand) -> bool:
    """True if an integer dot product exists: the scale is constant over at least two elements that are summed.

    A scale can be pulled out of Σ xₖ·wₖ only if the scale is the same for every k. So the edge along the summed axis
    must be above 1 (or cover the axis); the sum then runs over integers within a block, and over floats between blocks.
    An axis of one element asks for nothing (depthwise convolutions: one channel a group).
    """
    return operand.extent <= 1 or block.edge(operand.contracted) != 1


def legal_spec(spec: QuantSpec, operand: Operand) -> QuantSpec | None:
    """Return the spec with the block as given, or turned, for one operand; None if both are illegal."""
    if is_legal(spec.block, operand):
        return spec
    turned = spec.with_block(spec.block.transposed())
    fits = is_legal(turned.block, operand) and (turned.outlives_batch or operand.role is Role.WEIGHT)
    return turned if fits else None


@dataclasses.dataclass(frozen=True)
class ChooseBlocks:
    """1. A legal block stays.

    2. An illegal one is turned (`Block.transposed`: batch↔channel, out↔in), if that is legal: the tensor is then
       quantized once more for this contraction, over the other axis.
    3. Otherwise the operand stays in float, with the reason.
    """

    name: ClassVar[str] = "choose-blocks"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of quantizers that were turned or taken out."""
        found = list(iterate_contractions(module.graph))
        return sum(_choose_block(node, operand) for node, fact in found for operand in fact.operands)


def _choose_block(node: Node, operand: Operand) -> int:
    floats = get_dequantizer(node.args[operand.arg])
    if floats is None:
        return 0
    quantizer = Quantizer(floats.codes)
    spec = quantizer.spec
    chosen = legal_spec(spec, operand)
    if chosen == spec:
        return 0
    if chosen is None:
        node.update_arg(operand.arg, quantizer.tensor)
        turned = spec.with_block(spec.block.transposed())
        how = "turned or not" if turned.outlives_batch else "and turned it has no range that outlives a batch"
        reason = f"block {spec.block} has edge 1 along the summed axis {operand.contracted!r}, {how}"
        record_operand(node, operand.arg, kept=reason)
        return 1
    quantizer.respecify(chosen, str(SiteName.parse(quantizer.site).turn()))
    return 1
