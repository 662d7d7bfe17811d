"""Kernels that multiply inside, out of reach for quantizers: by the names of operators, with the reason."""

import functools
import re
from collections.abc import Iterable
from typing import Any, Final

import torch

from qcompiler.passes.ir.views import aten

#: patterns of operator names, tried in order → why the contractions inside cannot be reached
OPAQUE: Final = {
    r"transformer_encoder_layer_fwd": "fused inference kernel of a whole encoder layer",
    r"native_multi_head_attention": "fused inference kernel of multi-head attention",
    r"attention|multi_head|scaled_dot|attn": "fused attention: its two products are inside one kernel",
    r"\b_?(?:\w+_)?(?:rnn|lstm|gru)(?:_(?!flatten_weight)\w+)?$": "fused recurrent kernel",
    r"^(?:dot|vdot|addr)$": "vector product",
    r"^(?:mv|addmv)$": "matrix-vector product",
    r"^(?:_trilinear|bilinear)$": "trilinear product",
    r"^addbmm$": "sum of products in one kernel",
    r"^conv_tbc(?:_backward)?$": "convolution with channels last, of a kernel of its own",
    r"^(?:_?cdist|_euclidean_dist)": "distance kernel",
    r"^_int_mm$|pack_mm|dyn_quant_matmul": "already an integer product",
    r"^_scaled_mm": "already a scaled product",
    r"grouped_mm": "grouped product of a fused kernel",
    r"sparse.*(?:mm|matmul|linear)|spmm": "product of a sparse matrix",
    r"^(?:linalg_matrix_exp|_compute_linear_combination|linalg_householder_product|ormqr)$": (
        "product of matrices inside of one kernel"
    ),
    r"affine_grid_generator$": "grid that a kernel computes by a product of its own",
    r"^(?!.*(?:convert|reorder|convolution_mode)).*conv(?:olution|\d|_|$)": "convolution of a kernel of its own",
    r"^(?:_foreach_mm|_addmm_activation|einsum|tensordot|linalg_multi_dot|chain_matmul)$": "fused kernel of products",
    r"^(?:\w*_)?matmul(?:_backward)?$|^(?:_mixed_dtypes_|mkldnn_)?linear(?:_backward\w*)?$": "fused kernel of products",
    r"^triton_kernel_wrapper": "Triton kernel of the model: nothing is known of what it multiplies",
    r"^(?:mm|bmm|addmm|baddbmm)$": "product of another type than its operands",
}
#: the operators that passes annotate, and quantize
_REACHED: Final = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten.convolution_backward.default,
    }
)
#: words in names of operators that other libraries define
_FOREIGN: Final = re.compile(
    r"conv(?!ert)|attention|attn|matmul|gemm|(?:^|_)(?:linear|lstm|gru|rnn|moe|b?mm)(?:_|$)", re.IGNORECASE
)
#: libraries whose operators are known one by one; functions of torch itself stand in graphs that are not taken apart
_KNOWN: Final = ("aten", "prims", "prim", "qcompiler", "higher_order", "torch")


def explain_name(target: Any) -> str:
    """Return why the contractions of an operator cannot be reached; empty for one that has none, or that passes reach.

    Operators of other libraries are known by name alone; see `explain_call`.
    """
    return "" if target in _REACHED else _explain_pattern(*_split_name(target))


def explain_call(target: Any, given: Iterable[Any], returned: Any) -> str:
    """Return `explain_name`, and for an operator of another library that may multiply, a reason that says so.

    Such an operator takes two floating tensors of two and more dimensions and returns a floating tensor. The name need
    not tell: `mine::project(x, w)`. One that only combines elements is named too, since nobody can know.

    Args:
        target: the operator.
        given: tensors among the arguments, or fake values; anything else is passed over.
        returned: the results, or the fake values of the results.
    """
    library, _name = _split_name(target)
    reason = explain_name(target)
    if reason or library in _KNOWN:
        return reason
    results = returned if isinstance(returned, list | tuple) else [returned]
    matrices = [one for one in given if _is_floating(one) and one.ndim > 1]
    if len(matrices) < 2 or not any(map(_is_floating, results)):
        return ""
    return f"operator of {library}: nobody knows whether it multiplies; if so, in float"


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def is_reached(target: Any) -> bool:
    """Return True for the contractions that passes annotate, forward and backward."""
    return target in _REACHED


@functools.cache
def _explain_pattern(library: str, name: str) -> str:
    if library not in _KNOWN:
        return f"operator of {library}, which multiplies inside of its own kernel" if _FOREIGN.search(name) else ""
    return next((reason for pattern, reason in OPAQUE.items() if re.search(pattern, name)), "")


def _split_name(target: Any) -> tuple[str, str]:
    """Return the library and the name of an operator, a higher-order operator, or a function of torch."""
    name = str(getattr(target, "__name__", target))
    return str(getattr(target, "namespace", "torch")), name.partition(".")[0]
