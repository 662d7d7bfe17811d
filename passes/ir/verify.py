"""The rules of a legal graph: a table that is checked after every pass, and on both halves after the partition."""

import functools
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.arguments import get_argument, get_arguments
from qcompiler.passes.ir.edit import clean_graph, finish_graph
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import get_contraction, get_input, get_value, has_value, is_backward, strides_read
from qcompiler.passes.ir.quantizer import Dequantizer, Quantizer
from qcompiler.passes.ir.strides import changed_reads, get_strides, may_read_any
from qcompiler.passes.ir.views import is_view, list_views, view_root
from qcompiler.passes.ir.walk import find_dequantizer
from qcompiler.runtime import ops
from qcompiler.runtime.errors import QCompilerError
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.quantized import explain_scale
from qcompiler.runtime.spec import parse_spec


class VerifyError(QCompilerError):
    """The graph breaks a rule; the message names the node, the present state and a legal one."""


def verify_graph(module: GraphModule, among: Collection[Node] | None = None) -> None:
    """Checks every rule on one graph, whole or half.

    Args:
        module: the graph.
        among: the nodes whose rules can have broken; None: all.

    Raises:
        VerifyError: with the first node that breaks a rule.
    """
    _check_inputs(module)
    nodes = module.graph.nodes if among is None else [node for node in module.graph.nodes if node in among]
    calls = [node for node in nodes if node.op == "call_function"]
    for node in calls:
        if not has_value(node) and returns_something(node):
            raise VerifyError(f"{node.name}: no value inferred for {node.target}")
    for node in calls:
        if node.target is ops.QUANTIZE:
            _check_rules(node, Quantizer(node), _QUANTIZER)
    for node in calls:
        if node.target is ops.DEQUANTIZE:
            _check_rules(node, Dequantizer(node), _DEQUANTIZER)
    for node in calls:
        fact = get_contraction(node)
        for operand in () if fact is None else fact.operands:
            tensor = node.args[operand.arg]
            if isinstance(tensor, Node) and len(operand.layout) != get_value(tensor).ndim:
                raise VerifyError(
                    f"{node.name}: layout {operand.layout!r} for {get_value(tensor).ndim} dimensions of {tensor.name}"
                )


def _check_inputs(module: GraphModule) -> None:
    """Raises VerifyError if an input bears the name of another node: code would read that one."""
    names = {node.name for node in module.graph.nodes}
    for node in module.graph.find_nodes(op="placeholder"):
        if node.target != node.name and node.target in names:
            raise VerifyError(f"{node.name}: input of the name {node.target}, which is another node; valid: its own")


def _check_rules(node: Node, view: Any, rules: Iterable[Callable[[Any], str]]) -> None:
    for rule in rules:
        complaint = rule(view)
        if complaint:
            raise VerifyError(f"{node.name}: {complaint}")


def returns_something(node: Node) -> bool:
    """Return False for an operator without a result: the check of a value, as in F.one_hot."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)


def find_affected(changed: Collection[Node]) -> set[Node]:
    """Return the nodes whose rules can have broken when these nodes changed.

    Rules read arguments, arguments of those, and the halves of readers; views between them do not count.
    """
    affected, level = set(changed), set(changed)
    for _ in range(2):
        level = {reader for node in level for view in list_views(node) for reader in (view, *view.users)}
        affected |= level
    return affected | {view_root(source) for node in changed for source in node.all_input_nodes}


def clean_and_verify(module: GraphModule) -> None:
    """Do as `finish_and_verify`, but leave the code of the module, which takes longer to write than all checks.

    Raises:
        VerifyError: with the first node that breaks a rule.
    """
    clean_graph(module)
    verify_graph(module)


def finish_and_verify(module: GraphModule) -> None:
    """Drop unread nodes, and check every rule on the rest: the check after each pass over a joint graph.

    Raises:
        VerifyError: with the first node that breaks a rule.
    """
    finish_graph(module)
    verify_graph(module)


def verify_saved(forward: GraphModule, saved: list[Node]) -> None:
    """Checks the partition: no tensor that codes were turned back into is saved as float.

    Raises:
        VerifyError: names the saved tensor.
    """
    for node in saved:
        root = view_root(node)
        if root.target in (ops.DEQUANTIZE, ops.UNPACK):
            raise VerifyError(f"{node.name}: saved for backward as {get_value(node).dtype}, but its codes would do")


def verify_strides(module: GraphModule) -> None:
    """Checks, after all passes, that every traced operator but contractions reads the strides that were traced.

    Raises:
        VerifyError: names the reader, the tensor and both strides.
    """
    for node in module.graph.nodes:
        traced = strides_read(node)
        if traced is None or may_read_any(node) or node.target is operator.getitem:
            continue
        for place, source in changed_reads(node):
            if 0 not in (traced[place] or ()):  # a dense tensor in place of an expanded one: no copy can be expanded
                found = get_strides(source)
                raise VerifyError(f"{node.name}: reads {source.name} with strides {found}; traced: {traced[place]}")


def _spec_is_canonical(quantizer: Quantizer) -> str:
    text = quantizer.text
    try:
        view_blocks(tuple(get_value(quantizer.tensor).shape), quantizer.layout, quantizer.spec.block)
    except ValueError as error:
        return str(error)
    spec = _write_again(text)
    return "" if spec == text else f"spec {text!r} is not canonical; valid: {spec!r}"


@functools.cache
def _write_again(text: str) -> str:
    return str(parse_spec(text))


def _reads_a_float(quantizer: Quantizer) -> str:
    tensor = quantizer.tensor
    fact = get_input(tensor)
    is_constant = fact is not None and fact.kind is InputKind.CONSTANT
    if is_constant and get_value(tensor).dtype is quantizer.spec.format.dtype:
        return ""  # the codes of a frozen weight
    if not get_value(tensor).is_floating_point():
        return f"quantizes {tensor.name} of {get_value(tensor).dtype}; valid: a floating tensor"
    if find_dequantizer(tensor) is not None:
        return f"quantizes {tensor.name}, which codes were turned back into: a second quantization of one tensor"
    return ""


def _has_its_own_scale(quantizer: Quantizer) -> str:
    scale = quantizer.scale
    if not isinstance(scale, Node):
        return f"scale {scale!r} is not a node"
    if scale.op == "placeholder":
        return ""
    names = ("x", "spec", "layout")
    if scale.target is not ops.SCALE or get_arguments(scale, *names) != get_arguments(quantizer.codes, *names):
        return f"its scale {scale.name} belongs to another tensor, spec or layout"
    return ""


def _has_what_its_spec_needs(quantizer: Quantizer) -> str:
    spec, point, key = quantizer.spec, quantizer.zero_point, quantizer.key
    if spec.has_zero_point != (point is not None):
        return f"spec {spec} {'needs a' if spec.has_zero_point else 'has no'} zero point"
    if (spec.rounding is Rounding.STOCHASTIC) != (key is not None):
        return f"spec {spec} {'needs a' if key is None else 'has no use for a'} random key"
    return ""


def _codes_have_the_format(quantizer: Quantizer) -> str:
    found, valid = get_value(quantizer.codes).dtype, quantizer.spec.format.dtype
    return "" if found is valid else f"codes are {found}; valid: {valid}"


def _dequantizes_its_own_codes(reader: Dequantizer) -> str:
    codes, scale, shown = reader.codes, reader.scale, reader.shown
    saved = codes.op == "placeholder"  # the partitioner may compute floats again beside saved codes
    own = Quantizer(codes) if codes.target is ops.QUANTIZE else None
    if shown is not None and not saved and (own is None or shown is not own.tensor):
        return f"shows what is not finite in {shown}, which is not the tensor of its codes {codes.name}"
    if saved or codes.target is ops.UNPACK:
        return ""
    if own is None:
        return f"dequantizes {codes.name}, which is no quantize node"
    if isinstance(scale, Node) and scale.target is ops.CHECKED:
        tensor, *checked = get_arguments(scale, "x", "spec", "layout")
        if tensor is not own.tensor or checked != [reader.text, reader.layout]:
            return f"its scale {scale.name} checks another tensor, spec or layout than its codes {codes.name}"
        scale = get_argument(scale, "scale")
    if isinstance(scale, Node) and scale.op == "placeholder":
        scale = own.scale  # saved, or given with the graph: only forward shows which one
    names = ("zero_point", "spec", "layout")
    if scale is not own.scale or get_arguments(reader.floats, *names) != get_arguments(own.codes, *names):
        return f"scale, zero point, spec or layout differ from those of its codes {codes.name}"
    return ""


def _scale_fits(reader: Dequantizer) -> str:
    return explain_scale(tuple(get_value(reader.codes).shape), get_value(reader.scale), reader.spec, reader.layout)


def _backward_reads_codes(dequantizer: Dequantizer) -> str:
    """Only a dequantize that is pinned to backward leaves codes, not floats, for the partitioner to save."""
    node = dequantizer.floats
    if is_backward(node):
        return ""
    readers = list(node.users)
    for reader in readers:
        if is_view(reader):
            readers += [user for user in reader.users if user not in readers]
        if is_backward(reader):
            return f"{reader.name} reads it in backward; valid: a dequantize of its own, pinned to backward"
    return ""


_QUANTIZER: Final[tuple[Callable[[Quantizer], str], ...]] = (
    _spec_is_canonical,
    _reads_a_float,
    _has_its_own_scale,
    _has_what_its_spec_needs,
    _codes_have_the_format,
)
_DEQUANTIZER: Final[tuple[Callable[[Dequantizer], str], ...]] = (
    _dequantizes_its_own_codes,
    _scale_fits,
    _backward_reads_codes,
)
