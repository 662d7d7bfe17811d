"""The training data of the command line: batches and a loss from the user's own code, or stand-ins for both."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.cli.models import ModelError, as_call, named, told
from qcompiler.compiler import torch_compat
from qcompiler.errors import in_short, is_own
from qcompiler.module import QuantizedModule, get_session

#: (model, batch) → loss
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
STAND_IN: Final = "no --data: the example inputs, and the mean square of the outputs as loss, stand in for training"


def training(
    data: str | None, loss: str | None, arguments: Any, count: int, what: str
) -> tuple[list[Any], Loss, tuple[str, ...]]:
    """(batches, loss, notes) that `--data` and `--loss` stand for.

    Args:
        data: `module:name` of an iterable of batches, or of a callable that returns one; None: the example inputs.
        loss: `module:name` of a callable (model, batch) → loss; None: the cross entropy of pairs (inputs, labels),
            and for example inputs the mean square of all outputs.
        arguments: the example inputs of the model, a tuple or a dict.
        count: batches to take; the example inputs are taken so many times.
        what: the model and the options, as errors of a step call them.

    Raises:
        ModelError: a text leads nowhere, or to something else.
    """
    chosen = None if loss is None else named(loss, "--loss")
    if chosen is not None and not callable(chosen):
        raise ModelError(f"--loss {loss!r}: got {type(chosen).__name__}; valid: a callable (model, batch) -> loss")
    if data is None:
        return [arguments] * count, _told(chosen or mean_square, loss, what), (STAND_IN,) if chosen is None else ()
    found = batches_of("--data", data)
    with told(f"--data {data!r}"):
        batches = list(itertools.islice(found, count))
    if not batches:
        raise ModelError(f"--data {data!r}: got no batch; valid: at least one")
    return batches, _told(chosen or cross_entropy, loss, what), ()


def batches_of(option: str, text: str) -> Iterable[Any]:
    """The iterable that `module:name` stands for, or that the callable there returns.

    Raises:
        ModelError: the text leads nowhere, or to something else; it names the option.
    """
    found = named(text, option)
    with told(f"{option} {text!r}"):
        found = found() if callable(found) and not isinstance(found, Iterable) else found
    if not isinstance(found, Iterable) or isinstance(found, Tensor):
        raise ModelError(f"{option} {text!r}: got {type(found).__name__}; valid: an iterable of batches")
    return found


def _told(loss: Loss, chosen: str | None, what: str) -> Loss:
    """Return the loss, whose errors and results are told under the name `what`; for a `chosen` loss with the arguments.

    Raises:
        ModelError: at a call: something in the step raised, or the result is no loss.
    """

    def checked(model: nn.Module, batch: Any) -> Tensor:
        plain = get_session("batches", model).model if isinstance(model, QuantizedModule) else model
        given = f"; --loss {chosen!r} is called with (model, batch): {type(plain).__name__} and {type(batch).__name__}"
        with told(what, lambda: _run(loss, plain, batch, given if chosen else "")):
            value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            given = f"a tensor {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"{what}: the loss is {given}; valid: a tensor of one number that has a gradient")
        return value

    return checked


def _run(loss: Loss, model: nn.Module, batch: Any, given: str) -> Tensor:
    """Call the loss; to an error add the arguments."""
    try:
        return loss(model, batch)
    except Exception as error:
        if is_own(error) or not given:
            raise
        raise ModelError(f"{in_short(error)}{given}") from error


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a classifier for a pair (inputs, labels).

    Raises:
        ModelError: the batch is something else.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ModelError(f"--data: a batch is a {type(batch).__name__}; valid: a pair (inputs, labels), or a --loss")
    outputs, labels = model(batch[0]), batch[1]
    for name, value in (("model returns", outputs), ("labels are", labels)):
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the {name} a {type(value).__name__}, of which there is no cross entropy; valid: a tensor, or "
                "--loss MODULE:NAME, a callable (model, batch) -> loss"
            )
    return F.cross_entropy(outputs, labels)


def mean_square(model: nn.Module, arguments: Any) -> Tensor:
    """Σ over the outputs of a model of their mean square; outputs that are no floats do not count.

    Raises:
        ModelError: no output has a gradient.
    """
    args, kwargs = as_call(arguments)
    parts = [
        leaf
        for leaf in torch_compat.list_leaves(model(*args, **kwargs))
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if not parts:
        raise ModelError("model: no output has a gradient; valid: a model with parameters, or --data and --loss")
    return torch.stack([part.square().mean() for part in parts]).sum()


def train(model: nn.Module, batches: Iterable[Any], loss: Loss, rate: float) -> list[float]:
    """One step of plain SGD for each batch; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses
