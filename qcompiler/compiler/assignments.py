"""`parameter.data = value` inside of forward: a write that AOTAutograd can trace."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

from qcompiler.compiler import dynamo_graphs
from qcompiler.errors import CaptureError
from qcompiler.passes.ir.meta import get_example, set_example

#: calls of a Dynamo graph that give the same memory
_ALIASES: Final = ("_get_data_attr", "detach", "alias")


def copy_assigned(module: GraphModule, inputs: Sequence[Any], names: Sequence[str]) -> dict[int, int | None]:
    """Rewrite `parameter.data = value` to `parameter.copy_(value)` in a Dynamo graph.

    The results of the graph are the same. Afterwards the parameter gets the new tensor as its data, as in eager: other
    tensors that share the old memory stay.

    Returns:
        Index of each input that gets new data → the input whose memory it shares from then on, None for new memory.

    Raises:
        CaptureError: the new data has another shape, or is a part of another input.
    """
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    assigned: dict[int, int | None] = {}
    for node in [node for node in module.graph.nodes if dynamo_graphs.assigns_data(node)]:
        target, value = node.args[:2]
        index = placeholders.index(target)
        _check_shape(inputs[index], value, names[index])
        others = [other for other in placeholders if other is not target]  # the example of the target is the new one
        source = _find_source(value, others, names[index])
        assigned[index] = None if source is None else placeholders.index(source)
        _keep_old_values(target, node)
        with module.graph.inserting_before(node):
            module.graph.call_method("copy_", (target, value))
        for reader in list(node.users):
            if getattr(reader.target, "__name__", "") == "_lower_version_count_by_1":
                module.graph.erase_node(reader)
        node.replace_all_uses_with(target)
        module.graph.erase_node(node)
    if assigned:
        module.recompile()
    return assigned


def _check_shape(given: torch.Tensor, value: Node, name: str) -> None:
    shape = get_example(value).shape
    if shape != given.shape:
        raise CaptureError(f"{name}.data: got the shape {list(shape)}; valid: {list(given.shape)}, as before")


def _is_alias(node: Any) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _ALIASES


def _find_source(value: Node, placeholders: Sequence[Node], name: str) -> Node | None:
    """Return the input that the new data is, None if it is memory of its own."""
    source = value
    while _is_alias(source):
        source = source.args[0]  # type: ignore[assignment]
    if source in placeholders:
        return source
    storage = get_example(value).untyped_storage()._cdata
    if any(_get_storage(node) == storage for node in placeholders):
        raise CaptureError(f"{name}.data: got a part of another input; valid: a whole tensor, or a copy, as by clone()")
    return None


def _get_storage(node: Node) -> int | None:
    example = get_example(node)
    return example.untyped_storage()._cdata if isinstance(example, torch.Tensor) else None


def _keep_old_values(target: Node, node: Node) -> None:
    """Copy tensors that were read from the old data and are used after the new data is there."""
    order = {other: index for index, other in enumerate(target.graph.nodes)}
    # reads and views of the target, and views of these; a copy of a copy does no harm
    old = {_get_storage(user) for user in target.users if order[user] < order[node]}
    for alias in [other for other in order if order[other] < order[node] and other.op != "placeholder"]:
        late = [user for user in alias.users if order[user] > order[node]]
        if late and _get_storage(alias) is not None and _get_storage(alias) in old:
            with target.graph.inserting_after(alias):
                kept = target.graph.call_method("clone", (alias,))
            set_example(kept, get_example(alias).clone())
            for user in late:
                user.replace_input_with(alias, kept)
