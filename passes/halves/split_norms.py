"""Let the partitioner compute the result of a norm again from its input and the saved statistics."""

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.meta import get_value, is_backward
from qcompiler.passes.ir.quantizer import insert_operator
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops

_KINDS = {
    aten._native_batch_norm_legit_functional.default: "batch",
    aten.native_layer_norm.default: "layer",
    aten.native_group_norm.default: "group",
}
#: in these the statistics have the type of the input, so that the result is the same bit for bit
_EXACT = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class SplitNorms:
    """Y, mean, rstd = norm(X); read(Y) → read(norm_again(X, mean, rstd)), for batch, layer and group norm.

    The statistics are saved for the gradient of the norm in any case. `JoinNorms` gives forward its Y back.
    """

    name: ClassVar[str] = "split-norms"

    def __call__(self, halves: Halves) -> int:
        """Return the number of norms that were split."""
        if halves.joint is None or not halves.is_whole:
            return 0
        graph = halves.joint.graph
        found = [node for target in _KINDS for node in graph.find_nodes(op="call_function", target=target)]
        return sum(map(_split_norm, found))


def _split_norm(norm: Node) -> int:
    results = {item.args[1]: item for item in norm.users if item.target is operator.getitem}
    given = _find_arguments(norm)
    if given is None or not {0, 1, 2} <= results.keys() or not results[0].users:
        return 0
    for index in (2, 1):
        norm.append(results[index])  # in front of every reader of the result
    given |= {"mean": results[1], "rstd": results[2]}
    again = insert_operator(norm.graph, ops.NORM_AGAIN, given, after=results[2])
    if get_value(again).stride() != get_value(results[0]).stride():
        norm.graph.erase_node(again)
        return 0
    results[0].replace_all_uses_with(again)
    return 1


def _find_arguments(norm: Node) -> dict[str, Any] | None:
    """Return the arguments of `norm_again`, but for the statistics; None if the result would not be the same."""
    kind, x = str(_KINDS[norm.target]), get_argument(norm, "input")  # type: ignore[index]
    in_training = kind != "batch" or get_argument(norm, "training")
    if not in_training or is_backward(norm) or get_value(x).dtype not in _EXACT:
        return None
    sizes: list[int] = []
    if kind == "layer":
        sizes = list(get_argument(norm, "normalized_shape"))
    elif kind == "group":
        sizes = [get_argument(norm, "group")]
    same = {name: get_argument(norm, name) for name in ("weight", "bias", "eps")}
    return {"x": x, "kind": kind, "sizes": sizes, **same}
