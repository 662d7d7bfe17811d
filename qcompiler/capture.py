"""From the graph that Dynamo hands over to the joint forward and backward graph, with the user's names on it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

from qcompiler import torch_compat
from qcompiler.passes.graph import Input, InputKind, clean_path, is_backward, set_fact

#: outputs that share memory with an input or with one another, by AOTAutograd's names
_ALIASES: Final = (
    "alias_of_input",
    "is_input",
    "alias_of_intermediate",
    "alias_of_intermediate_save_as_output",
    "alias_of_intermediate_base_is_user_output",
)


class CaptureError(Exception):
    """The training graph could not be captured; says what in the model stands in the way."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """A joint (or, without gradients, forward) graph and the meaning of its inputs and outputs, in graph order.

    Outputs of the graph: new values of `mutated` inputs, user outputs, and for a joint graph one gradient an input.
    """

    module: GraphModule
    inputs: tuple[Input, ...]
    mutated: tuple[int, ...]
    differentiable: tuple[bool, ...]
    tangents: tuple[int, ...]  # the user output that each tangent belongs to
    is_joint: bool

    @property
    def forward_outputs(self) -> int:
        """Outputs of the forward half, without what is saved for backward."""
        return len(self.mutated) + len(self.differentiable)

    @property
    def static_inputs(self) -> tuple[int, ...]:
        """Inputs that stay alive and in place between steps: parameters and buffers."""
        return tuple(i for i, fact in enumerate(self.inputs) if fact.kind is not InputKind.INPUT)


def capture(module: GraphModule, inputs: Sequence[Any]) -> Captured:
    """The joint graph of a Dynamo graph, functional, with an `Input` on every placeholder.

    Outputs that share memory with an input or another output are copied first: the values are the same, but writing
    into such an output no longer changes the tensor that it shared memory with.

    Raises:
        CaptureError: an input that needs gradients is changed in place; or the graph has effects or tensor subclasses.
    """
    facts = [_describe(node, given) for node, given in zip(_placeholders(module), inputs, strict=True)]
    graph, metadata = torch_compat.export_joint(module, inputs)
    aliases = [i for i, info in enumerate(metadata.output_info) if info.output_type.name in _ALIASES]
    if aliases:
        _copy_outputs(module, aliases)
        graph, metadata = torch_compat.export_joint(module, inputs)
    _refuse_unsupported(facts, metadata, graph)
    return _annotate(graph, facts, metadata)


def _placeholders(module: GraphModule) -> list[Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def _describe(node: Node, given: Any) -> Input:
    source = torch_compat.placeholder_source(node)
    if isinstance(given, torch.nn.Parameter):
        kind = InputKind.PARAMETER
    else:
        kind = InputKind.BUFFER if "_buffers[" in source else InputKind.INPUT
    variable = re.sub(r"^[LG]\['(\w+)'\]$", r"\1", source)
    return Input(kind, clean_path(source) or variable or node.name)


def _copy_outputs(module: GraphModule, indices: Sequence[int]) -> None:
    output = module.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    for index in indices:
        with module.graph.inserting_before(output):
            values[index] = module.graph.call_function(torch.clone, (values[index],))
    output.args = (tuple(values),)
    module.recompile()


def _refuse_unsupported(facts: Sequence[Input], metadata: Any, graph: GraphModule) -> None:
    for fact, info in zip(facts, metadata.input_info, strict=True):
        if info.mutates_data and info.requires_grad:
            raise CaptureError(
                f"input {fact.name}: needs gradients and is changed in place; change a copy of it instead"
            )
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


def _annotate(graph: GraphModule, facts: Sequence[Input], metadata: Any) -> Captured:
    placeholders = _placeholders(graph)
    output = graph.graph.output_node()
    descriptions = list(output.meta["desc"])
    names = [type(d).__name__ for d in descriptions]
    outputs = [i for i, name in enumerate(names) if name == "PlainAOTOutput"]
    mutated = [d.mutated_input.idx for d in descriptions[: outputs[0] if outputs else 0]]
    tangents = []
    for node in placeholders:
        description = node.meta["desc"]
        if type(description).__name__ == "TangentAOTInput":
            tangents.append(description.output.idx)
            set_fact(node, Input(InputKind.TANGENT, f"output {description.output.idx}"))
        elif type(description).__name__ == "PlainAOTInput":
            set_fact(node, facts[description.idx])
        else:
            raise CaptureError(f"input {node.name} is a {type(description).__name__}, which is not supported")
    _tag_halves(graph)
    differentiable = tuple(bool(info.requires_grad) for info in metadata.output_info)
    return Captured(graph, tuple(facts), tuple(mutated), differentiable, tuple(tangents), bool(tangents))


def _tag_halves(graph: GraphModule) -> None:
    """Gives every node the tag of its half: AOTAutograd tags the backward of a custom autograd.Function as forward."""
    for node in graph.graph.nodes:
        node.meta.setdefault("partitioner_tag", "is_forward")
        if node.op == "call_function" and not is_backward(node) and any(map(is_backward, node.all_input_nodes)):
            node.meta["partitioner_tag"] = "is_backward"
