"""The checks of `dynamic_shapes` against a call, before torch reads them: entries, axes, sizes."""

import reprlib
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from torch import Tensor
from torch.export import Dim

from qcompiler.exporting.trace import ExportError

_DIMENSION: Final = "a name such as 'batch', torch.export.Dim, Dim.AUTO, the size, or None"
#: Dim.AUTO and its kind
_HINT: Final = type(Dim.AUTO)


def check_dims(inputs: Mapping[str, Any], shapes: Any) -> None:
    """Refuse `dynamic_shapes` that do not fit the inputs.

    Args:
        inputs: argument of the model → its value, in the order of the signature.
        shapes: as in torch.export.export; a string is a name.

    Raises:
        ExportError: with the input, the given entry and a valid one.
    """
    if not shapes:
        if shapes is not None and not isinstance(shapes, Mapping | tuple | list):
            _refuse("", shapes, _show_entries(inputs))
        return
    if isinstance(shapes, Mapping) and shapes.keys() == inputs.keys():
        pairs = [(name, inputs[name], shapes[name]) for name in inputs]
    elif isinstance(shapes, tuple | list) and len(shapes) == len(inputs):
        pairs = [(name, inputs[name], spec) for name, spec in zip(inputs, shapes, strict=True)]
    else:
        _refuse("", shapes, _show_entries(inputs))
    for name, given, spec in pairs:
        _check_entry(name, given, spec)


def _show_entries(inputs: Mapping[str, Any]) -> str:
    entries = ", ".join(f'"{name}": …' for name in inputs)
    return f'one entry for each given input, {{{entries}}}; an entry is {{0: "batch"}}, or None for fixed sizes'


def _check_entry(name: str, given: Any, spec: Any) -> None:
    """Check the entry of one input, part by part; torch checks the parts of other containers."""
    if isinstance(given, Tensor) and spec is not None:
        _check_axes(name, given, spec)
    elif isinstance(given, Mapping):
        if not isinstance(spec, Mapping) or spec.keys() != given.keys():
            _refuse(name, spec, f"a mapping with the keys {', '.join(map(repr, given))}")
        for key, one in given.items():
            _check_entry(f"{name}[{key!r}]", one, spec[key])
    elif isinstance(given, tuple | list):
        if not isinstance(spec, tuple | list) or len(spec) != len(given):
            _refuse(name, spec, f"a {type(given).__name__} of {len(given)} entries")
        for index, pair in enumerate(zip(given, spec, strict=True)):
            _check_entry(f"{name}[{index}]", *pair)


def _check_axes(name: str, given: Tensor, spec: Any) -> None:
    """Check the entry of a tensor: axis → dimension, or all dimensions in order."""
    shown = f"{name} ({'×'.join(map(str, given.shape)) or 'a number'})"
    if isinstance(spec, tuple | list):
        if len(spec) != given.ndim:
            _refuse(shown, spec, f"{given.ndim} dimensions, one for each axis")
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping):
        _refuse(shown, spec, 'a mapping of axes such as {0: "batch"}, or None')
    for axis, dim in spec.items():
        if type(axis) is not int or not 0 <= axis < given.ndim:
            last = given.ndim - 1
            _refuse(shown, spec, f"axes from 0 to {last}" if given.ndim else "no axis", what=f"axis {axis!r}")
        _check_size(f"{shown}: axis {axis}", given.shape[axis], dim)


def _check_size(name: str, size: int, dim: Any) -> None:
    """Check that a dimension can have the size that it has in the example."""
    if type(dim) is int and dim != size:
        _refuse(name, dim, f"the size of the example, {size}, or a name")
    if dim is None or type(dim) is int:
        return
    if not isinstance(dim, str | Dim | _HINT):
        _refuse(name, dim, _DIMENSION)
    if size < 2 and dim not in (Dim.AUTO, Dim.STATIC):
        _refuse(name, dim, f"an example of at least 2 there, since torch takes the size {size} for a constant")
    if type(dim) is Dim and not dim.min <= size <= dim.max:
        _refuse(name, dim, f"ends with the size of the example, {size}, between them")


def _refuse(name: str, given: Any, valid: str, what: str = "") -> NoReturn:
    """Raise the error of one entry."""
    where = f"{name}: " if name else ""
    raise ExportError(f"export: dynamic_shapes: {where}got {what or reprlib.repr(given)}; valid: {valid}")
