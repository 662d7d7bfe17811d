"""A captured graph at every stage of its way: captured, after each pass, lowered into two halves."""

import dataclasses
from collections.abc import Sequence
from typing import Final

from torch.fx import GraphModule, Node

from qcompiler.capture import Captured
from qcompiler.lower import split
from qcompiler.passes.graph import copy_graph, graph_text
from qcompiler.passes.rules import did_you_mean
from qcompiler.pipeline import pipeline
from qcompiler.recipe import Recipe

CAPTURED: Final = "captured"
LOWERED: Final = "lowered"


class StageError(ValueError):
    """No stage has this name; the message lists those that there are."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One captured graph after one step of the compiler."""

    #: "captured", the name of a pass, or "lowered"
    name: str
    #: places that the pass changed; 0 for captured and lowered
    changes: int
    #: what inputs and outputs mean; its graph is the one of this stage until it is lowered
    captured: Captured
    #: the forward half when lowered, else the whole graph
    module: GraphModule
    #: the backward half when lowered
    backward: GraphModule | None = None
    #: the nodes of forward that are saved, in the order of the first inputs of backward; None until lowered
    saved: tuple[Node, ...] | None = None

    @property
    def is_lowered(self) -> bool:
        """True for the halves that run."""
        return self.saved is not None


def run_stages(captured: Captured, recipe: Recipe, *, frozen: bool = False) -> list[Stage]:
    """Every stage of one captured graph, which stays as it is. The passes and the partition run anew.

    Args:
        captured: the graph as captured.
        recipe: by which it is quantized.
        frozen: eval mode, in which ranges do not move.
    """
    stages = [_stage(CAPTURED, 0, captured)]
    work = _copy(captured)

    def observe(name: str, changes: int, module: GraphModule) -> None:
        stages.append(_stage(name, changes, _copy(work) if changes else stages[-1].captured))

    pipeline(recipe, frozen=frozen)(work.module, observe)
    return [*stages, lowered(work)]


def lowered(captured: Captured) -> Stage:
    """The last stage: the graph split into the halves that run. A graph without backward is one half already."""
    if not captured.is_joint:
        return Stage(LOWERED, 0, captured, captured.module, saved=())
    copied = _copy(captured)
    forward, backward, saved = split(copied)
    return Stage(LOWERED, 0, copied, forward, backward, tuple(saved))


def pick(frames: Sequence[Sequence[Stage]], name: str) -> list[Stage]:
    """The stage of one name of every captured graph.

    Raises:
        StageError: there is none of that name.
    """
    names = [stage.name for stage in frames[0]]
    if name not in names:
        raise StageError(f"stage: got {name!r}; valid: {', '.join(names)}{did_you_mean(name, names)}")
    return [stage for stages in frames for stage in stages if stage.name == name]


def stage_text(frames: Sequence[Sequence[Stage]], name: str) -> str:
    """The stage of one name of every captured graph as text; forward and then backward when lowered.

    Raises:
        StageError: there is none of that name.
    """
    halves = [half for stage in pick(frames, name) for half in (stage.module, stage.backward) if half is not None]
    return "\n".join(map(graph_text, halves))


def _copy(captured: Captured) -> Captured:
    return dataclasses.replace(captured, module=copy_graph(captured.module))


def _stage(name: str, changes: int, captured: Captured) -> Stage:
    return Stage(name, changes, captured, captured.module)
