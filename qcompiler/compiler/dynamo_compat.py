"""Every private API of Dynamo that this project touches; with torch_compat.py all private ones of torch."""

import collections
import contextlib
import dataclasses
import functools
import inspect
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch._C._functorch import peek_interpreter_stack
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule
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
from torch._dynamo.resume_execution import ContinueExecutionCache
from torch._dynamo.source import AttrSource, DictGetItemSource, GetItemSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.symbolic_convert import tls as _dynamo_thread
from torch._dynamo.types import ConvertFrameReturn
from torch._dynamo.utils import counters, guard_failures
from torch._dynamo.variables import builder
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from qcompiler.compiler.dynamo_graphs import name_source
from qcompiler.compiler.model_parts import Part, StepKind
from qcompiler.passes.ir.meta import get_graph_argument

_TORCH: Final = os.path.dirname(torch.__file__) + os.sep
_OWN: Final = os.path.dirname(__file__) + os.sep
#: held by Dynamo while it captures and compiles a function; others that do so hold it too, as torch keeps the state of
#: a capture for the whole process
CAPTURING: Final = compile_lock


def wait_for_captures() -> None:
    """Wait until no other thread captures: torch refuses calls of captured functions meanwhile."""
    with CAPTURING:
        pass


def capture_statically(reason: str) -> None:
    """Make Dynamo start this capture again, with every number of Python as a constant; returns if they are already.

    Raises:
        RestartAnalysis: for Dynamo.
    """
    if dynamo_config.automatic_dynamic_shapes:
        # undone at the end of `no_silent_eager`
        dynamo_config.automatic_dynamic_shapes, dynamo_config.specialize_float = False, True
        raise _CaptureAgain(restart_reason=reason)


class _CaptureAgain(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """The first base lets Dynamo accept the error from a backend, the second makes Dynamo forget earlier graphs."""


def graph_breaks() -> dict[str, int]:
    """Reasons for which Dynamo has split or skipped frames so far, with their counts; some are both."""
    return collections.Counter(counters["graph_break"]) + collections.Counter(counters["unimplemented"])


@contextlib.contextmanager
def no_silent_eager(limit: int) -> Iterator[None]:
    """A context in which running out of recompilations raises instead of training in float without a word.

    Guards also see hooks that are registered after the first call; by default Dynamo leaves them out. A model under
    DistributedDataParallel stays whole: split at its buckets, each part would have a first and a last contraction.
    Numbers of Python that change, such as counters, become inputs of a graph; sizes of tensors are constants.
    NumPy draws its random numbers itself, outside of the graphs: Dynamo would draw others, from torch's generator.
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
        "use_numpy_random_stream": True,
        "capture_scalar_outputs": False,
        "capture_dynamic_output_shape_ops": False,
    }
    before = builder.record_automatic_dynamic
    builder.record_automatic_dynamic = _record_sizes  # type: ignore[assignment]
    try:
        with dynamo_config.patch(options):
            yield
    finally:
        builder.record_automatic_dynamic = before


def _record_sizes(tx: Any, name: str, tensor: torch.Tensor) -> FrameStateSizeEntry:
    """The answer to Dynamo's search for sizes that change: here none does."""
    return FrameStateSizeEntry.make_size(tuple(tensor.size()))


@dataclasses.dataclass(frozen=True)
class TracedFrame:
    """The function that Dynamo is capturing."""

    file: str
    function: str
    line: int
    locals: Mapping[str, Any]
    globals: Mapping[str, Any]
    #: of the rest of a function behind a graph break: the function itself
    origin: types.CodeType
    #: the line of the graph break that this is the rest behind, and of the one that ends this graph; None without one
    breaks: tuple[int | None, int | None]
    #: True if this is a whole function, which torch itself has called for the model
    is_outermost: bool


def traced_frame(module: GraphModule) -> TracedFrame | None:
    """Return the function that a Dynamo graph comes from; None outside of Dynamo."""
    tracer = InstructionTranslator.current_tx() if hasattr(_dynamo_thread, "current_tx") else None
    if tracer is None:
        return None
    code, reason = tracer.f_code, getattr(module, "compile_subgraph_reason", None)
    resumed = ContinueExecutionCache.generated_code_metadata.get(code)
    origin = code if resumed is None else resumed.code
    # with a break the rest of the function is another graph
    breaks = (
        None if resumed is None else code.co_firstlineno,
        tracer.lineno if getattr(reason, "graph_break", False) else None,
    )
    return TracedFrame(
        file=code.co_filename,
        function=code.co_name,
        line=code.co_firstlineno,
        locals=tracer.f_locals,
        globals=tracer.f_globals,
        origin=origin,
        breaks=breaks,
        is_outermost=breaks == (None, None) and _is_called_by_torch(),
    )


def _is_called_by_torch() -> bool:
    """Return True if no function of the user runs between the call of a compiled model and this capture."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _Retrying.__call__.__code__:
        frame = frame.f_back
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_OWN)


def guard_instances(parts: Sequence[Part], module: GraphModule, is_part: Callable[[object], bool]) -> None:
    """Make Dynamo capture a function anew for other modules: by default it takes the graph of one block for the next.

    Args:
        parts: the parts of the model in the variables of the function.
        module: the graph that Dynamo is capturing.
        is_part: True for the modules of the model.
    """
    tracer = InstructionTranslator.current_tx()
    scopes = {"L": tracer.f_locals, "G": tracer.f_globals}
    held = [_part_source(part) for part in parts if isinstance(part.value, torch.nn.Module)]
    sources = [getattr(get_graph_argument(node), "source", None) for node in module.graph.find_nodes(op="placeholder")]
    for source in [*held, *(source for source in sources if source is not None)]:
        chain = [source]
        while hasattr(chain[-1], "base"):
            chain.append(chain[-1].base)
        for step in reversed(chain):
            if is_part(_evaluate(name_source(step), scopes)):
                install_guard(step.make_guard(GuardBuilder.ID_MATCH))
                break


def _part_source(part: Part) -> Any:
    """Return Dynamo's source of a part of the model."""
    source: Any = LocalSource(part.variable)
    kinds: dict[StepKind, Any] = {
        StepKind.ATTRIBUTE: AttrSource,
        StepKind.INDEX: GetItemSource,
        StepKind.KEY: DictGetItemSource,
    }
    for kind, step in part.steps:
        source = kinds[kind](source, step)
    return source


def _evaluate(expression: str, scopes: Mapping[str, Any]) -> Any:
    """Return the value that Dynamo has found at a source; None for a value that Dynamo makes."""
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
    return _short_reason(reasons[-1]) if reasons else "unknown"


def _short_reason(reason: Any) -> str:
    """Return `len(self.seen) == 3 # self.seen.append(y) # model.py:12 in forward` of Dynamo's reason."""
    return " ".join(str(reason).partition("\n")[0].partition(": ")[2].split())


#: the errors of Dynamo with fullgraph=True in place of a split graph
GRAPH_BREAKS: Final = (Unsupported, UserError, GuardOnDataDependentSymNode)


#: the errors of Dynamo at the end of `no_silent_eager`
CAPTURE_LIMIT: Final = FailOnRecompileLimitHit


@contextlib.contextmanager
def unwrapped_errors() -> Iterator[None]:
    """A context in which errors of our backend reach the user unchanged, without Dynamo's wrapper."""
    try:
        yield
    except BackendCompilerFailed as error:
        inner = error.inner_exception
        raise inner from inner.__cause__


#: told of a function that is not captured any more: its code, and why
GivenUp: TypeAlias = Callable[[types.CodeType, str], None]


def compile_with(
    model: torch.nn.Module, backend: Callable[..., Any], given_up: GivenUp, *, fullgraph: bool
) -> Callable[..., Any]:
    """torch.compile for one backend with static shapes; with separate compiled entries if torch can do that."""
    options = (
        {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    )
    held = _Held(backend)
    compiled: Any = torch.compile(model, backend=held, fullgraph=fullgraph, **options)  # type: ignore[call-overload]
    compiled.dynamo_ctx.callback = _Retrying(compiled.dynamo_ctx.callback, None if fullgraph else given_up)
    compiled._initialize()
    # its forward, since hooks on all modules would fire once more for the module around the model
    return compiled.forward  # type: ignore[no-any-return]


class _Held:
    """A backend for torch, which keeps all backends until the process ends: ours keeps a model, and goes with it."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self._backend = weakref.ref(backend)

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Any:
        backend = self._backend()
        assert backend is not None, "whoever calls the model keeps the backend"
        return backend(module, inputs)


def is_optimized(model: torch.nn.Module) -> bool:
    """Return True for the module that torch.compile has put around another one."""
    return isinstance(model, OptimizedModule)


@functools.cache
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


#: captures of a function for the length of a list, before its parts are captured alone
GROWN: Final = 8


class _Retrying:
    """Dynamo's own callback, which gives a function up for the present call, if another call of it may be captured.

    Dynamo gives it up for good: a model would stay in float after a call that raised, or ran inside of torch.func.
    A function with a list that grows is captured anew at each call; after `GROWN` of them its parts are captured alone.
    """

    def __init__(self, callback: Any, given_up: GivenUp | None) -> None:
        self._torchdynamo_orig_backend = callback
        self._given_up = given_up
        #: function → captures since a list had another length
        self._grown: collections.Counter[types.CodeType] = collections.Counter()

    def __call__(self, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        if self._given_up is not None and self._grown[frame.f_code] >= GROWN:
            return ConvertFrameReturn(apply_to_code=False)
        before, reasons = _count_exceptions(), len(guard_failures.get(frame.f_code, ()))
        result = self._convert(frame, cache_entry, frame_state)
        may_be_captured = cache_entry is not None or is_foreign_context() or _count_exceptions() > before
        if result.guarded_code is None and may_be_captured:
            result.apply_to_code = False
        self._watch_growth(frame.f_code, guard_failures.get(frame.f_code, ())[reasons:])
        return result

    def _convert(self, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        """Capture a function; layers of torch.nn too, which Dynamo takes only as parts of others.

        If Dynamo has given up the function around a layer, that layer would stay in float.
        """
        wrapper = self._torchdynamo_orig_backend
        if not _is_layer(frame.f_code) or is_foreign_context():
            return wrapper(frame, cache_entry, frame_state)
        with CAPTURING, _disable_current_modes():
            return wrapper._torchdynamo_orig_backend(frame, cache_entry, wrapper.hooks, frame_state, skip=1)

    def _watch_growth(self, code: types.CodeType, reasons: Sequence[Any]) -> None:
        lengths = [text for text in map(_short_reason, reasons[:1]) if "len(" in text]
        self._grown[code] += len(lengths)
        if lengths and self._grown[code] == GROWN and self._given_up is not None:
            self._given_up(code, lengths[0])


_LAYERS: Final = os.path.join(_TORCH, "nn", "modules") + os.sep


def _is_layer(code: types.CodeType) -> bool:
    return code.co_name == "forward" and code.co_filename.startswith(_LAYERS)


def _count_exceptions() -> int:
    """Return how many functions Dynamo has given up since they raise."""
    return sum(count for reason, count in graph_breaks().items() if reason.startswith("Observed exception"))
