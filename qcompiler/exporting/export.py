"""export_onnx(): a trained module as an ONNX file that stock onnxruntime runs, one quantizer for each trained one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qcompiler.exporting import report as reports
from qcompiler.exporting.assemble import Call, Examples, Options, assemble_model, import_tools, prepare_call
from qcompiler.exporting.causes import explain_parts
from qcompiler.exporting.inputs import read_keywords
from qcompiler.exporting.report import ExportReport
from qcompiler.exporting.trace import ExportError, Traced
from qcompiler.files import check_writable
from qcompiler.module import QuantizedModule, get_session


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
    calibration: Examples | None = None,
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
    options = Options(
        opset=opset, fold_batch_norm=fold_batch_norm, signed_weights=signed_weights, calibration=calibration
    )
    path = Path(os.path.realpath(path))
    check_writable(path)
    call = prepare_call(qmodel, example_inputs, read_keywords(example_kwargs), dynamic_shapes, dynamic_batch)
    traced, built = assemble_model(qmodel, call, options)
    return _write_and_report(qmodel, path, call, traced, built)


def _write_and_report(qmodel: QuantizedModule, path: Path, call: Call, traced: Traced, built: Any) -> ExportReport:
    """Write the file if the draft computes the same as the model, and report."""
    _, run = import_tools()
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
