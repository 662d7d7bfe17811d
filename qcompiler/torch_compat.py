"""Every private torch API that this project touches; nothing else touches them."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch._decomp import decomposition_table
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import CompileContext, TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch._prims.rng_prims import run_and_save_rng_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from qcompiler.runtime.ops import DECOMPOSITIONS
from qcompiler.runtime.state import Engine

#: dropout draws from torch's generator as in eager, so that a seed gives the same masks in both backends
_INDUCTOR: Final = {"fallback_random": True}


def placeholder_source(node: Node) -> str:
    """The expression behind a placeholder of a Dynamo graph: `L['self']._modules['fc']._parameters['weight']`."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def export_joint(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Any]:
    """The functional forward+backward graph of a Dynamo graph, and AOTAutograd's metadata of its inputs and outputs.

    Without inputs that need gradients (or under no_grad) the graph is the forward alone. Backward is traced with
    autocast off, as it runs in eager: each gradient has the type of its operator, whatever context the call stood in.
    """
    with contextlib.ExitStack() as stack, functorch_config.patch(backward_pass_autocast="off"):
        joint = aot_export_joint_with_descriptors(stack, module, tuple(inputs))
        return joint.graph_module, joint._aot_state.fw_metadata


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
    return composite | {op: op.py_kernels[gradients] for op in known}


def reserve_names(graph: Graph) -> None:
    """Makes a graph of torch.export know the names of its own nodes: an input called `scale` is not one of ours."""
    graph._graph_namespace._used_names.update(node.name for node in graph.nodes)


def symbols(size: Any) -> tuple[str, ...]:
    """The symbols in the size of a free dimension, `s31` and the like; none in a number."""
    return tuple(map(str, size.node.expr.free_symbols)) if isinstance(size, torch.SymInt) else ()


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts, and of what others have registered: outputs of transformers."""
    return pytree.tree_leaves(tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `function` of each leaf."""
    return pytree.tree_map(function, tree)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without what torch 2.13 says of itself while it exports: a deprecated check, and that torchvision is missing."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*treespec.*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        log.setLevel(before)


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


def partition(
    joint: GraphModule, forward_outputs: int, static_inputs: Sequence[int]
) -> tuple[GraphModule, GraphModule]:
    """torch's min-cut partition into a forward and a backward half; it honors the pins of passes/graph.py.

    Without its merging of equal nodes, which would join the dequantize of forward with the one of backward and so save
    floats; `retrace` merges within each half.
    """
    with functorch_config.patch(cse=False):
        return min_cut_rematerialization_partition(
            joint, None, num_fwd_outputs=forward_outputs, static_lifetime_input_indices=list(static_inputs)
        )


def retrace(module: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> GraphModule:
    """The graph over plain aten, our operators and Inductor's decompositions expanded, equal nodes merged."""
    with mode, torch.no_grad(), inductor_config.patch(_INDUCTOR):
        table = {**select_decomp_table(), **DECOMPOSITIONS}
        plain = make_fx(module, decomposition_table=table, tracing_mode="real")(*inputs)
    return GraphModule(plain, fx_graph_cse(plain.graph))


def compile_inductor(
    module: GraphModule, inputs: Sequence[Any], *, is_backward: bool, is_inference: bool, static_inputs: Sequence[int]
) -> Callable[[list[Any]], Sequence[Any]]:
    """The graph compiled by Inductor; called with a list, which it empties.

    Backward is compiled after Dynamo has left; the tracing context that it needs to use Inductor's cache is made anew.
    """
    modes = [value.fake_mode for value in inputs if isinstance(value, FakeTensor)]
    context = tracing(TracingContext(modes[0])) if modes else contextlib.nullcontext()
    with torch.no_grad(), inductor_config.patch(_INDUCTOR), context:
        return compile_fx_inner(
            module,
            list(inputs),
            is_backward=is_backward,
            is_inference=is_inference,
            static_input_idxs=tuple(static_inputs),
        )


def graph_breaks() -> dict[str, int]:
    """Reasons for which Dynamo has split or skipped frames so far, with their counts."""
    return {**counters["graph_break"], **counters["unimplemented"]}


def no_silent_eager(limit: int) -> Any:
    """A context in which running out of recompilations raises instead of training in float without a word.

    Guards also see hooks that are registered after the first call; by default Dynamo leaves them out.
    """
    return dynamo_config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True, skip_nnmodule_hook_guards=False)


#: what Dynamo raises with fullgraph=True where it would otherwise split the graph
GRAPH_BREAKS: Final = (Unsupported, UserError)
#: what Dynamo raises where `no_silent_eager` ends
CAPTURE_LIMIT: Final = FailOnRecompileLimitHit


@contextlib.contextmanager
def unwrapped_errors() -> Iterator[None]:
    """A context in which what our backend raises reaches the user as it is, without Dynamo's wrapper."""
    try:
        yield
    except BackendCompilerFailed as error:
        inner = error.inner_exception
        raise inner from inner.__cause__


#: the autograd engine, for ranges that change when a backward has ended
ENGINE: Final = Engine(
    after_backward=lambda call: torch.autograd.Variable._execution_engine.queue_callback(call),
    task=torch._C._current_graph_task_id,
)


def frame_id() -> int | None:
    """The frame that Dynamo is compiling: the same for every signature of a function, another after a graph break."""
    current = CompileContext.current_compile_id()
    return None if current is None else current.frame_id


def compile_with(model: torch.nn.Module, backend: Callable[..., Any], *, fullgraph: bool) -> Callable[..., Any]:
    """torch.compile for one backend with static shapes; its compiled entries are its own where torch can do that."""
    options = (
        {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    )
    return torch.compile(model, backend=backend, dynamic=False, fullgraph=fullgraph, **options)  # type: ignore[no-any-return,call-overload]


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
    """The state of every generator that a graph can draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: RandomState) -> None:
    """Puts the generators back to what `random_state` gave."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def is_random(node: Node) -> bool:
    """True where a node draws from torch's generators; in a region that is computed again only the first drawing."""
    if node.target is run_and_save_rng_state:
        return True
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
