"""The drawn part of the joint graph: the nodes without the plumbing, one chip for each saved tensor, and ranks.

Views, packing and dequantizers become lines; scale and zero point become part of the quantizer. The result is one value
for all stages: each node and line says in which stages it exists.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Final

import networkx

from qcompiler.compiler.network import CARRIERS, INPUTS
from qcompiler.drawing.ranks import set_ranks

#: kinds that are never drawn: the tensor is a part of another one, or holds only random bits or a range
_HIDDEN: Final = CARRIERS | {"scale", "mask", "range", "state", "range output", "constant", "size"}
#: attributes that the details of a node do not repeat
_PLACE: Final = frozenset({"kind", "lane", "saved", "operands", "bits"})

#: a quantizer's color changes at these harms; at the last one half of a contraction is lost
HARMS: Final = (0.001, 0.01, 0.1, 0.5)
Graph = networkx.MultiDiGraph  # of str


@dataclasses.dataclass
class Shape:
    """One node of the picture."""

    id: str
    #: input, parameter, buffer, tangent, output, contraction, quantizer, operator, key, rotation or saved
    kind: str
    #: 0 forward, 1 saved, 2 backward
    lane: int
    #: the module path, `layer1.0.conv1`, of the box around
    module: str
    label: str
    #: quantizers: weight, activation, gradient or output
    role: str = ""
    bytes: int = 0
    #: contractions: why an operand stays in float
    kept: str = ""
    #: bit k: exists in stage k
    stages: int = 0
    #: the row within the box
    rank: int = 0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: quantizers: the figures of the debugger, which give the color; JSON values
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Line:
    """A tensor on its way from one node to another."""

    source: str
    target: str
    #: bit k: exists in stage k
    stages: int = 0


@dataclasses.dataclass(frozen=True)
class Picture:
    """Everything that is drawn."""

    title: str
    stages: tuple[tuple[str, int], ...]
    shapes: tuple[Shape, ...]
    lines: tuple[Line, ...]
    #: path of a box → path of the box around
    parents: dict[str, str]
    #: `box ` and the path of a box → the row in the box around
    ranks: dict[str, int]
    #: training steps that the debugger has watched; 0 if there are no figures
    watched: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the picture as JSON values."""
        return dataclasses.asdict(self) | {"harms": HARMS}


def make_picture(
    title: str, stages: Sequence[tuple[str, int, Graph]], containers: Collection[str] = frozenset()
) -> Picture:
    """Return the picture of a graph at several stages, in order; nodes are named alike in all stages.

    Args:
        title: the line above the picture.
        stages: name, places changed, and the graph of each stage.
        containers: paths of modules that get no box; the parts stand in the box around.
    """
    shapes: dict[str, Shape] = {}
    lines: dict[tuple[str, str], Line] = {}
    for index, (_, _, graph) in enumerate(stages):
        view = _View(graph, containers)
        for shape in view.shapes():
            before = shapes.get(shape.id)
            shapes[shape.id] = dataclasses.replace(shape, stages=1 << index | (before.stages if before else 0))
        for source, target in view.lines():
            lines.setdefault((source, target), Line(source, target)).stages |= 1 << index
    parents = _find_parents((shape.module for shape in shapes.values()), containers)
    rows = set_ranks(list(shapes.values()), list(lines.values()), parents)
    names = tuple((name, changes) for name, changes, _ in stages)
    return Picture(title, names, tuple(shapes.values()), tuple(lines.values()), parents, rows)


def _list_boxes(module: str, containers: Collection[str]) -> list[str]:
    """Return the paths of the boxes around a part of a module, outermost first: `a.b` → "", "a", "a.b"."""
    parts = module.split(".") if module else []
    paths = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return ["", *(path for path in paths if path not in containers)]


def _find_parents(modules: Iterable[str], containers: Collection[str]) -> dict[str, str]:
    """Return box → the box around, for all modules."""
    pairs = (itertools.pairwise(_list_boxes(module, containers)) for module in modules)
    return {inner: outer for chain in pairs for outer, inner in chain}


class _View:
    """One stage: the drawn part of the graph."""

    def __init__(self, graph: Graph, containers: Collection[str]) -> None:
        self.graph = graph
        self.containers = containers
        self.drawn: dict[str, str | None] = {}
        self.chips: dict[str, Shape] = {}
        self.is_lowered = graph.graph["stage"] == "lowered"

    def shapes(self) -> Iterator[Shape]:
        """Yield every node that is drawn, then one chip for each form in which a node is saved."""
        for node, data in self.graph.nodes(data=True):
            if data["kind"] not in _HIDDEN:
                yield self.shape(node, data)
        for node in self.saved():
            self.add_chip(node)
        yield from self.chips.values()

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield every tensor that a drawn node reads, by way of a chip if the tensor is saved."""
        for node, data in self.graph.nodes(data=True):
            if data["kind"] in _HIDDEN:
                continue
            for source, _, edge in self.graph.in_edges(node, data=True):
                start = self.representative(source)
                if start is None or start == node or (data["kind"] == "quantizer" and edge["arg"] != 0):
                    continue
                if self.graph.nodes[source]["kind"] in ("scale", "key"):
                    continue
                yield from self.path(start, source, node)

    def path(self, start: str, source: str, node: str) -> Iterator[tuple[str, str]]:
        """start → node, or start → chip → node if the tensor crosses from forward to backward."""
        lane = self.graph.nodes
        while source != start and lane[source]["lane"] == "backward":
            source = self.carried(source)
        crosses = lane[source]["lane"] == "forward" and lane[node]["lane"] == "backward"
        chip = self.chip_id(source) if crosses else ""
        if chip in self.chips:
            yield start, chip
            yield chip, node
        else:
            yield start, node

    def saved(self) -> list[str]:
        """Return the saved tensors; before the partition has decided, all tensors of forward that backward reads."""
        if self.is_lowered:
            return [node for node, data in self.graph.nodes(data=True) if data["saved_bytes"]]
        crossing = (source for source, _, data in self.graph.edges(data=True) if data["saved"])
        return [node for node in dict.fromkeys(crossing) if self.graph.nodes[node]["kind"] not in INPUTS]

    def add_chip(self, node: str) -> None:
        data, start = self.graph.nodes[node], self.representative(node)
        if start is None:
            return
        owner = self.graph.nodes[start]
        size = data["saved_bytes"] if self.is_lowered else data["bytes"]
        known = self.chips.get(self.chip_id(node))
        if known is not None:
            known.bytes += size
            known.details["bytes"] = known.bytes
            known.label = f"{known.details['as']} {format_bytes(known.bytes)}"
            return
        form = self.form(node)
        details = {"tensor": owner["name"] or start, "as": form, "bytes": size, "shape": owner["shape"]}
        label = f"{form} {format_bytes(size)}"
        chip = Shape(self.chip_id(node), "saved", 1, self.box(owner), label, bytes=size, details=details)
        chip.role = owner.get("role", "")
        self.chips[chip.id] = chip

    def chip_id(self, node: str) -> str:
        return f"saved {self.form(node)} {self.representative(node)}"

    def form(self, node: str) -> str:
        """codes, random key, mask, or the dtype of a tensor that is saved unchanged."""
        data = self.graph.nodes[node]
        if data["kind"] == "key":
            return "random key"
        source = self.representative(node)
        if source is not None and self.graph.nodes[source]["kind"] == "quantizer":
            return f"{self.graph.nodes[source]['format']} codes"
        return "mask" if data["kind"] in ("mask", "packing") else str(data["dtype"]) or "tensor"

    def representative(self, node: str) -> str | None:
        """Return the drawn node that a tensor belongs to; None if there is none."""
        if node not in self.drawn:
            self.drawn[node] = self.find(node)
        return self.drawn[node]

    def find(self, node: str) -> str | None:
        kind = self.graph.nodes[node]["kind"]
        if kind not in _HIDDEN:
            return node
        if kind == "scale":
            near = (reader for _, reader in self.graph.out_edges(node))
            found = (self.of_scale(reader) for reader in near)
            return next((name for name in found if name is not None), None)
        return self.representative(self.carried(node)) if kind in CARRIERS or kind == "mask" else None

    def of_scale(self, reader: str) -> str | None:
        """Return the quantizer behind a reader of the scale: itself, or the one whose codes a dequantizer reads."""
        kind = self.graph.nodes[reader]["kind"]
        return self.representative(reader) if kind in ("quantizer", "dequantizer", "scale") else None

    def carried(self, node: str) -> str:
        """Return the first argument of a node."""
        return str(next(source for source, _, data in self.graph.in_edges(node, data=True) if data["arg"] == 0))

    def shape(self, node: str, data: dict[str, Any]) -> Shape:
        details = {key: value for key, value in data.items() if key not in _PLACE and value not in ("", (), False)}
        kept = data.get("kept", "")
        lane = 0 if data["lane"] == "forward" else 2
        role = data.get("role", "")
        box = self.box(data)
        return Shape(node, data["kind"], lane, box, _make_label(data, box), role, data["bytes"], kept, details=details)

    def box(self, data: dict[str, Any]) -> str:
        """Return the path of the innermost box around a node."""
        return _list_boxes(data["module"], self.containers)[-1]


def _make_label(data: dict[str, Any], box: str) -> str:
    """Return the text on a node, without the path of the box around."""
    kind, name = data["kind"], str(data["name"])
    if kind == "quantizer":
        return f"{data['format']} {data['block']}"
    if kind == "contraction":
        whole = not data["operands"]  # a fused kernel, whose operands nobody knows
        return _shorten_operator(data) if whole else name.removeprefix(f"{box} ").rpartition(".")[2]
    if kind == "key":
        return "random key"
    if kind not in INPUTS and kind != "output":
        return _shorten_operator(data)
    what, of, tensor = ("gradient", " of ", name) if kind == "tangent" else name.rpartition(" of ")
    return f"{what}{of}{tensor.removeprefix(f'{box}.')}"


def _shorten_operator(data: dict[str, Any]) -> str:
    """`aten.convolution_backward.default` → `convolution_backward`."""
    name = str(data["op"]).removeprefix("aten.").partition(".")[0].strip("_")
    return name.removeprefix("native_").partition("_legit")[0]  # native_batch_norm_legit_functional


def format_bytes(size: int) -> str:
    """1536 → `1.5 KiB`."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
