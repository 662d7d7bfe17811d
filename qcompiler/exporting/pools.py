"""Translations for torch's exporter of operators that it has none for, or one that computes other numbers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.onnx_opset import opset21

from qcompiler.exporting.trace import ExportError
from qcompiler.passes.ir.views import aten

op: Any = opset21


def _translate_pool(dims: int) -> Callable[..., Any]:
    """The translation for average pools of so many dimensions; in one dimension torch gives no divisor."""

    def translate(
        x: Any,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil: bool = False,
        with_padding: bool = True,
        divisor: int | None = None,
    ) -> Any:
        return _average_pool(x, dims, kernel, stride, padding, ceil, with_padding, divisor)

    return translate


def _average_pool(
    x: Any,
    dims: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    with_padding: bool,
    divisor: int | None,
) -> Any:
    """torch's average pool over the last `dims` dimensions, without ONNX's ceil_mode, which counts other windows.

    The padding behind the tensor is made as long as the last window needs. Where torch divides by another number than
    the size of the window, its quotient is a factor of that output.
    """
    kernel, padding = _each(kernel, dims), _each(padding, dims)
    stride = _each(stride, dims) if stride else kernel
    sizes, over, factors = list(x.shape)[-dims:], [0] * dims, np.ones(())
    if ceil and all(isinstance(size, int) for size in sizes):
        over, factors, ceil = *_cut_windows(sizes, kernel, stride, padding), False
    if divisor is not None:
        factors = np.array(math.prod(kernel) / divisor)
    if ceil and (divisor is not None or (with_padding and any(padding))):
        raise ExportError(_FREE)
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


_FREE: Final = (
    "ceil_mode over a free dimension, whose size decides which windows are cut; valid: ceil_mode=False, or that "
    "dimension fixed"
)


def _cut_windows(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[list[int], np.ndarray]:
    """How far the last window of each dimension reaches over the padding; size of each window, whole by cut."""
    starts = [_starts(*one) for one in zip(sizes, kernel, stride, padding, strict=True)]
    ends = [size + pad for size, pad in zip(sizes, padding, strict=True)]
    axes = list(zip(starts, kernel, ends, strict=True))
    over = [max(own[-1] + edge - end, 0) for own, edge, end in axes]
    quotients = ([edge / (min(at + edge, end) - at) for at in own] for own, edge, end in axes)
    return over, np.asarray(functools.reduce(np.multiply.outer, quotients, np.ones(())))


def _starts(size: int, kernel: int, stride: int, padding: int) -> list[int]:
    """Where the windows of one dimension begin, with ceil_mode: none in the padding behind the tensor."""
    windows = range(_count_windows(size, kernel, stride, padding))
    return [at for at in (stride * i - padding for i in windows) if at < size]


def _count_windows(size: int, kernel: int, stride: int, padding: int) -> int:
    """How many windows ONNX counts with ceil_mode."""
    return -(-(size + 2 * padding - kernel) // stride) + 1


def close_windows(graph: ir.Graph) -> None:
    """Makes `ceil_mode` of each MaxPool padding: ONNX counts a last window that begins in the padding, torch does not.

    Raises:
        ExportError: that depends on a free dimension.
    """
    for node in [node for node in graph if node.op_type == "MaxPool"]:
        given = node.attributes
        if "ceil_mode" not in given or not given["ceil_mode"].as_int():
            continue
        assert node.inputs[0] is not None
        assert node.inputs[0].shape is not None
        kernel, ones = given["kernel_shape"].as_ints(), [1] * len(given["kernel_shape"].as_ints())
        stride, dilation = (given[key].as_ints() if key in given else ones for key in ("strides", "dilations"))
        pads = list(given["pads"].as_ints()) if "pads" in given else [0, 0] * len(kernel)
        reach = [step * (edge - 1) + 1 for step, edge in zip(dilation, kernel, strict=True)]
        sizes = [size if isinstance(size, int) else None for size in node.inputs[0].shape][-len(kernel) :]
        axes = list(zip(sizes, reach, stride, pads, strict=False))
        if any(size is None and step + pad > edge for size, edge, step, pad in axes):
            raise ExportError(f"export: {node.name}: {_FREE}")
        if all(size is not None for size in sizes) and any(_is_behind(*one) for one in axes):
            over, _ = _cut_windows(*zip(*axes, strict=True))
            pads[len(kernel) :] = [pad + more for pad, more in zip(pads[len(kernel) :], over, strict=True)]
            given["ceil_mode"], given["pads"] = ir.AttrInt64("ceil_mode", 0), ir.AttrInt64s("pads", pads)


def _is_behind(size: int | None, kernel: int, stride: int, padding: int) -> bool:
    """True where ONNX counts a window that begins behind the tensor."""
    if size is None:
        return False
    return len(_starts(size, kernel, stride, padding)) < _count_windows(size, kernel, stride, padding)


def _each(numbers: Sequence[int], dims: int) -> list[int]:
    """One number for each dimension."""
    return list(numbers) if len(numbers) == dims else [numbers[0]] * dims


def _trilinear(
    first: Any,
    second: Any,
    third: Any,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    summed: Sequence[int],
    unroll_dim: int = 1,
) -> Any:
    """Σ first · second · third over the dimensions in `summed`: what `nn.Bilinear` computes."""
    rank = len(first.shape) + len(expand1)
    letters = "abcdefghijklmnop"[:rank]
    missing = (expand1, expand2, expand3, summed)
    parts = ["".join(one for d, one in enumerate(letters) if d not in out) for out in missing]
    return op.Einsum(first, second, third, equation=f"{','.join(parts[:3])}->{parts[3]}")


#: for `torch.onnx.export(custom_translation_table=…)`
TRANSLATIONS: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    aten._trilinear.default: _trilinear,
    aten.avg_pool1d.default: _translate_pool(1),
    aten.avg_pool2d.default: _translate_pool(2),
    aten.avg_pool3d.default: _translate_pool(3),
}
