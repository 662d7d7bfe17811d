"""Give every traced operator of both halves the strides back that it was traced with."""

import dataclasses
from typing import ClassVar

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.joint.restore_strides import RestoreStrides


@dataclasses.dataclass(frozen=True)
class RestoreHalves:
    """`RestoreStrides` for each half: what backward computes anew can have other strides than what it computed."""

    name: ClassVar[str] = "restore-halves"

    def __call__(self, halves: Halves) -> int:
        """Return the number of copies that were placed."""
        return 0 if halves.is_whole or halves.backward is None else sum(map(RestoreStrides(), halves.graphs))
