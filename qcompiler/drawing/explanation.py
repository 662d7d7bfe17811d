"""explain(): every quantizer and every contraction as tables, and the cost and the savings of the recipe in total."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final

import networkx

from qcompiler.compiler.network import build_network, operand_readers
from qcompiler.compiler.stages import lower_plain, pick_stages
from qcompiler.module import QuantizedModule, get_session
from qcompiler.tables import Table, to_markdown, to_text

#: bits of a number in float, and of the accumulator that a contraction is summed in (Fournarakis & Nagel 2021)
_FLOAT: Final = 32


@dataclasses.dataclass(frozen=True)
class QuantizerRow:
    """One quantizer that runs."""

    name: str
    module: str
    role: str
    spec: str
    shape: tuple[int, ...]
    #: `conv1 forward`, `conv1 weight gradient`, …
    consumers: tuple[str, ...]
    #: quantizers that were placed for these readers, before equal ones were merged
    placed: int
    #: bytes of codes and scales that forward saves for backward
    saved_bytes: int
    #: the line of the model with the consumer
    source: str


@dataclasses.dataclass(frozen=True)
class ContractionRow:
    """One contraction of forward or backward."""

    name: str
    module: str
    operator: str
    #: forward, input-gradient, weight-gradient or bias-gradient
    product: str
    #: operand → the quantizer, or `float: ` and the reason
    operands: Mapping[str, str]
    source: str


@dataclasses.dataclass(frozen=True)
class Totals:
    """The needs of the whole model in a step."""

    #: one quantizer for each operand of each contraction
    placed: int
    #: quantizers that run
    quantizers: int
    #: quantizers of a scheme whose blocks lie along the summed axis: one for each tensor and axis
    one_dimensional: int
    contractions: int
    #: contractions with at least one operand in float
    in_float: int
    #: bytes that forward saves for backward; of these codes, scales and masks; and the bytes without quantizers
    saved_bytes: int
    saved_code_bytes: int
    saved_bytes_in_float: int
    #: bytes that the contractions move between memory and chip in a step, with ranges that are known before and with
    #: ranges that are measured first, which writes and reads each 32-bit result once more
    traffic_static: int
    traffic_dynamic: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The tables of `explain`: `print` it, or take `to_markdown()` or `to_json()`."""

    recipe: str
    quantizers: tuple[QuantizerRow, ...]
    contractions: tuple[ContractionRow, ...]
    totals: Totals
    #: graph breaks, frames without a graph, fallbacks, rules that matched nothing
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self) -> str:
        """Return the tables in Markdown."""
        return to_markdown([*self._tables(), *self.notes])

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = 160, *, color: bool = False) -> str:
        """Return the tables for a terminal of so many columns."""
        return to_text([*self._tables(), *(f"note: {note}" for note in self.notes)], width, color=color)

    def _tables(self) -> Iterator[Table]:
        head = ["quantizer", "role", "spec", "shape", "read by", "placed", "saved, bytes"]
        rows = [
            [q.name, q.role, q.spec, list(q.shape), ", ".join(q.consumers), q.placed, f"{q.saved_bytes:,}"]
            for q in self.quantizers
        ]
        yield Table(f"Quantizers of {self.recipe}", head, rows, {"quantizer": ".", "spec": ":"})
        products = [
            [c.name, c.operator, "; ".join(f"{name}: {how}" for name, how in c.operands.items())]
            for c in self.contractions
        ]
        yield Table("Contractions", ["contraction", "operator", "operands"], products, {"contraction": "."})
        totals = [[name.replace("_", " "), f"{n:,}"] for name, n in vars(self.totals).items()]
        yield Table("Totals", ["total", "value"], totals)


def explain(qmodel: QuantizedModule, *, training: bool = True) -> Explanation:
    """Return the work of the compiler on a model: every quantizer, every contraction, and totals.

    Everything is read off the graph that runs (`qmodel.to_networkx()`) and off the same graph before the passes.

    Args:
        qmodel: the result of `qcompiler.compile`, called at least once in that mode.
        training: False for the graph of evaluation mode.

    Raises:
        CompileError: no compiled model, or no graph of that mode has been captured.
    """
    get_session("explain", qmodel)
    qmodel.check_captured("explain", training)
    frames = qmodel.stages(training=training)
    graph = build_network(pick_stages(frames, "lowered"))
    plain = build_network([lower_plain(stages[0].captured) for stages in frames])
    plan = qmodel.plan(training=training)
    contractions = [data for _, data in graph.nodes(data=True) if data["kind"] == "contraction"]
    quantizers = tuple(_quantizer_rows(graph))
    static, dynamic = (sum(sizes) for sizes in zip(*_list_traffic(graph), strict=True)) if contractions else (0, 0)
    totals = Totals(
        placed=plan.placed,
        quantizers=len(quantizers),
        one_dimensional=_one_dimensional(graph),
        contractions=len(contractions),
        in_float=sum(bool(data["kept"]) for data in contractions),
        saved_bytes=plan.saved_bytes,
        saved_code_bytes=plan.saved_code_bytes,
        saved_bytes_in_float=sum(data["saved_bytes"] for _, data in plain.nodes(data=True)),
        traffic_static=static,
        traffic_dynamic=dynamic,
    )
    return Explanation(qmodel.recipe.name, quantizers, tuple(_contraction_rows(graph)), totals, plan.notes)


def operands_of(graph: "networkx.MultiDiGraph[str]") -> dict[tuple[str, int], str]:
    """Return (contraction, argument) → the quantizer there; an operand in float is not in the table."""
    found: dict[tuple[str, int], str] = {}
    for node, data in graph.nodes(data=True):
        if data["kind"] == "quantizer":
            found |= dict.fromkeys(operand_readers(graph, node), node)
    return found


def _quantizer_rows(graph: "networkx.MultiDiGraph[str]") -> Iterator[QuantizerRow]:
    for node, data in graph.nodes(data=True):
        if data["kind"] == "quantizer":
            names = tuple(graph.nodes[reader]["name"] for reader in data["consumers"])
            placed = sum(graph.nodes[reader]["product"] != "bias-gradient" for reader in data["consumers"])
            saved = sum(graph.nodes[part]["saved_bytes"] for part in _list_parts(graph, node))
            fields = {key: data[key] for key in ("name", "module", "role", "spec", "shape", "source")}
            yield QuantizerRow(**fields, consumers=names, placed=placed, saved_bytes=saved)


def _list_parts(graph: "networkx.MultiDiGraph[str]", quantizer: str) -> Iterator[str]:
    """Yield the codes, packed or not, and the scales of a quantizer."""
    kinds = {"scale", "packing"}
    near = {quantizer, *(node for node in graph.predecessors(quantizer) if graph.nodes[node]["kind"] == "scale")}
    after = {reader for node in near for reader in graph.successors(node) if graph.nodes[reader]["kind"] in kinds}
    yield from near | after


def _contraction_rows(graph: "networkx.MultiDiGraph[str]") -> Iterator[ContractionRow]:
    sources = operands_of(graph)
    for node, data in graph.nodes(data=True):
        if data["kind"] != "contraction":
            continue
        operands = {} if data["operands"] else {"all": f"float: {data['kept']}"}
        for operand in data["operands"]:
            quantizer = sources.get((node, operand["arg"]))
            operands[operand["name"]] = graph.nodes[quantizer]["name"] if quantizer else f"float: {operand['kept']}"
        fields = {key: data[key] for key in ("name", "module", "operator", "product", "source")}
        yield ContractionRow(**fields, operands=operands)


def _one_dimensional(graph: "networkx.MultiDiGraph[str]") -> int:
    """Blocks along one axis are legal if that is the summed one: a quantizer for each tensor and summed axis."""
    sources, needed = operands_of(graph), set()
    for (node, arg), quantizer in sources.items():
        data = graph.nodes[node]
        if data["product"] != "bias-gradient":
            (axis,) = (operand["axis"] for operand in data["operands"] if operand["arg"] == arg)
            tensor = next(start for start, _, edge in graph.in_edges(quantizer, data=True) if edge["arg"] == 0)
            needed.add((tensor, axis))
    return len(needed)


def _list_traffic(graph: "networkx.MultiDiGraph[str]") -> Iterator[tuple[int, int]]:
    """(static, dynamic) bytes of each product."""
    sources = operands_of(graph)
    for node, data in graph.nodes(data=True):
        if data["kind"] == "contraction" and len(data["operands"]) == 2:
            sides = []
            for operand in data["operands"]:
                (start,) = (s for s, _, edge in graph.in_edges(node, data=True) if edge["arg"] == operand["arg"])
                quantizer = sources.get((node, operand["arg"]))
                bits = graph.nodes[quantizer]["bits"] if quantizer else _FLOAT
                sides.append((math.prod(graph.nodes[start]["shape"]), bits, operand["role"]))
            yield compute_traffic(sides, data["elements"], is_parameter=data["product"] == "weight-gradient")


def compute_traffic(sides: Sequence[tuple[int, int, str]], elements: int, *, is_parameter: bool) -> tuple[int, int]:
    """Bytes that one contraction moves with static and with dynamic ranges, by the model of Fournarakis & Nagel 2021.

    static = |A|·a + |B|·b + |Y|·y bits; dynamic adds 2·|Y|·32: the result is written whole, and read back once the
    range is known. y is the width of the activation (or gradient) among the operands, which the next contraction reads.

    Args:
        sides: (elements, bits, role) of both operands.
        elements: of the result.
        is_parameter: the result is the gradient of a weight, which stays in 32 bits: no range, so nothing is added.
    """
    moved = sum(count * bits for count, bits, _ in sides)
    width = _FLOAT if is_parameter else next((bits for _, bits, role in sides if role != "weight"), _FLOAT)
    static = moved + elements * width
    dynamic = static + (2 * elements * _FLOAT if width < _FLOAT else 0)
    return math.ceil(static / 8), math.ceil(dynamic / 8)


def is_colored(stream: IO[str]) -> bool:
    """Return True if text to this stream may have colors: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
