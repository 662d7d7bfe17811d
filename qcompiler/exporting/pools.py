"""Translations for torch's exporter of operators that it has none for, or one that computes other numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnxscript.onnx_opset import opset21

from qcompiler.exporting.trace import ExportError
from qcompiler.exporting.windows import FREE_SIZE, cut_windows
from qcompiler.passes.ir.views import aten

op: Any = opset21


def _translate_pool(dims: int) -> Callable[..., Any]:
    """Return the translation for average pools of so many dimensions; in one dimension torch gives no divisor."""

    def translate(
        x: Any,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil: bool = False,
        with_padding: bool = True,
        divisor: int | None = None,
    ) -> Any:
        return _write_average_pool(x, dims, kernel, stride, padding, ceil, with_padding, divisor)

    return translate


def _write_average_pool(
    x: Any,
    dims: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    with_padding: bool,
    divisor: int | None,
) -> Any:
    """Write torch's average pool over the last `dims` dimensions; ONNX's ceil_mode counts other windows.

    The padding behind the tensor is made as long as the last window needs. If torch divides by another number than the
    size of the window, the quotient of both is a factor of that output.
    """
    kernel, padding = _spread_numbers(kernel, dims), _spread_numbers(padding, dims)
    stride = _spread_numbers(stride, dims) if stride else kernel
    sizes, over, factors = list(x.shape)[-dims:], [0] * dims, np.ones(())
    if ceil and all(isinstance(size, int) for size in sizes):
        over, factors, ceil = *cut_windows(sizes, kernel, stride, padding), False
    if divisor is not None:
        factors = np.array(math.prod(kernel) / divisor)
    if ceil and (divisor is not None or (with_padding and any(padding))):
        raise ExportError(FREE_SIZE)
    with_padding = (with_padding and not ceil) or divisor is not None
    alone = x.shape.rank() == dims + 1  # one sample without a batch, of which ONNX knows nothing
    y = op.AveragePool(
        op.Unsqueeze(x, op.Constant(value_ints=[0])) if alone else x,
        kernel_shape=kernel,
        strides=stride,
        pads=[*padding, *(pad + more for pad, more in zip(padding, over, strict=True))],
        count_include_pad=int(with_padding),
        ceil_mode=int(ceil),
    )
    y = op.Squeeze(y, op.Constant(value_ints=[0])) if alone else y
    if not with_padding or np.all(factors == 1):
        return y
    return op.Mul(y, op.CastLike(op.Constant(value=onnx.numpy_helper.from_array(factors.astype(np.float32))), y))


def _spread_numbers(numbers: Sequence[int], dims: int) -> list[int]:
    """Return one number for each dimension."""
    return list(numbers) if len(numbers) == dims else [numbers[0]] * dims


def _translate_trilinear(
    first: Any,
    second: Any,
    third: Any,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    summed: Sequence[int],
    unroll_dim: int = 1,
) -> Any:
    """Write Σ first · second · third over the dimensions in `summed`: the sum of `nn.Bilinear`."""
    rank = len(first.shape) + len(expand1)
    letters = "abcdefghijklmnop"[:rank]
    missing = (expand1, expand2, expand3, summed)
    parts = ["".join(one for d, one in enumerate(letters) if d not in out) for out in missing]
    return op.Einsum(first, second, third, equation=f"{','.join(parts[:3])}->{parts[3]}")


#: for `torch.onnx.export(custom_translation_table=…)`
TRANSLATIONS: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    aten._trilinear.default: _translate_trilinear,
    aten.avg_pool1d.default: _translate_pool(1),
    aten.avg_pool2d.default: _translate_pool(2),
    aten.avg_pool3d.default: _translate_pool(3),
}
