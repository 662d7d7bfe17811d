"""Free dimensions have the names that the user gave them."""

import dataclasses
import re
from collections.abc import Callable
from typing import ClassVar

import onnx_ir as ir

from qcompiler.exporting.exported_model import ExportedModel


@dataclasses.dataclass(frozen=True)
class RenameDimensions:
    """Puts names in place of the symbols in the shapes of all values: `s31` becomes batch, `2*s31` 2*batch.

    A name may be the symbol of another dimension; so the pass takes the names from the subject, and leaves none there.
    """

    name: ClassVar[str] = "rename-dimensions"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of values."""
        names, subject.symbols = subject.symbols, {}
        if not names:
            return 0
        symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")

        def rename(text: str) -> str:
            return symbol.sub(lambda found: names[found[0]], text)

        graph = subject.graph
        made = (value for node in graph.all_nodes() for value in node.outputs)
        values = dict.fromkeys((*graph.inputs, *graph.outputs, *made))  # an output that a node computes counts once
        return sum([_rename_shape(value, rename) for value in values])


def _rename_shape(value: ir.Value, rename: Callable[[str], str]) -> bool:
    if value.shape is None:
        return False
    before = [size if isinstance(size, int) else size.value for size in value.shape]
    after = [rename(size) if isinstance(size, str) else size for size in before]
    if before != after:
        value.shape = ir.Shape(after)
    return before != after
