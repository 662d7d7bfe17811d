"""Call kernels of our own for quantizers, in place of loops that a compiler makes."""

import collections
import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Target

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import get_argument, get_arguments, has_argument, pack_arguments
from qcompiler.passes.ir.edit import insert_result, replace_node
from qcompiler.passes.ir.meta import find_value, get_contraction, get_value
from qcompiler.passes.ir.quantizer import Dequantizer, Quantizer, insert_operator, list_dequantizers, list_quantizers
from qcompiler.passes.ir.views import list_readers
from qcompiler.runtime import coders, ops
from qcompiler.runtime.kernels.packing import explain_packing
from qcompiler.runtime.kernels.quantize_blocks import explain_parts, find_call
from qcompiler.runtime.kernels.quantizers import (
    BLOCKS,
    FLOATS,
    KNOWN,
    MEASURED,
    QuantizerFacts,
    explain_quantizer,
    has_quick_loops,
)
from qcompiler.runtime.numbers.packing import per_byte
from qcompiler.runtime.numbers.rounding import Rounding


@dataclasses.dataclass
class Tally:
    """The quantizers that a compiler got so far."""

    #: those in kernels of our own
    called: int = 0
    #: why quantizers stay loops of the compiler → how many
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Tally") -> None:
        """Count the quantizers of another tally too."""
        self.called += other.called
        self.reasons.update(other.reasons)


@dataclasses.dataclass(frozen=True)
class CallKernels:
    """scale(X), quantize(X, scale), dequantize(codes, scale) → quantize_blocks(X), where a kernel is faster.

    1. The last pass over the copy of a half that a compiler gets: afterwards nobody looks for quantizers.
    2. Of a scale that is known, or that other loops find: quantize(X, scale) → quantize_by(X, scale).
    3. A dequantizer of codes that come from elsewhere: dequantize(codes, scale) → dequantize_blocks(codes, scale).
    4. Of a scale in hindsight, with what the range learns: quantize(X, scale), measure(X, reach), checked(scale, X) →
       quantize_measured(X, scale, reach).
    5. Codes of such calls, and codes that such calls read, are packed and unpacked by calls: pack_codes, unpack_codes.
       Where parts that share bytes hold whole blocks, the kernels of the quantizer and of the floats do so themselves.
    6. A quantizer that stays a loop is counted with the reason.
    """

    name: ClassVar[str] = "call-kernels"
    tally: Tally = dataclasses.field(default_factory=Tally)

    def __call__(self, halves: Halves) -> int:
        """Return the number of quantizers and dequantizers that became calls."""
        return sum(self._call_half(half) for half in halves.graphs)

    def _call_half(self, half: GraphModule) -> int:
        calls = sum(self._call_quantizer(one) for one in list_quantizers(half.graph))
        calls += sum(map(_call_packing, half.graph.find_nodes(op="call_function", target=ops.PACK)))
        calls += sum(map(_call_unpacking, half.graph.find_nodes(op="call_function", target=ops.UNPACK)))
        return calls + sum(self._call_dequantizer(one) for one in list_dequantizers(half.graph))

    def _call_quantizer(self, one: Quantizer) -> bool:
        facts, measure = _describe(one.tensor, one), _find_measure(one)
        if not _explain_blocks(one, facts):
            _write_blocks(one)
        elif measure is not None and not explain_quantizer(MEASURED, facts):
            _write_measured(one, measure)
        elif reason := explain_quantizer(KNOWN, facts):
            self.tally.reasons[reason] += 1
            return False
        else:
            _write_known(one, ops.QUANTIZE_BY, {})
        self.tally.called += 1
        return True

    def _call_dequantizer(self, one: Dequantizer) -> bool:
        if get_value(one.codes).element_size() > 1 or one.codes.target is ops.QUANTIZE or _explain_floats(one):
            return False
        _write_floats(one, one.codes, {})
        return True


def _call_packing(node: Node) -> bool:
    """Replace the packing of codes that a kernel has written, which no loop makes."""
    codes, bits = get_arguments(node, "codes", "bits")
    if codes.target is not operator.getitem or explain_packing(get_value(codes).shape, bits):
        return False
    replace_node(node, insert_operator(node.graph, ops.PACK_CODES, {"codes": codes, "bits": bits}, before=node))
    return True


def _call_unpacking(node: Node) -> bool:
    """Replace the unpacking of codes that kernels read alone."""
    packed, shape, bits, signed = get_arguments(node, "packed", "shape", "bits", "signed")
    readers = [Dequantizer(user) for user in node.users if user.target is ops.DEQUANTIZE]
    if len(readers) < len(node.users) or explain_packing(shape, bits) or any(map(_explain_floats, readers)):
        return False
    if all(map(_unpacks, readers)):
        for reader in readers:
            _write_floats(reader, packed, {"shape": shape})
        node.graph.erase_node(node)
        return True
    given = {"packed": packed, "shape": shape, "bits": bits, "signed": signed}
    made = insert_operator(node.graph, ops.UNPACK_CODES, given, before=node)
    if get_value(made).stride() != get_value(node).stride():
        node.graph.erase_node(made)
        return False
    replace_node(node, made)
    return True


def _unpacks(one: Dequantizer) -> bool:
    """Return True if the kernel that writes the floats reads packed codes."""
    floats, bits = get_value(one.floats), one.spec.format.bits
    packed, held = get_arguments(one.codes, "packed", "bits")
    made = coders.fake_dequantize_blocks(
        get_value(packed), get_value(one.scale), None, one.text, one.layout, one.dtype, floats.shape
    )
    if held != bits or made.stride() != floats.stride():
        return False
    call = find_call(tuple(floats.shape), floats.stride(), one.text, one.layout)
    return not explain_parts(call, finds_scale=False)


def _write_floats(one: Dequantizer, codes: Node, more: dict[str, Any]) -> None:
    """Write a call in place of a dequantizer."""
    shared = {"scale": one.scale, "zero_point": one.zero_point, "spec": one.text, "layout": one.layout}
    given = {"codes": codes, **shared, "dtype": one.dtype, **more}
    replace_node(one.floats, insert_operator(one.floats.graph, ops.DEQUANTIZE_BLOCKS, given, before=one.floats))


def _explain_floats(one: Dequantizer) -> str:
    """Say why floats are not computed by a kernel; empty: they are."""
    if one.shown is not None:
        return "the kernel shows what the scale shows"
    return explain_quantizer(FLOATS, _describe(one.codes, one))


def _describe(tensor: Node, one: Quantizer | Dequantizer) -> QuantizerFacts:
    value = get_value(tensor)
    return QuantizerFacts(
        device=value.device.type,
        dtype=one.dtype,
        spec=one.spec,
        layout=one.layout,
        shape=tuple(value.shape),
        stride=value.stride(),
    )


def _explain_blocks(one: Quantizer, facts: QuantizerFacts) -> str:
    """Return the reason why one kernel does not find the scale as well."""
    if one.scale.target is not ops.SCALE or has_argument(one.scale, "state"):
        return "the scale comes from elsewhere"
    if one.key is not None and one.scale < one.key:
        return "the key is drawn behind the scale"
    return explain_quantizer(BLOCKS, facts)


def _list_floats(one: Quantizer, shown: Node | None) -> list[Dequantizer]:
    """Return the dequantizers that a kernel writes together with the codes, all alike."""
    return [
        reader
        for reader in one.dequantizers
        if reader.scale is one.scale and reader.shown is shown and reader.dtype is one.dtype
    ]


def _write_blocks(one: Quantizer) -> None:
    """Write one call in place of scale, codes and floats, and of the packing of codes that nothing else reads."""
    readers, scale = _list_floats(one, None), one.scale
    packed = _find_packing(one, readers)
    parts = {} if packed is None else {"parts": per_byte(one.spec.format.bits)}
    if packed is not None:
        packed.replace_all_uses_with(one.codes)
        packed.graph.erase_node(packed)
    call = _write_call(one, ops.QUANTIZE_BLOCKS, readers, parts, before=scale)
    scale.replace_all_uses_with(insert_result(call, len(find_value(call)) - 1))


def _find_packing(one: Quantizer, readers: list[Dequantizer]) -> Node | None:
    """Return the packing of codes that only floats of the same call read too, if the kernel can write it."""
    others = set(one.codes.users) - {reader.floats for reader in readers}
    packed = next(iter(others), None)
    if len(others) != 1 or packed is None or packed.target is not ops.PACK:
        return None
    bits, value = get_argument(packed, "bits"), get_value(one.tensor)
    if bits != one.spec.format.bits or value.device.type != "cpu":
        return None
    call = find_call(tuple(value.shape), torch.empty_like(value).stride(), one.text, one.layout)
    return None if per_byte(bits) == 1 or explain_parts(call) else packed


def _find_measure(one: Quantizer) -> Node | None:
    """Return the call that measures the same tensor for the same range."""
    found = (user for user in one.tensor.users if user.target is ops.MEASURE)
    return next((user for user in found if get_arguments(user, "spec", "layout") == (one.text, one.layout)), None)


def _write_measured(one: Quantizer, measure: Node) -> None:
    """Write one call in place of codes, floats and what is learned from the tensor."""
    shared = {"x": one.tensor, "spec": one.text, "layout": one.layout}
    args = pack_arguments(ops.CHECKED, {"scale": one.scale, **shared})
    checks = [user for user in one.tensor.users if user.target is ops.CHECKED and user.args == args]
    call = _write_known(one, ops.QUANTIZE_MEASURED, {"reach": get_argument(measure, "reach"), "checks": bool(checks)})
    last = len(find_value(call)) - 1
    replace_node(measure, insert_result(call, last - bool(checks)))
    for check in checks:
        replace_node(check, insert_result(call, last))


def _write_known(one: Quantizer, target: Target, more: dict[str, Any]) -> Node:
    """Write one call in place of codes and floats, by a scale that is known.

    Floats that loops read stay loops if a loop computes them as fast: of codes, which take a byte in place of four.
    """
    shown = next((None for reader in one.dequantizers if reader.shown is None), one.tensor)
    readers = _list_floats(one, shown)
    if one.spec.rounding is Rounding.NEAREST and has_quick_loops():
        readers = [reader for reader in readers if _is_read_by_calls(reader.floats)]
    known = {"scale": one.scale, "zero_point": one.zero_point, "shows": shown is not None and bool(readers)}
    return _write_call(one, target, readers, {**known, **more}, before=one.codes)


def _write_call(one: Quantizer, target: Target, readers: list[Dequantizer], more: dict[str, Any], before: Node) -> Node:
    """Write a call, the codes first, if something reads them, then the floats of the readers; return the call."""
    codes, floats = len(readers) < len(one.codes.users), bool(readers)
    given = {"x": one.tensor, "key": one.key, "spec": one.text, "layout": one.layout, "site": one.site}
    call = insert_operator(one.codes.graph, target, {**given, **more, "codes": codes, "floats": floats}, before=before)
    if floats:
        made = insert_result(call, int(codes))
        for reader in readers:
            replace_node(reader.floats, made)
    if codes:
        one.codes.replace_all_uses_with(insert_result(call, 0))
    one.codes.graph.erase_node(one.codes)
    return call


def _is_read_by_calls(floats: Node) -> bool:
    """Return True if contractions alone read a tensor, which no loop computes."""
    return all(map(get_contraction, list_readers(floats)))
