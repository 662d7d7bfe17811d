"""An export at every stage of its way: traced, after each pass, translated to ONNX. No file is written.

The stages of training: qcompiler/compiler/stages.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.fx import Graph

from qcompiler.compiler.pipelines import frozen_pipeline, joint_pipeline
from qcompiler.compiler.stages import check_name
from qcompiler.exporting.assemble import Examples, Options, assemble_model, import_tools, prepare_call
from qcompiler.exporting.trace import TRACED, ExportError
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.ir.edit import copy_nodes
from qcompiler.passes.ir.text import graph_text
from qcompiler.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class ExportStage:
    """The graph of an export after one step."""

    #: "traced", "translated", or the name of a pass
    name: str
    #: places that the pass changed; 0 for traced and translated
    changes: int
    #: one node a line
    text: str
    #: a copy of the graph; None of an ONNX model, which has its text alone
    graph: Graph | None = None


def export_stages(
    qmodel: QuantizedModule,
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    opset: int = 21,
    fold_batch_norm: bool = True,
    signed_weights: bool = False,
    calibration: Examples | None = None,
) -> list[ExportStage]:
    """Return the graph of an export after each step of its way, from the traced graph to the ONNX model.

    First comes "traced", the graph of evaluation mode as torch.export gives it. The joint passes and the frozen passes
    follow, then "translated", the ONNX model that torch's exporter makes, and the passes over that model.

    Args:
        qmodel: made by `qcompiler.compile`; trained, or loaded with its ranges.
        example_inputs, example_kwargs: what the model is called with; shapes count, values do not.
        dynamic_batch, dynamic_shapes, opset, fold_batch_norm, signed_weights, calibration: as in `export_onnx`.

    Raises:
        ExportError: as in `export_onnx`.
    """
    get_session("export_stages", qmodel, ExportError)
    options = Options(
        opset=opset, fold_batch_norm=fold_batch_norm, signed_weights=signed_weights, calibration=calibration
    )
    call = prepare_call(qmodel, example_inputs, dict(example_kwargs or {}), dynamic_shapes, dynamic_batch)
    stages: list[ExportStage] = []
    assemble_model(
        qmodel, call, options, lambda name, changes, subject: stages.append(_make_stage(name, changes, subject))
    )
    return stages


def list_names() -> list[str]:
    """Return the names of the stages of an export, in order."""
    build, _ = import_tools()
    from qcompiler.exporting.pipeline import onnx_pipeline

    joint = [step.name for step in joint_pipeline(Recipe(name="any", rules=())).passes]
    frozen = [step.name for step in frozen_pipeline().passes]
    return [TRACED, *joint, *frozen, build.TRANSLATED, *(step.name for step in onnx_pipeline().passes)]


def check_stage(name: str) -> None:
    """Refuses, before anything is traced, what is no stage of an export.

    Raises:
        StageError: there is none of that name.
    """
    check_name(name, list_names())


def _make_stage(name: str, changes: int, subject: Any) -> ExportStage:
    """Return the stage of a subject: a joint graph, a frozen graph or an ONNX model."""
    if isinstance(subject.graph, Graph):
        return ExportStage(name, changes, graph_text(subject.graph), copy_nodes(subject.graph))
    from qcompiler.exporting.text import model_text  # needs the packages of the extra

    return ExportStage(name, changes, model_text(subject.model))
