"""The gradient of learned ranges: one more output of the graph for each operand that has one."""

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule, Node

from qcompiler.passes.graph import Contraction, add_output, aten, insert_call
from qcompiler.passes.mask_gradients import gradient_pairs, is_transposed
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec


@dataclasses.dataclass(frozen=True)
class LearnRanges:
    """dX → range_gradient(dX, X, scale) as an output, for every operand X whose spec has a learned range.

    dX is the gradient before any clip mask. An operand with several consumers has one such output for each of its
    gradients; thread-ranges adds them up where their quantizers have become one.
    """

    name: ClassVar[str] = "learn-ranges"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of gradients that were written."""
        return sum(_learn(fact, result, codes) for fact, result, codes in gradient_pairs(module.graph))


def _learn(fact: Contraction, result: Node, codes: Node) -> int:
    tensor, scale, _, _, text, _, _ = codes.args
    done = any(user.target is ops.RANGE_GRADIENT for user in _with_transposes(result))
    if not parse_spec(str(text)).range.is_learned or done:
        return 0
    grad = result
    if is_transposed(fact):
        grad = insert_call(result.graph, aten.transpose.int, (result, -2, -1), after=result)
    add_output(result.graph, insert_call(result.graph, ops.RANGE_GRADIENT, (grad, tensor, scale, text), after=grad))
    return 1


def _with_transposes(result: Node) -> list[Node]:
    """The readers of a gradient, and those of its transposes."""
    users = list(result.users)
    return users + [again for user in users if user.target is aten.transpose.int for again in user.users]
