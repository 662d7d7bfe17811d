"""QuantPlan: the quantizers and the refusals of a graph, read back as a table. The graph is the only source."""

import dataclasses
import math
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.meta import get_value, iterate_contractions
from qcompiler.passes.ir.quantizer import Quantizer, list_dequantizers, list_quantizers
from qcompiler.passes.ir.saved_floats import iterate_saved
from qcompiler.passes.ir.site_name import get_role
from qcompiler.passes.ir.subgraphs import contractions_inside
from qcompiler.passes.ir.views import is_view
from qcompiler.passes.ir.walk import iterate_readers, list_operands
from qcompiler.passes.rules import Role, Rule, first_match, saves_floats
from qcompiler.runtime.numbers.packing import per_byte
from qcompiler.runtime.spec import QuantSpec
from qcompiler.tables import Table, join_some, to_text


@dataclasses.dataclass(frozen=True)
class Site:
    """One quantizer: one tensor that becomes codes, once."""

    name: str  # `layer1.0.conv1/input`
    role: Role
    spec: QuantSpec
    layout: str
    shape: tuple[int, ...]
    consumers: tuple[str, ...]  # `layer1.0.conv1 forward`, `… weight gradient`
    #: False for gradients, and if only the backward half reads the codes
    is_forward: bool

    @property
    def code_bytes(self) -> int:
        """Bytes of its codes, packed, without scales."""
        form = self.spec.format
        return math.ceil(math.prod(self.shape) / per_byte(form.bits)) * form.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Kept:
    """One operand (or a whole fused kernel) that stays in float, and why."""

    name: str
    consumer: str
    reason: str
    #: True if a rule says so; False if nothing could be done, or no rule speaks of it
    asked: bool = False


def join_reasons(kept: Sequence[Kept]) -> str:
    """Return each reason once, behind the first few consumers that the reason holds for."""
    consumers: dict[str, list[str]] = {}
    for one in kept:
        consumers.setdefault(one.reason, []).append(one.consumer)
    return "; ".join(f"{join_some(list(dict.fromkeys(names)))}: {reason}" for reason, names in consumers.items())


@dataclasses.dataclass(frozen=True)
class QuantPlan:
    """Every quantizer after deduplication, everything kept in float, and notes for the user.

    `print(plan)` shows the table. `len(plan.sites)` is the number of quantizers that run in a step, `plan.placed` the
    number before deduplication: one for each operand of each contraction.
    """

    sites: tuple[Site, ...] = ()
    kept: tuple[Kept, ...] = ()
    placed: int = 0
    #: bytes that forward keeps for backward, without parameters and inputs; of these, codes and scales
    saved_bytes: int = 0
    saved_code_bytes: int = 0
    #: indices of the recipe's rules that decided something
    matched: frozenset[int] = frozenset()
    #: graph breaks, fallbacks, rules that matched nothing, rotations that could not be done
    notes: tuple[str, ...] = ()
    #: contractions that are computed as integers
    integer: int = 0
    #: contractions of codes that are computed as floats although integers were asked for
    simulated: tuple[Kept, ...] = ()
    #: quantizers that kernels of our own compute, in the halves that are compiled so far
    in_kernels: int = 0
    #: quantizers that loops of the compiler compute → why
    in_loops: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, module: GraphModule) -> "QuantPlan":
        """Reads the table off a graph, whole or forward only."""
        found = list(iterate_contractions(module.graph))
        consumers = {reader.floats: fact for node, fact in found for reader in list_operands(node, fact)}
        sites = tuple(_describe_site(quantizer, consumers) for quantizer in list_quantizers(module.graph))
        readers = [reader.floats for reader in list_dequantizers(module.graph)]
        placed = [floats for floats in readers if floats in consumers and not consumers[floats].is_bias]
        rules = {o.rule for _, fact in iterate_contractions(module.graph) for o in fact.operands}
        rules |= {fact.output_rule for _, fact in iterate_contractions(module.graph)}
        matched = {rule for rule in rules if rule is not None}
        facts = [fact for _, fact in iterate_contractions(module.graph)]
        notes = [
            f"{fact.site}/{o.name} in {describe_contraction(fact)}: {o.remark}"
            for fact in facts
            for o in fact.operands
            if o.remark
        ]
        kept = tuple(_list_kept(module))
        return cls(sites=sites, kept=kept, placed=len(placed), matched=frozenset(matched), notes=tuple(notes))

    def with_saved(self, other: "QuantPlan") -> "QuantPlan":
        """Return the table with the rows of `describe_saved`."""
        both, kept = (*self.sites, *other.sites), (*self.kept, *other.kept)
        return dataclasses.replace(self, sites=both, kept=kept, matched=self.matched | other.matched)

    def with_run(
        self,
        saved_bytes: int,
        saved_code_bytes: int,
        notes: Sequence[str],
        integer: int = 0,
        simulated: tuple[Kept, ...] = (),
        in_kernels: int = 0,
        in_loops: Mapping[str, int] = types.MappingProxyType({}),
    ) -> "QuantPlan":
        """Return the table with the facts from lowering."""
        known = dataclasses.replace(self, integer=integer, simulated=simulated, notes=(*self.notes, *notes))
        known = dataclasses.replace(known, in_kernels=in_kernels, in_loops=tuple(in_loops.items()))
        return dataclasses.replace(known, saved_bytes=saved_bytes, saved_code_bytes=saved_code_bytes)

    @classmethod
    def merge(cls, plans: Sequence["QuantPlan"], notes: Sequence[str] = ()) -> "QuantPlan":
        """Return one table for a model that was captured in several graphs."""
        return cls(
            sites=tuple(site for plan in plans for site in plan.sites),
            kept=tuple(kept for plan in plans for kept in plan.kept),
            placed=sum(plan.placed for plan in plans),
            saved_bytes=sum(plan.saved_bytes for plan in plans),
            saved_code_bytes=sum(plan.saved_code_bytes for plan in plans),
            integer=sum(plan.integer for plan in plans),
            simulated=tuple(kept for plan in plans for kept in plan.simulated),
            in_kernels=sum(plan.in_kernels for plan in plans),
            in_loops=_add_counts([plan.in_loops for plan in plans]),
            matched=frozenset(index for plan in plans for index in plan.matched),
            notes=(*(note for plan in plans for note in plan.notes), *notes),
        )

    def __str__(self) -> str:
        return to_text(self._parts())

    def _parts(self) -> Iterator[Table | str]:
        columns = ("role", "format", "block", "scale", "range", "rounding", "shape", "read by")
        yield Table("Quantizers", ("quantizer", *columns), [_make_row(site) for site in self.sites])
        if self.kept:
            rows = [(kept.name, kept.consumer, kept.reason) for kept in self.kept]
            yield Table("Left in float", ("kept in float", "in", "why"), rows)
        if self.simulated:
            simulated = [(kept.consumer, kept.reason) for kept in self.simulated]
            yield Table("Contractions simulated in float", ("simulated", "why"), simulated)
        yield f"quantizers: {self.placed} before deduplication, {len(self.sites)} after"
        if self.integer or self.simulated:
            yield f"contractions of codes: {self.integer} as integers, {len(self.simulated)} simulated in float"
        if self.in_kernels or self.in_loops:
            why = "".join(f"; {count} in compiled loops: {reason}" for reason, count in self.in_loops)
            yield f"compiled quantizers: {self.in_kernels} in kernels of their own{why}"
        yield f"saved for backward: {self.saved_bytes:,} bytes, of which codes and scales {self.saved_code_bytes:,}"
        yield from (f"note: {note}" for note in self.notes)


def _add_counts(parts: Sequence[tuple[tuple[str, int], ...]]) -> tuple[tuple[str, int], ...]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(dict(part))
    return tuple(total.items())


def _make_row(site: Site) -> tuple[Any, ...]:
    """Return a quantizer as a row of the table."""
    s, readers = site.spec, ", ".join(site.consumers)
    return site.name, site.role, s.format, s.block, s.scale, s.range, s.rounding, list(site.shape), readers


def describe_contraction(fact: Contraction) -> str:
    """`layer1.0.conv1 forward`, `… input gradient`, `… weight gradient`, `… bias gradient`."""
    if fact.is_bias:
        return f"{fact.site} bias gradient"
    if fact.gradient_of is None:
        return f"{fact.site} forward"
    name = {0: "input", 1: "weight"} if fact.operator != "matmul" else {0: "left", 1: "right"}
    return f"{fact.site} {name[fact.gradient_of]} gradient"


def _describe_site(quantizer: Quantizer, consumers: Mapping[Node, Contraction]) -> Site:
    readers = [reader.floats for reader in iterate_readers(quantizer.codes)]
    role = get_role(quantizer.site)
    facts = [consumers[reader] for reader in readers if reader in consumers]
    forward = not facts or any(fact.gradient_of is None and not fact.is_bias for fact in facts)
    return Site(
        quantizer.site,
        role,
        quantizer.spec,
        quantizer.layout,
        tuple(get_value(quantizer.tensor).shape),
        tuple(map(describe_contraction, facts)),
        forward and role is not Role.GRADIENT,
    )


def describe_saved(halves: Halves, rules: Sequence[Rule]) -> QuantPlan:
    """Return the quantizers of the role *saved*, and the floats that stay; nothing without a rule of that role."""
    if halves.forward is None or not saves_floats(rules):
        return QuantPlan()
    table = SavedTable(halves)
    quantizers = [one for one in list_quantizers(halves.forward.graph) if get_role(one.site) is Role.SAVED]
    sites = tuple(_describe_saved_site(one, table.inputs) for one in quantizers)
    floats = list(iterate_saved(table.inputs, rules))
    kept = (
        Kept(one.site, _list_names(table.inputs[one.node].users), f"saved in float: {one.reason}") for one in floats
    )
    modules = ("" if path == "(root)" else path for path in (site.name.rpartition("/")[0] for site in sites))
    found = (first_match(rules, Role.SAVED, "saved", module, frozenset()) for module in modules)
    matched = {match[0] for match in found if match} | {one.rule for one in floats if one.rule is not None}
    return QuantPlan(sites=sites, kept=tuple(kept), matched=frozenset(matched))


def _describe_saved_site(quantizer: Quantizer, inputs: Mapping[Node, Node]) -> Site:
    saved = [inputs[node] for node in (quantizer.codes, *quantizer.codes.users) if node in inputs]
    readers = [reader for node in saved for reader in iterate_readers(node)]
    names = {name for reader in readers for name in _list_names(reader.floats.users).split(", ")}
    shape = tuple(get_value(quantizer.tensor).shape)
    return Site(quantizer.site, Role.SAVED, quantizer.spec, quantizer.layout, shape, tuple(sorted(names)), True)


def _list_names(nodes: Iterable[Node]) -> str:
    """Return the operators that read a tensor, through views too, each once."""
    readers = list(nodes)
    for node in readers:
        if is_view(node):
            readers += [user for user in node.users if user not in readers]
    targets = (str(node.target) for node in readers if not is_view(node))
    names = (target.removeprefix("aten.").removeprefix("qcompiler.") for target in targets)
    return ", ".join(sorted({name.partition(".")[0] for name in names}))


def _list_kept(module: GraphModule) -> list[Kept]:
    found = []
    for _, fact in iterate_contractions(module.graph):
        if fact.kept:
            found.append(Kept(fact.operator, fact.site, fact.kept))
        found += [
            Kept(f"{fact.site}/{o.name}", describe_contraction(fact), o.kept, asked=o.asked)
            for o in fact.operands
            if o.kept and not fact.is_bias
        ]
    inside = contractions_inside(module)
    return found + [Kept(one.operator, one.module or "(root)", one.reason) for one in inside]
