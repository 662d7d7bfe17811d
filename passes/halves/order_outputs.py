"""Put the outputs of the joint graph into the order in which the halves return them."""

import dataclasses
from typing import ClassVar

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.edit import list_outputs, set_outputs
from qcompiler.passes.ir.meta import drop_description, is_backward
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class OrderOutputs:
    """outputs, gradients, states → outputs, states after forward | gradients, states after backward.

    What stands in front of the line belongs to the forward half. Gradients are those of inputs, then those of learned
    ranges.
    """

    name: ClassVar[str] = "order-outputs"

    def __call__(self, halves: Halves) -> int:
        """Return the number of outputs that have another place."""
        if halves.joint is None or not halves.is_whole:
            return 0
        graph = halves.joint.graph
        outputs = list_outputs(graph)
        states = [node for node in outputs if isinstance(node, Node) and node.target is ops.UPDATE]
        others = [node for node in outputs if node not in states]
        forward = [state for state in states if not is_backward(state)]
        backward = [state for state in states if is_backward(state)]
        ordered = [*others[: halves.user_outputs], *forward, *others[halves.user_outputs :], *backward]
        set_outputs(graph, ordered)
        drop_description(graph.output_node())  # AOTAutograd's list for the old order, which the partition would cut
        halves.outputs = halves.user_outputs + len(forward)
        return sum(before is not after for before, after in zip(outputs, ordered, strict=True))
