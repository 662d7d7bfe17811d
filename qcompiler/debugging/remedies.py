"""Remedies for a quantizer, tried on recorded tensors: another range, smaller blocks, more bits, float."""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any, Final

from qcompiler.passes.rules import Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.figures import Tally
from qcompiler.runtime.numbers.blocks import AXES, WHOLE, Block
from qcompiler.runtime.numbers.formats import BITS, FloatFormat, parse_format
from qcompiler.runtime.ranges.present import Current, Percentile
from qcompiler.runtime.spec import QuantSpec, Scale

#: edges of a block that is legal for all three contractions of a layer
_HYPERBLOCK: Final = {"b": 2, "c": 8, "o": 4, "i": 4}
#: formats to go on to from a float format, the nearest first
_FLOATS: Final = tuple(map(parse_format, ("e2m3", "e4m3", "e5m10")))


class Remedy(enum.StrEnum):
    """The kinds of change that mend a site, from the cheapest to the dearest."""

    RANGE = "other range"
    BLOCK = "smaller block"
    BITS = "more bits"
    KEEP = "keep in float"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One spec (None: float) at one site: the effect on the recorded tensor, and the harm to the contractions."""

    spec: QuantSpec | None
    harm: float
    tally: Tally


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Rules that mend one site, to stand in front of all others of a recipe."""

    site: str
    remedy: Remedy
    rules: tuple[Rule, ...]
    #: on the recorded tensors, before and with the rules
    harm: float
    harm_after: float
    #: the bound for `harm_after`
    target: float
    #: everything that was tried, in order
    trials: tuple[tuple[Remedy, Trial], ...]
    #: why the site stands out, in words
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the rules as a recipe in YAML."""
        held = Recipe(name="proposal", rules=self.rules).to_yaml()
        figures = {"harm": self.harm, "harm_after": self.harm_after, "target": self.target}
        return {"site": self.site, "remedy": str(self.remedy), "rules": held, **figures}

    def __str__(self) -> str:
        change = f"proposal: {self.remedy}, which leaves harm {self.harm_after:.3g}; in front of all rules:"
        return "\n".join([self.why, change, *(f"  {rule}" for rule in self.rules)])


def list_candidates(spec: QuantSpec) -> Iterator[tuple[Remedy, QuantSpec | None]]:
    """Yield the specs to try in place of one, from the cheapest to float. Blocks grow smaller, bits more."""
    plain = dataclasses.replace(spec, range=Current())
    if spec.range != Current():
        yield Remedy.RANGE, plain
    if spec.scale is Scale.ONE:
        yield Remedy.RANGE, dataclasses.replace(plain, scale=Scale.MAX)
    if not isinstance(spec.range, Percentile):
        yield Remedy.RANGE, dataclasses.replace(plain, range=Percentile())
    smaller = _shrink_blocks(plain)
    yield from ((Remedy.BLOCK, other) for other in smaller)
    for base in (plain, *smaller[:1]):
        yield from ((Remedy.BITS, other) for other in _widen_formats(base))
    yield Remedy.KEEP, None


def _shrink_blocks(spec: QuantSpec) -> list[QuantSpec]:
    """Return the spec over blocks that shrink step by step; letters that are left out have an edge of 1."""
    found: list[QuantSpec] = []
    block = spec.block
    while (block := _shrink_block(block)) != (found[-1].block if found else spec.block):
        found.append(spec.with_block(block))
    return found


def _shrink_block(block: Block) -> Block:
    """Shrink whole axes to the edges of a hyperblock, long edges to a quarter; no edge above 1 becomes 1."""
    edges = {}
    for letter, whole in _HYPERBLOCK.items():
        edge = block.edge(letter)
        edges[AXES[letter]] = whole if edge == WHOLE else max(2, edge // 4) if edge > 1 else 1
    return Block(**edges)


def _widen_formats(spec: QuantSpec) -> list[QuantSpec]:
    """Return the same with more bits, one format after the other."""
    form = spec.format
    if isinstance(form, FloatFormat):
        plain = dataclasses.replace(spec, scale=Scale.MAX if spec.scale is Scale.ONE else spec.scale)
        return [dataclasses.replace(plain, format=wider) for wider in _FLOATS if wider.bits > form.bits]
    more = [bits for bits in BITS if bits > form.bits]
    return [dataclasses.replace(spec, format=dataclasses.replace(form, bits=bits)) for bits in more]
