"""Write into a half whether its ranges have a state yet."""

import dataclasses
from typing import ClassVar

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import get_argument, has_argument, set_arguments
from qcompiler.runtime import ops

#: operators that read a state
_READERS = (ops.SCALE, ops.ZERO_POINT, ops.UPDATE)


@dataclasses.dataclass(frozen=True)
class StartRanges:
    """scale(X, state, first=False) → scale(X, state, first=True), in scales, zero points and updates with a state.

    In a first step a state that is NaN gives way to the range of the tensor itself.
    """

    name: ClassVar[str] = "start-ranges"
    first: bool = True

    def __call__(self, halves: Halves) -> int:
        """Return the number of calls that were changed."""
        calls = [
            node
            for half in halves.graphs
            for target in _READERS
            for node in half.graph.find_nodes(op="call_function", target=target)
            if has_argument(node, "state") and get_argument(node, "first") is not self.first
        ]
        for node in calls:
            set_arguments(node, first=self.first)
        return len(calls)
