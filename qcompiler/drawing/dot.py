"""A picture in the language of Graphviz."""

from collections.abc import Mapping
from typing import Final

from qcompiler.drawing.picture import HARMS, Picture, Shape

_COLORS: Final = {"weight": "#2f6fde", "activation": "#1b8f58", "gradient": "#d9480f", "output": "#8e44ad"}

#: from harmless to lost: classes heat-0 … heat-4 of the page
_HEAT: Final = ("#dcefe3", "#f7e9a0", "#f5b85c", "#e8743b", "#b3123b")


def write_dot(picture: Picture) -> str:
    """Return the last stage as a `digraph`: a cluster for each module, quantizers in the color of the role.

    Every name is written as a quoted string, so nothing inside is read as markup.
    """
    bit = 1 << (len(picture.stages) - 1)
    shapes = [shape for shape in picture.shapes if shape.stages & bit]
    lines = [line for line in picture.lines if line.stages & bit]
    saved = {shape.id for shape in shapes if shape.kind == "saved"}
    body = [*_write_cluster("", shapes, picture.parents)]
    for line in lines:
        style = " [style=dashed]" if {line.source, line.target} & saved else ""
        body.append(f"  {_quote_text(line.source)} -> {_quote_text(line.target)}{style};")
    head = f'digraph {_quote_text(picture.title)} {{\n  node [shape=box, fontname="monospace", fontsize=10];'
    return "\n".join([head, *body, "}"]) + "\n"


def _write_cluster(path: str, shapes: list[Shape], parents: Mapping[str, str]) -> list[str]:
    """Return the nodes of one module and the clusters inside; a module of which nothing is drawn has none."""
    lines = [f"  {_quote_text(shape.id)} [{_style_node(shape)}];" for shape in shapes if shape.module == path]
    for child in (inner for inner, outer in parents.items() if outer == path):
        if body := _write_cluster(child, shapes, parents):
            lines += [f"  subgraph {_quote_text(f'cluster {child}')} {{ label={_quote_text(child)};", *body, "  }"]
    return lines


def _style_node(shape: Shape) -> str:
    label = f"label={_quote_text(shape.label)}"
    if shape.kind == "quantizer" and shape.figures:
        tooltip = _quote_text("\n".join(f"{name}: {value}" for name, value in shape.figures.items()))
        return f'{label}, style="rounded,filled", fillcolor="{_color_harm(shape.figures["harm"])}", tooltip={tooltip}'
    if shape.kind == "quantizer":
        return f'{label}, style="rounded,filled", fontcolor=white, fillcolor="{_COLORS[shape.role]}"'
    if shape.kind == "contraction":
        kept = f', style="filled,striped", fillcolor="#f5d97a:white", tooltip={_quote_text(shape.kept)}'
        return label + (kept if shape.kept else ', style=filled, fillcolor="#1f2a3a", fontcolor=white')
    return f'{label}, style="rounded,filled", fillcolor="#ece8f6"' if shape.kind == "saved" else label


def _color_harm(harm: float | str) -> str:
    """Return the color of a harm; JSON has an infinite one as text."""
    return _HEAT[sum(float(harm) >= edge for edge in HARMS)]


def _quote_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
