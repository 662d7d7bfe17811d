"""Options that commands share, and the model that they lead to. Slow modules are imported on use."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.cli.progress import show_progress
from qcompiler.errors import in_short

if TYPE_CHECKING:
    from qcompiler.exporting.stages import ExportStage
    from qcompiler.module import QuantizedModule

MODEL = (
    "MODEL is `module:callable`, `path.py:callable`, or the type of a transformers config, such as gpt2. The callable "
    "returns the model, or the model and a tuple of its inputs; the class of a model will do."
)


def capture_model(model: str, recipe: str, inputs: tuple[str, ...], evaluate: bool) -> "QuantizedModule":
    """Return the model of a command, called once."""
    with show_progress("capturing the graph"):
        from qcompiler.cli.models import captured

        return captured(model, recipe, inputs, training=not evaluate)


def export_model(
    model: str, recipe: str, inputs: tuple[str, ...], checkpoint: str | None
) -> "tuple[QuantizedModule, list[ExportStage]]":
    """Return the model of a command, and its stages on the way to ONNX."""
    from qcompiler.cli.models import as_call, compiled
    from qcompiler.exporting.stages import export_stages

    qmodel, values = compiled(model, recipe, inputs, checkpoint)
    args, kwargs = as_call(values)
    tell_untrained(checkpoint)
    with show_progress("running the passes"):
        return qmodel, export_stages(qmodel, args, example_kwargs=kwargs)


def tell_untrained(checkpoint: str | None) -> None:
    """Say on stderr that nobody has trained the weights."""
    if checkpoint is None:
        click.echo("note: no --checkpoint: weights as the callable made them", err=True)


def refuse_pairs(options: dict[str, object]) -> None:
    """Refuses two options of which a command takes one."""
    given = [name for name, value in options.items() if value]
    if len(given) > 1:
        raise click.UsageError(f"{given[0]} and {given[1]} do not go together; leave one out")


def check_export(export: bool, evaluate: bool, checkpoint: str | None) -> None:
    """Refuses options that do not go with --export, or do not go without."""
    refuse_pairs({"--export": export, "--eval": evaluate})
    if checkpoint and not export:
        raise click.UsageError("--checkpoint goes with --export alone: other graphs hold no values")


@dataclasses.dataclass(frozen=True)
class Training:
    """The arguments of commands that train, as texts."""

    model: str
    recipe: str
    inputs: tuple[str, ...]
    checkpoint: str | None
    data: str | None
    loss: str | None

    def __str__(self) -> str:
        from qcompiler.cli.models import describe

        return describe(self.model, input=self.inputs, data=self.data, loss=self.loss)


def check_with(check: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback for an option or argument: if `check` raises, refuse before any work, with exit code 2."""

    def refuse(context: click.Context, option: click.Parameter, value: Any) -> Any:
        try:
            with show_progress("loading"):  # a check imports the modules of the command
                for one in value if isinstance(value, tuple) else () if value is None else (value,):
                    check(one)
        except (OSError, ValueError, ImportError) as error:
            raise click.BadParameter(in_short(error)) from None
        return value

    return refuse


def named_recipe(name: str) -> None:
    """Refuses a text that is no recipe."""
    from qcompiler.recipes import get

    try:
        get(name)
    except OSError as error:
        valid = "a name that `qcompiler recipes` lists, or the path of a .yaml file that is there"
        raise ValueError(f"{in_short(error)}; valid: {valid}") from error


def _parse_input(text: str) -> None:
    from qcompiler.cli.models import parse_input

    parse_input(text)


def check_picture(path: str, *, colored: bool = False) -> None:
    """Refuses a path that no picture can have."""
    from qcompiler.drawing.drawing import check_path

    _refuse_folder(path)
    check_path(path, colored=colored)


def refuse_unwritable(path: str) -> None:
    """Refuses a path that no file can have."""
    from qcompiler.files import check_writable

    _refuse_folder(path)
    check_writable(path)


def _refuse_folder(path: str) -> None:
    """Refuses a folder in place of a file."""
    if Path(path).is_dir():
        raise ValueError(f"got {path!r}, which is a folder; valid: the path of a file")


def check_positive(number: float) -> None:
    """Refuses NaN, infinity, zero and negative numbers."""
    if not 0 < number < math.inf:
        raise ValueError(f"got {number:g}; valid: a finite number above 0")


def recipe_path(path: str) -> None:
    """Refuses a path that no recipe can have."""
    if Path(path).suffix not in (".yaml", ".yml"):
        raise ValueError(f"got {path!r}; valid: a path that ends in .yaml")
    if not Path(path).parent.is_dir():
        raise ValueError(f"there is no folder {Path(path).parent}; valid: a folder that exists")
    refuse_unwritable(path)


def with_recipe(default: str) -> Callable[[Any], Any]:
    """Return the option of every command that quantizes."""
    text = "A name (`qcompiler recipes` lists them) or a .yaml file."
    return click.option(
        "--recipe", "-r", default=default, show_default=True, callback=check_with(named_recipe), help=text
    )


def with_json(text: str = "JSON instead of text.") -> Callable[[Any], Any]:
    """Return the option of every command."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def with_model(command: Any, recipe: str = "hyperblock-int8") -> Any:
    """Return the argument and the options of every command that takes a model."""
    for add in (
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="SHAPE",
            callback=check_with(_parse_input),
            help="Shape of an input, instead of those that the callable gives: 8,3,32,32 or 4,16:int64; once for each.",
        ),
        with_recipe(recipe),
        click.argument("model"),
    ):
        command = add(command)
    return command


def with_graph(command: Any) -> Any:
    """Return the options of every command that looks at a graph."""
    flag = click.option("--eval", "evaluate", is_flag=True, help="The graph of eval mode instead of training.")
    return with_model(flag(command))


def with_checkpoint(command: Any) -> Any:
    """Return the trained state of the model."""
    text = "The state_dict() of the trained model: a file of torch.save."
    return click.option("--checkpoint", "-c", type=click.Path(exists=True, dir_okay=False), help=text)(command)


def with_export(command: Any) -> Any:
    """Return the options of every command that looks at a graph, of an export too. --export is read first."""
    text = "The graph on its way to a file of ONNX; writes none."
    flag = click.option("--export", is_flag=True, is_eager=True, help=text)
    return with_graph(flag(with_checkpoint(command)))


def with_file(command: Any) -> Any:
    """Return the options of every command about a file of ONNX."""
    path = click.argument("path", type=click.Path(dir_okay=False))
    return with_model(path(with_checkpoint(with_json("JSON instead of a table.")(command))))


def with_training(recipe: str) -> Callable[[Any], Any]:
    """Return the options of every command that trains; the command gets one `Training`."""

    def add(command: Any) -> Any:
        @functools.wraps(command)
        def run(
            model: str,
            recipe: str,
            inputs: tuple[str, ...],
            checkpoint: str | None,
            data: str | None,
            loss: str | None,
            **own: Any,
        ) -> None:
            command(Training(model, recipe, inputs, checkpoint, data, loss), **own)

        data = click.option(
            "--data",
            metavar="MODULE:NAME",
            help="Batches: an iterable, or a callable that returns one. Default: the example inputs of the model.",
        )
        loss = click.option(
            "--loss",
            metavar="MODULE:NAME",
            help="A callable (model, batch) -> loss. Default: the cross entropy of batches (inputs, labels).",
        )
        return with_model(with_checkpoint(data(loss(with_json()(run)))), recipe)

    return add
