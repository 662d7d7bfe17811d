"""export_onnx(): a trained module as an ONNX file that stock onnxruntime runs, one quantizer for each trained one."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompiler.exporting import report as reports
from qcompiler.exporting.calibration import measure_ranges
from qcompiler.exporting.causes import explain_missing, explain_parts, explain_recurrent
from qcompiler.exporting.dimensions import as_dims, find_symbol_names
from qcompiler.exporting.inputs import as_example, check_inputs, copy_tensors, free_batch
from qcompiler.exporting.report import ExportReport
from qcompiler.exporting.trace import ExportError, MissingRangeError, Traced, join_some, trace_model
from qcompiler.files import check_writable
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.frozen.calibrate_ranges import Calibrated


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of the model to trace, and the example that the user gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: which dimensions are free, as in torch.export.export
    shapes: Any
    given_args: tuple[Any, ...]
    given_kwargs: dict[str, Any]


def export_onnx(
    qmodel: QuantizedModule,
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    opset: int = 21,
    fold_batch_norm: bool = True,
    signed_weights: bool = False,
    calibration: Iterable[tuple[Any, ...] | Mapping[str, Any]] | None = None,
) -> ExportReport:
    """Write the eval graph of a trained module as an ONNX file, and compare it with PyTorch on the example.

    The file has one quantizer for each of `plan(training=False)`: `QuantizeLinear` and `DequantizeLinear` if the range
    is known, stored integers for weights, local functions of standard operators if the range is measured. It is
    checked, run by onnxruntime and compared before it takes its name, so a file that was there stays whole if any of
    that fails.

    A static range saturates infinities and NaN, for which PyTorch gives NaN.

    Args:
        qmodel: made by `qcompiler.compile`; trained, or loaded with its ranges.
        path: the file; beside it `<name>.<random>.data` holds the tensors of models above 2 GB.
        example_inputs, example_kwargs: the arguments of the model; shapes count, values are for the comparison.
        dynamic_batch: dimension 0 of all tensors that have the size of the first one's is free.
        dynamic_shapes: which dimensions are free, as in torch.export.export; in place of `dynamic_batch`. The file has
            them by the names of their `Dim`; a string stands for the `Dim` of that name.
        opset: the version of the ONNX operators, from 21 to the newest that the installed onnx and onnxruntime know.
        fold_batch_norm: batch norm behind a convolution becomes part of the bias and of the weight's scales, if the
            codes of the weight stay; False leaves a separate node.
        signed_weights: int8 codes of weights stay int8; False stores them as uint8 with the zero point 128. On x86 CPUs
            without VNNI kernels for int8 weights are faster, and their sums saturate at 16 bits: codes are wrong there.
        calibration: examples on which ranges of the present tensor (`current`, over whole tensors) are measured and
            then fixed: from the smallest to the largest value of all; None leaves such ranges to each call. An example
            is a tuple of positional inputs, a mapping of keyword inputs, or a pair (tuple, mapping) of both; an input
            that the example lacks comes from `example_kwargs`. A tuple that is such a pair is read as one.

    Raises:
        ExportError: see its message: not a quantized module, ranges without a value, random rounding, an operator or
            format without a form in ONNX, data-dependent shapes, inputs that the model does not run on, an opset out
            of range, a package that is not installed.
        OSError: the file cannot be written.
    """
    get_session("export", qmodel, ExportError)
    build, _ = _import_tools()
    build.check_opset(opset)
    path = Path(os.path.realpath(path))
    call = _prepare_call(qmodel, path, example_inputs, dict(example_kwargs or {}), dynamic_shapes, dynamic_batch)
    ranges = _measure_ranges(qmodel, call, calibration)
    traced = _trace(qmodel, call, fold_batch_norm=fold_batch_norm, calibrated=ranges)
    names = find_symbol_names(traced.frozen.program, get_session("export", qmodel).model, call.shapes)
    built = build.build_model(traced, qmodel, opset, signed_weights=signed_weights, dimensions=names)
    return _write_and_report(qmodel, path, call, traced, built)


def _prepare_call(
    qmodel: QuantizedModule, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, dynamic_batch: bool
) -> _Call:
    """Return the call that is traced; raises for all that can be refused before anything is computed."""
    model, given_args, given_kwargs = get_session("export", qmodel).model, args, kwargs
    _check_types(model)
    check_writable(path)
    check_inputs(model, args, kwargs)
    shapes = as_dims(model, args, kwargs, shapes)
    args, kwargs = copy_tensors(args, kwargs)
    if shapes is None and dynamic_batch:
        args, kwargs, shapes = free_batch(model, args, kwargs)
    return _Call(args, kwargs, shapes, given_args, given_kwargs)


def _trace(qmodel: QuantizedModule, call: _Call, **options: Any) -> Traced:
    """Return the traced graph of a call; a missing range is explained by the model, if the model is the cause."""
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


def _measure_ranges(
    qmodel: QuantizedModule, call: _Call, examples: Iterable[tuple[Any, ...] | Mapping[str, Any]] | None
) -> dict[str, Calibrated] | None:
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


def _write_and_report(qmodel: QuantizedModule, path: Path, call: _Call, traced: Traced, built: Any) -> ExportReport:
    """Write the file if the draft computes the same as the model, and report."""
    _, run = _import_tools()
    from qcompiler.exporting.write_file import write_file

    written = {one.site for one in built.quantizers} | traced.frozen.folded.keys()
    missing = {site.name for site in traced.plan.sites} ^ written
    if missing:
        raise ExportError(f"export: quantizers were lost on the way: {', '.join(sorted(missing))}")

    def compare(draft: Path) -> tuple[float, dict[str, int]]:
        found: tuple[float, dict[str, int]] = run.compare_file(qmodel, draft, call.args, call.kwargs)
        _check_plan(qmodel, written)
        return found

    size, (difference, kernels) = write_file(built.model, path, compare)
    return ExportReport(
        path=path,
        trained=len(traced.plan.sites),
        exported=_count_kinds(traced, built),
        kept=traced.plan.kept,
        file_bytes=size,
        float_bytes=_count_bytes(get_session("export", qmodel).model),
        difference=difference,
        integer_kernels=kernels,
        notes=(
            *traced.frozen.notes,
            *reports.list_approximate(kernels, run.APPROXIMATE),
            *reports.list_float_biases(built.float_biases, qmodel.recipe),
            *reports.list_signed([one.site for one in built.quantizers if one.saturates]),
            *reports.list_unread(qmodel, traced.plan),
        ),
        calibrated={name: (one.lowest, one.highest) for name, one in traced.frozen.calibrated.items()},
    )


def _count_kinds(traced: Traced, built: Any) -> dict[str, int]:
    """Return the number of quantizers by kind; folded ones only if there are some."""
    kinds, folded = [one.kind for one in built.quantizers], len(traced.frozen.folded)
    counts = {kind: kinds.count(kind) for kind in ("weight", "static", "dynamic")}
    return counts | ({"folded": folded} if folded else {})


def _import_tools() -> tuple[Any, Any]:
    """Return the parts that need the packages of the extra."""
    try:
        from qcompiler.exporting import build, run
    except ImportError as error:
        raise ExportError(f"export: {error.name} is not installed; pip install 'qcompiler[onnx]'") from error
    return build, run


def _check_types(model: nn.Module) -> None:
    """Raise if a parameter or buffer has a type that onnxruntime does not compute in."""
    held = [*model.named_parameters(), *model.named_buffers()]
    name = next((name for name, tensor in held if tensor.dtype is torch.bfloat16), None)
    if name is not None:
        raise ExportError(
            f"export: {name} is bfloat16, for which onnxruntime has no contractions on the CPU; valid: a model in "
            "float32, such as model.float(), compiled anew with the ranges of this one (load_state_dict)"
        )


def _check_plan(qmodel: QuantizedModule, exported: set[str]) -> None:
    """Raise if eval mode, which was captured for the comparison, has other quantizers than the file."""
    # evaluation mode has a backward half too, after a call with gradients
    others = {site.name for site in qmodel.plan(training=False).sites if site.is_forward} ^ exported
    if others:
        cause = explain_parts(qmodel, others)
        raise ExportError(
            f"export: plan(training=False) and the graph of torch.export differ in {', '.join(sorted(others))}; "
            f"the file would not be what eval mode computes{cause and f': {cause}'}"
        )


def _count_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
