"""The backward of quantizers: no gradient if a value was clipped, or one that is scaled by the error of rounding."""

import dataclasses
import operator
from typing import ClassVar

from torch.fx import Graph, GraphModule, Node

from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.facts import Contraction
from qcompiler.passes.ir.meta import is_backward, iterate_contractions, pin_to_backward
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.walk import get_dequantizer
from qcompiler.passes.rules import Role
from qcompiler.runtime import ops
from qcompiler.runtime.spec import Ewgs, Vjp


@dataclasses.dataclass(frozen=True)
class MaskGradients:
    """dX → where(in_range(X), dX, 0) for every operand X whose spec says `vjp: clip` and whose format can clip.

    The mask is computed in forward and applied to the result of each gradient contraction of X; the gradients of
    several consumers are summed behind the mask, which is the same: Σ m·gᵢ = m·Σ gᵢ. If the range comes from the
    present tensor, formats with a zero point and a `real` or `fit` scale over signed codes never clip, so there is no
    mask.

    dX → scale_gradient(dX, X, scale) if the spec says `vjp: ewgs`; gradients of several consumers one by one.
    """

    name: ClassVar[str] = "mask-gradients"

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of gradients that were masked."""
        pairs = gradient_pairs(module.graph)
        return sum(_mask_gradient(*pair) for pair in pairs) + sum(_scale_gradient(*pair) for pair in pairs)


def gradient_pairs(graph: Graph) -> list[tuple[Contraction, Node, Quantizer]]:
    """(gradient contraction, the node that holds its result, the quantizer of the forward operand)."""
    forward: dict[str, tuple[Node, Contraction]] = {}
    pairs = []
    for node, fact in iterate_contractions(graph):
        if not is_backward(node) and fact.operands:
            forward[fact.site] = (node, fact)
        if fact.gradient_of is None or fact.site not in forward:
            continue
        reader, forward_fact = forward[fact.site]
        floats = get_dequantizer(reader.args[forward_fact.operands[fact.gradient_of].arg])
        result = _find_result(node, fact.gradient_of)
        if result is not None and floats is not None:
            pairs.append((fact, result, Quantizer(floats.codes)))
    return pairs


def _mask_gradient(fact: Contraction, result: Node, quantizer: Quantizer) -> int:
    spec = quantizer.spec
    done = any(user.target is aten.where.ScalarOther for user in result.users)
    if spec.vjp is not Vjp.CLIP or not spec.saturates or done:
        return 0
    mask = quantizer.insert_mask()
    readers, place = list(result.users), result
    if is_transposed(fact):
        mask = place = insert_call(result.graph, aten.transpose.int, (mask, -2, -1), after=result)
        pin_to_backward(mask)
    masked = insert_call(result.graph, aten.where.ScalarOther, (mask, result, 0.0), after=place)
    for reader in readers:
        reader.replace_input_with(result, masked)
    return 1


def _scale_gradient(fact: Contraction, result: Node, quantizer: Quantizer) -> int:
    readers = list(result.users)
    done = any(user.target is ops.SCALE_GRADIENT for reader in [result, *readers] for user in reader.users)
    if not isinstance(quantizer.spec.vjp, Ewgs) or done:
        return 0
    turn = is_transposed(fact)
    grad = insert_call(result.graph, aten.transpose.int, (result, -2, -1), after=result) if turn else result
    scaled = quantizer.insert_gradient(ops.SCALE_GRADIENT, grad)
    if turn:
        scaled = insert_call(result.graph, aten.transpose.int, (scaled, -2, -1), after=scaled)
    for reader in readers:
        reader.replace_input_with(result, scaled)
    return 1


def _find_result(node: Node, gradient_of: int) -> Node | None:
    """Return the node that holds the gradient: the contraction itself, or an item of a convolution's gradient."""
    if node.target is not aten.convolution_backward.default:
        return node
    items = [u for u in node.users if u.target is operator.getitem and u.args[1] == gradient_of]
    return items[0] if items else None


def is_transposed(fact: Contraction) -> bool:
    """Return True if autograd computes the transpose: dA = G·Bᵀ and dB = Aᵀ·G are direct, B·Gᵀ and Gᵀ·A are not."""
    if fact.operator == "convolution":
        return False
    gradient_left = fact.operands[0].role is Role.GRADIENT
    return gradient_left != (fact.gradient_of == 0)
