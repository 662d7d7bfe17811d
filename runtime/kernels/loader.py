"""Kernels of our own in C++: the files beside this one, compiled at their first use by torch's loader.

The library is kept in the cache folder of Inductor, so that one machine compiles it once.
"""

import contextlib
import contextvars
import ctypes
import functools
import importlib
import logging
import re
import subprocess
import threading
from collections.abc import Callable
from importlib import resources
from typing import Final, TypeVar, cast

logger = logging.getLogger("qcompiler")

T = TypeVar("T")

#: a·b + c stays two roundings, as in the reference; the other two let gcc vectorize loops, which Inductor does itself
_FLAGS: Final = ("-ffp-contract=off", "-fno-trapping-math", "-ftree-loop-vectorize")
#: a kernel of Inductor that does nothing
_EMPTY_KERNEL: Final = (
    "#include <torch/csrc/inductor/cpp_prefix.h>\n"
    'extern "C" void kernel(float* x) { at::vec::Vectorized<float>::loadu(x).store(x); }\n'
)
#: held while a library is compiled, so that no other thread compiles it too
_COMPILING: Final = threading.Lock()
#: held while torch tries the processor, whose flags it changes meanwhile: two threads at once would leave wrong ones
_TRYING: Final = threading.RLock()


def load_library(name: str) -> ctypes.CDLL | str:
    """Return the functions of `name`.cpp, or the reason why this machine has none, which is logged."""
    explain_compiler()  # outside of the lock: one thread tries the processor, before any compiles
    with _COMPILING:
        return _load(name)


@functools.cache
def _load(name: str) -> ctypes.CDLL | str:
    if reason := explain_compiler():  # the plan says so, once for all libraries
        return reason
    library = _compile(name)
    if isinstance(library, str):
        logger.warning("%s", library)
    return library


def _compile(name: str) -> ctypes.CDLL | str:
    try:
        return call_until_compiled(lambda: compile_source(read_source(f"{name}.cpp")))
    except Exception as error:  # no compiler, a folder that allows no programs
        return f"{name}.cpp does not compile here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def call_until_compiled(run: Callable[[], T]) -> T:
    """Return what `run` returns; it runs once more if a signal has ended the compiler.

    Ctrl-C in a terminal ends g++ too, and torch would raise that failure again as long as the process lives.

    Raises:
        Exception: of `run`.
    """
    try:
        return run()
    except Exception as error:
        if not _was_ended(error):
            raise
    from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache

    for kind in (CppCodeCache, CppPythonBindingsCodeCache):
        kind.cache.clear()
    return run()


def _was_ended(error: BaseException | None) -> bool:
    """Return True if a signal has ended a program that the error comes from."""
    while error is not None:
        if isinstance(error, subprocess.CalledProcessError) and error.returncode < 0:
            return True
        error = error.__cause__ or error.__context__
    return False


@functools.cache
def explain_compiler() -> str:
    """Say why this machine compiles no kernels; empty: it does.

    The answer takes 0.4 s, and 5 s more on a new machine, whose processor torch tries. A library takes up to 4 s, and
    may be on its way in another thread.
    """
    library = _ask_processor()
    return library if isinstance(library, str) else ""


@functools.cache
def explain_vectors() -> str:
    """Say why kernels that multiply codes do not run here; empty: they do."""
    library = _ask_processor()
    if isinstance(library, str):
        return library
    return "" if library.get_lanes() else "kernels that multiply codes need a processor with AVX-512 VNNI or AVX2"


def has_wide_vectors() -> bool:
    """Return True if the kernels of codes multiply 64 bytes at once (AVX-512 VNNI), False for 16 (AVX2)."""
    library = _ask_processor()
    return not isinstance(library, str) and library.get_lanes() == 16


def has_tiles() -> bool:
    """Return True if the processor multiplies tiles of bytes (AMX): torch then multiplies several times as fast."""
    library = _ask_processor()
    return not isinstance(library, str) and bool(library.has_tiles())


@functools.cache
def _ask_processor() -> ctypes.CDLL | str:
    with _TRYING:
        return _compile("processor")


@functools.cache
def start_loading(*names: str, inductor: bool, then: Callable[[], object] = lambda: None) -> threading.Thread:
    """Load libraries in a thread, while this one traces; later calls find them loaded, or wait.

    Args:
        inductor: let Inductor compile the header of all kernels meanwhile, which takes 5 to 9 s on a new machine.
        then: what the thread does behind all of that.
    """
    _import_compiler()
    ready = threading.Event()

    def load() -> None:
        with _TRYING:
            ready.set()
            works = not explain_compiler()
        header = _start_thread(_try_inductor, "qcompiler-header") if inductor and works else None
        for name in names:
            load_library(name)
        if header is not None:
            header.join()
        if works:
            then()

    thread = _start_thread(load, "qcompiler-libraries")
    ready.wait()
    return thread


def _start_thread(run: Callable[[], None], name: str) -> threading.Thread:
    """Start a thread with the configuration of this one: Inductor's is that of a context."""
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name)
    thread.start()
    return thread


def _try_inductor() -> None:
    with contextlib.suppress(Exception):  # Inductor raises it again where the user sees it
        prepare_inductor()


def wait_for_processor() -> None:
    """Wait until the thread that was started has tried the processor."""
    with _TRYING:
        pass


def _import_compiler() -> None:
    """Import what compiles in this thread: imports in two threads at once can fail.

    The extension imports setuptools, which takes a finder out of `sys.meta_path`. An import in another thread that
    walks through that list then passes over the finder of files, and a module that is there is not found.
    """
    for module in ("_inductor.codecache", "_inductor.cpp_builder", "_inductor.cpu_vec_isa", "utils.cpp_extension"):
        importlib.import_module(f"torch.{module}")


def prepare_inductor() -> None:
    """Compile an empty kernel as Inductor does, with the header of all kernels.

    Raises:
        Exception: of Inductor, if the kernel does not compile.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    CppPythonBindingsCodeCache.load_pybinding(["float*"], _EMPTY_KERNEL)


def read_source(file: str) -> str:
    """Return the text of a file beside this one, with the text of each header of ours in place of its `#include`."""
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.*)"$', lambda found: read_source(found[1]), text, flags=re.MULTILINE)


def compile_source(source: str) -> ctypes.CDLL:
    """Return the compiled library of C++ code, whose functions are `extern "C"`.

    Raises:
        Exception: of torch's loader, if there is no compiler or the code does not compile.
    """
    from torch._inductor.codecache import CppCodeCache  # loads Inductor: half a second, which eager users save

    return cast(ctypes.CDLL, CppCodeCache.load(source, device_type="cpu", extra_flags=_FLAGS))
