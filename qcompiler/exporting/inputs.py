"""The arguments of a model: by name, checked before the work starts, with a free batch."""

import inspect
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from qcompiler.compiler import torch_compat
from qcompiler.exporting.signature import get_signature
from qcompiler.exporting.trace import ExportError, enter_eval_mode


def name_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return argument of `forward` → its value, in the order in which a traced graph takes its inputs.

    Raises:
        TypeError: the model does not take these arguments.
    """
    signature = get_signature(model, kwargs)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [_describe_type(one) for one in args] + [
            f"{name}={_describe_type(one)}" for name, one in kwargs.items()
        ]
        valid = _show_signature(inspect.signature(model.forward))
        raise TypeError(f"{error}; got ({', '.join(given)}); valid: the arguments of forward{valid}") from error
    return {**signature.bind_partial(*args).arguments, **kwargs}


def _show_signature(signature: inspect.Signature) -> str:
    """Return `(x, mask=None)`, without types."""
    plain = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    return str(inspect.Signature(plain))


def read_keywords(given: Any) -> dict[str, Any]:
    """Return the keyword inputs of a call as a dict of their own.

    Raises:
        ExportError: they are no mapping of names.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ExportError(
            f"export: example_kwargs: got {reprlib.repr(given)}; valid: a mapping of the names of arguments, such as "
            '{"mask": mask}'
        )
    return dict(given)


def copy_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same call, every tensor a copy of its own.

    Of one that is given twice, torch.export makes one input, and of a parameter of the model none; Dynamo one quantizer
    for both.
    """

    def copy(one: Any) -> Any:
        return one.detach().clone() if isinstance(one, Tensor) else one

    args, kwargs = torch_compat.map_leaves(copy, (args, dict(kwargs)))
    return args, dict(kwargs)


def check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the model on copies of them in eval mode, in float and on copies of its buffers.

    Raises:
        ExportError: the model has other arguments, a tensor holds no sample, or the model does not run: other shapes,
            types or devices.
    """
    if not isinstance(args, tuple):
        raise ExportError(f"export: inputs: got {type(args).__name__}; valid: a tuple, such as (x,)")
    try:
        named = name_inputs(model, args, kwargs)
    except TypeError as error:
        raise ExportError(f"export: inputs: {error}") from error
    for name, given in named.items():
        if any(isinstance(one, Tensor) and one.ndim and not len(one) for one in torch_compat.list_leaves(given)):
            raise ExportError(f"export: input {_describe_input(name, given)} holds no sample; valid: at least one")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with enter_eval_mode(model), torch.no_grad(), torch_compat.plain_encoder_layers(True):
            torch.func.functional_call(model, buffers, *copy_tensors(args, kwargs))
    except Exception as error:
        inputs = describe_inputs(named)
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"export: the model does not run on the inputs {inputs}: {type(error).__name__}: {reason}"
        ) from error


def describe_inputs(named: Mapping[str, Any]) -> str:
    """Return `x (float32 2×8), mask (NoneType)`."""
    return ", ".join(_describe_input(name, given) for name, given in named.items())


def _describe_input(name: str, given: Any) -> str:
    """Return `x (float32 2×8)`; the type of anything but a tensor."""
    return f"{name} ({_describe_type(given)})"


def _describe_type(given: Any) -> str:
    """Return `float32 2×8` for a tensor."""
    if not isinstance(given, Tensor):
        return type(given).__name__
    sizes = "×".join(map(str, given.shape))
    return f"{given.dtype} {sizes}".removeprefix("torch.").strip()


def free_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Return the example, and the dimensions that are free in it: 0 of each tensor as long as the first one.

    A batch of 1 is doubled, since torch takes a 1 for a constant.

    Raises:
        ExportError: none of the arguments is a tensor with dimensions.
    """
    bound = get_signature(model, kwargs).bind(*args, **kwargs).arguments
    tensors = [one for one in torch_compat.list_leaves((args, kwargs)) if isinstance(one, Tensor) and one.ndim]
    if not tensors:
        raise ExportError("export: example_inputs hold no tensor with dimensions; valid: dynamic_batch=False")
    length, axis = tensors[0].shape[0], torch.export.Dim("batch")

    def is_free(one: Any) -> bool:
        return isinstance(one, Tensor) and one.ndim > 0 and one.shape[0] == length

    def twice(one: Any) -> Any:
        return torch.cat([one, one]) if length == 1 and is_free(one) else one

    shapes = torch_compat.map_leaves(lambda one: {0: axis} if is_free(one) else None, dict(bound))
    args, kwargs = torch_compat.map_leaves(twice, (args, kwargs))
    return args, kwargs, shapes


def free_as(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Return an example to be traced as for a file, and the free dimensions.

    A graph for one sample alone may be another: its views are other ones. So a free dimension of 1 is doubled here too.

    Args:
        args, kwargs: the arguments of the model.
        axes: input of the file → the free dimensions, in the order of the inputs.
    """
    bound = dict(get_signature(model, kwargs).bind(*args, **kwargs).arguments)
    tensors = [bound[name] for name in axes] if axes.keys() <= bound.keys() else torch_compat.list_leaves(bound)
    known = dict(zip(map(id, (one for one in tensors if isinstance(one, Tensor))), axes.values(), strict=False))

    def twice(one: Any) -> Any:
        for axis in known.get(id(one), ()):
            one = torch.cat([one, one], axis) if one.shape[axis] == 1 else one
        return one

    def free(one: Any) -> dict[int, Any] | None:
        return dict.fromkeys(known.get(id(one), ()), torch.export.Dim.AUTO) if isinstance(one, Tensor) else None

    shapes = torch_compat.map_leaves(free, bound)
    args, kwargs = torch_compat.map_leaves(twice, (args, dict(kwargs)))
    return args, dict(kwargs), shapes


def describe_given(program: ExportedProgram) -> dict[str, str]:
    """Input of a traced program → "a tensor", or the argument as text, which is a constant of the graph."""
    given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return {arg.name: repr(arg.value) if isinstance(arg, ConstantArgument) else "a tensor" for arg in given}


def check_constants(model: nn.Module, held: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raise if a call gives other constants than those that a file has.

    Args:
        held, given: as from `describe_given`; missing inputs have the default.

    Raises:
        ExportError: with the first of them.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {one.name: repr(one.default) for one in parameters if one.default is not one.empty}
    for name in dict.fromkeys([*held, *given]):
        old, new = (of.get(name, defaults.get(name, "nothing")) for of in (held, given))
        if old != new:
            raise ExportError(
                f"export: input {name}: the file was made with {old}, and got {new}; valid: a tensor for a tensor, and "
                "else the same, which is a constant of the file"
            )


def as_example(model: nn.Module, given: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """One example of a calibration by name, in the order of the call (args, kwargs) that was traced.

    A tuple or list is positional inputs, a mapping keyword inputs, a pair of a tuple and a mapping both. Keywords that
    an example lacks come from `kwargs`.

    Raises:
        TypeError: it is none of these, or gives other inputs than the call, or tensors of other types.
    """
    match given:
        case (tuple() as first, Mapping() as others):
            own, named = first, others
        case tuple() | list():
            own, named = tuple(given), {}
        case Mapping():
            own, named = (), given
        case _:
            raise TypeError(
                f"got {type(given).__name__}; valid: a tuple of positional inputs, such as (x,), a mapping of keyword "
                "inputs, or a pair of both"
            )
    positional = get_signature(model, {}).bind_partial(*own).arguments
    found = name_inputs(model, own, {**{name: one for name, one in kwargs.items() if name not in positional}, **named})
    expected = name_inputs(model, args, kwargs)
    if found.keys() != expected.keys():
        raise TypeError(f"got {', '.join(found)}; valid: the inputs of the example, {', '.join(expected)}")
    for name, like in expected.items():
        if isinstance(like, Tensor) and isinstance(found[name], Tensor) and found[name].dtype != like.dtype:
            raise TypeError(
                f"got {_describe_input(name, found[name])}; valid: {_describe_input(name, like)}, but for the sizes"
            )
    return {name: found[name] for name in expected}
