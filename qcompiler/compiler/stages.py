"""A captured graph at every stage of its way: captured, after each pass, lowered into two halves.

The stages of an export: qcompiler/exporting/stages.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final

from torch.fx import Graph, GraphModule, Node

from qcompiler.compiler.capture import Captured
from qcompiler.compiler.pipelines import halves_pipeline, joint_pipeline
from qcompiler.compiler.rewrite import split_halves
from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.ir.edit import copy_graph, copy_nodes
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.joint.restore_strides import RestoreStrides
from qcompiler.passes.rules import Rule, did_you_mean
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.errors import QCompilerError

CAPTURED: Final = "captured"
#: the whole graph after all joint passes
QUANTIZED: Final = RestoreStrides.name
LOWERED: Final = "lowered"
#: how near a name is that was meant; names of passes share words, and so do names of another pipeline
_TYPING_ERROR: Final = 0.85


class StageError(QCompilerError, ValueError):
    """No stage has this name; the message lists those that there are."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One captured graph after one step of the compiler."""

    #: "captured", the name of a pass, or "lowered"
    name: str
    #: places that the pass changed; 0 for captured and lowered
    changes: int
    #: the meaning of the inputs and outputs of the captured graph
    captured: Captured
    #: the whole graph; when lowered its forward half
    graph: Graph
    #: the backward half when lowered
    backward: Graph | None = None
    #: the nodes of forward that are saved, in the order of the first inputs of backward; None until lowered
    saved: tuple[Node, ...] | None = None


def run_stages(
    captured: Captured, recipe: Recipe, *, frozen: bool = False, execution: Execution = Execution.SIMULATE
) -> list[Stage]:
    """Return every stage of one captured graph, which stays as it is. The passes and the partition run anew.

    Args:
        captured: the graph as captured.
        recipe: by which it is quantized.
        frozen: eval mode, in which ranges do not move.
        execution: which contractions of codes are computed as integers.
    """
    stages = [Stage(CAPTURED, 0, captured, captured.module.graph)]
    work = copy_graph(captured.module)

    def observe(name: str, changes: int, module: GraphModule) -> None:
        stages.append(Stage(name, changes, captured, copy_nodes(module.graph)))

    joint_pipeline(recipe, frozen=frozen, frame=captured.frame)(work, observe)
    return [*stages, *_lower_stages(captured, work, recipe.rules, execution)]


def lower_plain(captured: Captured) -> Stage:
    """Return the halves that would run without any pass: training in float."""
    return _lower_stages(captured, copy_graph(captured.module), (), Execution.SIMULATE)[-1]


def check_stage(name: str) -> None:
    """Refuses, before anything is captured, a name that is no stage of any recipe.

    Raises:
        StageError: there is none of that name.
    """
    names = [
        step.name for line in (joint_pipeline(Recipe(name="any", rules=())), halves_pipeline()) for step in line.passes
    ]
    _check_own_name(name, [CAPTURED, *names, LOWERED])


def pick_stages(frames: Sequence[Sequence[Stage]], name: str) -> list[Stage]:
    """Return the stage of one name of every captured graph.

    Raises:
        StageError: there is none of that name.
    """
    _check_own_name(name, [stage.name for stage in frames[0]])
    return [stage for stages in frames for stage in stages if stage.name == name]


def find_stage(stages: Sequence[Stage], name: str) -> Stage:
    """Return the stage of one name of one captured graph."""
    return next(stage for stage in stages if stage.name == name)


def stage_text(frames: Sequence[Sequence[Stage]], name: str) -> str:
    """Return the stage of one name of every captured graph as text; forward and then backward when lowered.

    Raises:
        StageError: there is none of that name.
    """
    halves = [half for stage in pick_stages(frames, name) for half in (stage.graph, stage.backward) if half is not None]
    return "\n".join(map(graph_text, halves))


def check_name(name: str, names: Sequence[str], others: str = "") -> None:
    """Refuses what is not among the names of stages; `others` says where there are more.

    Raises:
        StageError: it is none of them.
    """
    if name not in names:
        raise StageError(f"stage: got {name!r}; valid: {', '.join(names)}{_guess_name(name, names)}{others}")


def _guess_name(name: str, names: Sequence[str]) -> str:
    """Return the name that was meant, which begins with the given one or is nearly the same; empty without one."""
    longer = [one for one in names if name and one.startswith(name)]
    return f"; did you mean {longer[0]!r}?" if longer else did_you_mean(name, names, _TYPING_ERROR)


def _check_own_name(name: str, names: Sequence[str]) -> None:
    check_name(name, names, "; an export has others: qcompiler.export_stages, or show --export")


def count_changes(frames: Sequence[Sequence[Stage]]) -> dict[str, int]:
    """Return stage → the places that it changed in all captured graphs, in order."""
    return {stages[0].name: sum(stage.changes for stage in stages) for stages in zip(*frames, strict=True)}


def _lower_stages(captured: Captured, module: GraphModule, rules: Sequence[Rule], execution: Execution) -> list[Stage]:
    """The stages from the joint graph to the halves that run; the last one is called "lowered". Changes the module."""
    stages: list[Stage] = []

    def observe(name: str, changes: int, halves: Halves) -> None:
        if stages and not changes:
            stages.append(dataclasses.replace(stages[-1], name=name, changes=0))
            return
        graphs = [copy_nodes(graph.graph) for graph in halves.graphs]
        copies = dict(zip(halves.graphs[0].graph.nodes, graphs[0].nodes, strict=True))
        saved = None if halves.is_whole else tuple(copies[node] for node in halves.saved if isinstance(node, Node))
        stages.append(Stage(name, changes, captured, graphs[0], graphs[1] if len(graphs) > 1 else None, saved))

    split_halves(dataclasses.replace(captured, module=module), observe, rules, execution)
    return [*stages, dataclasses.replace(stages[-1], name=LOWERED, changes=0)]
