"""The file of the measurements of a search, so that an interrupted one goes on."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qcompiler.compiler import torch_compat
from qcompiler.files import replace_file
from qcompiler.runtime.errors import QCompilerError

#: the name of the difference, by the key of the file
_OTHER: Final = {"recipe": "another recipe", "specs": "other formats or blocks", "model": "other weights"}


class SearchFileError(QCompilerError, ValueError):
    """The search cannot go on with the file; names the owner of the file, or the fault."""


class SearchFile:
    """Measurements by batch and site: the error of the site alone, and spec → the losses of the contractions.

    With a path, each one is written at once, and the file is replaced as a whole; without, all are held in memory.

    Raises:
        SearchFileError: the file is of another search, or none at all.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, search: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        #: the model and the data of the measurements
        self.search = json.loads(json.dumps(search))
        #: batch → site → (error, losses)
        self.found: dict[str, dict[str, tuple[float, dict[str, float | None]]]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)
        self._write()  # now, since an error after the first measurement would come late

    def _read(self, path: Path) -> None:
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            search, found = dict(held["search"]), dict(held["found"])
            self.found = {b: {s: (error, losses) for s, (error, losses) in sites.items()} for b, sites in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SearchFileError(f"search: {path}: no file of a search ({error}); valid: one, or a new path") from None
        for name, value in self.search.items():
            if search.get(name) != value:
                raise SearchFileError(
                    f"search: {path} is of a search with {_OTHER[name]}; delete it, or give another file"
                )

    def has(self, batch: str, site: str) -> bool:
        """Return True if a site was measured on a batch."""
        return site in self.found.get(batch, {})

    def put(self, batch: str, site: str, error: float, losses: dict[str, float | None]) -> None:
        """Keeps one measurement."""
        self.found.setdefault(batch, {})[site] = (error, losses)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            with replace_file(self.path) as part:
                part.write_text(json.dumps({"search": self.search, "found": self.found}), encoding="utf-8")


def checksum_values(tree: Any) -> int:
    """crc32 of all tensors in nested lists, tuples and dictionaries, and of the text of all else."""
    found = 0
    for leaf in torch_compat.list_leaves(tree):
        if isinstance(leaf, Tensor):
            data = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        else:
            data = repr(leaf).encode()
        found = zlib.crc32(data, found)
    return found
