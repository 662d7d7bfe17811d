"""From a traced program to a checked ONNX file: torch's exporter, the quantizers, names, metadata."""

import errno
import importlib.metadata
import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import NameFixPass

import qcompiler
from qcompiler.collector import paused_collector
from qcompiler.compiler import torch_compat
from qcompiler.exporting.checksums import compute_checksum, compute_checksums
from qcompiler.exporting.exported_model import ExportedModel, ExportedQuantizer
from qcompiler.exporting.inputs import describe_given
from qcompiler.exporting.merged_constants import list_read, note_merged
from qcompiler.exporting.pipeline import onnx_pipeline
from qcompiler.exporting.stand_ins import TRANSLATIONS
from qcompiler.exporting.trace import ExportError, Observe, Traced
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.base import PassError
from qcompiler.passes.ir.meta import module_path

#: keys of the metadata of a file
RECIPE, SITES, VERSIONS = "qcompiler.recipe", "qcompiler.sites", "qcompiler.versions"
CHECKSUMS, INPUTS = "qcompiler.checksums", "qcompiler.inputs"
#: the stage between the frozen and the ONNX pipeline
TRANSLATED: Final = "translated"
#: the first opset with 4-bit types and block_size
OLDEST = 21


def check_opset(opset: int) -> None:
    """Raise ExportError unless the version of the operators is new enough, and one that onnxruntime runs."""
    if type(opset) is int and opset >= OLDEST and _can_load(opset):
        return
    newest = next(known for known in range(onnx.defs.onnx_opset_version(), OLDEST - 1, -1) if _can_load(known))
    raise ExportError(
        f"export: opset: got {opset!r}; valid: whole numbers from {OLDEST}, the first with 4-bit types and block_size, "
        f"to {newest}, the newest that the installed onnx and onnxruntime know"
    )


def _can_load(opset: int) -> bool:
    """Return True if onnx knows this opset, and onnxruntime loads a file of it."""
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


def build_model(
    traced: Traced,
    qmodel: QuantizedModule,
    opset: int,
    *,
    signed_weights: bool = False,
    dimensions: Mapping[str, str] = types.MappingProxyType({}),
    observe: Observe | None = None,
) -> ExportedModel:
    """Return the model in memory, with the metadata of its file.

    Args:
        signed_weights: as in `export_onnx`.
        dimensions: symbol of the traced graph → its name in the file.
        observe: called with the translated model, and after each pass.

    Raises:
        ExportError: an operator, format, range or block that has no form in ONNX.
    """
    subject = ExportedModel(translate_program(traced, opset), dict(dimensions))
    written = subject.graph.opset_imports.get("")
    if written != opset:
        raise ExportError(f"export: opset: got {opset}, and onnxscript wrote {written}; valid: {OLDEST} always is")
    if observe is not None:
        observe(TRANSLATED, 0, subject)
    try:
        onnx_pipeline(signed_weights=signed_weights)(subject, observe)
    except PassError as error:
        told = isinstance(error.__cause__, ExportError)  # names the fault of the model; the pass does not matter
        raise ExportError(str(error.__cause__) if told else f"export: {error}") from error
    _write_metadata(subject, traced, qmodel)
    return subject


def _write_metadata(subject: ExportedModel, traced: Traced, qmodel: QuantizedModule) -> None:
    """Write the facts for a verification, and the maker of the file."""
    model = subject.model
    versions = {
        "qcompiler": qcompiler.__version__,
        "torch": importlib.metadata.version("torch"),
        "onnx": onnx.__version__,
    }
    model.metadata_props.clear()
    model.metadata_props[RECIPE] = qmodel.recipe.to_yaml()
    model.metadata_props[SITES] = json.dumps([*_list_sites(traced, subject.quantizers)])
    model.metadata_props[CHECKSUMS] = json.dumps(compute_checksums(get_session("export", qmodel).model))
    model.metadata_props[INPUTS] = json.dumps(describe_given(traced.frozen.program))
    model.metadata_props[VERSIONS] = json.dumps(versions)
    model.producer_name, model.producer_version = "qcompiler", qcompiler.__version__


def translate_program(traced: Traced, opset: int) -> ir.Model:
    """Return the model that torch's exporter makes of a traced program, stand-ins of quantizers included."""
    try:
        with torch_compat.quiet_exporter(), paused_collector():
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
            before = list_read(program.model.graph)
            program.optimize()
            note_merged(before, program.model.graph)
    except Exception as error:
        raise ExportError(f"export: {_find_layer(traced, error)}{_find_reason(error)}") from error
    model: ir.Model = program.model
    return model


def _list_sites(traced: Traced, quantizers: Sequence[ExportedQuantizer]) -> Iterator[dict[str, Any]]:
    """Return the quantizers of the file for its metadata, and those whose codes are part of a weight's."""
    for one in quantizers:
        yield one.to_json() | _describe_changes(traced, one.site)
    for site, codes in traced.frozen.folded.items():
        yield {"site": site, "kind": "folded", "values": (), "checksum": compute_checksum(codes)} | _describe_changes(
            traced, site
        )


def _describe_changes(traced: Traced, site: str) -> dict[str, Any]:
    """Return the changes of the codes of a weight, and the range of an activation that was measured on data."""
    frozen, found = traced.frozen, traced.frozen.calibrated.get(site)
    measured = found and [found.scale.item(), None if found.point is None else found.point.item()]
    return {"order": frozen.order.get(site), "negated": frozen.negated.get(site, ()), "calibrated": measured}


def _find_layer(traced: Traced, error: BaseException | None) -> str:
    """Return the path of the layer with the node that could not be translated, as far as torch's exporter names one."""
    while error is not None:
        found = re.search(r"translating node %(\w+)", str(error))
        nodes = {node.name: node for node in traced.frozen.program.graph.nodes}
        if found is not None and found[1] in nodes and (path := module_path(nodes[found[1]])):
            return f"{path}: "
        error = error.__cause__
    return ""


def _find_reason(error: BaseException) -> str:
    """Return the innermost cause, which names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().partition("\n")[0].removeprefix("export: ") or type(error).__name__
    missing = re.match(r"No ONNX function found for <OpOverload\(op='(.*?)', overload='(.*?)'\)>", text)
    if missing is None:
        return text
    return f"{missing[1]}.{missing[2]} has no form in ONNX; valid: a model that computes this by other operators"


def count_bytes(model: ir.Model) -> int:
    """Return the bytes of the tensors of a model."""
    held = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def save_model(model: ir.Model, path: Path, data: Path | None) -> int:
    """Write a model, the tensors in `data` if given; returns the bytes of both.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        ir.save(model, path, external_data=None if data is None else data.name)
    except OSError as error:  # numpy's names neither the file nor the fault
        reason = f"cannot write all of it ({error}); is the disk full?"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    if data is not None:
        with data.open("rb+") as file:
            os.fsync(file.fileno())
    return sum(written.stat().st_size for written in (path, data) if written is not None)


def check_file(path: Path) -> None:
    """Run onnx's full check of a file, with strict shape inference.

    Raises:
        ExportError: the file is not valid, which is an error of this project.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"export: the file is not valid ONNX: {error}") from error
