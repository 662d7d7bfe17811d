"""The steps of one Dynamo graph: one for inputs with memory of their own, others for inputs that share memory."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from qcompiler.collector import paused_collector
from qcompiler.compiler import dynamo_compat
from qcompiler.compiler.capture import Captured, SharedMemoryError
from qcompiler.compiler.shared_memory import NONE, Sharing, check_shared, find_shared, join_inputs, merge_shared
from qcompiler.passes.ir.edit import copy_graph
from qcompiler.passes.ir.facts import InputKind
from qcompiler.runtime.execute.step import Step

#: captures and lowers a graph, which it changes, for given inputs
Build = Callable[[GraphModule, Sequence[Any]], tuple[Captured, Step]]


class Variants:
    """Makes the step of a Dynamo graph, and more of them at run time if other inputs share memory.

    Dynamo guards the inputs, and not the memory that inputs share. That matters if forward changes an input in place.
    """

    def __init__(
        self, module: GraphModule, build: Build, running: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._module, self._build, self._running = module, build, running
        self._made: dict[Sharing, tuple[Captured, Step]] = {}
        #: the inputs that may share memory; empty if forward changes none that a user gives
        self._among: tuple[int, ...] = ()

    def first(self, inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """Make the step for the inputs of the capture; return the function that runs this step, and the others."""
        try:
            captured, _ = self._make(NONE, inputs)
        except SharedMemoryError:
            self._among = tuple(range(len(inputs)))
            captured, _ = self._make(find_shared(inputs, self._among), inputs)
        given = [i for i, fact in enumerate(captured.inputs) if fact.kind is InputKind.INPUT]
        if set(given) & set(captured.mutated) and len(given) > 1:
            self._among = tuple(given)
        return self._run

    def _run(self, *inputs: Any) -> tuple[Any, ...]:
        with self._running():
            sharing = find_shared(inputs, self._among)
            captured, step = self._made.get(sharing) or self._make(sharing, inputs)
            tensors = captured.numbers.to_tensors(inputs)
            return captured.numbers.to_ints(step(*join_inputs(tensors, sharing)))

    def _make(self, sharing: Sharing, inputs: Sequence[Any]) -> tuple[Captured, Step]:
        with dynamo_compat.CAPTURING:
            if sharing not in self._made:  # another thread may have been first
                self._made[sharing] = self._capture(sharing, inputs)
            return self._made[sharing]

    def _capture(self, sharing: Sharing, inputs: Sequence[Any]) -> tuple[Captured, Step]:
        with paused_collector():
            module = copy_graph(self._module)
        if sharing:
            check_shared(inputs, [node.name for node in module.graph.find_nodes(op="placeholder")], sharing)
            merge_shared(module, sharing)
        return self._build(module, join_inputs(inputs, sharing))
