"""Kernels of our own in C++: the files beside this one, compiled at their first use by torch's loader.

The library is kept in the cache folder of Inductor, so that one machine compiles it once.
"""

import ctypes
import functools
from importlib import resources
from typing import Final, cast

#: a·b + c stays two roundings, as in the reference; the other two let gcc vectorize loops, which Inductor does itself
_FLAGS: Final = ("-ffp-contract=off", "-fno-trapping-math", "-ftree-loop-vectorize")


@functools.cache
def load_library(name: str) -> ctypes.CDLL | str:
    """Return the functions of `name`.cpp, or the reason why this machine has none: for example no C++ compiler."""
    source = resources.files(__package__).joinpath(f"{name}.cpp").read_text(encoding="utf-8")
    try:
        return compile_source(source)
    except Exception as error:  # no compiler, a folder that allows no programs, a processor without the instructions
        return f"{name}.cpp does not compile here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def compile_source(source: str) -> ctypes.CDLL:
    """Return the compiled library of C++ code, whose functions are `extern "C"`.

    Raises:
        Exception: of torch's loader, if there is no compiler or the code does not compile.
    """
    from torch._inductor.codecache import CppCodeCache  # loads Inductor: half a second, which eager users save

    return cast(ctypes.CDLL, CppCodeCache.load(source, device_type="cpu", extra_flags=_FLAGS))
