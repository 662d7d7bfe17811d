"""The graph as stable text, for golden tests and `show`."""

from typing import Any, Final

import torch
from torch.fx import Graph, GraphModule, Node

from qcompiler.passes.ir.meta import find_value, get_input, is_backward, is_pinned_saved

_SHORT: Final = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.bool: "b1",
}


def _show_type(node: Node) -> str:
    val = find_value(node)
    if not isinstance(val, torch.Tensor):
        return ""
    name = _SHORT.get(val.dtype) or str(val.dtype).removeprefix("torch.").replace("int", "i")
    return f" : {name}[{','.join(map(str, val.shape))}]"


def graph_text(module: GraphModule | Graph) -> str:
    """Return the graph as stable text, one node a line; `<` marks backward, `!` a tensor that is saved for backward."""
    lines = []
    for node in (module if isinstance(module, Graph) else module.graph).nodes:
        mark = ("<" if is_backward(node) else " ") + ("!" if is_pinned_saved(node) else " ")
        args = ", ".join(
            [_show_argument(a) for a in node.args] + [f"{k}={_show_argument(v)}" for k, v in node.kwargs.items()]
        )
        if node.op == "placeholder":
            fact = get_input(node)
            lines.append(
                f"{mark} %{node.name}{_show_type(node)} = {fact.kind} {fact.name}"
                if fact
                else f"{mark} %{node.name}{_show_type(node)}"
            )
        elif node.op == "output":
            lines.append(f"   return {_show_argument(node.args[0])}")
        else:
            target = (
                str(node.target)
                if not callable(node.target) or hasattr(node.target, "_schema")
                else node.target.__name__
            )
            lines.append(f"{mark} %{node.name}{_show_type(node)} = {target.removesuffix('.default')}({args})")
    return "\n".join(lines) + "\n"


def _show_argument(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, list | tuple):
        return f"[{', '.join(map(_show_argument, arg))}]"
    return str(arg)
