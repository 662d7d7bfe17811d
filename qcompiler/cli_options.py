"""Options that commands share. What is expensive to import is imported where it is used."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

MODEL = (
    "MODEL is `module:callable`, `path.py:callable`, or the type of a transformers config, such as gpt2. The callable "
    "returns the model, or the model and a tuple of its inputs; the class of a model will do."
)


@dataclasses.dataclass(frozen=True)
class Training:
    """What the commands that train are given, as texts."""

    model: str
    recipe: str
    inputs: tuple[str, ...]
    checkpoint: str | None
    data: str | None
    loss: str | None


def with_json(text: str = "JSON instead of text.") -> Callable[[Any], Any]:
    """The option of every command."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def with_model(command: Any, recipe: str = "hyperblock-int8") -> Any:
    """The argument and the options of every command that takes a model."""
    for add in (
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="SHAPE",
            help="Shape of an input where the callable gives none: 8,3,32,32 or 4,16:int64; once for each input.",
        ),
        click.option("--recipe", "-r", default=recipe, show_default=True, help="A name or a .yaml file."),
        click.argument("model"),
    ):
        command = add(command)
    return command


def with_graph(command: Any) -> Any:
    """Those of every command that looks at one of its graphs."""
    flag = click.option("--eval", "evaluate", is_flag=True, help="The graph of eval mode instead of training.")
    return with_model(flag(command))


def with_checkpoint(command: Any) -> Any:
    """The trained state of the model."""
    text = "The state_dict() of the trained model: a file of torch.save."
    return click.option("--checkpoint", "-c", type=click.Path(exists=True, dir_okay=False), help=text)(command)


def with_file(command: Any) -> Any:
    """Those of every command about a file of ONNX."""
    path = click.argument("path", type=click.Path(dir_okay=False))
    return with_model(path(with_checkpoint(with_json("JSON instead of a table.")(command))))


def with_training(recipe: str) -> Callable[[Any], Any]:
    """Those of every command that trains; the command gets them as one `Training`."""

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


def recipe_file(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Refuses, before the work, what no recipe could be written to or read from."""
    if path is not None and Path(path).suffix not in (".yaml", ".yml"):
        raise click.BadParameter(f"got {path!r}; valid: a path that ends in .yaml")
    if path is not None and not Path(path).parent.is_dir():
        raise click.BadParameter(f"there is no folder {Path(path).parent}")
    return path
