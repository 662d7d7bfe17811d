"""Evaluate with the biases that an integer engine adds: whole multiples of the unit of the engine."""

import dataclasses
import itertools
from typing import ClassVar, Final, cast

import torch
from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.facts import Contraction, InputKind
from qcompiler.passes.ir.layers import batch_norm_behind
from qcompiler.passes.ir.meta import get_input, get_value, iterate_contractions
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.passes.ir.views import aten, is_view, view_root
from qcompiler.passes.ir.walk import find_quantizer
from qcompiler.passes.rules import Role
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import TENSOR
from qcompiler.runtime.numbers.formats import IntFormat

#: contractions that add a bias → the argument
_BIAS: Final = {aten.convolution.default: 2, aten.addmm.default: 0}


@dataclasses.dataclass(frozen=True)
class RoundBiases:
    """bias → integer_bias(bias, scale of the input, scale of the weight), if sums of codes are integers.

    The sums are integers if the input has one float scale that does not depend on the input, and the weight one, or one
    for each output channel, both with integer codes. A batch norm that alone reads a convolution belongs to the layer:
    then the offset β changes, by the rounding of the bias of both together. Engines fold none into a transposed
    convolution.

    Only if the recipe asks for `integer_biases`, in eval mode (`active`): training keeps the float biases.
    """

    name: ClassVar[str] = "round-biases"
    active: bool = False

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of biases that were rounded."""
        return (
            sum(_round_bias(node, fact) for node, fact in list(iterate_contractions(module.graph)))
            if self.active
            else 0
        )


def _round_bias(node: Node, fact: Contraction) -> int:
    scales = _find_scales(node, fact)
    if scales is None:
        return 0
    bias = node.args[_BIAS[node.target]]  # type: ignore[index]
    norm = batch_norm_behind(node) if node.target is aten.convolution.default and not node.args[6] else None
    place, index = (node, _BIAS[node.target]) if norm is None else (norm, 2)  # type: ignore[index]
    rest = () if norm is None else (*norm.args[1:5], norm.args[-1])
    terms = [term for term in (bias, place.args[index]) if isinstance(term, Node)]
    if (norm is None and not terms) or not all(map(_is_held, terms)):
        return 0
    place.update_arg(index, insert_call(node.graph, ops.INTEGER_BIAS, (bias, *scales, *rest), before=place))
    return 1


def _is_held(bias: Node) -> bool:
    """Return True for a float32 [C] of the model itself, which is known before the input is."""
    fact = get_input(view_root(bias))
    held = fact is not None and fact.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    return held and get_value(bias).dtype is torch.float32 and get_value(bias).ndim == 1


def _find_scales(node: Node, fact: Contraction) -> tuple[Node, Node] | None:
    """Return the scales of input and weight; None if sums of the codes are no integers of one unit a channel."""
    roles = [operand.role for operand in fact.operands]
    if node.target not in _BIAS or node.kwargs or roles != [Role.ACTIVATION, Role.WEIGHT]:
        return None
    read = [cast(Node, node.args[operand.arg]) for operand in fact.operands]
    x, weight = map(find_quantizer, read)
    if x is None or weight is None or not (_is_whole(x) and _is_by_channel(weight, get_value(node).shape[1])):
        return None
    if weight.layout.count("o") > 1 and _is_permuted(read[1]):  # channels in another order than the scales
        return None
    return x.scale, weight.scale


def _has_float_scales(quantizer: Quantizer) -> bool:
    """Return True for a quantizer of integers with float scales."""
    spec = quantizer.spec
    return isinstance(spec.format, IntFormat) and spec.scale.dtype is torch.float32


def _is_whole(quantizer: Quantizer) -> bool:
    """Return True for one scale that is known before the tensor is."""
    spec = quantizer.spec
    return _has_float_scales(quantizer) and spec.has_known_scale and spec.block == TENSOR


def _is_by_channel(quantizer: Quantizer, channels: int) -> bool:
    """True for one scale, or one for each of the output channels; of a transposed weight, groups share theirs."""
    counts = tuple(get_value(quantizer.scale).shape)
    runs = ((letter, len(list(run))) for letter, run in itertools.groupby(quantizer.layout))
    axes = "".join(letter * (length if letter == "s" else 1) for letter, length in runs)
    split = {letter: count for letter, count in zip(axes, counts, strict=True) if count != 1}
    return _has_float_scales(quantizer) and split in ({}, {"o": channels})


def _is_permuted(weight: Node) -> bool:
    """Return True if a weight is read through a view that changes the order of dimensions."""
    while is_view(weight):
        if weight.target in (aten.t.default, aten.transpose.int, aten.permute.default):
            return True
        weight = cast(Node, weight.args[0])
    return False
