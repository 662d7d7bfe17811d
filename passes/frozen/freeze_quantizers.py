"""Weights become codes, known ranges become scales."""

import dataclasses
from typing import ClassVar

from qcompiler.passes.frozen.frozen_graph import FrozenGraph
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers


@dataclasses.dataclass(frozen=True)
class FreezeQuantizers:
    """Constants in place of the results of a quantizer that come from parameters and ranges alone.

    1. A scale and a zero point that do not depend on the input of the model are constants.
    2. A quantizer of a weight reads the codes in place of the weight, and tells the site to later passes. The float
       weight goes unless something else reads it.
    3. A weight that is computed of others, quantized or not, is codes alone: the quantizers of the others go.
    4. The tensor beside the codes, which shows NaN and infinities, is dropped: a file saturates instead.
    """

    name: ClassVar[str] = "freeze-quantizers"

    def __call__(self, subject: FrozenGraph) -> int:
        """Return the number of quantizers that changed."""
        return sum(_freeze_quantizer(subject, quantizer) for quantizer in list_quantizers(subject.graph))


def _freeze_quantizer(subject: FrozenGraph, quantizer: Quantizer) -> bool:
    site, codes = quantizer.site, subject.get_value(quantizer.codes)
    changed = _freeze_range(subject, quantizer)
    if codes is not None and not subject.is_constant(quantizer.tensor):
        subject.codes[site] = codes
        quantizer.read(subject.add_constant(codes, f"{site}#codes"))
        changed = True
    for reader in quantizer.dequantizers:
        changed = changed or reader.shown is not None
        reader.show(None)
    return changed


def _freeze_range(subject: FrozenGraph, quantizer: Quantizer) -> bool:
    """Case 1."""
    changed = False
    for node, name in ((quantizer.scale, "scale"), (quantizer.zero_point, "zero_point")):
        if node is None or subject.is_constant(node) or (value := subject.get_value(node)) is None:
            continue
        node.replace_all_uses_with(subject.add_constant(value, f"{quantizer.site}#{name}"))
        changed = True
    return changed
