"""An exported program through the frozen pipeline, and the program around the graph that comes out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec, TensorArgument
from torch.export.graph_signature import InputKind as SpecKind
from torch.fx import Node

from qcompiler.compiler.pipelines import frozen_pipeline
from qcompiler.passes.frozen.calibrate_ranges import Calibrated
from qcompiler.passes.frozen.frozen_graph import FrozenGraph
from qcompiler.passes.ir.edit import list_outputs
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import get_input


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A program with constants, and the changes of the codes of weights on the way."""

    program: ExportedProgram
    #: site → the order in which the dimensions of its codes lie in the file
    order: Mapping[str, tuple[int, ...]]
    #: site → output channels whose codes are negated, for a batch norm with a negative factor
    negated: Mapping[str, tuple[int, ...]]
    #: remarks for a reader of the file
    notes: tuple[str, ...]
    #: site → its range, measured on data
    calibrated: Mapping[str, Calibrated]
    #: site of a factor of a weight, such as B in W + B·A → its codes, which are part of that weight's
    folded: Mapping[str, Tensor]


def freeze_program(
    program: ExportedProgram,
    ranges: Mapping[str, Tensor],
    *,
    fold_batch_norm: bool,
    calibrated: Mapping[str, Calibrated],
    observe: Callable[[str, int, FrozenGraph], None] | None = None,
) -> Frozen:
    """Return the program with constants in place of nodes that depend on parameters and ranges alone.

    Args:
        program: an eval graph after the joint pipeline; its graph is changed.
        ranges: site → the state of its range.
        fold_batch_norm, calibrated: as in `frozen_pipeline`.
        observe: called after each pass.

    Raises:
        PassError: a pass failed.
    """
    subject = FrozenGraph(program.graph_module, find_known_inputs(program, ranges))
    frozen_pipeline(calibrated, fold_batch_norm=fold_batch_norm)(subject, observe)
    built = rebuild_program(program, subject)
    return Frozen(built, subject.order, subject.negated, subject.notes, calibrated, subject.list_folded())


def find_known_inputs(program: ExportedProgram, ranges: Mapping[str, Tensor]) -> dict[Node, Tensor]:
    """Return the value of every input of a graph except the inputs of the user: parameters, buffers and ranges."""
    held = {**program.state_dict, **program.constants}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    known: dict[Node, Tensor] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        fact = get_input(node)
        assert fact is not None
        if fact.kind is InputKind.STATE:
            known[node] = ranges[fact.name].detach()
        elif fact.kind is not InputKind.INPUT:
            known[node] = cast(Tensor, held[cast(str, specs[node.name].target)]).detach()
    return known


def rebuild_program(program: ExportedProgram, subject: FrozenGraph) -> ExportedProgram:
    """Return the program around the new graph; inputs that nothing reads are gone, except the inputs of the user."""
    inputs = _list_inputs(program, subject)
    subject.graph.lint()
    targets = {spec.target for spec in inputs}
    new = {name: value for name, value in subject.constants.values() if name in targets}
    state = {name: held for name, held in program.state_dict.items() if name in targets}
    return ExportedProgram(
        program.graph_module,
        subject.graph,
        ExportGraphSignature(inputs, _list_outputs(program, subject)),
        {**state, **new},
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def _list_inputs(program: ExportedProgram, subject: FrozenGraph) -> list[InputSpec]:
    """Return the inputs of the new graph, in order; erases those that nothing reads."""
    old = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inputs = []
    for node in list(subject.graph.find_nodes(op="placeholder")):
        spec = old.get(node.name)
        if not node.users and (spec is None or spec.kind is not SpecKind.USER_INPUT):
            subject.graph.erase_node(node)
        elif spec is not None:
            inputs.append(spec)
        else:
            name, _ = subject.constants[node.name]
            inputs.append(InputSpec(SpecKind.BUFFER, TensorArgument(node.name), name, persistent=True))
    return inputs


def _list_outputs(program: ExportedProgram, subject: FrozenGraph) -> list[OutputSpec]:
    """Return the outputs by their new names."""
    nodes = list_outputs(subject.graph)
    return [
        dataclasses.replace(spec, arg=TensorArgument(node.name)) if isinstance(node, Node) else spec
        for spec, node in zip(program.graph_signature.output_specs, nodes, strict=True)
    ]
