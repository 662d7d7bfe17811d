"""An export at every stage of its way: traced, after each pass, translated to ONNX. No file is written.

The stages of training: qcompiler/compiler/stages.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.fx import Graph, GraphModule

from qcompiler.compiler.capture import Captured
from qcompiler.compiler.pipelines import frozen_pipeline, joint_pipeline
from qcompiler.compiler.stages import Stage, check_name
from qcompiler.exporting.assemble import Examples, Options, assemble_model, import_tools, prepare_call
from qcompiler.exporting.inputs import read_keywords
from qcompiler.exporting.trace import TRACED, ExportError
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.ir.edit import copy_nodes, list_outputs
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import get_input
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
    #: the same for drawings and queries, as `qmodel.stages()` has it; None of an ONNX model, which has its text alone
    drawn: Stage | None = None
    #: the exported module, so that a drawing can tell that a stage is one of another module
    qmodel: QuantizedModule | None = dataclasses.field(default=None, repr=False, compare=False)


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
    call = prepare_call(qmodel, example_inputs, read_keywords(example_kwargs), dynamic_shapes, dynamic_batch)
    recorder = _Recorder(qmodel)
    assemble_model(qmodel, call, options, recorder)
    return recorder.stages


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


class _Recorder:
    """Keeps a stage of every subject that it is shown."""

    def __init__(self, qmodel: QuantizedModule) -> None:
        self._qmodel = qmodel
        self.stages: list[ExportStage] = []

    def __call__(self, name: str, changes: int, subject: Any) -> None:
        """Add the stage of a joint graph, a frozen graph or an ONNX model."""
        if isinstance(subject.graph, Graph):
            graph = _copy_read(subject.graph)
            drawn = self._make_drawn(name, changes, graph)
            self.stages.append(ExportStage(name, changes, graph_text(graph), drawn, self._qmodel))
            return
        from qcompiler.exporting.text import model_text  # needs the packages of the extra

        self.stages.append(ExportStage(name, changes, model_text(subject.model), qmodel=self._qmodel))

    def _make_drawn(self, name: str, changes: int, graph: Graph) -> Stage:
        """Return the stage as one of a captured graph; all of them share what the traced graph returns."""
        first = self.stages[0].drawn if self.stages else None
        return Stage(name, changes, _describe_traced(graph) if first is None else first.captured, graph)


def _copy_read(graph: Graph) -> Graph:
    """Return a copy without the parameters, ranges and constants that nothing reads: a file has none of them."""
    copied = copy_nodes(graph)
    for node, copy in zip(graph.nodes, copied.nodes, strict=True):
        copy.name = node.name  # `input` too, which torch.fx keeps for Python's own
    for node in copied.find_nodes(op="placeholder"):
        fact = get_input(node)
        if not node.users and (fact is None or fact.kind is not InputKind.INPUT):
            copied.erase_node(node)
    return copied


def _describe_traced(graph: Graph) -> Captured:
    """Return the traced graph as a captured one that only forward runs in."""
    inputs = tuple(fact for node in graph.find_nodes(op="placeholder") if (fact := get_input(node)) is not None)
    differentiable = (False,) * len(list_outputs(graph))
    return Captured(GraphModule({}, graph), inputs, (), differentiable, tangents=(), is_joint=False)
