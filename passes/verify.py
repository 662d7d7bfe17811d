"""What a legal graph is: a table of rules that is checked after every pass, and on both halves after the partition."""

import operator
from collections.abc import Callable
from typing import Final

from torch.fx import GraphModule, Node

from qcompiler.passes.graph import (
    contractions,
    dequantizers,
    has_value,
    is_backward,
    is_view,
    quantizers,
    strides_read,
    value,
    view_root,
)
from qcompiler.passes.strides import changed_reads, get_strides, may_read_any
from qcompiler.runtime import ops
from qcompiler.runtime.blocks import view_blocks
from qcompiler.runtime.rounding import Rounding
from qcompiler.runtime.spec import QuantSpec, parse_spec


class VerifyError(Exception):
    """The graph breaks a rule; the message names the node, what it has and what would be legal."""


def verify(module: GraphModule) -> None:
    """Checks every rule on one graph, whole or half.

    Raises:
        VerifyError: with the first node that breaks a rule.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and not has_value(node) and returns_something(node):
            raise VerifyError(f"{node.name}: no value inferred for {node.target}")
    for nodes, rules in ((quantizers(module.graph), _QUANTIZE), (dequantizers(module.graph), _DEQUANTIZE)):
        for node in nodes:
            for rule in rules:
                complaint = rule(node)
                if complaint:
                    raise VerifyError(f"{node.name}: {complaint}")
    for node, fact in contractions(module.graph):
        for operand in fact.operands:
            tensor = node.args[operand.arg]
            if isinstance(tensor, Node) and len(operand.layout) != value(tensor).ndim:
                raise VerifyError(
                    f"{node.name}: layout {operand.layout!r} for {value(tensor).ndim} dimensions of {tensor.name}"
                )


def returns_something(node: Node) -> bool:
    """False for an operator without a result: the check of a value, as F.one_hot makes it."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)


def verify_saved(forward: GraphModule, saved: list[Node]) -> None:
    """Checks the partition: no tensor that codes were turned back into is saved as float.

    Raises:
        VerifyError: names the saved tensor.
    """
    for node in saved:
        root = view_root(node)
        if root.target in (ops.DEQUANTIZE, ops.UNPACK):
            raise VerifyError(f"{node.name}: saved for backward as {value(node).dtype}, but its codes would do")


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


def _spec(node: Node) -> tuple[QuantSpec, str]:
    text, layout = node.args[-3:-1]
    return parse_spec(str(text)), str(layout)


def _spec_is_canonical(node: Node) -> str:
    try:
        spec, layout = _spec(node)
        tensor = node.args[0]
        assert isinstance(tensor, Node)
        view_blocks(tuple(value(tensor).shape), layout, spec.block)
    except ValueError as error:
        return str(error)
    text = str(node.args[-3])
    return "" if str(spec) == text else f"spec {text!r} is not canonical; valid: {str(spec)!r}"


def _reads_a_float(node: Node) -> str:
    tensor = node.args[0]
    assert isinstance(tensor, Node)
    if not value(tensor).is_floating_point():
        return f"quantizes {tensor.name} of {value(tensor).dtype}; valid: a floating tensor"
    if view_root(tensor).target is ops.DEQUANTIZE:
        return f"quantizes {tensor.name}, which codes were turned back into: a second quantization of one tensor"
    return ""


def _has_its_own_scale(node: Node) -> str:
    tensor, scale = node.args[:2]
    if not isinstance(scale, Node):
        return f"scale {scale!r} is not a node"
    if scale.op == "placeholder":
        return ""
    if scale.target is not ops.SCALE or scale.args[0] is not tensor or scale.args[1:3] != node.args[4:6]:
        return f"its scale {scale.name} belongs to another tensor, spec or layout"
    return ""


def _has_what_its_spec_needs(node: Node) -> str:
    spec, _ = _spec(node)
    point, key = node.args[2:4]
    if spec.has_zero_point != (point is not None):
        return f"spec {spec} {'needs a' if spec.has_zero_point else 'has no'} zero point"
    if (spec.rounding is Rounding.STOCHASTIC) != (key is not None):
        return f"spec {spec} {'needs a' if key is None else 'has no use for a'} random key"
    return ""


def _codes_have_the_format(node: Node) -> str:
    spec, _ = _spec(node)
    return (
        "" if value(node).dtype is spec.format.dtype else f"codes are {value(node).dtype}; valid: {spec.format.dtype}"
    )


def _dequantizes_its_own_codes(node: Node) -> str:
    codes, scale, point, text, layout = node.args[:5]
    assert isinstance(codes, Node)
    saved = codes.op == "placeholder"  # the partitioner may compute floats again beside codes that it saves
    if len(node.args) > 6 and not saved and (codes.target is not ops.QUANTIZE or node.args[6] is not codes.args[0]):
        return f"shows what is not finite in {node.args[6]}, which is not the tensor of its codes {codes.name}"
    if saved or codes.target is ops.UNPACK:
        return ""
    if codes.target is not ops.QUANTIZE:
        return f"dequantizes {codes.name}, which is no quantize node"
    if isinstance(scale, Node) and scale.target is ops.CHECKED:
        if scale.args[1] is not codes.args[0] or scale.args[2:] != (text, layout):
            return f"its scale {scale.name} checks another tensor, spec or layout than its codes {codes.name}"
        scale = scale.args[0]
    if (scale, point, text, layout) != (codes.args[1], codes.args[2], codes.args[4], codes.args[5]):
        return f"scale, zero point, spec or layout differ from those of its codes {codes.name}"
    return ""


def _scale_fits(node: Node) -> str:
    codes, scale, _, text, layout = node.args[:5]
    assert isinstance(codes, Node)
    assert isinstance(scale, Node)
    spec = parse_spec(str(text))
    counts = view_blocks(tuple(value(codes).shape), str(layout), spec.block).counts
    kind = spec.scale.dtype
    if tuple(value(scale).shape) != counts or value(scale).dtype is not kind:
        return f"scale is {value(scale).dtype} {list(value(scale).shape)}; valid: {kind} {list(counts)}"
    return ""


def _backward_reads_codes(node: Node) -> str:
    """Only a dequantize that is pinned to backward leaves codes, not floats, for the partitioner to save."""
    readers = list(node.users)
    for reader in readers:
        if is_view(reader):
            readers += [user for user in reader.users if user not in readers]
        if is_backward(reader) and not is_backward(node):
            return f"{reader.name} reads it in backward; valid: a dequantize of its own, pinned to backward"
    return ""


_QUANTIZE: Final[tuple[Callable[[Node], str], ...]] = (
    _spec_is_canonical,
    _reads_a_float,
    _has_its_own_scale,
    _has_what_its_spec_needs,
    _codes_have_the_format,
)
_DEQUANTIZE: Final[tuple[Callable[[Node], str], ...]] = (
    _dequantizes_its_own_codes,
    _scale_fits,
    _backward_reads_codes,
)
