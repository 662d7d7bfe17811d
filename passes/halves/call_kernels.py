"""Call kernels of our own for quantizers, in place of loops that a compiler makes."""

import collections
import dataclasses
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import has_argument
from qcompiler.passes.ir.edit import insert_result
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.ir.quantizer import Dequantizer, Quantizer, insert_operator, list_dequantizers, list_quantizers
from qcompiler.runtime import ops
from qcompiler.runtime.kernels.quantizers import BLOCKS, FLOATS, KNOWN, QuantizerFacts, explain_quantizer


@dataclasses.dataclass
class Tally:
    """The quantizers that a compiler got so far."""

    #: those in kernels of our own
    called: int = 0
    #: why quantizers stay loops of the compiler → how many
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class CallKernels:
    """scale(X), quantize(X, scale), dequantize(codes, scale) → quantize_blocks(X), where a kernel is faster.

    1. The last pass over the copy of a half that a compiler gets: afterwards nobody looks for quantizers.
    2. Of a scale that is known, or that other loops find: quantize(X, scale) → quantize_by(X, scale).
    3. A dequantizer of codes that come from elsewhere: dequantize(codes, scale) → dequantize_blocks(codes, scale).
    4. A quantizer that stays a loop is counted with the reason.
    """

    name: ClassVar[str] = "call-kernels"
    tally: Tally = dataclasses.field(default_factory=Tally)

    def __call__(self, halves: Halves) -> int:
        """Return the number of quantizers and dequantizers that became calls."""
        return sum(self._call_half(half) for half in halves.graphs)

    def _call_half(self, half: GraphModule) -> int:
        calls = sum(self._call_quantizer(one) for one in list_quantizers(half.graph))
        return calls + sum(self._call_dequantizer(one) for one in list_dequantizers(half.graph))

    def _call_quantizer(self, one: Quantizer) -> bool:
        facts = _describe(one.tensor, one)
        if not _explain_blocks(one, facts):
            _write_blocks(one)
        elif reason := explain_quantizer(KNOWN, facts):
            self.tally.reasons[reason] += 1
            return False
        else:
            _write_known(one)
        self.tally.called += 1
        return True

    def _call_dequantizer(self, one: Dequantizer) -> bool:
        if one.shown is not None or one.dtype is not torch.float32 or get_value(one.codes).element_size() > 1:
            return False
        if one.codes.target is ops.QUANTIZE or explain_quantizer(FLOATS, _describe(one.codes, one)):
            return False
        shared = {"scale": one.scale, "zero_point": one.zero_point, "spec": one.text, "layout": one.layout}
        made = insert_operator(
            one.floats.graph, ops.DEQUANTIZE_BLOCKS, {"codes": one.codes, **shared}, before=one.floats
        )
        one.floats.replace_all_uses_with(made)
        one.floats.graph.erase_node(one.floats)
        return True


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
        if reader.scale is one.scale and reader.shown is shown and reader.dtype is torch.float32
    ]


def _write_blocks(one: Quantizer) -> None:
    """Write one call in place of scale, codes and floats."""
    readers, graph = _list_floats(one, None), one.codes.graph
    given = {"x": one.tensor, "key": one.key, "spec": one.text, "layout": one.layout, "site": one.site}
    wanted = {"codes": len(readers) < len(one.codes.users), "floats": bool(readers)}
    call = insert_operator(graph, ops.QUANTIZE_BLOCKS, {**given, **wanted}, before=one.scale)
    codes, scale, floats = (insert_result(call, place) for place in range(3))
    _replace_readers(readers, floats)
    one.scale.replace_all_uses_with(scale)
    _replace_codes(one, codes)


def _write_known(one: Quantizer) -> None:
    """Write one call in place of codes and floats."""
    readers, graph = _list_floats(one, None), one.codes.graph
    shows = not readers
    readers = readers or _list_floats(one, one.tensor)
    given = {"x": one.tensor, "scale": one.scale, "zero_point": one.zero_point, "key": one.key}
    shared = {"spec": one.text, "layout": one.layout, "site": one.site}
    wanted = {"codes": len(readers) < len(one.codes.users), "floats": bool(readers), "shows": shows and bool(readers)}
    call = insert_operator(graph, ops.QUANTIZE_BY, {**given, **shared, **wanted}, before=one.codes)
    codes, floats = (insert_result(call, place) for place in range(2))
    _replace_readers(readers, floats)
    _replace_codes(one, codes)


def _replace_readers(readers: list[Dequantizer], floats: Node) -> None:
    for reader in readers:
        reader.floats.replace_all_uses_with(floats)
        reader.floats.graph.erase_node(reader.floats)


def _replace_codes(one: Quantizer, codes: Node) -> None:
    one.codes.replace_all_uses_with(codes)
    one.codes.graph.erase_node(one.codes)
