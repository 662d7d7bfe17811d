"""Operators give the strides that their shape rule and their decomposition say, in every layout of what they read."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

SPECS = (
    "int8:fit:tensor:nearest:pass",
    "int4:fit:b4c3:nearest:pass",
    "affine8:real:tensor:nearest:clip",
    "e4m3:fit:each:nearest:pass",
    "e2m1:fit:c16:nearest:pass",
    "int4:fit:c3s4:stochastic:pass",
)
LAYOUTS = {
    "plain": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], -1)[..., ::2],
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "one number": lambda t: t[:1, :1, :1, :1].expand(t.shape),
}
#: layouts in which every element has a place of its own, without gaps: results keep them
DENSE = ("plain", "channels last", "transposed")


def check(op, *args):
    """Runs an operator; its strides are those of its fake and of its decomposition. Extents of 1 do not count."""
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    real = op(*args)
    with mode:
        others = op(*fakes), ops.DECOMPOSITIONS[op](*fakes)
    for other in others:
        assert (other.shape, other.dtype) == (real.shape, real.dtype)
        assert strides(other) == strides(real), op
    return real


def strides(t):
    return [stride for stride, extent in zip(t.stride(), t.shape, strict=True) if extent != 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS)
def test_quantizers(spec, layout):
    x = LAYOUTS[layout](torch.randn(4, 6, 5, 8))
    form = parse_spec(spec).format
    scale = check(ops.SCALE, x, spec, "bcss")
    zero = check(ops.ZERO_POINT, x, scale, spec, "bcss") if parse_spec(spec).has_zero_point else None
    key = torch.zeros(2, dtype=torch.int32) if "stochastic" in spec else None
    codes = check(ops.QUANTIZE, x, scale, zero, key, spec, "bcss", "site")
    for beside in ((), (x,)):
        floats = check(ops.DEQUANTIZE, codes, scale, zero, spec, "bcss", torch.float32, *beside)
        assert layout not in DENSE or strides(floats) == strides(codes) == strides(x)
    check(ops.IN_RANGE, x, scale, spec, "bcss", zero)
    check(ops.CHECKED, scale, x, spec, "bcss")
    if form.bits <= 4:
        packed = check(ops.PACK, codes, form.bits)
        check(ops.UNPACK, packed, list(codes.shape), form.bits, codes.dtype.is_signed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_rotations_and_copies(layout):
    x = LAYOUTS[layout](torch.randn(4, 6, 5, 8))
    packed = check(ops.PACK, x > 0, 1)
    check(ops.UNPACK, packed, list(x.shape), 1, False)
    check(ops.ROTATE, x, 1, 2)
    assert check(ops.LAY_OUT, x, [240, 1, 48, 6]).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_grad", LAYOUTS)
def test_scaled_gradients(layout, of_grad):
    x, grad = LAYOUTS[layout](torch.randn(4, 6, 5, 8)), LAYOUTS[of_grad](torch.randn(4, 6, 5, 8))
    spec = "int4:real:tensor:nearest:ewgs(0.5)"
    check(ops.SCALE_GRADIENT, grad, x, ops.SCALE(x, spec, "bcss"), spec)
