"""The steps of one Dynamo graph: one for inputs with memory of their own, others for inputs that share memory."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from qcompiler.collector import paused_collector
from qcompiler.compiler import dynamo_compat
from qcompiler.compiler.capture import Captured, SharedMemoryError
from qcompiler.compiler.naming import FrameNames
from qcompiler.compiler.numbers import Numbers
from qcompiler.compiler.shared_memory import NONE, Sharing, check_shared, find_shared, join_inputs, merge_shared
from qcompiler.passes.ir.edit import copy_graph
from qcompiler.passes.ir.facts import InputKind
from qcompiler.runtime.execute.step import Step

#: captures and lowers a graph, which it changes, for given inputs and with given names
Build = Callable[[GraphModule, Sequence[Any], FrameNames], tuple[Captured, Step]]


class Variants:
    """Makes the step of a Dynamo graph, and more of them at run time if other inputs share memory.

    Dynamo guards the inputs, and not the memory that inputs share. That matters if forward changes an input in place.
    """

    def __init__(
        self,
        module: GraphModule,
        names: FrameNames,
        build: Build,
        running: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._module, self._names, self._build, self._running = module, names, build, running
        self._made: dict[Sharing, tuple[Numbers, Step]] = {}
        #: the inputs that may share memory; empty if forward changes none that a user gives
        self._among: tuple[int, ...] = ()

    def first(self, inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """Make the step for the inputs of the capture; return the function that runs this step, and the others."""
        try:
            captured = self._add(NONE, inputs)
        except SharedMemoryError:
            self._among = tuple(range(len(inputs)))
            captured = self._add(find_shared(inputs, self._among), inputs)
        given = [i for i, fact in enumerate(captured.inputs) if fact.kind is InputKind.INPUT]
        if set(given) & set(captured.mutated) and len(given) > 1:
            self._among = tuple(given)
        self._names = self._names.forget()
        return self._run

    def _run(self, *inputs: Any) -> tuple[Any, ...]:
        with self._running():
            sharing = find_shared(inputs, self._among)
            numbers, step = self._made.get(sharing) or self._make(sharing, inputs)
            return numbers.to_ints(step(*join_inputs(numbers.to_tensors(inputs), sharing)))

    def _make(self, sharing: Sharing, inputs: Sequence[Any]) -> tuple[Numbers, Step]:
        with dynamo_compat.CAPTURING:
            if sharing not in self._made:  # another thread may have been first
                self._add(sharing, inputs)
            return self._made[sharing]

    def _add(self, sharing: Sharing, inputs: Sequence[Any]) -> Captured:
        """Make a step. The capture is returned and not kept, as it holds a whole graph."""
        with paused_collector():
            module = copy_graph(self._module)
        if sharing:
            check_shared(inputs, [node.name for node in module.graph.find_nodes(op="placeholder")], sharing)
            merge_shared(module, sharing)
        captured, step = self._build(module, join_inputs(inputs, sharing), self._names)
        self._made[sharing] = captured.numbers, step
        return captured
