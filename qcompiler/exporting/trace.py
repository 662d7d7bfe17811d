"""From a quantized module to the graph that is exported: its eval graph at any batch, ranges and weights frozen."""

import contextlib
import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind as SpecKind
from torch.fx import Graph

from qcompiler.collector import paused_collector
from qcompiler.compiler import torch_compat
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.compiler.plan import QuantPlan
from qcompiler.exporting.data_dependence import explain_branch, explain_size
from qcompiler.exporting.freeze import Frozen, freeze_program
from qcompiler.exporting.signature import named_keywords
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.base import PassError
from qcompiler.passes.frozen.calibrate_ranges import Calibrated
from qcompiler.passes.ir.facts import Input, InputKind
from qcompiler.passes.ir.meta import find_value, get_input, get_value, module_path, rename_modules, set_fact
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.passes.ir.views import aten, view_root
from qcompiler.runtime.errors import QCompilerError
from qcompiler.runtime.ranges.store import RangeStore
from qcompiler.tables import join_some

#: called with the name of a stage, the places that changed, and the subject of the pass: a graph or a model
Observe: TypeAlias = Callable[[str, int, Any], None]
#: the stage in front of all passes
TRACED: Final = "traced"
#: the kinds of inputs of an exported program, as the passes call them; a lifted constant is as good as a buffer
_KINDS = {
    SpecKind.PARAMETER: InputKind.PARAMETER,
    SpecKind.BUFFER: InputKind.BUFFER,
    SpecKind.CONSTANT_TENSOR: InputKind.BUFFER,
    SpecKind.USER_INPUT: InputKind.INPUT,
}

#: notes of torch about free dimensions and types in a trace; no values of the model
_CHECKS = (aten._assert_scalar.default, aten._assert_tensor_metadata.default)
_FIXED = (
    "\nThe model takes the size of a free dimension for a number: len(x) and int(x.shape[0]) do, x.shape[0] does not; "
    "or a weight has that size, such as the features of a linear layer. Valid: dynamic_shapes that leave this axis "
    "out, or dynamic_batch=False"
)
_EQUAL = "\nGive the dimensions that are always equal one name, or one torch.export.Dim"
_FUSED = (
    ". Attention is fused in eval; in training PyTorch takes it apart where it has dropout, and other tensors got "
    "ranges. Train and export under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or write attention out "
    "(transformers: attn_implementation='eager')"
)


class ExportError(QCompilerError):
    """The model cannot be exported; names the site, operator or path, and a valid one."""


class MissingRangeError(ExportError):
    """Ranges have no value yet; names the quantizers and the tensors in front."""

    def __init__(self, message: str, sites: Sequence[str], readers: Mapping[str, str], inputs: Sequence[str]) -> None:
        super().__init__(message)
        self.sites = sites
        #: site → the input of the graph that it reads, if it reads one
        self.readers = readers
        #: all of those inputs, in order
        self.inputs = inputs


@contextlib.contextmanager
def name_errors(what: str) -> Iterator[None]:
    """Begin errors of the parts that export and verification share with the name of the one that was called."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"{what}: {str(error).removeprefix('export: ').removeprefix(f'{what}: ')}") from error


@dataclasses.dataclass(frozen=True)
class Traced:
    """The eval graph after the passes, as torch's exporter takes it, and the plan read off it before it was frozen."""

    frozen: Frozen
    plan: QuantPlan
    #: of a graph that was not frozen: its inputs in order, as kind and name
    inputs: tuple[Input, ...]


def trace_model(
    qmodel: QuantizedModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    *,
    frozen: bool = True,
    fold_batch_norm: bool = True,
    calibrated: Mapping[str, Calibrated] | None = None,
    observe: Observe | None = None,
) -> Traced:
    """Return the forward graph of eval mode, quantized by the recipe of `qmodel` at batch edge 1.

    Args:
        args, kwargs: example inputs; their values do not matter, their shapes do.
        dynamic_shapes: as in torch.export.export.
        frozen: weights become codes, and ranges of the past scales; False leaves both as inputs of the graph.
        calibrated: site → a range that was measured on data, for a frozen graph.
        observe: called with the traced graph, and after each pass.

    Raises:
        ExportError: the model cannot be traced as one graph, keeps a range that has no value yet, or rounds
            stochastically in eval.
    """
    program = _export_program(qmodel, args, kwargs, dynamic_shapes)
    _refuse_state(program)
    _describe_inputs(program)
    _simplify_calls(program.graph)
    _refuse_inexact_sizes(program.graph)
    torch_compat.reserve_names(program.graph)
    if observe is not None:
        observe(TRACED, 0, program.graph_module)
    try:
        with paused_collector():
            joint_pipeline(qmodel.recipe.for_eval(), frozen=True)(program.graph_module, observe)
            plan = QuantPlan.of(program.graph_module)
        _refuse_missing(plan, qmodel.ranges(), program.graph)
        _refuse_ranges(plan, get_session("export", qmodel).store)
        if not frozen:
            program.graph_module.recompile()
            return Traced(Frozen(program, {}, {}, (), {}, {}), plan, _list_inputs(program.graph))
        with torch_compat.quiet_exporter(), paused_collector():
            made = freeze_program(
                program, qmodel.ranges(), fold_batch_norm=fold_batch_norm, calibrated=calibrated or {}, observe=observe
            )
    except PassError as error:
        raise ExportError(f"export: {explain_size(program.graph, error.__cause__) or error}") from error
    return Traced(made, plan, ())


def _refuse_state(program: ExportedProgram) -> None:
    """Raise if a call changes tensors of the model."""
    changed = [spec.target for spec in program.graph_signature.output_specs if "MUTATION" in spec.kind.name]
    if changed:
        raise ExportError(
            f"export: eval mode changes {', '.join(map(str, changed))}; a file keeps no state between calls"
        )


def _describe_inputs(program: ExportedProgram) -> None:
    """Attach to every input of the graph the fact that passes read."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in program.graph.find_nodes(op="placeholder"):
        kind = _KINDS.get(specs[node.name].kind)
        if kind is None:
            raise ExportError(f"export: input {node.name} is a {specs[node.name].kind.name}, which has no form in ONNX")
        set_fact(node, Input(kind, specs[node.name].target or node.name))


def _simplify_calls(graph: Graph) -> None:
    """Drop checks and paths that are none, and give ends of clamps that are whole numbers a form with an overload."""
    for node in list(graph.nodes):
        if node.target in _CHECKS:
            graph.erase_node(node)
            continue
        if node.target is aten.clamp.default and get_value(node).is_floating_point():  # 0 and 0.5 have no overload
            node.args = (node.args[0], *(float(end) if isinstance(end, int) else end for end in node.args[1:]))
        rename_modules(node, torch_compat.clean_module, "")
    graph.eliminate_dead_code()


def _export_program(
    qmodel: QuantizedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    model = get_session("export", qmodel).model
    with (
        torch_compat.quiet_exporter(),
        enter_eval_mode(model),
        named_keywords(model, kwargs),
        torch.no_grad(),
        torch_compat.plain_encoder_layers(bool(qmodel.recipe.rules)),
    ):
        try:
            program = torch.export.export(
                model,
                args,
                dict(kwargs),
                dynamic_shapes=dynamic_shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            with paused_collector():
                return cast(ExportedProgram, program.run_decompositions(torch_compat.training_decompositions()))
        except Exception as error:
            reason = explain_branch(model, error) or str(error).strip().partition("\n\n")[0]
            if "Constraints violated" in reason:
                hint = _EQUAL if "must always be equal" in reason else _FIXED
                reason = _shorten_constraints(reason) + hint
            raise ExportError(f"export: the model cannot be traced as one graph: {reason}") from error


def _shorten_constraints(reason: str) -> str:
    """Return torch's words about free dimensions with `x.shape[1]` for `L['x'].size()[1]`, and without its logs."""
    reason = re.sub(r"L\['(\w+)'\]((?:\[\S+?\])*)\.size\(\)", r"\1\2.shape", reason)
    return re.sub(r" For more information, run with TORCH_LOGS=.*", "", reason)


def _refuse_inexact_sizes(graph: Graph) -> None:
    """Raise if a free size is multiplied by a number such as 2.3: in the float32 of a file 23.0 may be 22."""
    for node in graph.find_nodes(op="call_function", target=operator.mul):
        factor = next((one for one in node.args if isinstance(one, float)), 1.0)
        if not (factor * 2**8).is_integer() and isinstance(find_value(node), torch.SymFloat):
            raise ExportError(
                f"export: {module_path(node) or 'the model'}: a scale factor of {factor} over a free dimension, whose "
                "new size and indices a file would round otherwise; valid: one of at most 8 binary places, such as 2 "
                "or 1.5, a size, or that dimension fixed"
            )


def _list_inputs(graph: Graph) -> tuple[Input, ...]:
    facts = [get_input(node) for node in graph.find_nodes(op="placeholder")]
    return tuple(fact for fact in facts if fact is not None)


@contextlib.contextmanager
def enter_eval_mode(model: nn.Module) -> Iterator[None]:
    """Enter eval mode in every module; give each module its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _refuse_missing(plan: QuantPlan, ranges: Mapping[str, Tensor], graph: Graph) -> None:
    """Raise if a range has no value yet."""
    kept = [site.name for site in plan.sites if site.spec.range.has_state]
    empty = [name for name in kept if name not in ranges or bool(ranges[name].isnan().any())]
    if not empty:
        return
    fused = any(one.reason.startswith("fused attention") for one in plan.kept) and len(empty) < len(kept)
    hint = "train the model for a step, or load a checkpoint with ranges" + (_FUSED if fused else "")
    inputs = [fact for fact in _list_inputs(graph) if fact.kind is InputKind.INPUT]
    roots = {one.site: get_input(view_root(one.tensor)) for one in list_quantizers(graph) if one.site in empty}
    readers = {site: fact.name for site, fact in roots.items() if fact in inputs and fact is not None}
    raise MissingRangeError(
        f"export: no range yet for {join_some(empty)}; {hint}", empty, readers, [fact.name for fact in inputs]
    )


def _refuse_ranges(plan: QuantPlan, store: RangeStore) -> None:
    """Raise for nodes that have no form in a file: ranges of another meaning, and random bits."""
    kept = [site for site in plan.sites if site.spec.range.has_state]
    others = [site.name for site in kept if not store.means(site.name, site.spec.range.meaning(site.spec.format.bits))]
    if others:
        raise ExportError(
            f"export: the ranges of {join_some(others)} belong to another recipe; "
            "train the model for a step, or load a checkpoint of this recipe"
        )
    random = [site.name for site in plan.sites if site.spec.rounding.value == "stochastic"]
    if random:
        raise ExportError(
            f"export: {join_some(random)} round stochastically in eval; valid: recipes that round to nearest"
        )
