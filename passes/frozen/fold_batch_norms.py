"""Batch norms become part of the convolution in front, the codes of whose weight stay as they are."""

import dataclasses
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.passes.frozen.frozen_graph import FrozenGraph
from qcompiler.passes.ir.edit import replace_node
from qcompiler.passes.ir.layers import BATCH_NORMS
from qcompiler.passes.ir.meta import get_value, module_path
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.passes.ir.views import aten
from qcompiler.passes.ir.walk import get_dequantizer
from qcompiler.runtime.numbers.biases import batch_norm_affine
from qcompiler.runtime.numbers.blocks import WHOLE, Block
from qcompiler.runtime.numbers.formats import IntFormat
from qcompiler.runtime.ranges.present import Current
from qcompiler.runtime.spec import Vjp

_BY_CHANNEL = Block(out=1, in_=WHOLE, space=WHOLE, batch=WHOLE, channel=WHOLE, group=WHOLE)


@dataclasses.dataclass(frozen=True)
class FoldBatchNorms:
    """batch_norm(convolution(x, w) + b) → convolution(x, w′) + b′, with w′ = gain · w and b′ = gain · b + offset.

    1. |gain| multiplies the scales of the weight, which are one float a tensor or an output channel; so the codes stay.
    2. Codes of a channel with a negative gain are negated.
    3. Every other batch norm stays, with a note that says why.

    Only if `active`; the notes of a graph come from the last run.
    """

    name: ClassVar[str] = "fold-batch-norms"
    active: bool = True

    def __call__(self, subject: FrozenGraph) -> int:
        """Return the number of batch norms that were folded."""
        if not self.active:
            return 0
        count, notes = 0, []
        for target in BATCH_NORMS:
            for norm in list(subject.graph.find_nodes(op="call_function", target=target)):
                reason = _fold_or_explain(subject, norm)
                count += not reason
                if reason:
                    notes.append(f"batch norm {module_path(norm)} stays in float: {reason}")
        subject.notes = tuple(notes)
        return count


def _fold_or_explain(subject: FrozenGraph, norm: Node) -> str:
    """Fold one batch norm, or return the reason why not."""
    layer = cast(Node, norm.args[0])
    reason = _explain_layer(layer)
    if reason:
        return reason
    floats = get_dequantizer(layer.args[1])
    quantizer = None if floats is None else Quantizer(floats.codes)
    if quantizer is None or subject.get_value(quantizer.tensor) is None or len(quantizer.codes.users) > 1:
        return "the weight is not quantized for this convolution alone"
    reason = _explain_weight(subject, quantizer)
    if reason:
        return reason
    gain, offset = _get_affine(subject, norm)
    _scale_weight(subject, quantizer, gain)
    bias = layer.args[2]
    before = 0.0 if bias is None else cast(Tensor, subject.get_value(cast(Node, bias))).double()
    numbers = (before * gain + offset).to(get_value(layer).dtype)
    layer.update_arg(2, subject.add_constant(numbers, f"{quantizer.site}#bias"))
    for result in list(norm.users):
        replace_node(result, layer)
    subject.graph.erase_node(norm)
    return ""


def _explain_layer(layer: Node) -> str:
    """Return the reason why nothing is folded into the input of a batch norm; empty for a convolution that fits."""
    if layer.target is aten.convolution.default and layer.args[6]:
        return "it stands behind a transposed convolution, which onnxruntime computes in float in any case"
    if layer.target is not aten.convolution.default or len(layer.users) > 1:
        return f"it reads {layer.name}, which is not a convolution that it alone reads"
    return ""


def _explain_weight(subject: FrozenGraph, quantizer: Quantizer) -> str:
    """Return the reason why no gain goes into the scales of a weight; empty if the gain does."""
    spec, steps = quantizer.spec, cast(Tensor, subject.get_value(quantizer.scale))
    if spec.scale.dtype is not torch.float32 or steps.numel() not in (1, len(steps)) or spec.has_zero_point:
        return f"the weight has other scales than one for each output channel: {spec}"
    if not isinstance(spec.format, IntFormat):
        return f"the weight has codes of {spec.format}"
    return ""


def _scale_weight(subject: FrozenGraph, quantizer: Quantizer, gain: Tensor) -> None:
    """Cases 1 and 2."""
    site = quantizer.site
    codes, steps = (cast(Tensor, subject.get_value(node)) for node in (quantizer.tensor, quantizer.scale))
    shape = (-1, *[1] * (codes.ndim - 1))
    sign = torch.where(gain < 0, -1, 1).reshape(shape).to(codes.dtype)
    subject.negated[site] = tuple((gain < 0).nonzero().flatten().tolist())
    turned = subject.add_constant(codes * sign, f"{site}#codes.folded")
    # a gain of 0 leaves sums of codes times 2^-126, which no bias sees
    scaled = (steps.double() * gain.abs().reshape(shape)).clamp(min=2.0**-126).float()
    scale = subject.add_constant(scaled, f"{site}#scale.folded")
    # the file needs neither a range nor a gradient, and some gradients allow no block but the tensor
    folded = dataclasses.replace(quantizer.spec, block=_BY_CHANNEL, range=Current(), vjp=Vjp.PASS)
    quantizer.fix(turned, scale, None, folded, quantizer.layout)


def _get_affine(subject: FrozenGraph, norm: Node) -> tuple[Tensor, Tensor]:
    """Return (gain, offset) of a batch norm as float64: y = gain·x + offset."""
    gamma, beta, mean, var = (
        None if part is None else cast(Tensor, subject.get_value(cast(Node, part))) for part in norm.args[1:5]
    )
    assert mean is not None
    assert var is not None
    return batch_norm_affine(gamma, beta, mean, var, float(cast(float, norm.args[-1])))
