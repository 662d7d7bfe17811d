"""Contractions that run as plain PyTorch: outside of the graphs that Dynamo captures, or in a whole forward."""

import concurrent.futures.thread
import contextlib
import copy
import dataclasses
import io
import os
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.compiler import torch_compat
from qcompiler.compiler.plan import Kept
from qcompiler.passes.ir.opaque import explain_call
from qcompiler.passes.joint.annotate_roles import is_contraction

#: no files of the user: files of torch, of this project and of threads, and the name that torch.fx gives to the file of
#: a graph
_LIBRARIES: Final = (
    *(os.path.dirname(str(library.__file__)) + os.sep for library in (torch, qcompiler)),
    *(threading.__file__, concurrent.futures.thread.__file__, "<eval_with_key>"),
)


class _Working(threading.local):
    """Captures and steps in progress in this thread, of any model: their operators are not those of a forward."""

    depth = 0


_WORKING: Final = _Working()


@contextlib.contextmanager
def working() -> Iterator[None]:
    """A context around a capture or a step."""
    _WORKING.depth += 1
    try:
        yield
    finally:
        _WORKING.depth -= 1


def is_working() -> bool:
    """Return True inside of a capture or a step of this thread."""
    return _WORKING.depth > 0


class Recorder(torch_compat.DispatchMode):
    """A mode that notes every contraction which runs as plain PyTorch inside of it, with its module and source line.

    Dynamo captures graphs inside of this mode as it does outside of it.
    """

    #: some operators inside of a step keep the state of a generator
    supports_higher_order_operators = True

    def __init__(self, *models: nn.Module, is_paused: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self._modules = {id(module): name for model in models for name, module in model.named_modules()}
        self._parameters = {id(value): name for model in models for name, value in model.named_parameters()}
        self._is_paused = is_paused
        #: the place of a call without a line of the user above
        self.elsewhere = "an unknown line"
        #: the module path of each contraction that passes can reach, in order
        self.order: list[str] = []
        #: each contraction once, those inside of fused kernels too
        self.found: dict[Kept, None] = {}

    def follow(self, is_paused: Callable[[], bool], elsewhere: str) -> "Recorder":
        """Return a recorder for another thread, which notes what it finds with this one."""
        other = Recorder(is_paused=is_paused)
        other._modules, other._parameters = self._modules, self._parameters
        other.found, other.elsewhere = self.found, elsewhere
        return other

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True: Dynamo gives up functions that run inside of other modes."""
        return True

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note a contraction, and run every operator as it is."""
        result = func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        if not self._is_paused() and (is_contraction(func) or explain_call(func, given, result)):
            path, line = self._find_place()
            path = self._find_owner(path, args)
            if is_contraction(func):
                self.order.append(path)
            self.found[Kept(str(func), path or "(root)", f"runs outside of the captured graphs, at {line}")] = None
        return result

    def _find_place(self) -> tuple[str, str]:
        """Return the path of the innermost module that runs, and the innermost line of the user."""
        frame: types.FrameType | None = sys._getframe(2)
        line, path = "", None
        while frame is not None and (path is None or not line):
            name = self._modules.get(id(frame.f_locals.get("self")))
            path = name if path is None else path
            if not line and not frame.f_code.co_filename.startswith(_LIBRARIES):
                line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        return path or "", line or self.elsewhere

    def _find_owner(self, path: str, args: tuple[Any, ...]) -> str:
        """Return the module that holds the weight if that lies inside of `path`: attention multiplies for out_proj."""
        for arg in args:
            base = arg._base if isinstance(arg, Tensor) and arg._base is not None else arg
            owner = self._parameters.get(id(base), "").rpartition(".")[0]
            if owner and (not path or owner.startswith(f"{path}.")):
                return owner
        return path


@dataclasses.dataclass
class _Watch:
    """A call of a model whose threads are watched. A thread that never ends keeps the watch, so it holds no model."""

    recorder: Recorder
    #: the threads that run parts of the forward
    threads: set[int]
    is_over: bool = False

    def _is_paused(self) -> bool:
        return self.is_over or is_working()

    def follow(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return what a thread runs, as a part of the forward that started the thread."""

        def start(*args: Any, **kwargs: Any) -> Any:
            if self.is_over:
                return run(*args, **kwargs)
            inner = self.recorder.follow(self._is_paused, "the start of a thread")
            own = threading.get_ident()
            self.threads.add(own)
            try:
                with inner:
                    return run(*args, **kwargs)
            finally:
                self.threads.discard(own)  # a thread of a pool goes on to work for others

        return start


@contextlib.contextmanager
def recording_threads(recorder: Recorder) -> Iterator[None]:
    """Note contractions in threads that forward starts, too: modes, and Dynamo, see one thread alone."""
    watch = _Watch(recorder, {threading.get_ident()})
    with _CHANGING:
        if not _WATCHES:
            _PLAIN[:] = [getattr(kind, name) for kind, name, _ in _STARTS]
            for kind, name, ours in _STARTS:
                setattr(kind, name, ours)
        _WATCHES.append(watch)
    try:
        yield
    finally:
        watch.is_over = True
        with _CHANGING:
            _WATCHES.remove(watch)
            if not _WATCHES:
                for (kind, name, _), plain in zip(_STARTS, _PLAIN, strict=True):
                    setattr(kind, name, plain)


def _start_thread(thread: threading.Thread) -> None:
    """Start a thread, in the place of `Thread.start`."""
    _follow_run(thread)
    _PLAIN[0](thread)


def _make_task(task: Any, *args: Any, **kwargs: Any) -> None:
    """Make a task of a pool of threads, in the place of `_WorkItem.__init__`."""
    _PLAIN[1](task, *args, **kwargs)
    _follow_run(task)


def _follow_run(given: Any) -> None:
    """Watch what a thread or a task runs, if this thread is a part of a forward."""
    own = threading.get_ident()
    for watch in [watch for watch in _WATCHES if own in watch.threads]:
        given.run = watch.follow(given.run)


_WATCHES: Final[list[_Watch]] = []
#: held while the functions of `_STARTS` come and go
_CHANGING: Final = threading.Lock()
#: where threads and tasks of pools begin, and our functions in those places while a forward is watched
_STARTS: Final[tuple[tuple[Any, str, Callable[..., None]], ...]] = (
    (threading.Thread, "start", _start_thread),
    (concurrent.futures.thread._WorkItem, "__init__", _make_task),
)
#: the functions that stood there before
_PLAIN: Final[list[Callable[..., None]]] = []


def forward_order(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Return the module path of each contraction of one forward, in order.

    A copy of the model runs forward once, without gradients. A function that somebody has put in the place of `forward`
    may go on to call the model itself. Nothing of the model, its inputs and the random generators changes. Prints of
    forward appear once.

    Raises:
        Exception: the model cannot be copied, or its forward raises.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, types.FunctionType)]:
                del hooks[key]  # closures write to objects that the copy shares with the model
    inputs, options = torch_compat.map_leaves(_copy_tensor, (args, dict(kwargs)))
    recorder = Recorder(model, twin)
    with (
        _kept_state(model),
        _kept_generators(),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        torch.no_grad(),
        recorder,
    ):
        warnings.simplefilter("ignore")
        twin(*inputs, **options)
    return recorder.order


def _copy_tensor(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


@contextlib.contextmanager
def _kept_state(model: nn.Module) -> Iterator[None]:
    """Put the buffers and attributes of a model back at the end, if it was called."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for held, before in attributes:
            held.update(before)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):  # batch norm changes no version
                buffer.copy_(value)


@contextlib.contextmanager
def _kept_generators() -> Iterator[None]:
    """Put the generators of torch, Python and NumPy back at the end."""
    states = torch_compat.random_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch_compat.set_random_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
