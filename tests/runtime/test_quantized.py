"""A quantized tensor as one value: its parts belong together, or are refused."""

import dataclasses

import pytest
import torch

from qcompiler.runtime import ops
from qcompiler.runtime.quantized import Quantized, explain_mismatch
from qcompiler.runtime.spec import parse_spec

SPECS = ("int8:max:b2c2:nearest:pass", "affine4:real:tensor:nearest:pass", "e4m3:fit:b2c2:stochastic:pass")


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", SPECS)
def test_the_operators_make_the_same(text, x):
    made = Quantized.from_tensor(x, parse_spec(text), "bc")
    again = Quantized.from_tensor(x, parse_spec(text), "bc")
    assert torch.equal(made.codes, again.codes)
    scale = ops.SCALE(x, text, "bc")
    point = ops.ZERO_POINT(x, scale, text, "bc") if made.spec.has_zero_point else None
    key = torch.zeros(2, dtype=torch.int32) if "stochastic" in text else None
    codes = ops.QUANTIZE(x, scale, point, key, text, "bc", "what-if")
    expected = ops.DEQUANTIZE(codes, scale, point, text, "bc", torch.float16)
    assert torch.equal(made.dequantize(torch.float16), expected)


def test_parts_that_do_not_belong_together_are_refused(x):
    made = Quantized.from_tensor(x, parse_spec(SPECS[1]), "bc")
    for changes, complaint in (
        ({"codes": made.codes.float()}, r"codes are torch.float32; valid: torch.uint8"),
        ({"scale": made.scale.reshape(1)}, r"scale is torch.float32 \[1\]; valid: torch.float32 \[1, 1\]"),
        ({"scale": made.scale.double()}, r"scale is torch.float64 \[1, 1\]; valid: torch.float32"),
        ({"zero_point": None}, "needs a zero point"),
        ({"zero_point": made.zero_point.reshape(1)}, r"zero point is torch.uint8 \[1\]; valid: torch.uint8 \[1, 1\]"),
        ({"spec": parse_spec("uint4:real:tensor:nearest:pass")}, "has no zero point"),
    ):
        with pytest.raises(ValueError, match=f"^quantized tensor: .*{complaint}"):
            dataclasses.replace(made, **changes)
    assert explain_mismatch(made.codes, made.scale, made.zero_point, made.spec, "bc") == ""


def test_empty():
    made = Quantized.from_tensor(torch.empty(0, 3), parse_spec(SPECS[0]), "bc")
    assert made.dequantize().shape == (0, 3)
