"""The present work of a command, on the terminal, if it takes longer than two seconds."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final, TextIO

#: seconds of a command before it says anything, and between two updates
_SILENT: Final = 2.0
_UPDATE: Final = 0.5
#: the command began when it was imported
_START: Final = time.monotonic()


@contextlib.contextmanager
def show_progress(doing: str, start: float = _START) -> Iterator[None]:
    """Shows `doing` and the seconds since `start` on one line of stderr, which is gone if the block ends.

    Nothing is shown in the first two seconds, nor if stderr is no terminal; stdout never has any of it.
    """
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    line = threading.Thread(target=_show_line, args=(doing, start, sys.stderr, ended), daemon=True)
    line.start()
    try:
        yield
    finally:
        ended.set()
        line.join()


def _show_line(doing: str, start: float, stream: TextIO, ended: threading.Event) -> None:
    """Writes the line anew until the work has ended, then clears it."""
    shown = ""
    if ended.wait(max(0.0, start + _SILENT - time.monotonic())):
        return
    while True:
        # a line that is broken could not be written over
        text = f"{doing}: {time.monotonic() - start:.0f} s"[: shutil.get_terminal_size().columns - 1]
        _write_line(stream, text.ljust(len(shown)))
        shown = text
        if ended.wait(_UPDATE):
            break
    _write_line(stream, " " * len(shown) + "\r")


def _write_line(stream: TextIO, text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed
        stream.write(f"\r{text}")
        stream.flush()
