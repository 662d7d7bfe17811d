"""Every private torch API that this project touches; nothing else touches them."""

import contextlib
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch._C._functorch import peek_interpreter_stack
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TensorifyScalarRestartAnalysis,
    UnspecializeRestartAnalysis,
    Unsupported,
    UserError,
)
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.pgo import FrameStateSizeEntry
from torch._dynamo.source import LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.symbolic_convert import tls as _dynamo_thread
from torch._dynamo.utils import counters, guard_failures
from torch._dynamo.variables import builder
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._prims.rng_prims import run_and_save_rng_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from qcompiler.runtime.ops import DECOMPOSITIONS
from qcompiler.runtime.state import Engine

#: a mode that sees every operator
DispatchMode = TorchDispatchMode

#: dropout draws from torch's generator as in eager, so that a seed gives the same masks in both backends
_INDUCTOR: Final = {"fallback_random": True}


def placeholder_source(node: Node) -> str:
    """The expression behind a placeholder of a Dynamo graph: `L['self']._modules['fc']._parameters['weight']`."""
    return _source_name(getattr(node.meta.get("grapharg"), "source", None))


def _source_name(source: Any) -> str:
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def is_number(node: Any) -> bool:
    """Return True for an input of a Dynamo graph that is a float for its caller."""
    return isinstance(node, Node) and getattr(node.meta.get("grapharg"), "is_tensor", True) is False


def has_symbolic_sizes(module: GraphModule) -> bool:
    """Return True if a tensor of a Dynamo graph has a size that is no number."""
    examples = [node.meta.get("example_value") for node in module.graph.nodes]
    tensors = [tensor for tensor in leaves(examples) if isinstance(tensor, torch.Tensor)]
    return any(isinstance(size, torch.SymInt) for tensor in tensors for size in tensor.shape)


def capture_statically(reason: str) -> None:
    """Make Dynamo start this capture again, with every number of Python as a constant; returns if they are already.

    Raises:
        RestartAnalysis: for Dynamo.
    """
    if dynamo_config.automatic_dynamic_shapes:
        # undone where `no_silent_eager` ends
        dynamo_config.automatic_dynamic_shapes, dynamo_config.specialize_float = False, True
        raise _CaptureAgain(restart_reason=reason)


class _CaptureAgain(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """The first base lets Dynamo take it from a backend, the second makes Dynamo forget what it has seen."""


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


def composite_decompositions() -> dict[Any, Callable[..., Any]]:
    """For `ExportedProgram.run_decompositions`: the operators that torch itself expands when it traces, and no others.

    So an exported graph has the products that a captured one has.
    """
    table = torch.export.default_decompositions().materialize()
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    return {
        op: rule for op, rule in table.items() if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), implicit)
    }


def reserve_names(graph: Graph) -> None:
    """Makes a graph of torch.export know the names of its own nodes: an input called `scale` is not one of ours."""
    graph._graph_namespace._used_names.update(node.name for node in graph.nodes)


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


@contextlib.contextmanager
def no_silent_eager(limit: int) -> Iterator[None]:
    """A context in which running out of recompilations raises instead of training in float without a word.

    Guards also see hooks that are registered after the first call; by default Dynamo leaves them out. A model under
    DistributedDataParallel stays whole: split at its buckets, each part would have a first and a last contraction.
    Numbers of Python that change, such as counters, become inputs of a graph; sizes of tensors are constants.
    """
    options: dict[str, Any] = {
        "recompile_limit": limit,
        "accumulated_recompile_limit": 100 * limit,
        "fail_on_recompile_limit_hit": True,
        "skip_nnmodule_hook_guards": False,
        "optimize_ddp": False,
        "automatic_dynamic_shapes": True,
        "assume_static_by_default": True,
        "allow_unspec_int_on_nn_module": True,
        "specialize_float": False,
    }
    before = builder.record_automatic_dynamic
    builder.record_automatic_dynamic = _record_sizes  # type: ignore[assignment]
    try:
        with dynamo_config.patch(options):
            yield
    finally:
        builder.record_automatic_dynamic = before


def _record_sizes(tx: Any, name: str, tensor: torch.Tensor) -> FrameStateSizeEntry:
    """What Dynamo asks for to find sizes that change: here none does."""
    return FrameStateSizeEntry.make_size(tuple(tensor.size()))


@dataclasses.dataclass(frozen=True)
class TracedFrame:
    """The function that Dynamo is capturing."""

    file: str
    function: str
    line: int
    locals: Mapping[str, Any]
    globals: Mapping[str, Any]
    #: True if something breaks the graph, so that the rest of the function is another graph
    is_broken: bool


def traced_frame(module: GraphModule) -> TracedFrame | None:
    """Return the function that a Dynamo graph comes from; None outside of Dynamo."""
    tracer = InstructionTranslator.current_tx() if hasattr(_dynamo_thread, "current_tx") else None
    if tracer is None:
        return None
    code, reason = tracer.f_code, getattr(module, "compile_subgraph_reason", None)
    broken = bool(getattr(reason, "graph_break", False))
    return TracedFrame(code.co_filename, code.co_name, code.co_firstlineno, tracer.f_locals, tracer.f_globals, broken)


def guard_instances(module: GraphModule, is_part: Callable[[object], bool]) -> None:
    """Make Dynamo capture a function anew for other modules: by default it takes the graph of one block for the next.

    Args:
        module: the graph that Dynamo is capturing.
        is_part: True for the modules of the model.
    """
    tracer = InstructionTranslator.current_tx()
    scopes = {"L": tracer.f_locals, "G": tracer.f_globals}
    sources = [getattr(node.meta.get("grapharg"), "source", None) for node in module.graph.find_nodes(op="placeholder")]
    for source in [LocalSource("self"), *(source for source in sources if source is not None)]:
        chain = [source]
        while hasattr(chain[-1], "base"):
            chain.append(chain[-1].base)
        for step in reversed(chain):
            if is_part(_evaluate(_source_name(step), scopes)):
                install_guard(step.make_guard(GuardBuilder.ID_MATCH))
                break


def _evaluate(expression: str, scopes: Mapping[str, Any]) -> Any:
    """Return what Dynamo has found at a source; None for what it makes itself."""
    try:
        return eval(expression, dict(scopes))
    except Exception:
        return None


def is_foreign_context() -> bool:
    """Return True inside of modes and transformations under which Dynamo gives functions up for good.

    Modes that see every operator (FlopCounterMode), and torch.func.
    """
    return is_in_torch_dispatch_mode(include_infra_modes=False) or peek_interpreter_stack() is not None


def latest_recapture() -> str:
    """Return the latest reason of the function that was captured most often: `len(self.seen) == 3`."""
    reasons: list[Any] = max(guard_failures.values(), key=len, default=[])
    if not reasons:
        return "unknown"
    return " ".join(str(reasons[-1]).partition("\n")[0].partition(": ")[2].split())


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


def compile_with(model: torch.nn.Module, backend: Callable[..., Any], *, fullgraph: bool) -> Callable[..., Any]:
    """torch.compile for one backend with static shapes; its compiled entries are its own where torch can do that."""
    options = (
        {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    )
    compiled: Any = torch.compile(model, backend=backend, fullgraph=fullgraph, **options)  # type: ignore[call-overload]
    compiled.dynamo_ctx.callback = _Retrying(compiled.dynamo_ctx.callback)
    compiled._initialize()
    # its forward, since hooks on all modules would fire once more for the module around the model
    return compiled.forward  # type: ignore[no-any-return]


def trace_checkpoint_sequential() -> None:
    """Let Dynamo capture torch.utils.checkpoint.checkpoint_sequential, which it leaves in float by default."""
    with contextlib.suppress(ValueError):  # somebody else has done it
        substitute: Any = torch.compiler.substitute_in_graph(checkpoint_sequential, skip_signature_check=True)
        substitute(_checkpoint_parts)


def _checkpoint_parts(functions: Any, segments: int, input: Any, **options: Any) -> Any:  # noqa: A002
    """The same in a form that Dynamo captures: each segment but the last one is checkpointed."""
    parts = list(functions.children()) if isinstance(functions, torch.nn.Sequential) else list(functions)
    size = len(parts) // segments
    reentrant = options.get("use_reentrant") is not False
    keep = options.get("preserve_rng_state", True)

    def run(start: int, end: int, x: Any) -> Any:
        for part in parts[start:end]:
            x = part(x)
        return x

    start = 0
    for _ in range(segments - 1):
        input = checkpoint(run, start, start + size, input, use_reentrant=reentrant, preserve_rng_state=keep)  # noqa: A001
        start += size
    return run(start, len(parts), input)


class _Retrying:
    """Dynamo's own callback, which gives a function up for the present call, if another call of it may be captured.

    Dynamo gives it up for good: a model would stay in float after a call that raised, or ran inside of torch.func.
    """

    def __init__(self, callback: Callable[..., Any]) -> None:
        self._torchdynamo_orig_backend = callback

    def __call__(self, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        before = _count_exceptions()
        result = self._torchdynamo_orig_backend(frame, cache_entry, frame_state)
        may_be_captured = cache_entry is not None or is_foreign_context() or _count_exceptions() > before
        if result.guarded_code is None and may_be_captured:
            result.apply_to_code = False
        return result


def _count_exceptions() -> int:
    """Return how many functions Dynamo has given up since they raise."""
    return sum(count for reason, count in graph_breaks().items() if reason.startswith("Observed exception"))


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
