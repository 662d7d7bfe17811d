"""Give every quantizer a block that is legal for the contraction that reads it."""

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule, Node

from qcompiler.passes.graph import Contraction, Operand, contractions, infer, record
from qcompiler.passes.rules import Role
from qcompiler.runtime import ops
from qcompiler.runtime.blocks import Block
from qcompiler.runtime.spec import QuantSpec, parse_spec


def is_legal(block: Block, operand: Operand) -> bool:
    """True where an integer dot product exists: the scale is constant over at least two elements that are summed.

    A scale can be pulled out of Σ xₖ·wₖ only where it does not change with k. So the edge along the summed axis must be
    above 1 (or cover the axis); the sum then runs over integers within a block, and over floats between blocks.
    An axis of one element asks for nothing (depthwise convolutions: one channel a group).
    """
    return operand.extent <= 1 or block.edge(operand.contracted) != 1


def legal_spec(spec: QuantSpec, operand: Operand) -> QuantSpec | None:
    """The spec with its block as it is, or turned, whichever is legal for one operand; None: it stays in float."""
    if is_legal(spec.block, operand):
        return spec
    turned = spec.with_block(spec.block.transposed())
    fits = is_legal(turned.block, operand) and (turned.outlives_batch or operand.role is Role.WEIGHT)
    return turned if fits else None


@dataclasses.dataclass(frozen=True)
class ChooseBlocks:
    """1. A legal block stays.

    2. An illegal one is turned (`Block.transposed`: batch↔channel, out↔in), where that is legal: the tensor is then
       quantized once more for this contraction, over the other axis.
    3. Otherwise the operand stays in float, with the reason.
    """

    name: ClassVar[str] = "choose-blocks"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of quantizers that were turned or taken out."""
        found = list(contractions(module.graph))
        return sum(_choose(node, fact, operand) for node, fact in found for operand in fact.operands)


def _choose(node: Node, fact: Contraction, operand: Operand) -> int:
    floats = node.args[operand.arg]
    if not isinstance(floats, Node) or floats.target is not ops.DEQUANTIZE:
        return 0
    codes = floats.args[0]
    assert isinstance(codes, Node)
    spec = parse_spec(str(codes.args[4]))
    chosen = legal_spec(spec, operand)
    if chosen == spec:
        return 0
    if chosen is None:
        tensor = codes.args[0]
        assert isinstance(tensor, Node)
        node.update_arg(operand.arg, tensor)
        turned = spec.with_block(spec.block.transposed())
        how = "turned or not" if turned.outlives_batch else "and turned it has no range that outlives a batch"
        reason = f"block {spec.block} has edge 1 along the summed axis {operand.contracted!r}, {how}"
        record(node, operand.arg, kept=reason)
        return 1
    _respecify(codes, floats, str(chosen))
    return 1


def _respecify(codes: Node, floats: Node, text: str) -> None:
    """Writes another spec into one quantizer; its scale changes shape, so the values are inferred again."""
    tensor, scale, point, key, _, layout, site = codes.args
    assert isinstance(scale, Node)
    scale.args = (tensor, text, layout)
    if isinstance(point, Node):
        point.args = (tensor, scale, text, layout)
    codes.args = (tensor, scale, point, key, text, layout, f"{site}.turned")
    floats.args = (codes, scale, point, text, layout, floats.args[5])
    for node in (scale, point, codes, floats):
        if isinstance(node, Node):
            infer(node)
