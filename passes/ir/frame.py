"""The place of a graph in a model: Dynamo captures several graphs of a model that something breaks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from qcompiler.passes.ir.site_name import number_name
from qcompiler.passes.rules import Position

#: the positions of contractions, from the module path of each, in graph order
Positions = Callable[[Sequence[str]], list[frozenset[Position]]]


def whole_model(paths: Sequence[str]) -> list[frozenset[Position]]:
    """Return the positions in a graph that holds the whole model, from the first contraction to the last.

    A single contraction is both. Empty for a graph without contractions.
    """
    last = len(paths) - 1
    ends = [{p for p, end in ((Position.FIRST, 0), (Position.LAST, last)) if i == end} for i in range(len(paths))]
    return [frozenset(found or {Position.INNER}) for found in ends]


def _only_graph(key: str) -> int:
    return 1


@dataclasses.dataclass(frozen=True)
class Frame:
    """One of the graphs of a model. The default is the only one."""

    #: name of a layer → 1 in the first graph that has contractions of that layer, 2 in the second …
    claim: Callable[[str], int] = _only_graph
    positions: Positions = whole_model

    def name(self, key: str, occurrence: int) -> str:
        """Return the name of a contraction: `layer`, `layer#2` for the second of a graph, `layer@2` in a second graph.

        Args:
            key: the module path, with /matmul or /add behind.
            occurrence: 1 for the first contraction of that key in this graph.
        """
        graph = self.claim(key)
        return number_name(f"{key}@{graph}" if graph > 1 else key, occurrence)


#: the place of the only graph of a model
WHOLE: Final = Frame()
