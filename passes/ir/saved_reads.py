"""How backward reads a float that forward saves: by products with the gradient, or in a way that bends rounding."""

import operator
from collections.abc import Iterable
from typing import Final

import torch
from torch.fx import Graph, Node

from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import find_value, get_contraction, list_inputs
from qcompiler.passes.ir.views import aten, is_view
from qcompiler.runtime import ops

#: linear in every tensor that they read
_LINEAR: Final = frozenset(
    {
        *(aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten._to_copy.default, aten.expand.default),
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar),
        *(
            aten.cat.default,
            aten.stack.default,
            aten.slice.Tensor,
            aten.select.int,
            aten.repeat.default,
            aten.flip.default,
        ),
        *(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, operator.getitem),
        *(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.masked_fill.Scalar),
        *(aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.constant_pad_nd.default),
        *(aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default, ops.NORM_AGAIN),
    }
)
#: linear too, but no longer element by element
_REDUCTIONS: Final = frozenset({aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default})
#: functions whose slope is never far above 1: a step of rounding stays a step
_GENTLE: Final = frozenset(
    {
        *(
            aten.relu.default,
            aten.leaky_relu.default,
            aten._prelu_kernel.default,
            aten.hardtanh.default,
            aten.abs.default,
        ),
        *(
            aten.clamp.default,
            aten.clamp_min.default,
            aten.clamp_max.default,
            aten.maximum.default,
            aten.minimum.default,
        ),
        *(aten.gelu.default, aten.silu.default, aten.mish.default, aten.elu.default, aten.softplus.default),
        *(aten.tanh.default, aten.sigmoid.default, aten.hardswish.default, aten.hardsigmoid.default),
        *(aten.max_pool2d_with_indices.default,),
    }
)
#: gradients that read a float more than once, but never divide by it: norms, softmax, attention, activation functions
_BOUNDED: Final = frozenset(
    {
        *("native_batch_norm_backward", "native_layer_norm_backward", "native_group_norm_backward"),
        *("_fused_rms_norm_backward", "_softmax_backward_data"),
        *("_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward"),
        *("_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward"),
        *("gelu_backward", "silu_backward", "mish_backward", "tanh_backward", "sigmoid_backward"),
        *("hardswish_backward", "hardsigmoid_backward", "elu_backward", "softplus_backward", "log_sigmoid_backward"),
    }
)
#: gradients of two pieces, with a comparison in between
MASKED: Final = frozenset(
    {
        *(aten.threshold_backward.default, aten.leaky_relu_backward.default, aten._prelu_kernel_backward.default),
        *(aten.hardtanh_backward.default, aten.hardshrink_backward.default, aten.softshrink_backward.default),
    }
)


def list_gradients(graph: Graph) -> set[Node]:
    """Return the nodes of backward that depend on a gradient that comes in."""
    return list_dependents(node for node, _ in list_inputs(graph, InputKind.TANGENT))


def list_dependents(sources: Iterable[Node], *, elementwise: bool = False) -> set[Node]:
    """Return nodes and everything computed from them; `elementwise`: not what lies behind a sum over elements."""
    found = list(sources)
    known = set(found)
    for node in found:
        if not elementwise or (node.target not in _REDUCTIONS and get_contraction(node) is None):
            new = [user for user in node.users if user not in known]
            found += new
            known.update(new)
    return known


def find_bending(given: Node, gradients: set[Node], *, masks_follow: bool = False) -> Node | None:
    """Return the first call of backward that bends the rounding of a saved float; None if there is none.

    Where backward is linear in the float, stochastic rounding leaves the gradient right on average. A divisor, an
    argument of a logarithm or a root, and a comparison are bent: a code of 0 in place of 0.01 makes infinity of 100.

    Args:
        given: the input of backward.
        gradients: of `list_gradients`; what is linear in a gradient stays so behind it.
        masks_follow: comparisons are no fault, since a pass makes them in forward later.
    """
    alike = list_dependents([given], elementwise=True)
    found = [given]
    for node in found:
        for user in node.users:
            if masks_follow and (user.target in MASKED or _is_mask(user)):
                continue
            if not _reads_well(user, node, alike):
                return user
            if user not in gradients and _is_float(user) and user not in found and not _ends(user):
                found.append(user)
    return None


def _reads_well(user: Node, node: Node, alike: set[Node]) -> bool:
    """Return whether a call is linear in a float that it reads, or near enough."""
    if _ends(user) or user.target in _LINEAR or user.target in _REDUCTIONS or user.target in _GENTLE or is_view(user):
        return True
    if get_contraction(user) is not None:
        return True
    if user.target is aten.mul.Tensor:
        return sum(one in alike for one in user.args) == 1
    if user.target is aten.div.Tensor:
        return user.args[0] is node and user.args[1] not in alike
    return user.target is aten.pow.Tensor_Scalar and get_argument(user, "exponent") == 1


def _ends(user: Node) -> bool:
    """Return True for a reader behind which nothing is to be asked: outputs, quantizers, shapes, and `_BOUNDED`."""
    name = getattr(getattr(user.target, "_schema", None), "name", "")
    own = name.startswith("qcompiler::") and user.target is not ops.NORM_AGAIN
    return user.op == "output" or own or name.removeprefix("aten::") in _BOUNDED or name.endswith("_like")


def _is_mask(node: Node) -> bool:
    value = find_value(node)
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _is_float(node: Node) -> bool:
    value = find_value(node)
    return not isinstance(value, torch.Tensor) or value.is_floating_point()
