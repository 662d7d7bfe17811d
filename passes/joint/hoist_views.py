"""Move quantizers above views, to the tensor that all readers share."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar, Final

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import insert_call, replace_node
from qcompiler.passes.ir.meta import get_value, is_backward, pin_to_backward
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.passes.ir.views import aten, is_view
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import WHOLE, Block, check_layout


@dataclasses.dataclass(frozen=True)
class HoistViews:
    """dequantize(quantize(view(X))) → view(dequantize(quantize(X))), if the same elements share scales.

    1. A permutation permutes the letters of the layout.
    2. A reshape gives each dimension of X the letter of the new dimensions, if that is one letter.
    3. A copy or an alias changes nothing.
    4. Refused if an axis would be flattened in another order and has an edge that is neither 1 nor whole, if two
       letters meet in one dimension, or if spatial edges would tile other rows.
    5. A clip mask moves with the quantizer: in_range(view(X)) → view(in_range(X)).
    6. A stochastic quantizer moves above a permutation too; the random bits then follow the elements of X.
    """

    name: ClassVar[str] = "hoist-views"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of views that quantizers moved above."""
        return sum(map(_hoist_quantizer, list_quantizers(module.graph)))


def _hoist_quantizer(quantizer: Quantizer) -> int:
    """Move one quantizer above all views that it may pass; return how many."""
    scale = quantizer.scale
    views, source, layout = _find_source(quantizer)
    if not views:
        return 0
    hoisted = quantizer.write_beside(source, layout)
    for reader in quantizer.dequantizers:
        plain = hoisted.insert_dequantizer(reader.dtype, reader.floats)
        replace_node(reader.floats, _view_like(plain, views, reader.floats))
    for mask in [user for user in scale.users if user.target is ops.IN_RANGE]:
        whole = hoisted.insert_mask()
        for node in list(mask.users):
            node.replace_input_with(mask, _view_like(whole, views, node))
        mask.graph.erase_node(mask)
    # of one scale a tensor, which no view changes
    for gradient in [user for user in scale.users if user.target in (ops.RANGE_GRADIENT, ops.SCALE_GRADIENT)]:
        gradient.replace_input_with(scale, hoisted.scale)
    quantizer.remove()
    return len(views)


def _find_source(quantizer: Quantizer) -> tuple[list[Node], Node, str]:
    """Return the views that a quantizer may move above, the uppermost first, and their source with its layout."""
    views: list[Node] = []
    source, layout = quantizer.tensor, quantizer.layout
    while is_view(source):
        above = layout_above(source, layout, quantizer.spec.block)
        if above is None:
            break
        views.insert(0, source)
        source, layout = source.all_input_nodes[0], above
    return views, source, layout


def _view_like(source: Node, like: Sequence[Node], reader: Node) -> Node:
    """Return the same views of another tensor, in front of a reader and in the same half."""
    for view in like:
        # codes that were packed lie in memory as new: a view of them may need a copy
        target = aten.reshape.default if view.target in _RESHAPES else view.target
        args = (source, *view.args[1:])
        source = insert_call(source.graph, target, args, dict(view.kwargs), before=reader)
        if is_backward(reader):
            pin_to_backward(source)
    return source


_RESHAPES: Final = (aten.view.default, aten._unsafe_view.default)


def layout_above(view: Node, layout: str, block: Block) -> str | None:
    """Return the layout of a view's source that makes the same blocks, or None if there is none."""
    source = view.args[0]
    assert isinstance(source, Node)
    order = _find_permutation(view)
    if order is not None:
        letters = [""] * len(order)
        for dim, letter in zip(order, layout, strict=True):
            letters[dim] = letter
        above = "".join(letters)
        return above if _same_order(above, layout, order, block) else None
    if view.target in (aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default):
        return layout
    return _reshape_layout(tuple(get_value(source).shape), tuple(get_value(view).shape), layout, block)


def _find_permutation(view: Node) -> list[int] | None:
    """Return the dimension of the source behind each dimension of a permuting view; None for any other view."""
    ndim = get_value(view).ndim
    order = list(range(ndim))
    if view.target is aten.permute.default:
        return [int(d) % ndim for d in view.args[1]]  # type: ignore[union-attr, arg-type]
    if view.target is aten.t.default:
        return order[::-1]
    if view.target is aten.transpose.int:
        a, b = (int(d) % ndim for d in view.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
        return order
    return None


def _same_order(above: str, below: str, order: list[int], block: Block) -> bool:
    """Case 4 for permutations: equal letters stay side by side and, if the edge matters, in the same order."""
    try:
        check_layout(above, len(above))
    except ValueError:
        return False
    for letter in set(above):
        dims = [dim for dim, at in zip(order, below, strict=True) if at == letter]
        if dims != sorted(dims) and letter != "s" and block.edge(letter) not in (1, WHOLE):
            return False
    return True


def _reshape_layout(source: tuple[int, ...], shape: tuple[int, ...], layout: str, block: Block) -> str | None:
    """Case 2: splits both shapes into the smallest groups of equal size, and carries letters group by group."""
    letters: list[str] = []
    for dims, outs in _group_dimensions(source, shape):
        here = [layout[o] for o in outs if shape[o] != 1] or [layout[o] for o in outs]
        kinds = set(here)
        if len(dims) == len(here) and [source[d] for d in dims] == [shape[o] for o in outs if shape[o] != 1]:
            letters += here
        elif len(kinds) == 1 and not ("s" in kinds and block.space not in (1, WHOLE)):
            letters += here[:1] * len(dims)
        elif not here:  # a dimension of extent 1 that the view drops
            letters += (letters[-1:] or ["b"]) * len(dims)
        elif dims:
            return None
    above = "".join(letters)
    runs = [letter for letter, _ in itertools.groupby(above)]
    return above if len(runs) == len(set(runs)) and len(above) == len(source) else None


def _group_dimensions(source: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return dimensions of two shapes in the smallest groups with equal products; extent 1 joins the group before."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(shape):
        dims: list[int] = []
        outs: list[int] = []
        left = right = 1
        while not dims or not outs or left != right:
            if (left <= right and i < len(source)) or j >= len(shape):
                if i >= len(source):
                    break
                dims.append(i)
                left, i = left * source[i], i + 1
            else:
                outs.append(j)
                right, j = right * shape[j], j + 1
        groups.append((dims, outs))
    return groups
