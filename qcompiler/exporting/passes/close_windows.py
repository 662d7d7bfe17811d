"""Max pools without ceil_mode, which ONNX counts otherwise than torch."""

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.exporting.exported_model import ExportedModel
from qcompiler.exporting.trace import ExportError
from qcompiler.exporting.windows import FREE_SIZE, counts_one_more, cut_windows


@dataclasses.dataclass(frozen=True)
class CloseWindows:
    """MaxPool with ceil_mode → the same with more padding, if ONNX counts a last window that begins in the padding.

    torch does not count that window. A pool on which both agree stays.

    Raises:
        ExportError: the count depends on a free dimension.
    """

    name: ClassVar[str] = "close-windows"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of pools."""
        pools = [node for node in subject.graph if node.op_type == "MaxPool"]
        return sum(_close_pool(node) for node in pools if node.attributes.get_int("ceil_mode", 0))


def _close_pool(node: ir.Node) -> bool:
    given = node.attributes
    assert node.inputs[0] is not None
    assert node.inputs[0].shape is not None
    kernel, ones = given["kernel_shape"].as_ints(), [1] * len(given["kernel_shape"].as_ints())
    stride, dilation = (given[key].as_ints() if key in given else ones for key in ("strides", "dilations"))
    pads = list(given["pads"].as_ints()) if "pads" in given else [0, 0] * len(kernel)
    reach = [step * (edge - 1) + 1 for step, edge in zip(dilation, kernel, strict=True)]
    sizes = [size if isinstance(size, int) else None for size in node.inputs[0].shape][-len(kernel) :]
    axes = list(zip(sizes, reach, stride, pads, strict=False))
    if any(size is None and step + pad > edge for size, edge, step, pad in axes):
        raise ExportError(f"export: {node.name}: {FREE_SIZE}")
    if any(size is None for size in sizes) or not any(counts_one_more(*axis) for axis in axes):
        return False
    over, _ = cut_windows(*zip(*axes, strict=True))
    pads[len(kernel) :] = [pad + more for pad, more in zip(pads[len(kernel) :], over, strict=True)]
    given["ceil_mode"], given["pads"] = ir.AttrInt64("ceil_mode", 0), ir.AttrInt64s("pads", pads)
    return True
