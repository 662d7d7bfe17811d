"""From a traced program to a checked ONNX file: torch's exporter, the quantizers, names, metadata."""

import errno
import importlib.metadata
import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import NameFixPass

import qcompiler
from qcompiler.compiler import torch_compat
from qcompiler.exporting.biases import split_biases
from qcompiler.exporting.checksums import checksum, checksums
from qcompiler.exporting.lower import Exported, lower
from qcompiler.exporting.pools import close_windows
from qcompiler.exporting.stand_ins import TRANSLATIONS
from qcompiler.exporting.trace import ExportError, Traced
from qcompiler.module import QuantizedModule
from qcompiler.passes.ir.meta import module_path

#: keys of the metadata of a file
RECIPE, SITES, VERSIONS = "qcompiler.recipes.recipe", "qcompiler.sites", "qcompiler.versions"
CHECKSUMS = "qcompiler.checksums"
#: the first opset with 4-bit types and block_size
OLDEST = 21


def check_opset(opset: int) -> None:
    """Raises ExportError for what is no version of the operators that is new enough and that onnxruntime runs."""
    if type(opset) is int and opset >= OLDEST and _runs(opset):
        return
    newest = next(known for known in range(onnx.defs.onnx_opset_version(), OLDEST - 1, -1) if _runs(known))
    raise ExportError(
        f"export: opset: got {opset!r}; valid: whole numbers from {OLDEST}, the first with 4-bit types and block_size, "
        f"to {newest}, the newest that the installed onnx and onnxruntime know"
    )


def _runs(opset: int) -> bool:
    """True where onnx knows this opset, and onnxruntime loads a file of it."""
    if opset > onnx.defs.onnx_opset_version():
        return False
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an opset that it does not know is an error, which is raised too
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # its own errors share no type
        return False
    return True


def build(
    traced: Traced,
    qmodel: QuantizedModule,
    opset: int,
    *,
    signed_weights: bool = False,
    dimensions: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[ir.Model, list[Exported], tuple[str, ...]]:
    """The model in memory; its quantizers, in graph order; the layers whose bias stands behind them.

    `signed_weights` as in `export_onnx`; `dimensions`: symbol of the traced graph → its name in the file.

    Raises:
        ExportError: an operator, format, range or block that has no form in ONNX.
    """
    model = _translate(traced, opset)
    written = model.opset_imports.get("")
    if written != opset:
        raise ExportError(f"export: opset: got {opset}, and onnxscript wrote {written}; valid: {OLDEST} always is")
    exported = lower(model, signed_weights=signed_weights)
    _name_nodes(model)
    close_windows(model.graph)
    _rename_dimensions(model, dimensions)
    floats = split_biases(model.graph)
    versions = {
        "qcompiler": qcompiler.__version__,
        "torch": importlib.metadata.version("torch"),
        "onnx": onnx.__version__,
    }
    model.metadata_props.clear()
    model.metadata_props[RECIPE] = qmodel.recipe.to_yaml()
    model.metadata_props[SITES] = json.dumps([*_sites(traced, exported)])
    model.metadata_props[CHECKSUMS] = json.dumps(checksums(qmodel._model))
    model.metadata_props[VERSIONS] = json.dumps(versions)
    model.producer_name, model.producer_version = "qcompiler", qcompiler.__version__
    return model, exported, floats


def _translate(traced: Traced, opset: int) -> ir.Model:
    """What torch's exporter makes of a traced program, stand-ins of quantizers included."""
    try:
        with torch_compat.quiet_exporter():
            program = torch.onnx.export(
                traced.frozen.program,
                (),
                dynamo=True,
                opset_version=opset,
                custom_translation_table=TRANSLATIONS,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            NameFixPass()(program.model)  # a call `t` beside a parameter `t`: folded, both would be initializers
            program.optimize()
    except Exception as error:
        raise ExportError(f"export: {_layer(traced, error)}{_reason(error)}") from error
    model: ir.Model = program.model
    return model


def _sites(traced: Traced, exported: Sequence[Exported]) -> Iterator[dict[str, Any]]:
    """The quantizers of the file for its metadata, and those whose codes are part of a weight's."""
    for one in exported:
        yield one.to_json() | _changes(traced, one.site)
    for site, codes in traced.frozen.folded.items():
        yield {"site": site, "kind": "folded", "values": (), "checksum": checksum(codes)} | _changes(traced, site)


def _changes(traced: Traced, site: str) -> dict[str, Any]:
    """What was done to the codes of a weight, and the range of an activation that was measured on data."""
    frozen, found = traced.frozen, traced.frozen.calibrated.get(site)
    measured = found and [found.scale.item(), None if found.point is None else found.point.item()]
    return {"order": frozen.order.get(site), "negated": frozen.negated.get(site, ()), "calibrated": measured}


def _rename_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    """Puts names in place of the symbols in the shapes of all values: `s31` becomes batch, `2*s31` 2*batch."""
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")

    def named(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int):
            return size
        text = size.value
        return text if text is None else symbol.sub(lambda found: names[found[0]], text)

    made = (value for node in model.graph.all_nodes() for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.outputs, *made):
        if value.shape is not None:
            value.shape = ir.Shape([named(size) for size in value.shape])


def _layer(traced: Traced, error: BaseException | None) -> str:
    """The path of the layer with the node that could not be translated, as far as torch's exporter names one."""
    while error is not None:
        found = re.search(r"translating node %(\w+)", str(error))
        nodes = {node.name: node for node in traced.frozen.program.graph.nodes}
        if found is not None and found[1] in nodes and (path := module_path(nodes[found[1]])):
            return f"{path}: "
        error = error.__cause__
    return ""


def _reason(error: BaseException) -> str:
    """The innermost cause, which names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().partition("\n")[0].removeprefix("export: ") or type(error).__name__
    missing = re.match(r"No ONNX function found for <OpOverload\(op='(.*?)', overload='(.*?)'\)>", text)
    if missing is None:
        return text
    return f"{missing[1]}.{missing[2]} has no form in ONNX; valid: a model that computes this by other operators"


def _name_nodes(model: ir.Model) -> None:
    """Gives the nodes of a module its path: `layer1.0.conv1/Conv`; our own have the names of their sites."""
    taken: dict[str, int] = {}
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node_name = node.name or node.op_type
        if "site" not in node.metadata_props and scopes:
            path = json.loads(scopes.replace("'", '"'))[-2:-1]
            if path and path[0]:
                node_name = f"{path[0]}/{node.op_type}"
        count = taken[node_name] = taken.get(node_name, 0) + 1
        node.name = node_name if count == 1 else f"{node_name}#{count}"
        for key in [key for key in node.metadata_props if key.startswith("pkg.")]:
            del node.metadata_props[key]


def size(model: ir.Model) -> int:
    """Bytes of the tensors of a model."""
    held = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def save(model: ir.Model, path: Path, data: Path | None) -> int:
    """Writes a model, its tensors in `data` where that is given; returns the bytes of both.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        ir.save(model, path, external_data=None if data is None else data.name)
    except OSError as error:  # numpy's names no file, and not what was wrong
        reason = f"cannot write all of it ({error}); is the disk full?"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    if data is not None:
        with data.open("rb+") as file:
            os.fsync(file.fileno())
    return sum(written.stat().st_size for written in (path, data) if written is not None)


def check(path: Path) -> None:
    """onnx's full check of a file, with strict shape inference.

    Raises:
        ExportError: the file is not valid, which is an error of this project.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"export: the file is not valid ONNX: {error}") from error
