"""The commands that train a model: demo, debug, search."""

import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from qcompiler.cli.options import (
    MODEL,
    Training,
    check_picture,
    check_positive,
    check_with,
    recipe_path,
    refuse_unwritable,
    with_json,
    with_recipe,
    with_training,
)
from qcompiler.cli.progress import show_progress

if TYPE_CHECKING:
    from qcompiler.debugging.debugger import Debugger
    from qcompiler.debugging.remedies import Proposal
    from qcompiler.debugging.report import DebugReport


@click.command()
@with_recipe("hyperblock-int4")
@click.option("--epochs", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--backend", type=click.Choice(["eager", "inductor"]), help="Default: inductor, or eager where it fails.")
@with_json("JSON instead of a table.")
def demo(recipe: str, epochs: int, backend: str | None, as_json: bool) -> None:
    """Train a small network on handwritten digits, in float and through a recipe, and compare.

    Needs scikit-learn, which brings the digits: pip install 'qcompiler[demo]'.

    \b
    Examples:
      qcompiler demo
      qcompiler demo --recipe mxfp8 --epochs 3 --backend eager
    """
    from qcompiler.demo.digits import compare_recipe

    made = compare_recipe(recipe, epochs, backend)
    click.echo(json.dumps(made.to_dict(), indent=1) if as_json else str(made))


@click.command(epilog=MODEL)
@with_training("hyperblock-int8")
@click.option("--steps", type=click.IntRange(min=1), default=2, show_default=True, help="Training steps to watch.")
@click.option(
    "--rate",
    type=float,
    callback=check_with(check_positive),
    default=0.01,
    show_default=True,
    help="Learning rate of SGD.",
)
@click.option(
    "--out", "-o", callback=check_with(recipe_path), help="Write the recipe with the proposed rules to this .yaml file."
)
@click.option(
    "--draw",
    "drawn",
    metavar="PATH",
    callback=check_with(functools.partial(check_picture, colored=True)),
    help="Draw the graph, quantizers in the colors of their harm.",
)
def debug(given: Training, steps: int, rate: float, out: str | None, drawn: str | None, as_json: bool) -> None:
    """Watch training steps of MODEL: which quantizer does most harm, and the rule that mends it.

    \b
    Examples:
      qcompiler debug mynet.py:make --recipe tensor-int4
      qcompiler debug mynet.py:Net --data mynet.py:batches --steps 4 --draw harm.html
      qcompiler debug mynet.py:make --loss mynet.py:loss --out mended.yaml
    """
    from qcompiler.cli.batches import train, training
    from qcompiler.cli.models import compiled
    from qcompiler.debugging.debugger import debug
    from qcompiler.drawing.drawing import draw

    qmodel, values = compiled(given.model, given.recipe, given.inputs, given.checkpoint, optional=bool(given.data))
    batches, loss, notes = training(given.data, given.loss, values, steps, str(given))
    with show_progress("watching training steps"), debug(qmodel) as watched:
        losses = train(qmodel, batches, loss, rate)
    with show_progress("trying what mends it"):
        proposal, report = watched.propose(), watched.report()
    if drawn is not None:
        with show_progress(f"drawing {drawn}"):
            draw(qmodel, drawn, debug=watched)
    notes = (*notes, *_explain_end(len(batches), steps), *_write_mended(watched, proposal, out))
    click.echo(_debug_json(report, proposal, losses, notes) if as_json else _write_lines(report, notes))


def _explain_end(found: int, asked: int) -> Iterator[str]:
    """Yield a note if the data ended early."""
    if found < asked:
        yield f"--data gave {found} of {asked} batches"


def _write_mended(watched: "Debugger", proposal: "Proposal | None", out: str | None) -> Iterator[str]:
    """Writes the recipe with the proposed rules; says if the file was written."""
    if out is not None and proposal is not None:
        watched.mended(proposal).to_file(out)
        yield f"{out} is written"
    elif out is not None:
        yield f"{out} is not written, as no rule is proposed"


def _write_lines(report: "DebugReport", notes: tuple[str, ...]) -> str:
    return "\n".join([str(report), *(f"note: {note}" for note in notes)])


def _debug_json(report: "DebugReport", proposal: "Proposal | None", losses: list[float], notes: tuple[str, ...]) -> str:
    from qcompiler.debugging.report import to_plain

    found = {"losses": losses, "proposal": None if proposal is None else proposal.to_dict(), "notes": list(notes)}
    return json.dumps(to_plain(report.to_dict() | found), indent=1)


@click.command(epilog=MODEL)
@with_training("hyperblock-int4")
@click.argument("path", callback=check_with(recipe_path))
@click.option(
    "--budget",
    "-b",
    type=float,
    callback=check_with(check_positive),
    required=True,
    help="Bits of an element with its scales, such as 4.5.",
)
@click.option("--unit", type=click.Choice(["bits", "bytes"]), default="bits", show_default=True, help="Of the budget.")
@click.option("--batches", "count", type=click.IntRange(min=1), default=4, show_default=True, help="To measure on.")
@click.option(
    "--file",
    "-f",
    "state",
    metavar="PATH",
    callback=check_with(refuse_unwritable),
    help="Keep measurements here (JSON), and go on from them.",
)
@click.option("--format", "formats", multiple=True, help="A format to choose from, such as int4; once for each.")
@click.option("--block", "blocks", multiple=True, help="A block to choose from, such as b2c8o4i4; once for each.")
def search(
    given: Training,
    path: str,
    budget: float,
    unit: str,
    count: int,
    state: str | None,
    formats: tuple[str, ...],
    blocks: tuple[str, ...],
    as_json: bool,
) -> None:
    """Choose bits and blocks for each layer of MODEL within a budget, and write the recipe to PATH, a .yaml file.

    \b
    Examples:
      qcompiler search mynet.py:make found.yaml --budget 4.5 --file search.json
      qcompiler search mynet.py:Net found.yaml --budget 1e6 --unit bytes --data mynet.py:batches -c run.pt
      qcompiler search mynet.py:Net found.yaml --budget 6 --data mynet.py:batches --format int4 --format int8
    """
    from qcompiler.cli.batches import training
    from qcompiler.cli.models import plain
    from qcompiler.searching.searcher import BLOCKS, FORMATS, search

    model, values = plain(given.model, given.inputs, given.checkpoint, optional=bool(given.data))
    batches, loss, notes = training(given.data, given.loss, values, count if given.data else 1, str(given))
    found = search(
        model,
        batches,
        budget=budget,
        unit=unit,
        recipe=given.recipe,
        formats=formats or FORMATS,
        blocks=blocks or BLOCKS,
        loss=loss,
        batches=count,
        file=state,
        quiet=as_json,
    )
    found.to_file(path)
    notes = (*notes, f"{path} is written")
    made = {"path": path, "name": found.name, "yaml": found.to_yaml(), "notes": notes}
    click.echo(json.dumps(made, indent=1) if as_json else "\n".join(f"note: {note}" for note in notes))
