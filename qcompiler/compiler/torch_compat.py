"""Private APIs of torch, but for those of Dynamo (dynamo_compat.py) and of its caches (cache/cache_compat.py)."""

import contextlib
import dataclasses
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch._decomp import decomposition_table
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload
from torch._prims.rng_prims import run_and_save_rng_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import _trace as export_trace
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.compiler.expansion import expand_graph
from qcompiler.passes.ir.edit import list_outputs, make_module
from qcompiler.passes.ir.inference import fake_mode
from qcompiler.passes.ir.meta import set_visible_outputs
from qcompiler.runtime import ops
from qcompiler.runtime.ops import DECOMPOSITIONS
from qcompiler.runtime.ranges.store import Engine

#: a mode that sees every operator
DispatchMode = TorchDispatchMode


#: dropout draws from torch's generator as in eager, so that a seed gives the same masks in both backends; and Triton
#: divides as eager does, where its own division is off by 2 units in the last place
_INDUCTOR: Final = {
    "fallback_random": True,
    **({"eager_numerics.division_rounding": True} if hasattr(inductor_config, "eager_numerics") else {}),
}
#: the path of a module that nodes have which torch.export adds
_NO_MODULE: Final = "_empty_nn_module_stack_from_metadata_hook"
#: logs in which warnings of an export are noise: of the operators of torchvision, of symbols without a line
_EXPORT_LOGS: Final = ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes")


def export_joint(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Any]:
    """The functional forward+backward graph of a Dynamo graph, and AOTAutograd's metadata of its inputs and outputs.

    Without inputs that need gradients (or under no_grad) the graph is the forward alone. Backward is traced with
    autocast off, as it runs in eager: each gradient has the type of its operator, whatever context the call stood in.
    """
    with contextlib.ExitStack() as stack, functorch_config.patch(backward_pass_autocast="off"):
        if not torch.is_grad_enabled() and _start_without_gradients(module):
            stack.enter_context(torch.enable_grad())
        joint = aot_export_joint_with_descriptors(stack, module, tuple(inputs))
        return joint.graph_module, joint._aot_state.fw_metadata


def _start_without_gradients(module: GraphModule) -> bool:
    """Turn gradients off at the start of a graph that turns them on, so that it can be traced with gradients."""
    switch, nodes = torch._C._set_grad_enabled, list(module.graph.nodes)
    turns_on = any(node.target is switch and node.args == (True,) for node in nodes)
    if turns_on:
        with module.graph.inserting_after(list(module.graph.find_nodes(op="placeholder"))[-1]):
            module.graph.call_function(switch, (False,))
        module.recompile()
    return turns_on


def training_decompositions() -> dict[Any, Callable[..., Any]]:
    """For `ExportedProgram.run_decompositions`: the operators that torch expands when it traces for training.

    An exported graph has the operators of a captured one, by the same rules: those of the dispatcher, a rule for
    gradients before one for all. torch.export itself keeps some whole, such as bilinear interpolation.
    """
    table = torch.export.default_decompositions().materialize()
    implicit, gradients = torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd
    composite = {
        op: rule for op, rule in table.items() if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), implicit)
    }
    known = [op for op in decomposition_table if isinstance(op, OpOverload) and gradients in op.py_kernels]
    linear = torch.ops.aten.linear.default
    return composite | {op: op.py_kernels[gradients] for op in known} | {linear: _fold_rows(composite[linear])}


def _fold_rows(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule of a linear layer that reads rows in any layout as one matrix, if its weight trains.

    So does the dispatcher. Without gradients torch sees no weight behind its transposition, and expands the weight to a
    batch of matrices where rows are not contiguous: its codes then depend on the batch.
    """

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        if x.ndim < 3 or x.is_contiguous() or not weight.requires_grad:
            return rule(x, weight, bias)
        sizes = x.shape[:-1]
        rows = x.reshape(math.prod(sizes), x.shape[-1]).mm(weight.t())
        made = torch.ops.aten._unsafe_view(rows, [*sizes, weight.shape[0]])
        return made if bias is None else made + bias

    return linear


def reserve_names(graph: Graph) -> None:
    """Makes a graph of torch.export know the names of its own nodes: an input called `scale` is not one of ours."""
    graph._graph_namespace._used_names.update(node.name for node in graph.nodes)


def clean_module(path: str) -> str:
    """Return the path of a module; "" for nodes that torch.export has added, which it gives a path of its own."""
    return "" if path == _NO_MODULE else path


def list_symbols(size: Any) -> tuple[str, ...]:
    """Return the symbols in the size of a free dimension, `s31` and the like; none in a number."""
    return tuple(map(str, size.node.expr.free_symbols)) if isinstance(size, torch.SymInt) else ()


def list_leaves(tree: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts, and of what others have registered: outputs of transformers."""
    return pytree.tree_leaves(tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the same tree with `function` of each leaf."""
    return pytree.tree_map(function, tree)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without what torch 2.13 says of itself while it exports.

    That is a deprecated check, the weights that recurrent layers hold in a list too, and that torchvision is missing;
    for a model that depends on values, the graph so far, and that no user code belongs to a symbol. The error is
    raised too.
    """
    logs = [logging.getLogger(name) for name in _EXPORT_LOGS]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    vars(export_trace)["print"] = lambda *text, file: None  # prints a graph, and nothing else
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*treespec.*LeafSpec.* is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", message="The tensor attributes .*_flat_weights", category=UserWarning)
            yield
    finally:
        vars(export_trace).pop("print", None)
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


@contextlib.contextmanager
def without_error_log() -> Iterator[None]:
    """Without the errors of shapes that torch logs, with a traceback, before it raises them."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_is_no_error)
    try:
        yield
    finally:
        log.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno != logging.ERROR


def split_joint(
    joint: GraphModule, forward_outputs: int, static_inputs: Sequence[int]
) -> tuple[GraphModule, GraphModule]:
    """torch's min-cut partition into a forward and a backward half; it honors the pins of passes/ir/meta.py.

    Without its merging of equal nodes, which would join the dequantize of forward with the one of backward and so save
    floats; `retrace_graph` merges within each half. Outside of Dynamo, where somebody looks at stages, there is
    no tracing context, and one is made: without it torch keeps random keys in forward that only backward reads, and
    refuses a checkpointed region with dropout. The code of the halves is written when somebody asks for it.
    """
    context = contextlib.nullcontext() if TracingContext.try_get() else tracing(TracingContext(fake_mode(joint.graph)))
    options = functorch_config.patch(cse=False, ban_recompute_reductions=False)
    with options, _allow_recomputing(), context, _use_lazy_graph_module(True):
        forward, backward = min_cut_rematerialization_partition(
            joint, None, num_fwd_outputs=forward_outputs, static_lifetime_input_indices=list(static_inputs)
        )
    return forward, make_module(backward, backward.graph)  # torch reorders backward into one that writes at once


#: operators that backward may compute again, besides those of torch's own list: cheap ones that read memory once
_RECOMPUTABLE: Final = (
    *(op.overloadpacket for op in (ops.SCALE, ops.ZERO_POINT, ops.QUANTIZE, ops.DEQUANTIZE, ops.CHECKED, ops.IN_RANGE)),
    *(op.overloadpacket for op in (ops.PACK, ops.UNPACK, ops.LAY_OUT, ops.NORM_AGAIN)),
    torch.ops.aten._native_batch_norm_legit_no_training,
    torch.ops.aten._softmax,
    torch.ops.aten.cat,
)


@contextlib.contextmanager
def _allow_recomputing() -> Iterator[None]:
    """While torch's partitioner runs, its list of operators that it may compute again has ours too."""
    before = partitioners.get_default_op_list

    def list_operators() -> partitioners.OpTypes:
        types = before()
        return dataclasses.replace(
            types,
            recomputable_ops=types.recomputable_ops | set(_RECOMPUTABLE),
            fusible_ops=types.fusible_ops | set(_RECOMPUTABLE),
        )

    partitioners.get_default_op_list = list_operators
    try:
        yield
    finally:
        partitioners.get_default_op_list = before


def retrace_graph(module: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> GraphModule:
    """Return the graph over plain aten, our operators and Inductor's decompositions expanded, equal nodes merged."""
    with inductor_config.patch(_INDUCTOR):  # where random numbers are torch's own, dropout has no decomposition
        table = {**select_decomp_table(), **DECOMPOSITIONS}

    def trace(run: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
        with mode:
            own = [value.detach() if isinstance(value, torch.Tensor) else value for value in values]
            return make_fx(run, decomposition_table=table, tracing_mode="real")(*own)

    def is_plain(target: Any) -> bool:
        is_operator = isinstance(target, OpOverload) and target not in table and not target._can_decompose()
        return is_operator or target is operator.getitem

    with torch.no_grad(), inductor_config.patch(_INDUCTOR), _use_lazy_graph_module(True):
        graph, attributes = expand_graph(module, inputs, mode, trace, is_plain)
        graph.eliminate_dead_code()
        return _make_graph_module(attributes, fx_graph_cse(graph))


def compile_inductor(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    is_backward: bool,
    is_inference: bool,
    static_inputs: Sequence[int],
    fixed_outputs: int | None,
) -> Callable[[list[Any]], Sequence[Any]]:
    """Return the graph compiled by Inductor; called with a list, which it empties.

    The first `fixed_outputs` outputs (None: all) have the strides that they were traced with, others as is fastest.
    Backward is compiled after Dynamo has left; the tracing context that it needs to use Inductor's cache is made anew.
    """
    modes = [value.fake_mode for value in inputs if isinstance(value, FakeTensor)]
    context = tracing(TracingContext(modes[0])) if modes else contextlib.nullcontext()
    outputs = list_outputs(module.graph)[:fixed_outputs]
    set_visible_outputs(module.graph.output_node(), [i for i, node in enumerate(outputs) if isinstance(node, Node)])
    with torch.no_grad(), inductor_config.patch(_INDUCTOR), context:
        return compile_fx_inner(
            module,
            list(inputs),
            is_backward=is_backward,
            is_inference=is_inference,
            static_input_idxs=tuple(static_inputs),
        )


#: the autograd engine, for ranges that change when a backward has ended
ENGINE: Final = Engine(
    after_backward=lambda call: torch.autograd.Variable._execution_engine.queue_callback(call),
    task=torch._C._current_graph_task_id,
)


@contextlib.contextmanager
def plain_encoder_layers(wanted: bool) -> Iterator[None]:
    """While `wanted`, encoder layers run as their parts in eval too: their fused kernel hides its products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and not wanted)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


#: the state of the CPU's generator, and of every GPU's
RandomState: TypeAlias = tuple[torch.Tensor, list[torch.Tensor]]


def random_state() -> RandomState:
    """Return the state of every generator that a graph can draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: RandomState) -> None:
    """Puts the generators back to what `random_state` gave."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def is_random(node: Node) -> bool:
    """True if a node draws from torch's generators; in a region that is computed again only the first drawing."""
    if node.target is run_and_save_rng_state:
        return True
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def find_fake_mode(inputs: Sequence[Any]) -> FakeTensorMode | None:
    """Return the mode of the fake tensors that a capture makes of the inputs; None if it would make a new one."""
    context = TracingContext.try_get()
    modes = [value.fake_mode for value in inputs if isinstance(value, FakeTensor)]
    return context.fake_mode if context is not None and context.fake_mode is not None else next(iter(modes), None)
