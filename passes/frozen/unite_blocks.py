"""Blocks that all have the same known range become one block."""

import dataclasses
from typing import ClassVar

from qcompiler.passes.frozen.frozen_graph import FrozenGraph
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.runtime.numbers.blocks import TENSOR


@dataclasses.dataclass(frozen=True)
class UniteBlocks:
    """A known range that is the same for every block, such as `fixed`, becomes the range of one block: the tensor.

    Not for a range of the past, whose blocks are alike by chance, and not for a weight.
    """

    name: ClassVar[str] = "unite-blocks"

    def __call__(self, subject: FrozenGraph) -> int:
        """Return the number of quantizers."""
        return sum(_unite_blocks(subject, quantizer) for quantizer in list_quantizers(subject.graph))


def _unite_blocks(subject: FrozenGraph, quantizer: Quantizer) -> bool:
    spec, point, steps = quantizer.spec, quantizer.zero_point, subject.get_value(quantizer.scale)
    alike = steps is not None and not spec.range.has_state and len(steps.unique()) == 1
    if steps is None or not alike or spec.block == TENSOR or subject.get_value(quantizer.tensor) is not None:
        return False
    first = (slice(1),) * steps.ndim
    known = None if point is None else subject.get_value(point)
    subject.fix_whole(quantizer, steps[first], None if known is None else known[first])
    return True
