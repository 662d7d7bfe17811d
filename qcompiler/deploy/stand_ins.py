"""How torch's exporter translates our operators: to stand-ins in a domain of our own, which lower.py replaces."""

from collections.abc import Callable
from typing import Any, Final

import onnx
from onnxscript.values import Op, Opset

from qcompiler.deploy.functions import DOMAIN
from qcompiler.runtime import ops

_TENSORS: Final = [
    f"tensor({name})" for name in ("float", "float16", "double", "bfloat16", "int8", "uint8", "int16", "uint16")
]


def _stand_in(name: str, inputs: int, texts: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Op:
    """An operator that no runtime knows, with what its node in the graph of torch says."""
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


_SCALE: Final = _stand_in("Scale", 1, ("spec", "layout"))
_ZERO_POINT: Final = _stand_in("ZeroPoint", 2, ("spec", "layout"))
_QUANTIZE: Final = _stand_in("Quantize", 3, ("spec", "layout", "site"))
_DEQUANTIZE: Final = _stand_in("Dequantize", 3, ("spec", "layout"), ("dtype",))


def _scale(x: Any, spec: str, layout: str) -> Any:
    return _SCALE(x, spec=spec, layout=layout)


def _zero_point(x: Any, scale: Any, spec: str, layout: str) -> Any:
    return _ZERO_POINT(x, scale, spec=spec, layout=layout)


def _quantize(x: Any, scale: Any, zero_point: Any, key: Any, spec: str, layout: str, site: str) -> Any:
    return _QUANTIZE(x, scale, zero_point, spec=spec, layout=layout, site=site)


def _dequantize(codes: Any, scale: Any, zero_point: Any, spec: str, layout: str, dtype: int) -> Any:
    return _DEQUANTIZE(codes, scale, zero_point, spec=spec, layout=layout, dtype=dtype)


#: for `torch.onnx.export(custom_translation_table=…)`
TRANSLATIONS: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    ops.SCALE: _scale,
    ops.ZERO_POINT: _zero_point,
    ops.QUANTIZE: _quantize,
    ops.DEQUANTIZE: _dequantize,
}
