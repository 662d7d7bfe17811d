"""Save codes and scales for backward, packed, instead of floats."""

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import insert_call, replace_node
from qcompiler.passes.ir.meta import (
    get_value,
    is_backward,
    is_pinned_saved,
    is_recomputed,
    pin_saved,
    pin_to_backward,
)
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.passes.ir.views import aten, is_view, list_views, view_root
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.packing import per_byte


@dataclasses.dataclass(frozen=True)
class SaveQuantized:
    """1. Backward reads the codes of forward tensors, with scale and zero point. Codes that are `pinned` are saved; of
       a tensor that is kept in float too the partitioner decides by bytes, and backward may make them again.

    2. Codes of 4 bits and less are packed in forward and unpacked in backward: bwd(codes) → bwd(unpack(pack(codes))).
    3. The gradient of relu asks only if its output was positive. If that output is quantized, one bit an element
       takes the place of the float: threshold_backward(G, Y, 0) → where(unpack(pack(Y ≤ 0)), 0, G).
    4. The gradient of relu6 and hardtanh asks only if the input lay inside: one bit an element.
    5. A clip mask is saved as one bit an element too.

    Codes that are made again are the same: the scale of a range with a state is saved, and so is the random key.
    """

    name: ClassVar[str] = "save-quantized"
    #: True: codes are saved even if the tensor is kept in float too
    pinned: bool = False

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of saved tensors that were rewritten or pinned."""
        graph = module.graph
        changes = sum(_save_codes(one, self.pinned) for one in list_quantizers(graph))
        for node in graph.find_nodes(op="call_function", target=aten.threshold_backward.default):
            changes += _save_relu_mask(node)
        for node in graph.find_nodes(op="call_function", target=aten.hardtanh_backward.default):
            changes += _save_clip_mask(node)
        for mask in graph.find_nodes(op="call_function", target=ops.IN_RANGE):
            changes += _save_mask(mask)
        return changes


def _save_codes(quantizer: Quantizer, pinned: bool) -> int:
    """Cases 1 and 2 for one quantizer."""
    codes, readers = quantizer.codes, [one for one in quantizer.dequantizers if is_backward(one.floats)]
    if is_backward(codes) or not readers:
        return 0
    pinned = not _is_checkpointed(quantizer.tensor) and (pinned or not _is_kept_in_float(quantizer.tensor))
    for part in (readers[0].scale, quantizer.zero_point):
        if part is not None and (pinned or quantizer.spec.range.has_state):
            pin_saved(part)
    form = quantizer.spec.format
    changed = pinned and not is_pinned_saved(codes)
    if pinned:
        pin_saved(codes)  # of two to a byte the partitioner saves the packed ones: half the bytes
    if per_byte(form.bits) == 1:
        return int(changed)
    floats = [reader.floats for reader in readers]
    whole = _through_bytes(codes, form.bits, form.dtype.is_signed, min(floats))
    for reader in floats:
        reader.replace_input_with(codes, whole)
    return 1


def _through_bytes(source: Node, bits: int, signed: bool, reader: Node) -> Node:
    """Return unpack(pack(source)), unpacked in front of a backward reader."""
    packed = insert_call(source.graph, ops.PACK, (source, bits), after=source)
    shape = list(get_value(source).shape)
    whole = insert_call(source.graph, ops.UNPACK, (packed, shape, bits, signed), before=reader)
    pin_to_backward(whole)
    return whole


def _save_relu_mask(node: Node) -> int:
    """Case 3 for one gradient of relu."""
    _, output, threshold = node.args
    assert isinstance(output, Node)
    root = view_root(output)
    if is_backward(root) or not _is_quantized(root) or get_value(root).shape != get_value(output).shape:
        return 0
    zero = insert_call(node.graph, aten.le.Scalar, (root, threshold), after=root)
    mask = _through_bytes(zero, 1, False, node)
    if not _is_kept_in_float(root):
        pin_saved(root)  # not computed again for a bit: pinned nodes are saved, or not needed
    _mask_gradient(node, mask)
    return 1


def _save_clip_mask(node: Node) -> int:
    """Case 4 for one gradient of relu6 or hardtanh."""
    _, source, low, high = node.args
    assert isinstance(source, Node)
    if is_backward(source):
        return 0
    below = insert_call(node.graph, aten.le.Scalar, (source, low), after=source)
    above = insert_call(node.graph, aten.ge.Scalar, (source, high), after=below)
    clipped = insert_call(node.graph, aten.logical_or.default, (below, above), after=above)
    mask = _through_bytes(clipped, 1, False, node)
    _mask_gradient(node, mask)
    return 1


def _mask_gradient(node: Node, mask: Node) -> None:
    """Replace the gradient of a function by zero under the mask, and by the gradient of the result elsewhere."""
    masked = insert_call(node.graph, aten.where.ScalarSelf, (mask, 0.0, node.args[0]), before=node)
    replace_node(node, masked)


def _save_mask(mask: Node) -> int:
    """Case 5 for one clip mask."""
    readers = [user for user in mask.users if is_backward(user)]
    if not readers:
        return 0
    small = _through_bytes(mask, 1, False, min(readers))
    for reader in readers:
        reader.replace_input_with(mask, small)
    return 1


def _is_checkpointed(tensor: Node) -> bool:
    """Return True if the model computes the tensor again in backward, and so its codes too."""
    return is_recomputed(view_root(tensor))


def _is_kept_in_float(tensor: Node) -> bool:
    """Return True for a tensor that backward reads in float too, for an operator without a contraction; no input."""
    root = view_root(tensor)
    if root.op == "placeholder":
        return False
    gradient = aten.threshold_backward.default  # reads one bit
    found = (user for view in list_views(root) for user in view.users if user.target is not gradient)
    return any(is_backward(user) and not is_view(user) for user in found)


def _is_quantized(root: Node) -> bool:
    """Return True if some view of the tensor is read by a quantizer."""
    return any(user.target is ops.QUANTIZE for view in list_views(root) for user in view.users)
