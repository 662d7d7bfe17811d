"""Keep floats out of what a region that the user checkpoints saves."""

import dataclasses
from typing import ClassVar

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.meta import follow_policy, get_checkpoint_policy, is_backward, is_recomputed
from qcompiler.passes.ir.walk import find_dequantizer


@dataclasses.dataclass(frozen=True)
class RecomputeFloats:
    """1. A dequantize in front of a node that is computed again in backward is computed again too; codes are saved.

    2. A node that the user's policy decides for stays as decided.
    """

    name: ClassVar[str] = "recompute-floats"

    def __call__(self, halves: Halves) -> int:
        """Return the number of nodes that are computed again from now on."""
        if halves.joint is None or not halves.is_whole:
            return 0
        changes = 0
        for reader in filter(is_recomputed, reversed(halves.joint.graph.nodes)):
            for source in reader.all_input_nodes:
                undecided = get_checkpoint_policy(source) is None and not is_backward(source)
                if undecided and find_dequantizer(source) is not None:
                    follow_policy(source, reader)
                    changes += 1
        return changes
