"""Files that are there whole or not at all, and the values behind the keys of a checkpoint."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to, which replaces `path` at the end of the block, unless there is an error.

    Until then, and after an error, a kill or a full disk, `path` is unchanged: the new file reaches the disk first and
    is renamed then, which is one step for the file system. A link is followed. After an error nothing is left behind;
    after a kill the unfinished file is, under `.NAME.PROCESS.part`.

    Raises:
        OSError: the folder is not there or cannot be written to; the message names the path.
    """
    target = Path(os.path.realpath(path))
    _refuse_special(target)
    part = _name_draft(target)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            part.chmod(target.stat().st_mode & 0o7777)
        part.replace(target)
    except OSError as error:
        if error.filename == str(part):
            error.filename = str(target)
        raise
    finally:
        _drop_draft(part)
    _sync_folder(target.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises at once the error that `replace_file` would raise after the work; changes no file.

    Raises:
        OSError: the folder is not there, nothing can be written there, or `path` is a folder; it names the path.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    _refuse_special(target)
    draft = _name_draft(target)
    try:
        draft.touch()
        with contextlib.suppress(FileNotFoundError):
            target.stat()  # this name may be too long, and the name of the draft not
    except OSError as error:
        error.filename = str(target)
        raise
    finally:
        _drop_draft(draft)


def _refuse_special(target: Path) -> None:
    """Raises for a device, a pipe or a socket, which a rename would take away; a folder no file can replace."""
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, "not a regular file, which cannot be replaced", os.fspath(target))


def _name_draft(target: Path) -> Path:
    """Return the unfinished file: cut, so that the name is no longer than allowed for `target`."""
    name = os.fsdecode(os.fsencode(target.name)[:200])
    return target.with_name(f".{name}.{os.getpid()}.part")


def _drop_draft(draft: Path) -> None:
    """Removes the rest of the draft; a failure has a reason, and that error is on the way already."""
    with contextlib.suppress(OSError):
        draft.unlink()


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save` of `obj`, by which a checkpoint that was there is lost neither to a kill nor to a full disk.

    Raises:
        OSError: `path` cannot be written; the old file stays.
    """
    with replace_file(path) as part, part.open("wb") as file:
        torch.save(obj, file)


def _sync_folder(folder: Path) -> None:
    """The rename itself on the disk; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RangeKeys:
    """A stand-in with every attribute that the key of a range can consist of, such as `layer1` and `0/input`."""

    def __getattr__(self, name: str) -> "RangeKeys":
        # names that libraries look up on objects, and torch.distributed.checkpoint on modules
        if name.startswith("__") or name == "_fqn_modifiers":
            raise AttributeError(name)
        return self
