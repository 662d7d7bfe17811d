"""Ints and floats that change from call to call: symbols for Dynamo, tensors in our graphs."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qcompiler.compiler import dynamo_graphs
from qcompiler.passes.ir.meta import get_example
from qcompiler.runtime.errors import QCompilerError

#: calls on numbers alone that give the same on tensors of no dimension
_ARITHMETIC: Final = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.neg}
)
#: calls on a tensor and a number that take a tensor of no dimension as well
_SCALED: Final = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv),
        *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.true_divide),
        *("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"),
        *(torch.clamp, torch.clamp_min, torch.clamp_max, "clamp", "clamp_min", "clamp_max", "clamp_"),
    }
)


class BakedInError(QCompilerError):
    """A number is used as more than a number: as a size, an index, an option of an operator."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The inputs and outputs of a graph that are ints for its callers; inside they are int64 tensors of no dimension.

    Floats need no care: Dynamo passes them as float64 tensors, and takes those back.
    """

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()

    def to_tensors(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the inputs with a tensor for each int."""
        return [_as_tensor(x) if index in self.inputs else x for index, x in enumerate(inputs)]

    def to_ints(self, outputs: Sequence[Any]) -> tuple[Any, ...]:
        """Return the outputs with an int for each such tensor."""
        return tuple(int(x) if index in self.outputs else x for index, x in enumerate(outputs))


#: of a graph without such inputs
NONE: Final = Numbers()


def replace_numbers(module: GraphModule) -> Numbers:
    """Rewrite a Dynamo graph so that numbers which are inputs are tensors; changes nothing without such inputs.

    1. An int of the caller is a tensor at once; a float is a tensor already, of which `item()` is taken out.
    2. Sums, products and quotients of numbers are computed on float64 and int64 tensors, as Python does.
    3. A tensor times a number is the tensor times that tensor: one of no dimension changes neither shape nor type.

    Raises:
        BakedInError: a number is used otherwise.
    """
    rewriter = _Rewriter(module)
    for node in list(module.graph.nodes):
        rewriter.rewrite(node)
    # one by one: torch.fx takes calls in place, whose results nobody reads, for dead
    for node in [node for node in reversed(rewriter.tensors) if node.op != "placeholder" and not node.users]:
        module.graph.erase_node(node)
    module.recompile()
    return Numbers(frozenset(rewriter.inputs), frozenset(rewriter.outputs))


class _Rewriter:
    """One walk over one graph."""

    def __init__(self, module: GraphModule) -> None:
        self.graph = module.graph
        #: number → the tensor in its place, and whether it is an int
        self.tensors: dict[Node, tuple[Node, bool]] = {}
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.count = 0

    def rewrite(self, node: Node) -> None:
        """Rewrite one node, whose sources are rewritten."""
        if node.op == "placeholder":
            self.take_input(node)
        elif node.op == "call_method" and node.target == "item" and dynamo_graphs.is_number(node.args[0]):
            self.tensors[node] = (node.args[0], False)  # type: ignore[assignment]
        elif node.op == "output":
            self.take_outputs(node)
        elif any(source in self.tensors for source in node.all_input_nodes):
            self.replace(node)

    def take_input(self, node: Node) -> None:
        """Case 1."""
        if isinstance(get_example(node), torch.SymInt):
            self.inputs.append(self.count)
            self.tensors[node] = (node, True)
            node.type = None
        self.count += 1

    def take_outputs(self, node: Node) -> None:
        """Note which outputs are ints."""
        (results,) = node.args
        assert isinstance(results, tuple | list)
        self.outputs = [i for i, out in enumerate(results) if out in self.tensors]
        node.args = (tuple(self.tensors[out][0] if out in self.tensors else out for out in results),)  # type: ignore[index]

    def replace(self, node: Node) -> None:
        """Cases 2 and 3."""
        numbers = [source for source in node.all_input_nodes if source in self.tensors]
        if len(numbers) == len(node.all_input_nodes) and node.target in _ARITHMETIC and not node.kwargs:
            return self.compute(node)
        if node.target is torch.scalar_tensor:
            with self.graph.inserting_before(node):
                made = self.graph.call_method("to", (self.tensors[numbers[0]][0], node.kwargs["dtype"]))
            node.replace_all_uses_with(made)
            return None
        if node.target not in _SCALED or set(node.kwargs) - {"min", "max"} or not _keeps_type(node):
            raise BakedInError(f"{numbers[0].name} in {node.target}")
        for number in numbers:
            node.replace_input_with(number, self.tensors[number][0])
        return None

    def compute(self, node: Node) -> None:
        """Case 2: the same call on tensors."""
        ints = all(self.tensors[arg][1] if isinstance(arg, Node) else isinstance(arg, int) for arg in node.args)
        is_quotient = node.target is operator.truediv
        args = [self.tensors[arg][0] if isinstance(arg, Node) else arg for arg in node.args]
        with self.graph.inserting_before(node):
            if is_quotient:  # of integer tensors it would be float32
                args = [self.graph.call_method("double", (arg,)) if isinstance(arg, Node) else arg for arg in args]
            made = self.graph.call_function(cast(Callable[..., Any], node.target), tuple(args))
        self.tensors[node] = (made, ints and not is_quotient)


def _as_tensor(number: int | torch.SymInt) -> Tensor:
    """Return a number as a tensor; for a symbol 0, since asking for its value would make a constant of it."""
    return torch.tensor(0 if isinstance(number, torch.SymInt) else number)


def _keeps_type(node: Node) -> bool:
    """Return True for a floating tensor and a number: a tensor of integers would take the type of the other tensor."""
    found = get_example(node)
    examples = [get_example(source) for source in node.all_input_nodes]
    given = [example for example in examples if isinstance(example, Tensor)]
    if not isinstance(found, Tensor) or len(given) != 1:
        return False
    return given[0].is_floating_point() and found.dtype is given[0].dtype
