"""export_onnx(): a trained module as an ONNX file that stock onnxruntime runs, one quantizer for each trained one."""

import dataclasses
import functools
import glob
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qcompiler.compiler.plan import Kept, QuantPlan
from qcompiler.exporting.calibration import calibrate
from qcompiler.exporting.dimensions import as_dims, names_of_symbols
from qcompiler.exporting.inputs import as_example, check_inputs, copy_tensors, free_batch
from qcompiler.exporting.trace import ExportError, eval_mode, trace
from qcompiler.files import check_writable, replacing
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.ir.site_name import get_role
from qcompiler.passes.rules import Role
from qcompiler.recipes.recipe import Recipe
from qcompiler.tables import Table, to_text

#: a file above this size keeps its tensors in a second file: protobuf ends at 2 GiB
_EXTERNAL = 2**31 - 2**26

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written; `print(report)` shows it as text."""

    path: Path
    #: quantizers of the eval plan, and those in the file, by kind: weight, static, dynamic; folded where there are
    #: some: those of the factors of a weight, such as B in W + B·A, whose codes are part of the weight's
    trained: int
    exported: Mapping[str, int]
    #: operands of products that stay in float, and why
    kept: tuple[Kept, ...]
    #: bytes of the file and what lies beside it; bytes of the parameters and buffers of the model
    file_bytes: int
    float_bytes: int
    #: the largest difference from the outputs of PyTorch on the example, relative to the largest output
    difference: float
    #: the operators of onnxruntime's optimized graph that compute on integers, with their counts
    integer_kernels: Mapping[str, int]
    notes: tuple[str, ...] = ()
    #: site → the smallest and the largest value on the calibration data, which its range was fixed to
    calibrated: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        return to_text([Table(f"ONNX: {self.path.name}", ("what", "value"), [*self._rows()])])

    def _rows(self) -> Iterator[tuple[str, str]]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.exported.items() if count)
        yield "quantizers trained", str(self.trained)
        yield "quantizers exported", f"{sum(self.exported.values())} ({kinds or 'none'})"
        yield "file", f"{self.file_bytes:,} bytes, {self.file_bytes / max(self.float_bytes, 1):.2f} of float"
        yield "largest difference", f"{self.difference:.2g} of the largest output"
        kernels = ", ".join(f"{count} {name}" for name, count in self.integer_kernels.items())
        yield "integer kernels of onnxruntime", kernels or "none"
        yield from (("calibrated", f"{site}: {low:.4g} to {high:.4g}") for site, (low, high) in self.calibrated.items())
        yield from (("in float", f"{kept.name} in {kept.consumer}: {kept.reason}") for kept in self.kept)
        yield from (("note", note) for note in self.notes)


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
    """Writes the eval graph of a trained module as an ONNX file, and compares it with PyTorch on the example.

    The file has one quantizer for each of `plan(training=False)`: `QuantizeLinear` and `DequantizeLinear` where the
    range is known, stored integers for weights, local functions of standard operators where the range is measured. It
    is checked, run by onnxruntime and compared before it takes its name, so a file that was there stays whole if any of
    that fails.

    A static range saturates what is not finite, where PyTorch gives NaN.

    Args:
        qmodel: made by `qcompiler.compile`; trained, or loaded with its ranges.
        path: the file; beside it `<name>.<random>.data` holds the tensors of models above 2 GB.
        example_inputs, example_kwargs: what the model is called with; shapes count, values are for the comparison.
        dynamic_batch: dimension 0 of all tensors that have the size of that of the first is free.
        dynamic_shapes: which dimensions are free, as in torch.export.export; in place of `dynamic_batch`. The file has
            them by the names of their `Dim`; a string stands for the `Dim` of that name.
        opset: the version of the ONNX operators, from 21 to the newest that the installed onnx and onnxruntime know.
        fold_batch_norm: batch norm behind a convolution becomes part of its bias and of the scales of its weight, where
            the codes of the weight stay as they are; False leaves it a node of its own.
        signed_weights: int8 codes of weights stay int8; False stores them as uint8 with the zero point 128. On x86 CPUs
            without VNNI kernels for int8 weights are faster, and their sums saturate at 16 bits: codes are wrong there.
        calibration: examples on which ranges of the present tensor (`current`, over whole tensors) are measured and
            then fixed: from the smallest to the largest value of all; None leaves such ranges to each call. An example
            is a tuple of positional inputs, a mapping of keyword inputs, or a pair (tuple, mapping) of both; where it
            does not give one of `example_kwargs`, that holds. A tuple that is such a pair is read as one.

    Raises:
        ExportError: see its message: not a quantized module, ranges without a value, random rounding, an operator or
            format without a form in ONNX, data-dependent shapes, inputs that the model does not run on, an opset out
            of range, a package that is not installed.
        OSError: the file cannot be written.
    """
    get_session("export", qmodel, ExportError)
    build, run = _tools()
    build.check_opset(opset)
    model, kwargs, shapes = qmodel._model, dict(example_kwargs or {}), dynamic_shapes
    as_call = functools.partial(as_example, model, args=example_inputs, kwargs=kwargs)
    _check_types(model)
    path = Path(os.path.realpath(path))
    check_writable(path)
    check_inputs(model, example_inputs, kwargs)
    shapes = as_dims(model, example_inputs, kwargs, shapes)
    example_inputs, kwargs = copy_tensors(example_inputs, kwargs)
    _check_recurrent(qmodel, example_inputs, kwargs)
    if shapes is None and dynamic_batch:
        example_inputs, kwargs, shapes = free_batch(model, example_inputs, kwargs)
    calibrated = None
    if calibration is not None:
        if not isinstance(calibration, Iterable):
            got = type(calibration).__name__
            raise ExportError(
                f"export: calibration: got {got}; valid: an iterable of examples, such as a list of tuples"
            )
        seen = trace(qmodel, example_inputs, kwargs, shapes, frozen=False)
        calibrated = calibrate(seen, qmodel.ranges(), calibration, as_call)
    traced = trace(qmodel, example_inputs, kwargs, shapes, fold_batch_norm=fold_batch_norm, calibrated=calibrated)
    names = names_of_symbols(traced.frozen.program, model, shapes)
    made, exported, floats = build.build(traced, qmodel, opset, signed_weights=signed_weights, dimensions=names)
    written = {one.site for one in exported} | traced.frozen.folded.keys()
    missing = {site.name for site in traced.plan.sites} ^ written
    if missing:
        raise ExportError(f"export: quantizers were lost on the way: {', '.join(sorted(missing))}")

    def compared(draft: Path) -> tuple[float, dict[str, int]]:
        found: tuple[float, dict[str, int]] = run.compare(qmodel, draft, example_inputs, kwargs)
        _check_plan(qmodel, written)
        return found

    size, (difference, kernels) = _write(made, path, compared)
    kinds, folded = [one.kind for one in exported], len(traced.frozen.folded)
    return ExportReport(
        path=path,
        trained=len(traced.plan.sites),
        exported={kind: kinds.count(kind) for kind in ("weight", "static", "dynamic")}
        | ({"folded": folded} if folded else {}),
        kept=traced.plan.kept,
        file_bytes=size,
        float_bytes=_bytes(qmodel),
        difference=difference,
        integer_kernels=kernels,
        notes=(
            *traced.frozen.notes,
            *_approximate(kernels),
            *_float_biases(floats, qmodel.recipe),
            *_signed([one.site for one in exported if one.saturates]),
            *_unread(qmodel, traced.plan),
        ),
        calibrated={name: (one.lowest, one.highest) for name, one in traced.frozen.calibrated.items()},
    )


def _write(made: Any, path: Path, check: Callable[[Path], _T]) -> tuple[int, _T]:
    """Writes a model in place of what is at `path`, unless `check` raises; returns its bytes and what that returned."""
    build, _ = _tools()
    data = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data")
    try:
        with replacing(path) as draft:
            size = build.save(made, draft, data if build.size(made) > _EXTERNAL else None)
            build.check(draft)
            found = check(draft)
    except BaseException:
        if not _names(path, data):  # else the new file is in its place, and the error came after that
            data.unlink(missing_ok=True)
        raise
    _drop_old_data(path, data)
    return size, found


def _tools() -> tuple[Any, Any]:
    """The parts that need the packages of the extra."""
    try:
        from qcompiler.exporting import build, run
    except ImportError as error:
        raise ExportError(f"export: {error.name} is not installed; pip install 'qcompiler[onnx]'") from error
    return build, run


def _check_types(model: nn.Module) -> None:
    """Raises where a parameter or buffer has a type that onnxruntime does not compute in."""
    held = [*model.named_parameters(), *model.named_buffers()]
    name = next((name for name, tensor in held if tensor.dtype is torch.bfloat16), None)
    if name is not None:
        raise ExportError(
            f"export: {name} is bfloat16, for which onnxruntime has no products on the CPU; valid: a model in float32, "
            "such as model.float(), compiled anew with the ranges of this one (load_state_dict)"
        )


def _check_recurrent(qmodel: QuantizedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises where a recurrent layer keeps all of eval mode in float, in which torch's exporter finds products."""
    layers = [name for name, part in qmodel._model.named_modules() if isinstance(part, nn.RNNBase)]
    if not layers or not qmodel.recipe.rules:
        return
    with eval_mode(qmodel._model), torch.no_grad():
        qmodel(*args, **kwargs)
    if not qmodel.plan(training=False).sites:
        raise ExportError(
            f"export: {layers[0] or 'the model'} is a recurrent layer, and a model that holds one runs in float; "
            "valid: a model without recurrent layers, or a recipe without rules (identity)"
        )


def _check_plan(qmodel: QuantizedModule, exported: set[str]) -> None:
    """Raises where eval mode, which was captured for the comparison, has other quantizers than the file."""
    # eval mode has a backward half too, where it was last called with gradients
    others = {site.name for site in qmodel.plan(training=False).sites if site.is_forward} ^ exported
    if others:
        raise ExportError(
            f"export: plan(training=False) and the graph of torch.export differ in {', '.join(sorted(others))}; "
            "the file would not be what eval mode computes"
        )


def _approximate(kernels: Mapping[str, int]) -> Iterator[str]:
    """What is to be said of operators that onnxruntime computes with other numbers than the file says."""
    _, run = _tools()
    for name, why in run.APPROXIMATE.items():
        if count := kernels.get(name):
            yield f"onnxruntime makes {count} operators {name}, which {why}"


def _float_biases(layers: Sequence[str], recipe: Recipe) -> Iterator[str]:
    """What is to be said of layers between known scales whose bias is no whole number of their unit."""
    if layers:
        why = "the recipe does not ask for integer_biases"
        if recipe.integer_biases:
            why = "a batch norm there is not folded or multiplies by 0, or a bias needs more than 32 bits"
        yield (
            f"added in float behind {len(layers)} layers, so that no kernel rounds them: "
            f"the biases of {_first(layers)}; {why}"
        )


def _signed(weights: Sequence[str]) -> Iterator[str]:
    """What is to be said of weights whose codes were asked to be int8."""
    if weights:
        yield (
            f"codes of {len(weights)} weights are int8, as asked ({_first(weights)}): x86 CPUs without VNNI saturate "
            "their sums at 16 bits, so codes behind them can be wrong there"
        )


def _unread(qmodel: QuantizedModule, plan: QuantPlan) -> Iterator[str]:
    """What is to be said of ranges that no quantizer of eval reads, and none of the gradients, as far as known."""
    gradients = any(
        rule.spec is not None and rule.spec.range.has_state and rule.role in (None, Role.GRADIENT)
        for rule in qmodel.recipe.rules
    )
    held = [name for name in qmodel.ranges() if not (gradients and get_role(name) is Role.GRADIENT)]
    others = sorted(set(held) - {site.name for site in plan.sites if site.spec.range.has_state})
    if others:
        yield (
            f"{len(others)} of {len(qmodel.ranges())} ranges belong to no quantizer of recipe {qmodel.recipe.name!r} "
            f"and were not used, as if of another recipe or model: {_first(others)}"
        )


def _first(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _names(path: Path, data: Path) -> bool:
    """True where the file at `path` keeps its tensors in `data`."""
    return data.exists() and path.exists() and data.name.encode() in path.read_bytes()


def _drop_old_data(path: Path, data: Path) -> None:
    """Removes the tensors of the file that was replaced."""
    for other in path.parent.glob(f"{glob.escape(path.name)}.*.data"):
        if other != data and re.fullmatch(
            r"[0-9a-f]{8}", other.name.removeprefix(f"{path.name}.").removesuffix(".data")
        ):
            other.unlink(missing_ok=True)


def _bytes(qmodel: QuantizedModule) -> int:
    """Bytes of the parameters and buffers."""
    held = [*qmodel._model.parameters(), *qmodel._model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
