"""From the graph that Dynamo hands over to the joint forward and backward graph, with the user's names on it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

from qcompiler.compiler import dynamo_compat, dynamo_graphs, torch_compat
from qcompiler.compiler.assignments import copy_assigned
from qcompiler.compiler.naming import PLAIN, FrameNames
from qcompiler.compiler.numbers import NONE, BakedInError, Numbers, replace_numbers
from qcompiler.errors import CaptureError
from qcompiler.passes.ir.edit import list_outputs, set_outputs
from qcompiler.passes.ir.facts import Input, InputKind
from qcompiler.passes.ir.frame import WHOLE, Frame
from qcompiler.passes.ir.meta import get_description, has_half, is_backward, rename_modules, set_fact, set_half
from qcompiler.passes.ir.strides import record_strides
from qcompiler.passes.ir.views import aten
from qcompiler.runtime.errors import QCompilerError
from qcompiler.runtime.execute.step import Write, WriteKind

#: outputs that share memory with an input or with one another, by AOTAutograd's names
_ALIASES: Final = (
    "alias_of_input",
    "is_input",
    "alias_of_intermediate",
    "alias_of_intermediate_save_as_output",
    "alias_of_intermediate_base_is_user_output",
)


class SharedMemoryError(QCompilerError):
    """Inputs share memory, and one of them is changed in place."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """A joint (or, without gradients, forward) graph and the meaning of its inputs and outputs, in graph order.

    Outputs of the graph: new values of `mutated` inputs, user outputs, and for a joint graph one gradient an input.
    """

    module: GraphModule
    inputs: tuple[Input, ...]
    #: how each of the first outputs is written back
    writes: tuple[Write, ...]
    differentiable: tuple[bool, ...]
    #: the output of forward that each tangent belongs to
    tangents: tuple[int, ...]
    is_joint: bool
    #: the place of the graph in the model
    frame: Frame = WHOLE
    #: inputs and outputs that are ints for the caller
    numbers: Numbers = NONE

    @property
    def mutated(self) -> tuple[int, ...]:
        """The inputs whose new values are the first outputs."""
        return tuple(write.input for write in self.writes)

    @property
    def forward_outputs(self) -> int:
        """Outputs of the forward half, without the tensors saved for backward."""
        return len(self.mutated) + len(self.differentiable)

    @property
    def static_inputs(self) -> tuple[int, ...]:
        """Inputs that stay alive and in place between steps: parameters and buffers."""
        fixed = (InputKind.PARAMETER, InputKind.BUFFER)
        return tuple(i for i, fact in enumerate(self.inputs) if fact.kind in fixed)


def capture(module: GraphModule, inputs: Sequence[Any], names: FrameNames = PLAIN) -> Captured:
    """The joint graph of a Dynamo graph, functional, with an `Input` on every placeholder.

    Outputs that share memory with an input or another output are copied first: the values are the same, but writing
    into such an output no longer changes the tensor that it shared memory with.

    Raises:
        CaptureError: a parameter gets data of another shape; or the graph has effects or tensor subclasses.
        SharedMemoryError: inputs share memory, and one of them is changed in place (shared_memory.py).
    """
    numbers = _replace_numbers(module)
    inputs = numbers.to_tensors(inputs)
    placeholders = _placeholders(module)
    facts = [describe_input(node, given, names) for node, given in zip(placeholders, inputs, strict=True)]
    assigned = copy_assigned(module, inputs, [fact.name for fact in facts])
    graph, metadata = torch_compat.export_joint(module, inputs)
    aliases = [i for i, info in enumerate(metadata.output_info) if info.output_type.name in _ALIASES]
    if aliases:
        _copy_outputs(module, aliases)
        graph, metadata = torch_compat.export_joint(module, inputs)
    _refuse_unsupported(facts, metadata, graph)
    for node in graph.graph.nodes:
        rename_modules(node, names.path, names.root)
    return dataclasses.replace(_annotate(graph, facts, inputs, metadata, assigned), numbers=numbers)


def _replace_numbers(module: GraphModule) -> Numbers:
    """Make tensors of numbers that are inputs, or start again with all numbers as constants."""
    try:
        found = dynamo_graphs.find_symbolic_size(module)
        if found is None:
            return replace_numbers(module)
        reason = f"a size of a tensor is no number: {found}"
    except BakedInError as error:
        reason = str(error)
    dynamo_compat.capture_statically(reason)
    raise CaptureError(f"{reason}; valid: tensors of known sizes, without mark_dynamic")


def _placeholders(module: GraphModule) -> list[Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def describe_input(node: Node, given: Any, names: FrameNames) -> Input:
    """Return the kind and the user's name of an input of a Dynamo graph."""
    source = dynamo_graphs.placeholder_source(node)
    name = names.tensor(source, given)
    if isinstance(given, torch.nn.Parameter):
        kind = InputKind.PARAMETER
    elif dynamo_graphs.is_number(node):
        kind = InputKind.NUMBER
    else:
        is_buffer = "_buffers[" in source or id(given) in names.tensors
        kind = InputKind.BUFFER if is_buffer else InputKind.INPUT
    variable = re.sub(r"^[LG]\['(\w+)'\]$", r"\1", source)
    return Input(kind, name or variable or node.name)


def _copy_outputs(module: GraphModule, indices: Sequence[int]) -> None:
    values = list_outputs(module.graph)
    for index in indices:
        with module.graph.inserting_before(module.graph.output_node()):
            values[index] = module.graph.call_function(torch.clone, (values[index],))
    set_outputs(module.graph, values)
    module.recompile()


def _refuse_unsupported(facts: Sequence[Input], metadata: Any, graph: GraphModule) -> None:
    if len(metadata.input_info) != len(facts):
        raise SharedMemoryError
    for fact, info in zip(facts, metadata.input_info, strict=True):
        if info.mutates_metadata:
            raise CaptureError(
                f"input {fact.name}: its shape or strides are changed in place; use a new tensor instead"
            )
    if metadata.tokens:
        wrapped = [node for node in graph.graph.nodes if "with_effects" in str(node.target)]
        names = ", ".join(sorted({str(node.args[1]) for node in wrapped})) or ", ".join(map(str, metadata.tokens))
        raise CaptureError(
            f"the graph has operators with side effects: {names}; keep them out of it by torch.compiler.disable on the "
            "function that calls them (torch.linalg.inv, solve and cholesky check their result with such an operator; "
            "inv_ex, solve_ex and cholesky_ex do not)"
        )


def _annotate(
    graph: GraphModule,
    facts: Sequence[Input],
    inputs: Sequence[Any],
    metadata: Any,
    assigned: dict[int, int | None],
) -> Captured:
    names = [type(description).__name__ for description in get_description(graph.graph.output_node())]
    count = names.count("InputMutationAOTOutput")
    mutated = [d.mutated_input.idx for d in get_description(graph.graph.output_node())[:count]]
    writes = tuple(_write(index, metadata.input_info[index], inputs[index], assigned) for index in mutated)
    tangents = []
    for node in _placeholders(graph):
        description = get_description(node)
        if type(description).__name__ == "TangentAOTInput":
            of = description.output
            write = mutated.index(of.mutated_input.idx) if hasattr(of, "mutated_input") else None
            output = count + of.idx if write is None else write
            name = f"output {of.idx}" if write is None else f"new value of {facts[mutated[write]].name}"
            set_fact(node, Input(InputKind.TANGENT, name))
            if write is None or writes[write].how is WriteKind.AUTOGRAD or not _drop_tangent(node):
                tangents.append(output)
        elif type(description).__name__ == "PlainAOTInput":
            set_fact(node, facts[description.idx])
        else:
            raise CaptureError(f"input {node.name} is a {type(description).__name__}, which is not supported")
    _tag_halves(graph)
    record_strides(graph.graph)
    differentiable = tuple(bool(info.requires_grad) for info in metadata.output_info)
    return Captured(graph, tuple(facts), writes, differentiable, tuple(tangents), bool(tangents))


def _write(index: int, info: Any, given: torch.Tensor, assigned: dict[int, int | None]) -> Write:
    """Return how AOTAutograd would write the new value of an input back."""
    if index in assigned:
        return Write(index, WriteKind.ASSIGN, assigned[index])
    hidden = info.mutations_hidden_from_autograd or info.mutations_under_no_grad_or_inference_mode
    # autograd refuses to change a leaf that needs gradients: max_norm of an embedding does it behind its back
    is_weight = given.is_leaf and given.requires_grad
    with_autograd = info.requires_grad and not hidden and not is_weight
    return Write(index, WriteKind.AUTOGRAD if with_autograd else WriteKind.COPY)


def _drop_tangent(tangent: Node) -> bool:
    """Take the gradient of a value that is written without autograd, which is always zero, out of all sums."""
    for reader in list(tangent.users):
        if reader.op == "output":
            reader.args = (tuple(None if out is tangent else out for out in reader.args[0]),)  # type: ignore[union-attr]
        elif reader.target is aten.add.Tensor and not reader.kwargs:
            other = reader.args[1] if reader.args[0] is tangent else reader.args[0]
            reader.replace_all_uses_with(other)  # type: ignore[arg-type]
            tangent.graph.erase_node(reader)
    if tangent.users:
        return False
    tangent.graph.erase_node(tangent)
    return True


def _tag_halves(graph: GraphModule) -> None:
    """Gives every node the tag of its half: AOTAutograd tags the backward of a custom autograd.Function as forward."""
    for node in graph.graph.nodes:
        if not has_half(node):
            set_half(node, backward=False)
        if node.op == "call_function" and not is_backward(node) and any(map(is_backward, node.all_input_nodes)):
            set_half(node, backward=True)
