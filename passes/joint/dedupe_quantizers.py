"""Quantize every tensor once: merge quantizers that give the same codes."""

import dataclasses
from collections.abc import Hashable
from typing import ClassVar, Final

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.arguments import iterate_arguments
from qcompiler.passes.ir.edit import replace_node
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.runtime import ops

_MERGED: Final = (ops.SCALE, ops.ZERO_POINT, ops.QUANTIZE, ops.IN_RANGE)


@dataclasses.dataclass(frozen=True)
class DedupeQuantizers:
    """quantize(X, s, spec, layout, site₁) … quantize(X, s, spec, layout, site₂) → the first, read by both.

    Two quantizers are equal if tensor, spec (with the block) and layout are. The site, which names random bits and the
    state of a range, becomes the site of the first reader: the same with and without a backward. Forward, input
    gradient and weight gradient of one layer meet here if one block is legal for all three; so do three projections of
    one input. Dequantizes stay apart: each belongs to the half of the reader.
    """

    name: ClassVar[str] = "dedupe-quantizers"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of quantizers that were merged into another."""
        first: dict[Hashable, Node] = {}
        merged = 0
        for node in list(module.graph.nodes):
            if node.target not in _MERGED:
                continue
            kept = first.setdefault((node.target, _make_key(node)), node)
            if kept is not node:
                if node.target is ops.QUANTIZE and min(node.users) < min(kept.users):
                    Quantizer(kept).rename(Quantizer(node).site)
                replace_node(node, kept)
                merged += node.target is ops.QUANTIZE
        return merged


def _make_key(node: Node) -> Hashable:
    """Return the arguments that make two calls equal: all but the name of the site."""
    return tuple((name, argument) for name, argument in iterate_arguments(node) if name != "site")
