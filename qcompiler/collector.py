"""Python's garbage collector, out of the way while graphs are made."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """A context without garbage collections, for work that makes many objects and drops few of them in circles.

    A captured graph is some hundred thousand small objects, and all of them stay alive. The collector walks through
    them again and again: a fifth of the time, to find next to nothing. At the end the collector is as it was, after an
    error too, and walks through the new objects once. Inside of another such context, or in a program that runs without
    collector, nothing changes. Keep the code of the user, and compilers that run for minutes, out of the context.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
