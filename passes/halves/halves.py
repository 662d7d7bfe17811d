"""What the passes of this folder rewrite: one joint graph, and after the partition its two halves."""

import dataclasses
from collections.abc import Callable

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import finish_graph, list_outputs
from qcompiler.passes.ir.verify import clean_and_verify, verify_saved, verify_strides


@dataclasses.dataclass
class Halves:
    """A graph on its way to what runs. Passes change the fields in place."""

    #: the joint graph, which the partition takes apart; None for a graph without gradients
    joint: GraphModule | None
    #: the forward half, or the whole graph if there are no gradients; None before the partition
    forward: GraphModule | None
    backward: GraphModule | None
    #: outputs of the forward half without states and without what is saved for backward
    user_outputs: int
    #: indices of the inputs that stay in place between steps: parameters and buffers
    static_inputs: tuple[int, ...]
    #: outputs of the forward half with states, without what is saved for backward
    outputs: int

    @classmethod
    def of_joint(cls, module: GraphModule, outputs: int, static_inputs: tuple[int, ...]) -> "Halves":
        """Return the subject for a joint graph."""
        return cls(module, None, None, outputs, static_inputs, outputs)

    @classmethod
    def of_forward(cls, module: GraphModule, outputs: int) -> "Halves":
        """Return the subject for a graph without gradients, which is one half already."""
        return cls(None, module, None, outputs, (), outputs)

    @property
    def graphs(self) -> tuple[GraphModule, ...]:
        """The graphs as they are now: the joint one, or the halves."""
        found = (self.joint,) if self.is_whole else (self.forward, self.backward)
        return tuple(graph for graph in found if graph is not None)

    @property
    def is_whole(self) -> bool:
        """True before the partition of a joint graph."""
        return self.forward is None

    @property
    def saved(self) -> list[Node]:
        """The nodes of forward that are saved: the first inputs of backward, in the same order."""
        if self.forward is None or self.backward is None:
            return []
        return list_outputs(self.forward.graph)[self.outputs :]


def check_halves(halves: Halves, check: Callable[[GraphModule], None] = clean_and_verify) -> None:
    """Drop what nothing reads, and check every rule on each graph: the check after each pass of this folder.

    Args:
        halves: the graphs.
        check: of one graph; a pipeline has a `GraphChecker`, which knows the graphs that it has checked.

    Raises:
        VerifyError: with the first node that breaks a rule.
    """
    for module in halves.graphs:
        check(module)


def clean_halves(halves: Halves) -> None:
    """Drop what nothing reads: the check after passes that take quantizers apart."""
    for module in halves.graphs:
        finish_graph(module)


def finish_halves(halves: Halves) -> None:
    """Recompile after all passes, and check strides as traced, and that no float is saved for which there are codes.

    Raises:
        VerifyError: names the node, what it has and what would be legal.
    """
    for module in halves.graphs:
        module.recompile()
        verify_strides(module)
    if halves.forward is not None:
        verify_saved(halves.forward, halves.saved)
