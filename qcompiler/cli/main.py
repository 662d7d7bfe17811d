"""The command line: one small function a command. torch is imported by the commands that need it, not before."""

import json
import sys
from typing import Any

import click

from qcompiler import __version__
from qcompiler.cli.options import (
    MODEL,
    capture_model,
    check_export,
    check_picture,
    check_with,
    export_model,
    named_recipe,
    refuse_pairs,
    tell_untrained,
    with_export,
    with_file,
    with_graph,
    with_json,
)
from qcompiler.cli.progress import show_progress
from qcompiler.cli.show import show
from qcompiler.cli.training import debug, demo, search
from qcompiler.errors import in_short


class _Group(click.Group):
    """Errors are one line: exit code 2 for options and paths, 1 for all later failures. --traceback shows all."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("traceback"):
                raise
            raise click.ClickException(f"{in_short(error)} (--traceback shows where)") from error


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  qcompiler demo
  qcompiler recipes
  qcompiler explain mynet.py:Net --input 8,3,32,32 --recipe hyperblock-int4
  qcompiler draw mynet.py:make graph.html
  qcompiler show gpt2 --recipe mxfp8 --diff place-quantizers dedupe-quantizers
  qcompiler show mynet.py:make --export --list
  qcompiler debug mynet.py:make --recipe tensor-int4 --draw harm.html
  qcompiler search mynet.py:make found.yaml --budget 4.5 --file search.json
  qcompiler export mynet.py:make net.onnx --recipe deploy-int8 --checkpoint run.pt
  qcompiler --traceback draw mynet:Net graph.svg""",
)
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
@click.version_option(__version__, prog_name="qcompiler")
def main(traceback: bool) -> None:
    """Quantized training of PyTorch models: see what becomes of a model, find what spoils it, export it."""


@main.command()
@click.argument("name", required=False, callback=check_with(named_recipe))
@with_json()
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show one as YAML."""
    from qcompiler.recipes import RECIPES, get

    if name is not None:
        recipe = get(name)
        click.echo(
            json.dumps({"name": recipe.name, "yaml": recipe.to_yaml()}) if as_json else recipe.to_yaml(), nl=False
        )
        return
    rows = [{"name": recipe.name, "rules": len(recipe.rules), "source": recipe.source} for recipe in RECIPES.values()]
    width = max(map(len, RECIPES))
    click.echo(
        json.dumps(rows, indent=1) if as_json else "\n".join(f"{r['name']:{width}}  {r['source']}" for r in rows)
    )


@main.command(epilog=MODEL)
@with_export
@click.argument("path", callback=check_with(check_picture))
@with_json("Print the path and size as JSON.")
def draw(
    model: str,
    path: str,
    recipe: str,
    inputs: tuple[str, ...],
    evaluate: bool,
    export: bool,
    checkpoint: str | None,
    as_json: bool,
) -> None:
    """Draw the joint graph of MODEL, or with --export the graph on its way to ONNX, to PATH.

    PATH ends in .html, .svg, .dot, .graphml or .json.
    """
    from qcompiler.drawing.drawing import draw

    check_export(export, evaluate, checkpoint)
    if export:
        qmodel, stages = export_model(model, recipe, inputs, checkpoint)
    else:
        qmodel, stages = capture_model(model, recipe, inputs, evaluate), None
    with show_progress(f"drawing {path}"):
        made = draw(qmodel, path, training=not evaluate, export=stages)
    size = made.stat().st_size
    click.echo(json.dumps({"path": str(made), "bytes": size}) if as_json else f"{made}: {size:,} bytes")


@main.command(epilog=MODEL)
@with_graph
@with_json("JSON instead of tables.")
@click.option("--markdown", is_flag=True, help="Markdown instead of tables for a terminal.")
def explain(model: str, recipe: str, inputs: tuple[str, ...], evaluate: bool, as_json: bool, markdown: bool) -> None:
    """Print every quantizer, every contraction and totals of MODEL as tables."""
    refuse_pairs({"--json": as_json, "--markdown": markdown})
    from qcompiler.drawing.explanation import explain, is_colored

    qmodel = capture_model(model, recipe, inputs, evaluate)
    with show_progress("counting"):
        made = explain(qmodel, training=not evaluate)
    plain = made.to_text(color=is_colored(sys.stdout))
    click.echo(made.to_json() if as_json else made.to_markdown() if markdown else plain)


@main.command(epilog=MODEL)
@with_file
@click.option("--opset", default=21, show_default=True, help="The version of the ONNX operators.")
@click.option("--no-dynamic-batch", "fixed_batch", is_flag=True, help="Fix the batch to that of the inputs.")
@click.option("--keep-batch-norm", is_flag=True, help="Leave batch norms nodes of their own.")
@click.option("--signed-weights", is_flag=True, help="Store 8-bit weights as int8 (docs/onnx.md).")
@click.option(
    "--calibration",
    metavar="MODULE:NAME",
    help="Examples, an iterable or a callable that returns one, on which ranges of the present tensor are fixed.",
)
def export(
    model: str,
    path: str,
    recipe: str,
    inputs: tuple[str, ...],
    checkpoint: str | None,
    opset: int,
    fixed_batch: bool,
    keep_batch_norm: bool,
    signed_weights: bool,
    calibration: str | None,
    as_json: bool,
) -> None:
    """Write MODEL, trained, to PATH as ONNX, with one quantizer for each trained one."""
    from qcompiler.cli.batches import batches_of
    from qcompiler.cli.models import as_call, compiled, describe, told
    from qcompiler.exporting.export import export_onnx
    from qcompiler.module import get_session

    qmodel, values = compiled(model, recipe, inputs, checkpoint)
    args, kwargs = as_call(values)
    examples = None if calibration is None else map(as_call, batches_of("--calibration", calibration))
    tell_untrained(checkpoint)
    with told(
        describe(model, input=inputs, calibration=calibration),
        lambda: get_session("plan", qmodel).model(*args, **kwargs),
    ):
        made = export_onnx(
            qmodel.eval(),
            path,
            args,
            example_kwargs=kwargs,
            opset=opset,
            dynamic_batch=not fixed_batch,
            fold_batch_norm=not keep_batch_norm,
            signed_weights=signed_weights,
            calibration=examples,
        )
    click.echo(json.dumps(made.to_dict(), indent=1) if as_json else str(made))


@main.command(epilog=MODEL)
@with_file
def verify(model: str, path: str, recipe: str, inputs: tuple[str, ...], checkpoint: str | None, as_json: bool) -> None:
    """Compare the ONNX file at PATH with MODEL, code by code; exit code 3 if one differs."""
    from qcompiler.cli.models import as_call, compiled
    from qcompiler.exporting.verify import verify_onnx

    qmodel, values = compiled(model, recipe, inputs, checkpoint)
    args, kwargs = as_call(values)
    found = verify_onnx(qmodel.eval(), path, args, example_kwargs=kwargs)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    if not found.exact:
        raise click.exceptions.Exit(3)


for _command in (show, demo, debug, search):
    main.add_command(_command)

if __name__ == "__main__":
    main()
