"""Attention masks are no data: an infinity in a mask, or the lowest float, leaves a quantizer no range for the rest."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch.fx import Node

from qcompiler.passes.ir.edit import insert_call, replace_node
from qcompiler.passes.ir.facts import Contraction, InputKind, Operand
from qcompiler.passes.ir.meta import get_contraction, get_input, get_value, has_value, is_backward, set_fact
from qcompiler.passes.ir.views import aten, is_view

#: contraction with an addend in front of the operands → the contraction alone
_ALONE: Final = {aten.baddbmm.default: aten.bmm.default, aten.addmm.default: aten.mm.default}
_SOFTMAXES: Final = frozenset(
    {aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default, aten.logsumexp.default}
)
#: between scores and the softmax stand: scaling, masking, soft caps, casts
_ON_SCORES: Final = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.tanh.default,
        aten.clamp.default,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten._to_copy.default,
    }
)


def adds_mask(node: Node) -> bool:
    """Return True for a contraction with an addend that is no bias: one that does not come from parameters alone."""
    addend = node.args[0] if node.target in _ALONE else None
    if not isinstance(addend, Node):
        return False
    kinds = {_get_kind(source) for source in _reach_nodes([addend], _list_inputs) if source.op == "placeholder"}
    return InputKind.PARAMETER not in kinds or not kinds <= {InputKind.PARAMETER, InputKind.BUFFER}


def split_mask(node: Node, fact: Contraction) -> Node:
    """baddbmm(mask, A, B) → bmm(A, B) + mask; returns the contraction, which has the fact of the whole."""
    graph, addend = node.graph, node.args[0]
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    alone = total = insert_call(graph, _ALONE[node.target], node.args[1:3], before=node)  # type: ignore[index]
    set_fact(alone, dataclasses.replace(fact, operands=tuple(_move_operands(fact))))
    if alpha != 1:
        total = insert_call(graph, aten.mul.Tensor, (total, alpha), before=node)
    if beta not in (0, 1):
        addend = insert_call(graph, aten.mul.Tensor, (addend, beta), before=node)
    if beta != 0:
        total = insert_call(graph, aten.add.Tensor, (total, addend), before=node)
    replace_node(node, total)
    return alone


def is_masked_sum(node: Node) -> bool:
    """Return True for a sum of scores: one that only a softmax reads, or one with a mask for a term."""
    return _is_read_by_softmax_only(node) or any(_is_mask(term, node) for term in node.all_input_nodes)


def _move_operands(fact: Contraction) -> Iterable[Operand]:
    """Return the operands one place further to the front."""
    return (dataclasses.replace(operand, arg=operand.arg - 1) for operand in fact.operands)


def _is_read_by_softmax_only(node: Node) -> bool:
    """Return True if every forward reader is a softmax, or computes element by element for a softmax alone."""
    readers = [user for user in node.users if not is_backward(user)]
    return bool(readers) and all(
        reader.target in _SOFTMAXES
        or ((reader.target in _ON_SCORES or is_view(reader)) and _is_read_by_softmax_only(reader))
        for reader in readers
    )


def _is_mask(term: Node, total: Node) -> bool:
    """True for a term without parameters, contractions and data: truth values, whole numbers, inputs that are masks.

    A floating input is data if a contraction reads a result of the input, other than through the sum `total`.
    """
    sources = _reach_nodes([term], lambda node: () if _is_truth(node) else node.all_input_nodes)
    if any(_get_kind(node) is InputKind.PARAMETER or get_contraction(node) is not None for node in sources):
        return False
    inputs = [node for node in sources if _get_kind(node) is InputKind.INPUT and get_value(node).is_floating_point()]
    readers = _reach_nodes(inputs, lambda node: () if node is total or is_backward(node) else node.users)
    return not any(get_contraction(node) is not None for node in readers)


def _is_truth(node: Node) -> bool:
    return has_value(node) and getattr(get_value(node), "dtype", None) is torch.bool  # several results have no dtype


def _get_kind(node: Node) -> InputKind | None:
    fact = get_input(node)
    return None if fact is None else fact.kind


def _list_inputs(node: Node) -> Iterable[Node]:
    return node.all_input_nodes


def _reach_nodes(start: Iterable[Node], neighbors: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Return every node on a way from `start`, these included."""
    found, waiting = set(start), list(start)
    while waiting:
        new = [node for node in neighbors(waiting.pop()) if node not in found]
        found.update(new)
        waiting += new
    return found
