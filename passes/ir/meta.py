"""Everything that is read from or written to `node.meta`. No other file does.

One key of ours holds one typed value a node: an `Input` on placeholders, a `Contraction` on contractions. Two more keys
hold facts of the reads of a node: the traced strides (passes/ir/strides.py), and the fake values from which the value
was inferred.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from qcompiler.passes.ir.facts import Contraction, Input, InputKind
from qcompiler.passes.ir.source_names import clean_path

_KEY: Final = "qcompiler"


_STRIDES_READ: Final = "qcompiler_strides_read"


_INFERRED_FROM: Final = "qcompiler_inferred_from"


def get_input(node: Node) -> Input | None:
    """Return the `Input` of a placeholder that capture described."""
    fact = node.meta.get(_KEY)
    return fact if isinstance(fact, Input) else None


def get_contraction(node: Node) -> Contraction | None:
    """The `Contraction` that annotate-roles found at this node (the partitioner copies meta to placeholders too)."""
    fact = node.meta.get(_KEY) if node.op == "call_function" else None
    return fact if isinstance(fact, Contraction) else None


def list_inputs(graph: Graph, kind: InputKind) -> list[tuple[Node, Input]]:
    """Return the inputs of a graph that are of one kind, in order."""
    found = ((node, get_input(node)) for node in graph.find_nodes(op="placeholder"))
    return [(node, fact) for node, fact in found if fact is not None and fact.kind is kind]


def set_fact(node: Node, fact: Input | Contraction) -> None:
    """Attaches our one typed value to a node."""
    node.meta[_KEY] = fact


def iterate_contractions(graph: Graph) -> Iterator[tuple[Node, Contraction]]:
    """Yield every annotated contraction, in graph order."""
    for node in graph.nodes:
        fact = get_contraction(node)
        if fact is not None:
            yield node, fact


def record_operand(node: Node, arg: int, **changes: Any) -> None:
    """Changes the facts of the operand at `arg` of a contraction: `kept` (why the operand stays in float), `rule`."""
    fact = get_contraction(node)
    assert fact is not None
    operands = tuple(dataclasses.replace(o, **changes) if o.arg == arg else o for o in fact.operands)
    set_fact(node, dataclasses.replace(fact, operands=operands))


def get_value(node: Node) -> torch.Tensor:
    """Return the fake tensor that a node produces: shape, strides, dtype, device."""
    return cast(torch.Tensor, node.meta["val"])


def find_value(node: Node) -> Any:
    """Return the fake value of a node: a tensor, a number, a tuple of these; None if none is known."""
    return node.meta.get("val")


def set_value(node: Node, val: Any) -> None:
    """Writes the fake value that a node produces."""
    node.meta["val"] = val


def has_value(node: Node) -> bool:
    """Return True if the fake value of a node is known."""
    return "val" in node.meta


def is_size(node: Node) -> bool:
    """Return True for a number of a graph with free dimensions, such as the batch: no values of a tensor."""
    return isinstance(find_value(node), torch.SymInt)


def list_facts(node: Node) -> tuple[Any, ...]:
    """Return what rules read of a node besides the call: the fake value, the typed value, and the half."""
    get = node.meta.get
    return get("val"), get(_KEY), get("partitioner_tag")


def get_inferred_from(node: Node) -> tuple[Any, ...]:
    """Return the fake values that the value of a node was inferred from; empty for a node of a captured graph."""
    return cast(tuple[Any, ...], node.meta.get(_INFERRED_FROM, ()))


def set_inferred_from(node: Node, values: tuple[Any, ...]) -> None:
    """Attach the fake values that the value of a node was inferred from."""
    node.meta[_INFERRED_FROM] = values


def strides_read(node: Node) -> tuple[tuple[int, ...] | None, ...] | None:
    """The strides that a node of a captured graph reads, one for each argument; None for a node that a pass wrote."""
    return node.meta.get(_STRIDES_READ)


def set_strides_read(node: Node, strides: tuple[tuple[int, ...] | None, ...]) -> None:
    """Attaches the strides that a node reads."""
    node.meta[_STRIDES_READ] = strides


def is_backward(node: Node) -> bool:
    """Return True if the node was traced, or placed, in the backward half."""
    return str(node.meta.get("partitioner_tag", "")) in ("is_backward", "must_be_in_backward")


def set_half(node: Node, *, backward: bool) -> None:
    """Place a node in the backward half, or in the forward half."""
    node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"


def has_half(node: Node) -> bool:
    """Return True if the half of a node is known."""
    return "partitioner_tag" in node.meta


def pin_to_backward(node: Node) -> None:
    """Makes the partitioner compute this node in backward, though all inputs are forward values."""
    node.meta["partitioner_tag"] = "must_be_in_backward"


def pin_saved(node: Node) -> None:
    """Makes the partitioner save this node for backward instead of computing the node again."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def is_pinned_saved(node: Node) -> bool:
    """Return True after `pin_saved`."""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE


def is_recomputed(node: Node) -> bool:
    """Return True in a region that the user checkpoints, whose nodes are computed again in backward."""
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def get_checkpoint_policy(node: Node) -> CheckpointPolicy | None:
    """Return the decision of torch for a node of a region that the user checkpoints; None outside of such a region."""
    return node.meta.get("recompute")


def follow_policy(node: Node, reader: Node) -> None:
    """Compute a node again in backward if the reader is, unless something else is decided for the node."""
    node.meta.setdefault("recompute", reader.meta["recompute"])


def copy_meta(source: Node, node: Node) -> None:
    """Give a node everything that is known of another one."""
    node.meta = dict(source.meta)


def copy_origin(source: Node, node: Node) -> None:
    """Give a node the module, the line and the autograd node of another one."""
    for key in ("nn_module_stack", "fwd_nn_module_stack", "stack_trace", "seq_nr"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def sequence_number(node: Node) -> int | None:
    """Return the number of the autograd node that traced this one: equal in a forward operator and in the gradient."""
    return node.meta.get("seq_nr")


def module_path(node: Node) -> str:
    """The path of the innermost module that traced a forward node, `layer1.0.conv1`; empty if none is known."""
    stack = node.meta.get("nn_module_stack") or {}
    return clean_path(list(stack.values())[-1][0]) if stack else ""


def get_owner(node: Node) -> str | None:
    """Return the path of the module that a node of either half works for: in backward, the module of the gradient.

    A parameter or buffer belongs to the module that holds the tensor; nodes of the model itself have the path "". None
    if no module is known: sums of gradients, for one.
    """
    fact = get_input(node)
    if fact is not None:
        return fact.name.rpartition(".")[0] if fact.kind in (InputKind.PARAMETER, InputKind.BUFFER) else ""
    contraction = get_contraction(node)
    if contraction is not None:
        return contraction.module
    if is_backward(node) and "fwd_nn_module_stack" not in node.meta and not node.meta.get("nn_module_stack"):
        return None
    stack = node.meta.get("fwd_nn_module_stack")
    return clean_path(list(stack.values())[-1][0]) if stack else module_path(node)


def source_line(node: Node) -> str:
    """`model.py:12: x = self.conv(x)`: the innermost line of the user's model behind a node; empty if unknown."""
    lines = re.findall(r'File "([^"]+)", line (\d+).*\n\s*(.*)', get_stack_trace(node))
    if not lines:
        return ""
    path, number, text = lines[-1]
    return f"{path}:{number}: {text.strip()}"


#: a sum by the names that Dynamo and torch.export give to calls: `add_3`, `iadd`, `add__1`, `add.Tensor_1`
_SUM: Final = re.compile(r"_*[ir]?add_*(?:[._]tensor)?(?:_\d+)?", re.IGNORECASE)


def is_written_sum(node: Node) -> bool:
    """Return True if the code of the model adds, and not torch inside of a call such as `interpolate` or `gru_cell`.

    Torch takes such calls apart, in training otherwise than elsewhere. True too if no tracer has noted the call.
    """
    stack = node.meta.get("source_fn_stack")  # by Dynamo: (name, target) of calls, the innermost last
    name = stack[-1][0] if stack else node.meta.get("torch_fn", ("add",))[0]  # the latter by torch.export
    return _SUM.fullmatch(name) is not None


def rename_modules(node: Node, path_of: Callable[[str], str], root: str) -> None:
    """Rewrite the module paths of a node, of both halves; a node without one belongs to the module `root`."""
    for key in ("nn_module_stack", "fwd_nn_module_stack"):
        stack = node.meta.get(key)
        if stack:
            node.meta[key] = {name: (path_of(path), kind) for name, (path, kind) in stack.items()}
        elif root and node.op == "call_function" and (key in node.meta or key == "nn_module_stack"):
            node.meta[key] = {root: (root, None)}


#: facts of a tracer about other graphs, which no pass and no compiler reads
_OF_TRACERS: Final = ("from_node", "creation_timestamp")
#: stacks of calls, as pairs of a name and a function of the user
_CALLS: Final = ("source_fn_stack", "fwd_source_fn_stack")


def list_portable_facts(node: Node) -> dict[str, Any]:
    """Return what is known of a node without objects of the tracer: in stacks of calls the names alone."""
    facts = {key: fact for key, fact in node.meta.items() if key not in _OF_TRACERS}
    return facts | {key: [(name, name) for name, _ in facts[key]] for key in _CALLS if key in facts}


def set_facts(node: Node, facts: dict[str, Any]) -> None:
    """Write all that is known of a node."""
    node.meta = facts


def list_origins(node: Node) -> list[Any]:
    """Return what torch takes over from a node of a Dynamo graph: module, calls, line, and wishes for checkpoints."""
    calls = [name for name, _ in node.meta.get("source_fn_stack", ())]
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    wishes = [node.meta.get(key) for key in ("recompute", "ac_graph_id", "memory_budget", "custom")]
    return [modules, calls, get_stack_trace(node), *wishes]


def has_checkpoint_policy(module: GraphModule) -> bool:
    """Return True for the graph of a region of which a function of the user decides what a checkpoint saves."""
    return "_checkpoint_context_fn" in module.meta


def get_description(node: Node) -> Any:
    """Return AOTAutograd's description of an input, or of all outputs: which tensor of the user each one is."""
    return node.meta["desc"]


def drop_description(output: Node) -> None:
    """Forget AOTAutograd's description of the outputs, which fits the old order alone."""
    output.meta.pop("desc", None)


def set_visible_outputs(output: Node, indices: list[int]) -> None:
    """Tell Inductor which outputs the user sees, so that these keep the strides."""
    output.meta["user_visible_output_idxs"] = indices


def get_example(node: Node) -> Any:
    """Return the fake value of a node in a graph of Dynamo, before AOTAutograd; None if none is known."""
    return node.meta.get("example_value")


def set_example(node: Node, example: Any) -> None:
    """Write the fake value of a node in a graph of Dynamo."""
    node.meta["example_value"] = example


def get_stack_trace(node: Node) -> str:
    """Return the lines of the user that a node comes from; empty if none is known."""
    return node.meta.get("stack_trace") or ""


def get_graph_argument(node: Node) -> Any:
    """Return the knowledge of Dynamo about an input, such as the source; None if nothing is known."""
    return node.meta.get("grapharg")
