"""The answers that passes got about the place of a graph in its model."""

import dataclasses
from collections.abc import Sequence

from qcompiler.passes.ir.frame import Frame
from qcompiler.passes.rules import Position


@dataclasses.dataclass
class FrameRecord:
    """The questions and answers, in order. With other answers the passes may make another graph."""

    claims: dict[str, int] = dataclasses.field(default_factory=dict)
    positions: list[tuple[tuple[str, ...], list[frozenset[Position]]]] = dataclasses.field(default_factory=list)

    def watch(self, frame: Frame) -> Frame:
        """Return a frame that gives the same answers, and writes them down here."""

        def claim(layer: str) -> int:
            self.claims[layer] = frame.claim(layer)
            return self.claims[layer]

        def place(paths: Sequence[str]) -> list[frozenset[Position]]:
            found = frame.positions(paths)
            self.positions.append((tuple(paths), found))
            return found

        return Frame(claim, place)

    def holds(self, frame: Frame) -> bool:
        """Ask a frame the same questions, which makes the same claims; return True if the answers are the same."""
        claims = [frame.claim(layer) == number for layer, number in self.claims.items()]
        places = [frame.positions(paths) == found for paths, found in self.positions]
        return all(claims) and all(places)
