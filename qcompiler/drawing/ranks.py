"""Rows of a drawing: in each module's box forward runs down, backward runs up, and related nodes stand level.

Layered drawing as in Sugiyama et al. 1981, with one difference: both lanes share all rows, so the gradient of a layer
stands beside the layer.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import networkx

from qcompiler.compiler.network import INPUTS

if TYPE_CHECKING:
    from qcompiler.drawing.picture import Line, Shape


def set_ranks(shapes: Sequence["Shape"], lines: Sequence["Line"], parents: Mapping[str, str]) -> dict[str, int]:
    """Sets the rank of every shape in the box; returns the rank of every box in the box around.

    A line between two boxes counts at the meeting place: between the parts of the innermost box around both.

    Args:
        shapes: the nodes.
        lines: the arrows between nodes.
        parents: path of a box → path of the box around.
    """
    places = {shape.id: [*_list_boxes_around(shape.module, parents), shape.id] for shape in shapes}
    graphs: dict[str, networkx.DiGraph[str]] = {}
    order = _order_parts(shapes, places)
    for shape in shapes:
        for box, part in itertools.pairwise(places[shape.id]):
            graphs.setdefault(box, networkx.DiGraph()).add_node(part)
    lanes = {shape.id: shape.lane for shape in shapes}
    into = {line.target: line.source for line in lines if lanes[line.target] == 1}
    for line in lines:
        if lanes[line.target] != 1:
            source = into.get(line.source, line.source)
            _connect_parts(graphs, places[source], places[line.target], (lanes[source], lanes[line.target]))
    found = {part: rank for graph in graphs.values() for part, rank in _rank_parts(graph, order).items()}
    for shape in shapes:
        shape.rank = found[into.get(shape.id, shape.id)]  # a saved tensor stands beside the source
    return {part: rank for part, rank in found.items() if part not in places}


def _list_boxes_around(module: str, parents: Mapping[str, str]) -> list[str]:
    """`a.b` → the boxes around the parts, outermost first: "", "box a", "box a.b"."""
    return [*_list_boxes_around(parents[module], parents), f"box {module}"] if module else [""]


def _order_parts(shapes: Sequence["Shape"], places: dict[str, list[str]]) -> dict[str, float]:
    """Return a number for each part, growing downwards: the place in forward; backward ran the other way round.

    A part that forward knows keeps that place. The rest of backward is spread evenly from the bottom to the top. Inputs
    of forward stand above all.
    """
    order: dict[str, float] = {shape.id: -1 for shape in shapes if shape.lane == 0 and shape.kind in INPUTS}
    forward = [shape for shape in shapes if shape.lane == 0 and shape.kind not in INPUTS]
    forward += [shape for shape in shapes if shape.lane != 2 and (shape.lane == 1 or shape.kind in INPUTS)]
    backward = [shape for shape in shapes if shape.lane == 2]
    spread = len(forward) / max(1, len(backward))
    for index, shape in enumerate(forward):
        for part in places[shape.id]:
            order.setdefault(part, index)
    for index, shape in enumerate(backward):
        for part in places[shape.id]:
            order.setdefault(part, (len(backward) - index) * spread)
    return order


def _connect_parts(
    graphs: "dict[str, networkx.DiGraph[str]]", source: Sequence[str], target: Sequence[str], lanes: tuple[int, int]
) -> None:
    """One line, in the innermost box around both ends, pointing down.

    A line from forward to backward may stay level (step 0), a line within a lane goes down (step 1).
    """
    depth = next(i for i, (a, b) in enumerate(itertools.zip_longest(source, target)) if a != b)
    graph, start, end = graphs[source[depth - 1]], source[depth], target[depth]
    if lanes == (2, 2):
        start, end = end, start
    step = max(int(lanes[0] == lanes[1]), graph.edges[start, end]["step"] if graph.has_edge(start, end) else 0)
    graph.add_edge(start, end, step=step)


def _rank_parts(graph: "networkx.DiGraph[str]", order: dict[str, float]) -> dict[str, int]:
    """Return the longest path from above; a part that nothing holds from above moves down to the first reader."""
    for start, end in list(graph.edges):
        if start == end:
            graph.remove_edge(start, end)
    for loop in list(networkx.strongly_connected_components(graph)):  # a module that is called twice, for one
        inside = graph.subgraph(loop).edges
        graph.remove_edges_from([edge for edge in inside if order[edge[0]] >= order[edge[1]]])
    rank: dict[str, int] = {}
    rows = list(networkx.lexicographical_topological_sort(graph, key=lambda part: order[part]))
    for part in rows:
        rank[part] = max((rank[above] + edge["step"] for above, _, edge in graph.in_edges(part, data=True)), default=0)
    for part in reversed(rows):
        below = [rank[reader] - edge["step"] for _, reader, edge in graph.out_edges(part, data=True)]
        if below and not graph.in_degree(part):
            rank[part] = min(below)
    return rank
