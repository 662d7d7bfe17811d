"""The registered operators, one after the other."""

import torch

from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

KEY, SITE = (123456789, -987654321), "layer.weight"


Tensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]


def run(
    x: torch.Tensor, spec: str, layout: str, dtype: torch.dtype, key: tuple[int, int] = KEY, site: str = SITE
) -> Tensors:
    """(scale, zero point or None, codes, values as `dtype`) by the registered operators."""
    scale = ops.SCALE(x, spec, layout)
    zero = ops.ZERO_POINT(x, scale, spec, layout) if parse_spec(spec).has_zero_point else None
    codes = ops.QUANTIZE(x, scale, zero, torch.tensor(key, dtype=torch.int32), spec, layout, site)
    return scale, zero, codes, ops.DEQUANTIZE(codes, scale, zero, spec, layout, dtype)
