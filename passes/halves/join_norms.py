"""Undo `SplitNorms` in the forward half."""

import dataclasses
from typing import ClassVar, cast

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.edit import insert_result, replace_node
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class JoinNorms:
    """forward: read(norm_again(X, mean, rstd)) → read(Y), the result of the norm itself."""

    name: ClassVar[str] = "join-norms"

    def __call__(self, halves: Halves) -> int:
        """Return the number of norms that were joined."""
        if halves.is_whole or halves.forward is None:
            return 0
        found = list(halves.forward.graph.find_nodes(op="call_function", target=ops.NORM_AGAIN))
        for again in found:
            norm = cast(Node, get_argument(again, "mean")).all_input_nodes[0]
            own = insert_result(norm, 0)
            replace_node(again, own)
        return len(found)
