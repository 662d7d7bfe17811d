"""Ranges that were measured on data take the place of ranges of the present tensor."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from qcompiler.passes.frozen.frozen_graph import FrozenGraph
from qcompiler.passes.ir.quantizer import list_quantizers


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A range that was measured on data, and stands in the file in place of the range of the present tensor."""

    lowest: float
    highest: float
    #: one number each, in the shape of the scale of a whole tensor
    scale: Tensor
    point: Tensor | None


@dataclasses.dataclass(frozen=True)
class CalibrateRanges:
    """scale(x) → a constant, and so is the zero point, for every site in `ranges`; the tensor becomes one block."""

    name: ClassVar[str] = "calibrate-ranges"
    #: site → range
    ranges: Mapping[str, Calibrated]

    def __call__(self, subject: FrozenGraph) -> int:
        """Return the number of quantizers."""
        quantizers = [one for one in list_quantizers(subject.graph) if one.site in self.ranges]
        measured = [one for one in quantizers if not subject.is_constant(one.scale)]
        for quantizer in measured:
            found = self.ranges[quantizer.site]
            subject.fix_whole(quantizer, found.scale, found.point)
        return len(measured)
