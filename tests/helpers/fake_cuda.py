"""A captured graph as CUDA would run it, without CUDA: values are fake tensors that say so.

torch's autograd asks even a fake tensor for the driver of its device, so a build without CUDA cannot capture there. So
the graph is captured on the CPU, and every value is inferred anew from inputs on CUDA.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from qcompiler.compiler.capture import Captured
from qcompiler.passes.ir.edit import copy_graph
from qcompiler.passes.ir.meta import find_value, has_value, set_value

CUDA = torch.device("cuda", 0)


def move_to_cuda(captured: Captured) -> Captured:
    """Return the graph with inputs, constants and results on CUDA; what creates a tensor creates it there."""
    module = copy_graph(captured.module)
    for node in module.graph.nodes:
        node.args, node.kwargs = tree_map(_move_device, node.args), tree_map(_move_device, dict(node.kwargs))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [_make_like(find_value(node), mode) for node in module.graph.find_nodes(op="placeholder")]
    with mode, torch.no_grad():
        _Inference(module).run(*inputs, enable_io_processing=False)
    return dataclasses.replace(captured, module=module)


def list_devices(module: torch.fx.GraphModule) -> set[str]:
    """Return the types of device of all values; numbers of random generators apart, which stay on the CPU."""
    values = [leaf for node in module.graph.nodes for leaf in tree_leaves(find_value(node))]
    return {value.device.type for value in values if isinstance(value, Tensor)}


def _move_device(argument: Any) -> Any:
    return CUDA if isinstance(argument, torch.device) else argument


def _make_like(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


class _Inference(Interpreter):
    """Runs a graph on fake tensors, and writes each result to its node."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if has_value(n) and n.op != "output":
            set_value(n, result)
        return result
