"""Split the joint graph into a forward and a backward half."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch.fx import GraphModule

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.inference import infer_value
from qcompiler.passes.ir.meta import has_value

#: (joint graph, outputs of forward, indices of the inputs that stay in place) → forward, backward
Split = Callable[[GraphModule, int, Sequence[int]], tuple[GraphModule, GraphModule]]


@dataclasses.dataclass(frozen=True)
class Partition:
    """joint graph → forward, which returns what is saved behind its outputs, and backward, which takes it first.

    1. torch's partitioner decides what is saved and what is computed again; it honors the pins of passes/ir/meta.py.
    2. Values that the partitioner leaves open are inferred: the random states that it carries into regions that are
       computed again.
    """

    name: ClassVar[str] = "partition"
    split: Split

    def __call__(self, halves: Halves) -> int:
        """Return 1, or 0 for a graph that is partitioned already, or has no backward."""
        if halves.joint is None or not halves.is_whole:
            return 0
        halves.forward, halves.backward = self.split(halves.joint, halves.outputs, halves.static_inputs)
        for half in halves.graphs:
            for node in half.graph.nodes:
                if node.op == "call_function" and not has_value(node):
                    infer_value(node)
        return 1
