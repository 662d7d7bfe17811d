"""Writing a model to its file: either whole and checked, or nothing changes."""

import glob
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qcompiler.exporting import build
from qcompiler.files import replace_file

#: a file above this size keeps its tensors in a second file: protobuf ends at 2 GiB
_EXTERNAL = 2**31 - 2**26

_T = TypeVar("_T")


def write_file(model: Any, path: Path, check: Callable[[Path], _T]) -> tuple[int, _T]:
    """Write a model to `path`, unless `check` raises; return the bytes and the result of `check`."""
    data = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data")
    try:
        with replace_file(path) as draft:
            size = build.save_model(model, draft, data if build.count_bytes(model) > _EXTERNAL else None)
            build.check_file(draft)
            found = check(draft)
    except BaseException:
        if not _keeps_tensors(path, data):  # else the new file is in its place, and the error came after that
            data.unlink(missing_ok=True)
        raise
    _drop_old_data(path, data)
    return size, found


def _keeps_tensors(path: Path, data: Path) -> bool:
    """Return True if the file at `path` keeps its tensors in `data`."""
    return data.exists() and path.exists() and data.name.encode() in path.read_bytes()


def _drop_old_data(path: Path, data: Path) -> None:
    """Remove the tensors of the file that was replaced."""
    for other in path.parent.glob(f"{glob.escape(path.name)}.*.data"):
        if other != data and re.fullmatch(
            r"[0-9a-f]{8}", other.name.removeprefix(f"{path.name}.").removesuffix(".data")
        ):
            other.unlink(missing_ok=True)
