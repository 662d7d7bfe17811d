"""Kernels of our own in C++: the files beside this one, compiled at their first use by torch's loader.

The library is kept in the cache folder of Inductor, so that one machine compiles it once.
"""

import ctypes
import functools
import re
import threading
from importlib import resources
from typing import Final, cast

#: a·b + c stays two roundings, as in the reference; the other two let gcc vectorize loops, which Inductor does itself
_FLAGS: Final = ("-ffp-contract=off", "-fno-trapping-math", "-ftree-loop-vectorize")


@functools.cache
def load_library(name: str) -> ctypes.CDLL | str:
    """Return the functions of `name`.cpp, or the reason why this machine has none: for example no C++ compiler."""
    try:
        return compile_source(read_source(f"{name}.cpp"))
    except Exception as error:  # no compiler, a folder that allows no programs, a processor without the instructions
        return f"{name}.cpp does not compile here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@functools.cache
def start_loading(*names: str) -> threading.Thread:
    """Load libraries in a thread, which waits for the compiler while this one traces; later calls find them loaded."""

    def load() -> None:
        for name in names:
            load_library(name)

    thread = threading.Thread(target=load, name="qcompiler-libraries")
    thread.start()
    return thread


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
