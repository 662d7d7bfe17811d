"""One file for each capture, and for each graph that was made of one, in the cache folder of Inductor.

Like torch's own caches the files are pickles: who can write to the folder can run code in the process that reads it.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from qcompiler.collector import paused_collector
from qcompiler.compiler.cache import cache_compat
from qcompiler.compiler.cache.graphs import read_graphs, write_graphs
from qcompiler.compiler.cache.texts import Key
from qcompiler.files import replace_file
from qcompiler.passes.ir.inference import FakeTensorMode

logger = logging.getLogger("qcompiler")

T = TypeVar("T")
#: bytes of the hash in front of a value
_HASH: Final = 32


def _accept(found: Any) -> bool:
    return True


def recall(
    key: Key | None, mode: FakeTensorMode | None, make: Callable[[], T], fits: Callable[[T], bool] = _accept
) -> T:
    """Return what an earlier process has kept under a key; else what `make` returns, which is kept.

    A file that cannot be read or written costs time alone: the value is made anew.

    Args:
        key: stands for everything that the value depends on; None: nothing is kept.
        mode: of the fake tensors that the value gets; None: nothing is kept.
        make: returns the value. Its errors are not kept.
        fits: False for a value that is of no use here.
    """
    folder = cache_compat.find_cache()
    if key is None or mode is None or folder is None:
        return make()
    path = folder / key.hash
    with paused_collector():
        found = _read(key, path, mode)
    if found is not None and fits(found):
        logger.info("%s: read from %s", key, path)
        return found  # type: ignore[no-any-return]
    made = make()
    with paused_collector():
        _write(key, path, made)
    return made


def _read(key: Key, path: Path, mode: FakeTensorMode) -> Any:
    try:
        with path.open("rb") as file:
            expected, data = file.read(_HASH), file.read()
        if hashlib.sha256(data).digest() != expected:
            raise ValueError("damaged")
        return read_graphs(data, mode)
    except FileNotFoundError:
        return None
    except Exception as error:
        logger.info("%s: %s cannot be read: %s: %s", key, path, type(error).__name__, error)
        return None


def _write(key: Key, path: Path, value: Any) -> None:
    try:
        data = write_graphs(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as draft:
            draft.write_bytes(hashlib.sha256(data).digest() + data)
        logger.info("%s: made anew, and kept as %s", key, path)
    except Exception as error:
        logger.info("%s: made anew, not kept for the next process: %s: %s", key, type(error).__name__, error)
