"""Let the partitioner compute the result of a batch norm again from its input and the saved statistics."""

import dataclasses
import operator
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.ir.meta import get_value, is_backward
from qcompiler.passes.ir.quantizer import insert_operator
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops

#: in these the statistics have the type of the input, so that the result is the same bit for bit
_EXACT = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class SplitBatchNorms:
    """Y, mean, rstd = batch_norm(X); read(Y) → read(batch_norm_again(X, mean, rstd)).

    The statistics are saved for the gradient of the batch norm in any case. `JoinBatchNorms` gives forward its Y back.
    """

    name: ClassVar[str] = "split-batch-norms"

    def __call__(self, halves: Halves) -> int:
        """Return the number of batch norms that were split."""
        if halves.joint is None or not halves.is_whole:
            return 0
        target = aten._native_batch_norm_legit_functional.default
        return sum(map(_split_norm, halves.joint.graph.find_nodes(op="call_function", target=target)))


def _split_norm(norm: Node) -> int:
    x, weight, bias, _, _, training, _, eps = norm.args
    results = {item.args[1]: item for item in norm.users if item.target is operator.getitem}
    is_known = isinstance(x, Node) and get_value(x).dtype in _EXACT and {0, 1, 2} <= results.keys()
    if not (training and is_known) or is_backward(norm) or not any(map(is_backward, results[1].users)):
        return 0
    given = {"x": x, "weight": weight, "bias": bias, "mean": results[1], "rstd": results[2], "eps": eps}
    for index in (2, 1):
        norm.append(results[index])  # in front of every reader of the result
    again = insert_operator(norm.graph, ops.BATCH_NORM_AGAIN, given, after=results[2])
    results[0].replace_all_uses_with(again)
    return 1
