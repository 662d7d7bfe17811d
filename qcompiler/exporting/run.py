"""Running an ONNX file with onnxruntime: outputs, inner values, and the integer part of the optimized graph."""

import collections
import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from qcompiler.compiler import torch_compat
from qcompiler.exporting.build import CHECKSUMS, INPUTS, SITES
from qcompiler.exporting.edits import read_array
from qcompiler.exporting.observe import SAME
from qcompiler.exporting.trace import ExportError, enter_eval_mode
from qcompiler.module import QuantizedModule, get_session

#: the operators of onnxruntime that compute on codes
INTEGER = (
    "QLinearConv",
    "QLinearConvTranspose",
    "QLinearAdd",
    "QLinearMul",
    "QLinearMatMul",
    "QGemm",
    "QLinearGlobalAveragePool",
    "QLinearAveragePool",
    "QLinearReduceMean",
    "QLinearConcat",
    "QLinearWhere",
    "QLinearSigmoid",
    "QLinearLeakyRelu",
    "QLinearSoftmax",
    "QAttention",
    "QEmbedLayerNormalization",
    "ConvInteger",
    "MatMulInteger",
    "MatMulInteger16",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "GatherBlockQuantized",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
)
#: those that give other numbers than the operators that they stand for, and why
APPROXIMATE = {
    "MatMulNBits": "rounds floats to 8 bits",
    "DynamicQuantizeMatMul": "rounds floats to 8 bits",
    "DynamicQuantizeLSTM": "rounds floats to 8 bits",
    "QLinearSoftmax": "takes powers from a table of integers",
    "QAttention": "takes powers and products of integers",
    "QEmbedLayerNormalization": "rounds embeddings to 8 bits",
}


def open_session(
    path: Path, *, optimize: bool = True, keep: Path | None = None, layouts: bool = True
) -> onnxruntime.InferenceSession:
    """Return a session on the CPU, with no operator but onnxruntime's own.

    Args:
        optimize: with all of onnxruntime's optimizations; False: with none.
        keep: the path for the optimized graph, with the tensors in a file beside.
        layouts: False leaves out optimizations that change layouts alone.
    """
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    all_of_them = levels.ORT_ENABLE_ALL if layouts else levels.ORT_ENABLE_EXTENDED
    options.graph_optimization_level = all_of_them if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4  # an error is raised; it need not be printed too
    if keep is not None:
        options.optimized_model_filepath = str(keep)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{keep.name}.data")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _insert_cast(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return the value itself, or as float32 if numpy has no such type: 4 bits, and floats of 8."""
    kind = value.dtype
    if kind is None or not (kind.bitwidth < 8 or (kind.bitwidth == 8 and kind.is_floating_point())):
        return value
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
    node.outputs[0].name, node.outputs[0].type = f"{value.name}/as_float", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = value.shape
    graph.append(node)
    return node.outputs[0]


def make_feeds(
    running: onnxruntime.InferenceSession, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The tensors of a call by the names of the file's inputs, in the same order."""
    tensors = [one for one in torch_compat.list_leaves((args, dict(kwargs))) if isinstance(one, Tensor)]
    return {given.name: one.detach().cpu().numpy() for given, one in zip(running.get_inputs(), tensors, strict=True)}


def count_kernels(path: Path) -> dict[str, int]:
    """Return the integer operators of onnxruntime's optimized graph, with their counts."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "optimized.onnx"
        open_session(path, keep=kept)
        graph = onnx.load(str(kept), load_external_data=False).graph
    found = collections.Counter(node.op_type for node in graph.node)
    return {name: found[name] for name in INTEGER if found[name]}


def run_file(
    path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, optimize: bool = True
) -> list[np.ndarray]:
    """Return the outputs of the file for one call; `optimize` as in `open_session`."""
    running = open_session(path, optimize=optimize)
    return list(running.run(None, make_feeds(running, args, kwargs)))


@dataclasses.dataclass(frozen=True)
class FileContents:
    """The facts in a file of `export_onnx`."""

    #: input → its free dimensions, in order
    inputs: dict[str, tuple[int, ...]]
    #: site → its kind and the inner values to look at
    sites: dict[str, dict[str, Any]]
    #: name → checksum of the parameters and buffers that it was made of, as `compute_checksums` gives them
    tensors: dict[str, int]
    #: input of the traced graph → the argument, in the form of `describe_given`; None in files of earlier versions
    given: dict[str, str] | None


def read_file(path: Path) -> FileContents:
    """Return the inputs and the metadata of a file.

    Raises:
        ExportError: it has no such metadata, or is not a whole file of ONNX.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ExportError(f"verify: {path} is not a whole file of ONNX: {error}") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if not {SITES, CHECKSUMS} <= metadata.keys():
        raise ExportError(f"verify: {path} was not written by export_onnx of this version")
    return FileContents(
        inputs={one.name: _list_free_axes(one) for one in model.graph.input},
        sites={one["site"]: one for one in json.loads(metadata[SITES])},
        tensors=json.loads(metadata[CHECKSUMS]),
        given=json.loads(metadata.get(INPUTS, "null")),
    )


def _list_free_axes(one: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the dimensions of an input that have no number."""
    return tuple(axis for axis, dim in enumerate(one.type.tensor_type.shape.dim) if not dim.HasField("dim_value"))


def read_sites(path: Path) -> dict[str, dict[str, Any]]:
    """Return site → its kind and the inner values to look at; errors as in `read_file`."""
    return read_file(path).sites


def run_inner(
    path: Path, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, optimize: bool = False
) -> dict[str, np.ndarray]:
    """Return inner values of one call: by a copy of the file that returns them too."""
    return _show_values(path, names, args, kwargs, optimize)[0]


def _show_values(
    path: Path, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], optimize: bool
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return (inner values of one call by name, outputs of the file)."""
    model = ir.load(path)
    known = {value.name: value for node in model.graph for value in node.outputs}
    stored = {name: model.graph.initializers[name] for name in names if name in model.graph.initializers}
    given = {value.name for value in model.graph.inputs}
    extra = [name for name in dict.fromkeys(names) if name in known]
    before = [value.name for value in model.graph.outputs]
    for name in extra:
        if name not in before:
            model.graph.outputs.append(_insert_cast(model.graph, known[name]))
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "inner.onnx"
        ir.save(model, copied, external_data="inner.data")
        running = open_session(copied, optimize=optimize)
        fed = make_feeds(running, args, kwargs)
        returned = running.run(None, fed)
        found = dict(zip((one.name for one in running.get_outputs()), returned, strict=True))
    values = {name: found.get(f"{name}/as_float", found.get(name)) for name in extra}
    values |= {name: fed[name] for name in names if name in given}
    return values | {name: read_array(value) for name, value in stored.items()}, list(returned[: len(before)])


def find_fused(
    path: Path, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return (inner values of one call in the graph that onnxruntime optimizes, names of values that it lacks).

    No optimization takes out a value that a file returns. So the file is optimized unchanged, and the rest in that
    graph is looked at. Missing values come from a second file that returns these values. Such values are named if the
    second file returns other numbers than the plain one, and so computes something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "optimized.onnx"
        open_session(path, keep=kept, layouts=False)
        left = {value for node in onnx.load(str(kept), load_external_data=False).graph.node for value in node.output}
        stored = {one.name for one in onnx.load(str(path), load_external_data=False).graph.initializer}
        values = run_inner(kept, [name for name in names if name in left], args, kwargs)
    gone = [name for name in dict.fromkeys(names) if name not in left | stored]
    values |= run_inner(path, [name for name in names if name in stored], args, kwargs)
    plain, merged = run_file(path, args, kwargs) if gone else [], []
    for name in gone:
        shown, returned = _show_values(path, [name], args, kwargs, optimize=True)
        values |= shown
        merged += [name] if measure_difference(returned, plain) > SAME else []
    return values, tuple(merged)


def run_reference(qmodel: QuantizedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[np.ndarray]:
    """The tensors that PyTorch returns in eval mode."""
    with enter_eval_mode(get_session("export", qmodel).model), torch.no_grad():
        returned = qmodel(*args, **kwargs)
    return [one.detach().cpu().numpy() for one in torch_compat.list_leaves(returned) if isinstance(one, Tensor)]


def measure_difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference of any output, relative to the largest finite magnitude of that output.

    Infinite if one has a NaN or an infinity that the other has not. An empty output counts as equal.
    """
    return max((_measure_one(*pair) for pair in zip(found, expected, strict=True)), default=0.0)


def _measure_one(found: np.ndarray, expected: np.ndarray) -> float:
    one, other = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return math.inf
    scale = float(np.abs(other[finite]).max(initial=0)) or 1.0
    return float(np.abs(one[finite] - other[finite]).max(initial=0)) / scale


def compare_file(
    qmodel: QuantizedModule, path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float, dict[str, int]]:
    """Return (largest difference of the outputs on one call, integer operators in use)."""
    try:
        found = run_file(path, args, kwargs)
    except Exception as error:
        raise ExportError(f"export: onnxruntime cannot run the file: {str(error).strip()}") from error
    return measure_difference(found, run_reference(qmodel, args, kwargs)), count_kernels(path)
