"""From a quantized module and an example to the ONNX model in memory: the part of an export that writes no file."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from qcompiler.exporting.calibration import measure_ranges
from qcompiler.exporting.causes import explain_missing, explain_recurrent
from qcompiler.exporting.dimensions import as_dims, find_symbol_names
from qcompiler.exporting.inputs import as_example, check_inputs, copy_tensors, free_batch
from qcompiler.exporting.trace import ExportError, MissingRangeError, Observe, Traced, trace_model
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.frozen.calibrate_ranges import Calibrated
from qcompiler.tables import join_some

if TYPE_CHECKING:
    from qcompiler.exporting.exported_model import ExportedModel

#: examples on which ranges are measured
Examples: TypeAlias = Iterable[tuple[Any, ...] | Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the model to trace, and the example that the user gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: which dimensions are free, as in torch.export.export
    shapes: Any
    given_args: tuple[Any, ...]
    given_kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is written; `export_onnx` says what each of them does."""

    opset: int
    fold_batch_norm: bool
    signed_weights: bool
    calibration: Examples | None

    def __post_init__(self) -> None:
        import_tools()[0].check_opset(self.opset)
        _check_flag("fold_batch_norm", self.fold_batch_norm)
        _check_flag("signed_weights", self.signed_weights)


def _check_flag(name: str, given: Any) -> None:
    """Raise for anything but True and False: any text would count as True."""
    if not isinstance(given, bool):
        raise ExportError(f"export: {name}: got {given!r}; valid: True, False")


def prepare_call(
    qmodel: QuantizedModule, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, dynamic_batch: bool
) -> Call:
    """Return the call that is traced.

    Raises:
        ExportError: for all that can be refused before anything is computed.
    """
    model, given_args, given_kwargs = get_session("export", qmodel, ExportError).model, args, kwargs
    _check_types(model)
    _check_flag("dynamic_batch", dynamic_batch)
    check_inputs(model, args, kwargs)
    shapes = as_dims(model, args, kwargs, shapes)
    args, kwargs = copy_tensors(args, kwargs)
    if shapes is None and dynamic_batch:
        args, kwargs, shapes = free_batch(model, args, kwargs)
    return Call(args, kwargs, shapes, given_args, given_kwargs)


def assemble_model(
    qmodel: QuantizedModule, call: Call, options: Options, observe: Observe | None = None
) -> tuple[Traced, "ExportedModel"]:
    """Return the traced graph of a call, frozen, and the ONNX model that it becomes.

    Args:
        observe: called with the traced graph, after each pass over it, with the translated model, and after each pass
            over that one.

    Raises:
        ExportError: as in `export_onnx`.
    """
    build, _ = import_tools()
    ranges = _measure_ranges(qmodel, call, options.calibration)
    traced = _trace(qmodel, call, fold_batch_norm=options.fold_batch_norm, calibrated=ranges, observe=observe)
    names = find_symbol_names(traced.frozen.program, get_session("export", qmodel).model, call.shapes)
    built = build.build_model(
        traced, qmodel, options.opset, signed_weights=options.signed_weights, dimensions=names, observe=observe
    )
    return traced, built


def import_tools() -> tuple[Any, Any]:
    """Return the modules that need the packages of the extra: exporting/build.py and run.py.

    Raises:
        ExportError: with the first package that is not installed.
    """
    try:
        from qcompiler.exporting import build, run
    except ImportError as error:
        raise ExportError(f"export: {error.name} is not installed; pip install 'qcompiler[onnx]'") from error
    return build, run


def _trace(qmodel: QuantizedModule, call: Call, **options: Any) -> Traced:
    """Return the traced graph of a call; what has no range yet is explained by the model, if the model is the cause."""
    try:
        return trace_model(qmodel, call.args, call.kwargs, call.shapes, **options)
    except MissingRangeError as error:
        cause = explain_missing(qmodel, error, call.given_args, call.given_kwargs)
        if not cause:
            raise
        raise ExportError(f"export: no range yet for {join_some(error.sites)}: {cause}") from error
    except ExportError as error:
        cause = explain_recurrent(get_session("export", qmodel).model) if qmodel.recipe.rules else ""
        if not cause:
            raise
        raise ExportError(f"{error}\nBeside that, {cause}") from error


def _measure_ranges(qmodel: QuantizedModule, call: Call, examples: Examples | None) -> dict[str, Calibrated] | None:
    """Return the ranges that were measured on examples; None without examples."""
    if examples is None:
        return None
    if not isinstance(examples, Iterable):
        got = type(examples).__name__
        raise ExportError(f"export: calibration: got {got}; valid: an iterable of examples, such as a list of tuples")
    traced = _trace(qmodel, call, frozen=False)

    def as_call(example: Any) -> dict[str, Any]:
        return as_example(get_session("export", qmodel).model, example, call.given_args, call.given_kwargs)

    return measure_ranges(traced, qmodel.ranges(), examples, as_call)


def _check_types(model: nn.Module) -> None:
    """Raise if a parameter or buffer has a type that onnxruntime does not compute in."""
    held = [*model.named_parameters(), *model.named_buffers()]
    name = next((name for name, tensor in held if tensor.dtype is torch.bfloat16), None)
    if name is not None:
        raise ExportError(
            f"export: {name} is bfloat16, for which onnxruntime has no contractions on the CPU; valid: a model in "
            "float32, such as model.float(), compiled anew with the ranges of this one (load_state_dict)"
        )
