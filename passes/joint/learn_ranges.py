"""The gradient of learned ranges: one more output of the graph for each operand that has one."""

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import add_output, insert_call
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.passes.ir.views import aten
from qcompiler.passes.joint.mask_gradients import gradient_pairs, is_transposed
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class LearnRanges:
    """dX → range_gradient(dX, X, scale) as an output, for every operand X whose spec has a learned range.

    dX is the gradient before any clip mask. An operand with several consumers has one such output for each gradient;
    thread-ranges adds up the outputs of quantizers that have become one.
    """

    name: ClassVar[str] = "learn-ranges"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of gradients that were written."""
        return sum(_learn_range(*pair) for pair in gradient_pairs(module.graph))


def _learn_range(fact: Contraction, result: Node, quantizer: Quantizer) -> int:
    done = any(user.target is ops.RANGE_GRADIENT for user in _with_transposes(result))
    if not quantizer.spec.range.is_learned or done:
        return 0
    grad = result
    if is_transposed(fact):
        grad = insert_call(result.graph, aten.transpose.int, (result, -2, -1), after=result)
    add_output(result.graph, quantizer.insert_gradient(ops.RANGE_GRADIENT, grad))
    return 1


def _with_transposes(result: Node) -> list[Node]:
    """Return the readers of a gradient, and the readers of the transposes."""
    users = list(result.users)
    return users + [again for user in users if user.target is aten.transpose.int for again in user.users]
