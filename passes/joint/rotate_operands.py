"""Spread outliers before quantizing: random Hadamard matrices along the summed axis of a product."""

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.meta import get_value, iterate_contractions, record_operand
from qcompiler.passes.ir.signs import Signs
from qcompiler.passes.joint.place_quantizers import match_operand
from qcompiler.passes.rules import Rule
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class RotateOperands:
    """A·B → (A·R)·(Rᵀ·B), if the rules of both operands ask for one size n.

    R is block-diagonal, each block the Hadamard matrix of size n over √n with random signs of the columns, the same in
    every step: orthogonal, so the product is the same but for rounding, while each number that is quantized is a mix of
    n. A contraction whose operands ask for different sizes, or whose summed axis n does not divide, is left alone, and
    the operands say so.
    """

    name: ClassVar[str] = "rotate-operands"
    rules: tuple[Rule, ...] = ()

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of contractions that were rotated."""
        if not any(rule.rotate for rule in self.rules):
            return 0
        signs = Signs(module.graph)
        return sum(self.rotate(node, fact, signs) for node, fact in list(iterate_contractions(module.graph)))

    def rotate(self, node: Node, fact: Contraction, signs: Signs) -> int:
        """Rotates one contraction; 0 if no rule asks for that, or it cannot be done, or is done already."""
        sizes = {self.size(node, fact, index, signs) for index in range(len(fact.operands))}
        if len(fact.operands) != 2 or sizes <= {0}:
            return 0
        tensors = [node.args[operand.arg] for operand in fact.operands]
        if any(isinstance(tensor, Node) and tensor.target is ops.ROTATE for tensor in tensors):
            return 0
        size = max(sizes)
        if len(sizes) > 1 or any(operand.extent % size for operand in fact.operands):
            for operand in fact.operands:
                reason = f"not rotated: {size} must be asked for both operands, and divide {operand.extent}"
                record_operand(node, operand.arg, remark=reason)
            return 0
        for operand, tensor in zip(fact.operands, tensors, strict=True):
            assert isinstance(tensor, Node)
            dim = operand.layout.index(operand.contracted)
            node.update_arg(operand.arg, insert_call(node.graph, ops.ROTATE, (tensor, dim, size), after=tensor))
        return 1

    def size(self, node: Node, fact: Contraction, index: int, signs: Signs) -> int:
        """Return the size that the rule of one operand asks for; 0 if the operand is kept in float."""
        operand = fact.operands[index]
        tensor = node.args[operand.arg]
        assert isinstance(tensor, Node)
        match = match_operand(self.rules, fact, operand, signs.find(tensor))
        asked = match is not None and match[1].spec is not None and get_value(tensor).is_floating_point()
        return match[1].rotate if asked and match is not None else 0
