"""The names of quantizers and contractions: the one place that writes, reads and numbers names."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Final

from qcompiler.passes.rules import Role

_ROLES: Final = {"weight": Role.WEIGHT, "grad": Role.GRADIENT, "output": Role.OUTPUT, "saved": Role.SAVED}
_TURNED: Final = "turned"


@dataclasses.dataclass(frozen=True)
class SiteName:
    """`layer1.0.conv1/grad.weight-gradient.turned#2`, in parts."""

    #: the unique name of the contraction: `layer1.0.conv1`, `attention/matmul#2`, `block/add`
    contraction: str
    #: input, weight, left, right, grad, output or saved
    operand: str
    #: the contraction of the layer that a rule names: `weight-gradient`; empty: all that read the tensor
    product: str = ""
    #: True if the block was turned for one reader
    turned: bool = False
    #: 2 for the second quantizer of a graph that would have the same name
    index: int = 1

    def __str__(self) -> str:
        parts = [self.operand, self.product, _TURNED if self.turned else ""]
        return number_name(f"{self.contraction}/{'.'.join(filter(None, parts))}", self.index)

    @classmethod
    def parse(cls, text: str) -> "SiteName":
        """Return the parts of a name; `parse(str(name)) == name` for every name that `str` can write."""
        contraction, _, last = text.rpartition("/")
        name, _, index = last.partition("#")
        operand, *rest = name.split(".")
        product = ".".join(part for part in rest if part != _TURNED)
        return cls(contraction, operand, product, _TURNED in rest, int(index or 1))

    @property
    def role(self) -> Role:
        """The role of the tensor."""
        return _ROLES.get(self.operand, Role.ACTIVATION)

    def turn(self) -> "SiteName":
        """Return the name of the quantizer whose block is turned."""
        return dataclasses.replace(self, turned=True)


def get_role(site: str) -> Role:
    """Return the role in the name of a site: `layer1.0.conv1/grad.weight-gradient.turned` is a gradient."""
    return SiteName.parse(site).role


def number_name(name: str, occurrence: int) -> str:
    """Return `name`, `name#2` for the second of that name, and so on."""
    return name if occurrence == 1 else f"{name}#{occurrence}"


class Numbering:
    """Counts names, so that each given name is unique."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._seen: Counter[str] = Counter()
        self._taken = frozenset(taken)

    def count(self, name: str) -> int:
        """Return 1 for the first call with this name, 2 for the second …"""
        self._seen[name] += 1
        return self._seen[name]

    def number(self, name: str) -> str:
        """Return the name, numbered if given before, or taken."""
        numbered = number_name(name, self.count(name))
        return self.number(name) if numbered in self._taken else numbered
