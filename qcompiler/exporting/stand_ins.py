"""How torch's exporter translates our operators: quantizers to stand-ins, rotations at once."""

from collections.abc import Callable
from typing import Any, Final

import onnx
import torch
from onnxscript.onnx_opset import opset21
from onnxscript.values import Op, Opset

from qcompiler.exporting import pools
from qcompiler.exporting.functions import DOMAIN
from qcompiler.runtime import ops, references

_TENSORS: Final = [
    f"tensor({name})" for name in ("float", "float16", "double", "bfloat16", "int8", "uint8", "int16", "uint16")
]


def _make_stand_in(name: str, inputs: int, texts: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Op:
    """Return an operator that no runtime knows, with the facts of the node in the graph of torch."""
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    given = [
        schema.FormalParameter(f"input{i}", f"T{i}", param_option=option.Optional if i else option.Single)
        for i in range(inputs)
    ]
    attributes = [schema.Attribute(text, schema.AttrType.STRING) for text in texts]
    attributes += [schema.Attribute(number, schema.AttrType.INT) for number in numbers]
    types = [(f"T{i}", _TENSORS, "") for i in ("", *range(inputs))]
    result = [schema.FormalParameter("output", "T")]
    return Op(
        Opset(DOMAIN, 1),
        name,
        schema(name, DOMAIN, 1, inputs=given, outputs=result, attributes=attributes, type_constraints=types),
    )


_SCALE: Final = _make_stand_in("Scale", 1, ("spec", "layout"))
_ZERO_POINT: Final = _make_stand_in("ZeroPoint", 2, ("spec", "layout"))
_QUANTIZE: Final = _make_stand_in("Quantize", 3, ("spec", "layout", "site"))
_DEQUANTIZE: Final = _make_stand_in("Dequantize", 3, ("spec", "layout"), ("dtype",))


def _translate_scale(x: Any, spec: str, layout: str) -> Any:
    return _SCALE(x, spec=spec, layout=layout)


def _translate_zero_point(x: Any, scale: Any, spec: str, layout: str) -> Any:
    return _ZERO_POINT(x, scale, spec=spec, layout=layout)


def _translate_quantize(x: Any, scale: Any, zero_point: Any, key: Any, spec: str, layout: str, site: str) -> Any:
    return _QUANTIZE(x, scale, zero_point, spec=spec, layout=layout, site=site)


def _translate_dequantize(codes: Any, scale: Any, zero_point: Any, spec: str, layout: str, dtype: int) -> Any:
    return _DEQUANTIZE(codes, scale, zero_point, spec=spec, layout=layout, dtype=dtype)


def _translate_rotate(x: Any, dim: int, size: int) -> Any:
    """Write a contraction of parts of `size` with the Hadamard matrix as plain operators, `dim` last."""
    op: Any = opset21
    ndim, extent = len(x.shape), x.shape[dim]
    order = [*(d for d in range(ndim) if d != dim), dim]
    kept = [0] * (ndim - 1)
    parts = op.Reshape(op.Transpose(x, perm=order), op.Constant(value_ints=[*kept, extent // size, size]))
    matrix = onnx.numpy_helper.from_array(references.make_rotation(size, torch.device("cpu")).numpy())
    turned = op.Reshape(op.MatMul(parts, op.Constant(value=matrix)), op.Constant(value_ints=[*kept, extent]))
    return op.Transpose(turned, perm=[order.index(d) for d in range(ndim)])


#: for `torch.onnx.export(custom_translation_table=…)`
TRANSLATIONS: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    ops.SCALE: _translate_scale,
    ops.ZERO_POINT: _translate_zero_point,
    ops.QUANTIZE: _translate_quantize,
    ops.DEQUANTIZE: _translate_dequantize,
    ops.ROTATE: _translate_rotate,
    **pools.TRANSLATIONS,
}
