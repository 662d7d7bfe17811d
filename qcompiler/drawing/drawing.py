"""draw(): the joint graph as a page, a picture or a file for other tools, by the ending of the path."""

import dataclasses
import html
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Final

import networkx
from torch import Tensor, nn

from qcompiler.compiler.network import build_network
from qcompiler.compiler.stages import LOWERED, QUANTIZED, Stage, count_changes, find_stage, pick_stages
from qcompiler.drawing.picture import Picture, make_picture
from qcompiler.files import check_writable, replace_file
from qcompiler.module import QuantizedModule, get_session
from qcompiler.runtime.errors import QCompilerError

if TYPE_CHECKING:
    from qcompiler.debugging.debugger import Debugger
    from qcompiler.debugging.report import DebugReport
    from qcompiler.exporting.stages import ExportStage

#: parts that an SVG shows before it folds modules: more would not be read on one page
_PARTS: Final = 120
_HATCH: Final = (
    '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="hatch" width="7" height="7"/><rect class="hatch stripe" width="3.5" height="7"/></pattern>'
)
#: the pure scripts, for Python too, and the scripts that need a page; in reading order
_LAYOUT: Final = ("tree.js", "words.js", "layout.js")
_PAGE: Final = ("page.js", "details.js", "keys.js", "start.js")


class DrawError(QCompilerError, ValueError):
    """The picture cannot be drawn as asked; names the given and a valid value."""


class FolderError(DrawError, FileNotFoundError):
    """There is no such folder to draw in; names the folder."""


def draw(
    qmodel: QuantizedModule,
    path: str | os.PathLike[str],
    *,
    training: bool = True,
    debug: "Debugger | None" = None,
    export: "Sequence[ExportStage] | None" = None,
) -> Path:
    """Draws the joint graph of a model, forward and backward, with all quantizers; returns the path.

    Args:
        qmodel: the result of `qcompiler.compile`, called at least once in that mode.
        path: the ending decides. `.html`: one page that works offline, to be opened in a browser. `.svg`: the same
            picture with modules folded. `.dot`, `.graphml`: the graph for Graphviz and for graph tools. `.json`: the
            picture of every stage as data. An old file is replaced in one step.
        training: False for the graph of evaluation mode.
        debug: the result of `qcompiler.debug(qmodel)`: quantizers are colored by harm, with all figures as details.
        export: the result of `qcompiler.export_stages(qmodel, …)`, or a part of that list: the graph on the way to a
            file, up to the last pass in front of ONNX, in place of a captured graph.

    Raises:
        CompileError: no compiled model, or no graph of that mode has been captured.
        DrawError: no path, an unknown ending, or a missing library; a debugger of another model or recipe, or one that
            has watched nothing; a debugger for the graph of evaluation mode or of an export; an export that is no list
            of stages, has none in front of ONNX, or is one of another model; a folder that is missing.
        OSError: the file cannot be written; an old one is then unchanged.
    """
    get_session("draw", qmodel)
    path = check_path(path, colored=debug is not None)
    if export is not None:
        _check_export(qmodel, export)
    if debug is not None:
        _check_debugger(qmodel, training and export is None, debug)
    elif export is None:
        qmodel.check_captured("draw", training)
    text = _WRITERS[path.suffix.lower()](_Drawn(qmodel, training, debug, export))
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def check_path(path: str | os.PathLike[str], *, colored: bool = False) -> Path:
    """Return the path, if `draw` can write there.

    Args:
        colored: with the figures of a debugger.

    Raises:
        DrawError: no path, an unknown ending, an ending without colors, or a missing library.
        FolderError: the folder is missing.
        OSError: nothing can be written there.
    """
    valid = [ending for ending in _WRITERS if ending != ".graphml" or not colored]
    ending = os.path.splitext(path)[1].lower() if isinstance(path, str | os.PathLike) else None
    if ending not in valid:
        with_figures = " with the figures of a debugger" if colored else ""
        given = os.fspath(path) if ending is not None else path
        raise DrawError(f"draw: got {given!r}; valid{with_figures}: a path that ends in {', '.join(valid)}")
    path = Path(path)
    if not path.parent.is_dir():
        raise FolderError(f"draw: there is no folder {path.parent}; valid: a folder that exists")
    check_writable(path)
    if ending == ".svg":
        _find_engine()
    return path


def _check_debugger(qmodel: QuantizedModule, training: bool, debug: "Debugger") -> None:
    """Raises DrawError if the figures belong to other quantizers than the drawn ones."""
    from qcompiler.debugging.debugger import Debugger

    if not isinstance(debug, Debugger):
        got = type(debug).__name__
        raise DrawError(f"draw: debug: got {got}; valid: a debugger of this model, qcompiler.debug(qmodel)")
    if debug.qmodel is not qmodel:
        raise DrawError("draw: debug: the debugger watched another model; valid: one of this model")
    if not training:
        raise DrawError("draw: debug: eval mode is not watched, nor is an export; valid: training=True, export=None")
    if debug.recipe != qmodel.recipe:
        names = f"{debug.recipe.name!r}, the model has {qmodel.recipe.name!r}"
        raise DrawError(f"draw: debug: the debugger watched the recipe {names}; valid: draw before apply() or use()")


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What a file is asked to show; as in `draw`."""

    qmodel: QuantizedModule
    training: bool
    debug: "Debugger | None"
    export: "Sequence[ExportStage] | None"

    def list_frames(self) -> list[list[Stage]]:
        """Return the stages of each graph."""
        if self.export is not None:
            return [_list_drawn(self.export)]
        return self.qmodel.stages(training=self.training) if self.debug is None else self.debug.stages()

    def make_picture(self) -> Picture:
        """Return the picture of every stage that changed something."""
        report = None if self.debug is None else self.debug.report()
        return _picture_frames(self.qmodel, self.list_frames(), report)


def _check_export(qmodel: QuantizedModule, export: "Sequence[ExportStage]") -> None:
    """Raises DrawError for what is no list of stages, has nothing to draw, or belongs to another model."""
    from qcompiler.exporting.stages import ExportStage

    valid = "valid: what qcompiler.export_stages(qmodel, …) returned, or a part of that list"
    if not isinstance(export, Sequence) or isinstance(export, str):
        raise DrawError(f"draw: export: got {type(export).__name__}; {valid}")
    others = [type(one).__name__ for one in export if not isinstance(one, ExportStage)]
    if others or not export:
        raise DrawError(f"draw: export: got a list with {others[0] if others else 'no stage'}; {valid}")
    if not _list_drawn(export):
        names = ", ".join(stage.name for stage in export)
        raise DrawError(f"draw: export: got stages of ONNX alone, which are text: {names}; {valid} with stages before")
    if any(stage.qmodel is not qmodel for stage in export):
        raise DrawError(f"draw: export: got stages of another model; {valid}")


def _list_drawn(export: "Sequence[ExportStage]") -> list[Stage]:
    """Return the stages of an export in front of ONNX."""
    return [stage.drawn for stage in export if stage.drawn is not None]


def picture_of(qmodel: QuantizedModule, *, training: bool = True, debug: "Debugger | None" = None) -> Picture:
    """Return the picture of a model at every stage that changed something.

    Raises:
        CompileError: no graph of that mode has been captured.
    """
    return _Drawn(qmodel, training, debug, None).make_picture()


def _picture_frames(qmodel: QuantizedModule, frames: list[list[Stage]], report: "DebugReport | None") -> Picture:
    ends = (frames[0][0].name, LOWERED)
    shown = [(name, count) for name, count in count_changes(frames).items() if count or name in ends]
    session = get_session("draw", qmodel)
    title = f"{type(session.model).__name__}, {qmodel.recipe.name}"
    drawn = [(name, count, build_network(pick_stages(frames, name))) for name, count in shown]
    made = make_picture(title, drawn, list_containers(session.model))
    _add_ranges(made, qmodel.ranges())
    return made if report is None else _with_figures(made, frames, report)


def list_containers(model: nn.Module) -> frozenset[str]:
    """Return the paths of modules that only hold others and have no forward: ModuleDict, ModuleList, …"""
    # the same module may have two paths, and either may name a node
    modules = model.named_modules(remove_duplicate=False)
    return frozenset(path for path, module in modules if path and not _has_forward(module))


def _has_forward(module: nn.Module) -> bool:
    """Return True unless forward is the one of nn.Module itself, which refuses every call."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def _add_ranges(made: Picture, states: Mapping[str, Tensor]) -> None:
    """Writes the kept range of each quantizer, row by row, among the details."""
    for shape in made.shapes:
        if shape.kind == "quantizer" and (state := states.get(shape.details["name"])) is not None:
            rows = state.detach().reshape(state.shape[0], -1) if state.ndim else state.detach().reshape(1, 1)
            shape.details["range_state"] = [_find_span(row) for row in rows]


def _find_span(row: Tensor) -> str:
    low, high = float(row.min()), float(row.max())
    return f"{low:.4g}" if low == high or row.numel() == 1 else f"{low:.4g} … {high:.4g}"


def _with_figures(made: Picture, frames: Sequence[Sequence[Stage]], report: "DebugReport") -> Picture:
    """Return the picture with the figures of the debugger at the quantizers."""
    from qcompiler.debugging.shadow import numbered_sites

    figures = {site.name: site.to_figures() for site in report.sites}
    sites: dict[str, str] = {}
    for number, stages in enumerate(frames, start=1):
        prefix = f"{number}:" if len(frames) > 1 else ""
        sites |= {prefix + node: site for node, site in numbered_sites(find_stage(stages, QUANTIZED).graph).items()}
    for shape in made.shapes:
        shape.figures = figures.get(sites.get(shape.id, ""), {})
    return dataclasses.replace(made, watched=report.steps)


def _write_html(drawn: _Drawn) -> str:
    return make_page(drawn.make_picture())


def make_page(shown: Picture) -> str:
    """Return the page of a picture: one document that reads nothing else."""
    # `<` could end the script element that the names of the user's model stand in
    text = json.dumps(shown.to_dict(), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    data = text.replace("<", "\\u003c")
    light = "".join(f"--{name}: {color}; " for name, color in _read_light_theme().items())
    css = f":root {{ {light}}}\n{_read_assets('theme.css', 'scene.css', 'page.css')}"
    scripts = {"d3": _read_asset("d3.min.js"), "layout": _read_assets(*_LAYOUT), "page": _read_assets(*_PAGE)}
    return Template(_read_asset("page.html")).substitute(scripts, css=css, picture=data, hatch=_HATCH)


def _read_light_theme() -> dict[str, str]:
    """Return the light theme: name of a color → color."""
    return dict(re.findall(r"--([\w-]+): light-dark\((#\w+),", _read_asset("theme.css")))


def _write_svg(drawn: _Drawn) -> str:
    return make_svg(drawn.make_picture())


def make_svg(shown: Picture, budget: int = _PARTS) -> str:
    """Return the last stage of a picture as SVG, with so many modules unfolded that about `budget` parts are seen.

    Raises:
        DrawError: mini-racer, which runs the layout, is not installed.
    """
    with _find_engine()() as engine:
        engine.eval(_read_assets(*_LAYOUT))
        state = {"stage": len(shown.stages) - 1, "budget": budget, "color": "harm" if shown.watched else "role"}
        call = f"JSON.stringify(scene({json.dumps(shown.to_dict())}, {json.dumps(state)}))"
        made = json.loads(str(engine.eval(call)))
    body = "\n".join(_make_element(item) for item in made["items"])
    size = f'width="{made["width"]:.0f}" height="{made["height"]:.0f}"'
    view = f'viewBox="0 0 {made["width"]:.0f} {made["height"]:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view}>\n<title>{html.escape(shown.title)}</title>'
    # light, and without variables, which some programs that read SVG do not know
    colors = _read_light_theme()
    css = re.sub(r"var\(--([\w-]+)\)", lambda found: colors[found[1]], _read_asset("scene.css"))
    style = f"<style>{css}</style>\n<defs>{_HATCH}</defs>"
    return f'{head}\n{style}\n<g class="scene">\n{body}\n</g>\n</svg>\n'


def _find_engine() -> Any:
    """Return the class that runs the layout outside of a browser."""
    try:
        from py_mini_racer import MiniRacer
    except ImportError as error:
        raise DrawError("draw: .svg needs mini-racer; install it by: pip install 'qcompiler[draw]'") from error
    return MiniRacer


#: names in a scene → attributes of SVG
_ATTRIBUTES: Final = {
    "rect": {"x": "x", "y": "y", "w": "width", "h": "height", "r": "rx"},
    "circle": {"x": "cx", "y": "cy", "r": "r"},
    "text": {"x": "x", "y": "y", "anchor": "text-anchor"},
    "path": {"d": "d"},
}


def _make_element(item: dict[str, Any]) -> str:
    kind = item["type"]
    found = {name: item[key] for key, name in _ATTRIBUTES[kind].items() if key in item}
    texts = {name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in found.items()}
    attributes = " ".join(f'{name}="{html.escape(text)}"' for name, text in {"class": item["cls"], **texts}.items())
    title = f"<title>{html.escape(item['title'])}</title>" if item.get("title") else ""
    return f"<{kind} {attributes}>{html.escape(item.get('text', ''))}{title}</{kind}>"


def _write_json(drawn: _Drawn) -> str:
    return json.dumps(drawn.make_picture().to_dict(), indent=1) + "\n"


def _write_graphml(drawn: _Drawn) -> str:
    last = [stages[-1] for stages in drawn.list_frames()]
    return "\n".join(networkx.generate_graphml(_flatten_graph(build_network(last)))) + "\n"


def _flatten_graph(graph: "networkx.MultiDiGraph[str]") -> "networkx.MultiDiGraph[str]":
    """Return the same graph with all values as texts or numbers: GraphML knows nothing else."""
    flat: networkx.MultiDiGraph[str] = networkx.MultiDiGraph(**graph.graph)
    plain = (str, int, float)
    for node, data in graph.nodes(data=True):
        flat.add_node(node, **{k: v if isinstance(v, plain) else json.dumps(v) for k, v in data.items()})
    for start, end, key, data in graph.edges(keys=True, data=True):
        flat.add_edge(start, end, key, **data)
    return flat


def _write_dot(drawn: _Drawn) -> str:
    from qcompiler.drawing.dot import write_dot

    return write_dot(drawn.make_picture())


_WRITERS: Final[dict[str, Callable[[_Drawn], str]]] = {
    ".html": _write_html,
    ".svg": _write_svg,
    ".dot": _write_dot,
    ".graphml": _write_graphml,
    ".json": _write_json,
}


def _read_asset(name: str) -> str:
    return resources.files("qcompiler.drawing").joinpath("viewer", name).read_text(encoding="utf-8")


def _read_assets(*names: str) -> str:
    return "\n".join(map(_read_asset, names))
