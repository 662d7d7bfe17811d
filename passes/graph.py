"""The plumbing between passes and torch.fx: the only file that reads or writes `node.meta`.

One key of ours holds one typed value a node: an `Input` on placeholders, a `Contraction` on contractions. Two more keys
hold what a node reads: the strides that it was traced with (passes/strides.py), the fake values it was inferred from.
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from qcompiler.passes.rules import Position, Product, Role
from qcompiler.passes.source_names import clean_path
from qcompiler.runtime import ops

aten = torch.ops.aten

_KEY: Final = "qcompiler"
_STRIDES_READ: Final = "qcompiler_strides_read"
_INFERRED_FROM: Final = "qcompiler_inferred_from"


class InputKind(enum.StrEnum):
    """What a placeholder of the joint graph stands for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    #: an int or float of Python that changes from call to call
    NUMBER = "number"
    TANGENT = "tangent"
    #: the range of a quantizer, kept between steps; named by its site
    STATE = "state"


@dataclasses.dataclass(frozen=True)
class Input:
    """A placeholder: its kind, and the user's name for it (`layer1.0.conv1.weight`)."""

    kind: InputKind
    name: str


@dataclasses.dataclass(frozen=True)
class Operand:
    """One tensor that a contraction reads."""

    #: index in the node's arguments
    arg: int
    role: Role
    #: input, weight, left, right or grad: the last part of the site's name
    name: str
    #: a letter for each dimension, as the contraction sees the tensor (runtime/blocks.py)
    layout: str
    #: the letter that is summed over
    contracted: str
    #: elements summed over along that letter in one product (channels of a group in a grouped convolution)
    extent: int
    #: why this operand stays in float; empty: it is quantized
    kept: str = ""
    #: True where a rule of the recipe keeps it, False where nothing else was possible
    asked: bool = False
    #: index of the recipe's rule that decided; None: no rule matched
    rule: int | None = None
    #: what was asked for this operand, quantized or not, and could not be done
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A sum of products in the graph, forward or backward, and what the passes know of its operands."""

    #: module path of the layer, which rules match: `layer1.0.conv1`, empty for the model itself
    module: str
    #: the unique name: the path, with /matmul for products of activations and #2, #3 … where a module multiplies again
    site: str
    #: convolution, linear or matmul
    operator: str
    positions: frozenset[Position]
    operands: tuple[Operand, ...]
    #: a letter for each dimension of the result; empty where nobody asks (backward)
    layout: str = ""
    #: index of the recipe's rule that quantizes the result; None: it stays in float
    output_rule: int | None = None
    #: the operand of the forward contraction whose gradient this is; None in forward and for the bias gradient
    gradient_of: int | None = None
    #: True for the sum that makes a bias gradient: no product, but it reads the same codes of the gradient
    is_bias: bool = False
    #: why nothing here can be quantized; empty where the operands decide
    kept: str = ""

    @property
    def product(self) -> Product:
        """Which of the layer's products this is; of a product of activations the right one counts as the weight."""
        if self.is_bias:
            return Product.WEIGHT_GRADIENT
        if self.gradient_of is None:
            return Product.FORWARD
        with_weight = any(operand.role is Role.WEIGHT for operand in self.operands)
        is_input = with_weight if self.operator != "matmul" else self.gradient_of == 0
        return Product.INPUT_GRADIENT if is_input else Product.WEIGHT_GRADIENT


def get_input(node: Node) -> Input | None:
    """The `Input` of a placeholder that capture described."""
    fact = node.meta.get(_KEY)
    return fact if isinstance(fact, Input) else None


def get_contraction(node: Node) -> Contraction | None:
    """The `Contraction` that annotate-roles found at this node (the partitioner copies meta to placeholders too)."""
    fact = node.meta.get(_KEY) if node.op == "call_function" else None
    return fact if isinstance(fact, Contraction) else None


def set_fact(node: Node, fact: Input | Contraction) -> None:
    """Attaches our one typed value to a node."""
    node.meta[_KEY] = fact


def contractions(graph: Graph) -> Iterator[tuple[Node, Contraction]]:
    """Every annotated contraction, in graph order."""
    for node in graph.nodes:
        fact = get_contraction(node)
        if fact is not None:
            yield node, fact


def record(node: Node, arg: int, **changes: Any) -> None:
    """Changes what is known of the operand at `arg` of a contraction: `kept` (why it stays in float), `rule`."""
    fact = get_contraction(node)
    assert fact is not None
    operands = tuple(dataclasses.replace(o, **changes) if o.arg == arg else o for o in fact.operands)
    set_fact(node, dataclasses.replace(fact, operands=operands))


def value(node: Node) -> torch.Tensor:
    """The fake tensor that a node produces: shape, strides, dtype, device."""
    return cast(torch.Tensor, node.meta["val"])


def set_value(node: Node, val: Any) -> None:
    """Writes the fake value that a node produces."""
    node.meta["val"] = val


def strides_read(node: Node) -> tuple[tuple[int, ...] | None, ...] | None:
    """The strides that a node of a captured graph reads, one for each argument; None for a node that a pass wrote."""
    return node.meta.get(_STRIDES_READ)


def set_strides_read(node: Node, strides: tuple[tuple[int, ...] | None, ...]) -> None:
    """Attaches the strides that a node reads."""
    node.meta[_STRIDES_READ] = strides


def has_value(node: Node) -> bool:
    """True where the fake value of a node is known."""
    return "val" in node.meta


def is_size(node: Node) -> bool:
    """True for a number of a graph with free dimensions, such as the batch: it carries no values of a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def is_backward(node: Node) -> bool:
    """True where the node was traced, or placed, in the backward half."""
    return str(node.meta.get("partitioner_tag", "")) in ("is_backward", "must_be_in_backward")


def pin_to_backward(node: Node) -> None:
    """Makes the partitioner compute this node in backward, though it depends on forward values only."""
    node.meta["partitioner_tag"] = "must_be_in_backward"


def pin_saved(node: Node) -> None:
    """Makes the partitioner save this node for backward instead of computing it again."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def is_pinned_saved(node: Node) -> bool:
    """True after `pin_saved`."""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE


def is_recomputed(node: Node) -> bool:
    """True in a region that the user checkpoints, where nodes are computed again in backward."""
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def sequence_number(node: Node) -> int | None:
    """The number of the autograd node that traced this one: equal in a forward operator and its gradient."""
    return node.meta.get("seq_nr")


def module_path(node: Node) -> str:
    """The path of the innermost module that traced a forward node, `layer1.0.conv1`; empty where none is known."""
    stack = node.meta.get("nn_module_stack") or {}
    return clean_path(list(stack.values())[-1][0]) if stack else ""


def owner(node: Node) -> str | None:
    """The path of the module that a node of either half works for: in backward, the one whose gradient it makes.

    A parameter or buffer belongs to the module that holds it; what the model itself does has the path "". None where
    no module is known: sums of gradients, for one.
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
    lines = re.findall(r'File "([^"]+)", line (\d+).*\n\s*(.*)', node.meta.get("stack_trace") or "")
    if not lines:
        return ""
    path, number, text = lines[-1]
    return f"{path}:{number}: {text.strip()}"


#: a sum by the names that Dynamo and torch.export give to calls: `add_3`, `iadd`, `add__1`, `add.Tensor_1`
_SUM: Final = re.compile(r"_*[ir]?add_*(?:[._]tensor)?(?:_\d+)?", re.IGNORECASE)


def is_written_sum(node: Node) -> bool:
    """True where the code of the model adds, and not torch inside of a call such as `interpolate` or `gru_cell`.

    Torch takes such calls apart, in training otherwise than elsewhere. True too where no tracer has noted the call.
    """
    stack = node.meta.get("source_fn_stack")  # by Dynamo: (name, target) of calls, the innermost last
    name = stack[-1][0] if stack else node.meta.get("torch_fn", ("add",))[0]  # the latter by torch.export
    return _SUM.fullmatch(name) is not None


def copy_nodes(graph: Graph) -> Graph:
    """The same nodes, names and facts in a graph of their own."""
    copied = Graph()
    outputs = copied.graph_copy(graph, {})
    copied.output(outputs).meta = dict(graph.output_node().meta)
    return copied


def copy_graph(module: GraphModule) -> GraphModule:
    """A module with a copy of the graph, over the same attributes."""
    return GraphModule(module, copy_nodes(module.graph))


def rename_modules(node: Node, path_of: Callable[[str], str], root: str) -> None:
    """Rewrite the module paths of a node, of both halves; a node without one belongs to the module `root`."""
    for key in ("nn_module_stack", "fwd_nn_module_stack"):
        stack = node.meta.get(key)
        if stack:
            node.meta[key] = {name: (path_of(path), kind) for name, (path, kind) in stack.items()}
        elif root and node.op == "call_function" and (key in node.meta or key == "nn_module_stack"):
            node.meta[key] = {root: (root, None)}


VIEWS: Final = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.slice.Tensor,  # of a whole dimension: x[:, None] where that dimension is free
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten.contiguous.default,
        ops.LAY_OUT,
    }
)


def is_view(node: Node) -> bool:
    """True where the node holds the same elements as its first argument, arranged otherwise (copies included)."""
    if node.op != "call_function" or node.target not in VIEWS:
        return False
    source = node.args[0]
    return isinstance(source, Node) and value(source).numel() == value(node).numel()


def view_root(node: Node) -> Node:
    """The tensor that a chain of views starts from."""
    while is_view(node):
        node = cast(Node, node.args[0])
    return node


def last_placeholder(graph: Graph) -> Node:
    """The last of the inputs, which stand at the head of the graph."""
    nodes: list[Node] = list(graph.find_nodes(op="placeholder"))
    return nodes[-1]


def add_input(graph: Graph, like: torch.Tensor, kind: InputKind, name: str, *, backward: bool) -> Node:
    """A new input of the graph, behind all others, of the half that reads it.

    The partitioner knows the inputs of backward by "tangents" in their names.
    """
    count = len(graph.find_nodes(op="placeholder"))
    with graph.inserting_after(last_placeholder(graph)):
        node = graph.placeholder(f"tangents_{kind}_{count}" if backward else f"{kind}_{count}")
    node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"
    with fake_mode(graph):
        node.meta["val"] = torch.empty_like(like)
    set_fact(node, Input(kind, name))
    return node


def add_output(graph: Graph, node: Node | None) -> None:
    """One more output of the graph, behind all others."""
    output = graph.output_node()
    (outputs,) = output.args
    output.args = ((*cast(tuple[Any, ...], outputs), node),)


def remove_outputs(graph: Graph, nodes: Sequence[Node]) -> None:
    """Takes nodes out of the outputs of the graph."""
    output = graph.output_node()
    (outputs,) = output.args
    output.args = (tuple(out for out in cast(tuple[Any, ...], outputs) if out not in nodes),)


def insert_call(
    graph: Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    after: Node | None = None,
    before: Node | None = None,
) -> Node:
    """A new call with its shape inferred and the partitioner tag of its place; one of `after`, `before` is given.

    The tag is that of the neighbor, or backward where any argument is.
    """
    place = after if after is not None else before
    assert place is not None
    if after is not None and after.op == "placeholder":
        after = last_placeholder(graph)
    with graph.inserting_after(after) if after is not None else graph.inserting_before(before):
        name = str(getattr(target, "__name__", target)).partition(".")[0]
        node = graph.create_node("call_function", target, args, kwargs or {}, name=name)
    neighbors = [a for a in args if isinstance(a, Node)]
    backward = any(is_backward(a) for a in neighbors) or (before is not None and is_backward(before))
    node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"
    for key in ("nn_module_stack", "fwd_nn_module_stack", "stack_trace", "seq_nr"):
        if key in place.meta:
            node.meta[key] = place.meta[key]
    infer(node)
    return node


def infer(node: Node) -> None:
    """Computes the fake value of a call from those of its arguments."""
    args = torch.fx.map_arg(node.args, lambda a: a.meta["val"])
    kwargs = torch.fx.map_arg(node.kwargs, lambda a: a.meta["val"])
    with fake_mode(node.graph), torch.no_grad():
        node.meta["val"] = cast(Callable[..., Any], node.target)(*args, **kwargs)
    node.meta[_INFERRED_FROM] = _values_read(node)


def is_outdated(node: Node) -> bool:
    """True where a node that a pass wrote was inferred from other fake values than it reads now."""
    before, now = node.meta.get(_INFERRED_FROM, ()), _values_read(node)
    return len(before) != len(now) or any(old is not new for old, new in zip(before, now, strict=True))


def _values_read(node: Node) -> tuple[Any, ...]:
    return tuple(source.meta.get("val") for source in node.all_input_nodes)


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The mode that the graph's fake tensors belong to."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return cast(FakeTensorMode, mode)
    raise ValueError(
        "graph: no node holds a fake tensor; capture it through torch.compile or make_fx(tracing_mode='fake')"
    )


def finish(module: GraphModule) -> None:
    """After a pass: drops what nothing reads, checks the links, recompiles."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


_SHORT: Final = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.bool: "b1",
}


def _type(node: Node) -> str:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return ""
    name = _SHORT.get(val.dtype) or str(val.dtype).removeprefix("torch.").replace("int", "i")
    return f" : {name}[{','.join(map(str, val.shape))}]"


def graph_text(module: GraphModule | Graph) -> str:
    """The graph as stable text, one node a line; `<` marks backward, `!` what is pinned as saved for backward."""
    lines = []
    for node in (module if isinstance(module, Graph) else module.graph).nodes:
        mark = ("<" if is_backward(node) else " ") + ("!" if is_pinned_saved(node) else " ")
        args = ", ".join([_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()])
        if node.op == "placeholder":
            fact = get_input(node)
            lines.append(
                f"{mark} %{node.name}{_type(node)} = {fact.kind} {fact.name}"
                if fact
                else f"{mark} %{node.name}{_type(node)}"
            )
        elif node.op == "output":
            lines.append(f"   return {_show(node.args[0])}")
        else:
            target = (
                str(node.target)
                if not callable(node.target) or hasattr(node.target, "_schema")
                else node.target.__name__
            )
            lines.append(f"{mark} %{node.name}{_type(node)} = {target.removesuffix('.default')}({args})")
    return "\n".join(lines) + "\n"


def _show(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, list | tuple):
        return f"[{', '.join(map(_show, arg))}]"
    return str(arg)


def quantizers(graph: Graph) -> list[Node]:
    """Every quantize node, in graph order."""
    return list(graph.find_nodes(op="call_function", target=ops.QUANTIZE))


def codes_behind(operand: Node) -> Node | None:
    """The quantize node whose codes an operand of the joint graph is, through views and packing; None for a float."""
    floats = view_root(operand)
    if floats.target is not ops.DEQUANTIZE:
        return None
    codes = floats.args[0]
    while isinstance(codes, Node) and codes.target in (ops.UNPACK, ops.PACK):
        codes = codes.args[0]
    return codes if isinstance(codes, Node) and codes.target is ops.QUANTIZE else None


def dequantizers(graph: Graph) -> list[Node]:
    """Every dequantize node, in graph order."""
    return list(graph.find_nodes(op="call_function", target=ops.DEQUANTIZE))
