"""The command `show`: the graph of a model as text after any pass, in training, in eval mode or on its way to ONNX."""

import contextlib
import dataclasses
import difflib
import json
import os
from collections.abc import Callable

import click

from qcompiler.cli.options import (
    MODEL,
    capture_model,
    check_export,
    check_with,
    export_model,
    refuse_pairs,
    with_export,
    with_json,
)
from qcompiler.cli.progress import show_progress


@dataclasses.dataclass(frozen=True)
class _Stages:
    """The stages of the graphs of one model."""

    #: name → places that changed, in order
    changes: dict[str, int]
    #: name → text
    read: Callable[[str], str]
    #: the one that is shown if none is named
    last: str


def _check_names(context: click.Context, option: click.Parameter, value: str | tuple[str, str] | None) -> object:
    """Refuses the name of no stage; --export, which is read first, says of which pipelines."""
    check = _check_export_name if context.params["export"] else _check_name
    return check_with(check)(context, option, value)


def _check_export_name(name: str) -> None:
    from qcompiler.exporting.stages import check_stage

    check_stage(name)


def _check_name(name: str) -> None:
    from qcompiler.compiler.stages import StageError, check_stage

    try:
        check_stage(name)
    except StageError as error:
        from qcompiler.exporting.stages import list_names
        from qcompiler.exporting.trace import ExportError

        with contextlib.suppress(ExportError):  # onnx is not installed
            if name in list_names():
                raise StageError(f"stage: {name!r} is one of an export; add --export") from error
        raise


@click.command(epilog=MODEL)
@with_export
@click.option(
    "--after",
    metavar="PASS",
    callback=_check_names,
    help="The graph after this pass, `captured` or `lowered`, with --export `traced` or `translated`; default: after "
    "all.",
)
@click.option("--diff", nargs=2, metavar="PASS PASS", callback=_check_names, help="What changed between two of them.")
@click.option("--list", "listed", is_flag=True, help="The passes, each with the number of places that it changed.")
@with_json()
def show(
    model: str,
    recipe: str,
    inputs: tuple[str, ...],
    evaluate: bool,
    export: bool,
    checkpoint: str | None,
    after: str | None,
    diff: tuple[str, str] | None,
    listed: bool,
    as_json: bool,
) -> None:
    """Print the graph of MODEL as text, after any pass."""
    refuse_pairs({"--after": after, "--diff": diff, "--list": listed})
    check_export(export, evaluate, checkpoint)
    stages = (
        _list_of_export(model, recipe, inputs, checkpoint) if export else _list_of_mode(model, recipe, inputs, evaluate)
    )
    if listed:
        click.echo(json.dumps(stages.changes, indent=1) if as_json else _write_list(stages.changes))
        return
    names = diff or (after or stages.last,)
    texts = {name: stages.read(name) for name in names}
    if diff:
        lines = _list_changed(*((name, texts[name]) for name in diff))
        click.echo(json.dumps({"diff": diff, "lines": lines}, indent=1) if as_json else _write_diff(diff, lines))
    elif as_json:
        click.echo(json.dumps(texts, indent=1))
    else:
        click.echo(texts[names[0]], nl=False)


def _list_of_mode(model: str, recipe: str, inputs: tuple[str, ...], evaluate: bool) -> _Stages:
    """Return the stages of the captured graphs of training or of eval mode."""
    from qcompiler.compiler.stages import QUANTIZED, count_changes, stage_text

    qmodel = capture_model(model, recipe, inputs, evaluate)
    with show_progress("running the passes"):
        frames = qmodel.stages(training=not evaluate)
    return _Stages(count_changes(frames), lambda name: stage_text(frames, name), QUANTIZED)


def _list_of_export(model: str, recipe: str, inputs: tuple[str, ...], checkpoint: str | None) -> _Stages:
    """Return the stages of an export."""
    _, stages = export_model(model, recipe, inputs, checkpoint)
    texts = {stage.name: stage.text for stage in stages}
    return _Stages({stage.name: stage.changes for stage in stages}, texts.__getitem__, stages[-1].name)


def _write_list(changes: dict[str, int]) -> str:
    from qcompiler.tables import Table, to_text

    return to_text([Table("Stages", ("stage", "places changed"), list(changes.items()))])


def _list_changed(old: tuple[str, str], new: tuple[str, str]) -> list[str]:
    """Return the lines of a diff of two stages, as (name, text)."""
    (before, first), (behind, second) = old, new
    return [*difflib.unified_diff(first.splitlines(), second.splitlines(), before, behind, n=0, lineterm="")]


def _write_diff(names: tuple[str, str], lines: list[str]) -> str:
    return "\n".join(map(_color_line, lines)) or f"no difference between {names[0]} and {names[1]}"


def _color_line(line: str) -> str:
    """Return a line of a diff; click drops the colors if the output is no terminal."""
    color = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
    return click.style(line, fg=color) if color and not os.environ.get("NO_COLOR") else line
