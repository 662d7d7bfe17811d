"""Ranges, power-of-two exponents and real scales of blocks, against the oracle and by worked examples."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch

from qcompiler.runtime import scales
from qcompiler.runtime.formats import BITS
from qcompiler.runtime.spec import parse_spec

INF, NAN = math.inf, math.nan
NAMES = [f"{kind}{bits}:{rule}" for kind in ("int", "uint") for bits in BITS for rule in ("max", "fit")]
SPECS = [f"{name}:each:nearest:pass" for name in NAMES]


def exponent(amax: float, spec: str) -> int:
    """The exponent k of the step 2^k, from the stored byte."""
    return int(scales.power_of_two(torch.tensor([amax]), parse_spec(f"{spec}:each:nearest:pass"))) - 127


@pytest.mark.parametrize(
    ("spec", "amax", "k"),
    [
        ("int8:max", 1.0, -6),  # 1 = ½·2¹: step 2^(1−7), code 64
        ("int8:fit", 1.0, -6),
        ("int8:max", 127.5 / 64, -6),  # code 127, saturated
        ("int8:fit", 127.5 / 64, -5),
        ("int8:fit", 127.0, 0),  # 127·2⁰ holds it exactly
        ("int8:fit", 127.00001, 1),
        ("int8:max", 127.00001, 0),
        ("int8:max", 128.0, 1),
        ("int4:fit", 7.0, 0),
        ("int4:fit", 7.25, 1),
        ("int2:fit", 1.0, 0),
        ("int2:fit", 1.5, 1),
        ("int2:max", 1.0, 0),  # E − m = 1 − 1
        ("int2:max", 1.5, 0),
        ("int16:fit", 32767.0, 0),
        ("int16:fit", 32767.5, 1),
        ("uint8:fit", 255.0, 0),
        ("uint8:fit", 255.5, 1),
        ("uint8:max", 255.5, 0),
        ("uint16:fit", 65535.0, 0),
        ("uint16:fit", 65535.5, 1),
        ("int8:max", 0.0, -126),
        ("int8:fit", 2.0**-149, -126),  # subnormal: rounds on the grid of 2^−126 …
        ("int8:fit", 127 * 2.0**-126, -126),  # … up to its last code
        ("int8:fit", 127.5 * 2.0**-126, -125),
        ("int8:max", 2.0**127, 121),
        ("int2:max", 2.0**127, 127),
        ("int2:fit", 1.5 * 2.0**127, 127),  # 2^128 is no float32: saturates
        ("int8:fit", INF, 128),
        ("int8:max", NAN, 128),
    ],
)
def test_exponent_by_hand(spec: str, amax: float, k: int) -> None:
    assert exponent(amax, spec) == k


@pytest.mark.parametrize("spec", SPECS)
def test_exponent_beside_every_power_of_two_and_every_edge_of_the_codes(oracle: ModuleType, spec: str) -> None:
    powers = 2.0 ** np.arange(-149, 128, dtype=np.float64)
    read = oracle.read_spec(spec)
    with np.errstate(over="ignore"):
        edges = np.concatenate([[0], powers, read.top * powers, (read.top + 0.5) * powers]).astype(np.float32)
    below, above = np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(INF))
    amax = np.concatenate([edges, below, above, np.array([INF, NAN], np.float32)])
    got = scales.power_of_two(torch.from_numpy(amax), parse_spec(spec)).numpy()
    assert oracle.same(got, oracle.step_bytes(amax, read))


@pytest.mark.parametrize("spec", SPECS)
def test_fit_is_the_smallest_step_that_does_not_saturate(oracle: ModuleType, spec: str) -> None:
    amax = torch.from_numpy(np.abs(oracle.patterns("float16").astype(np.float32)))
    amax = amax[torch.isfinite(amax) & (amax > 0)].double()
    parsed = parse_spec(spec)
    step = scales.factor(scales.power_of_two(amax.float(), parsed)).double()
    if parsed.scale == "fit":
        assert torch.all(amax <= parsed.format.qmax * step)
        assert torch.all(amax > parsed.format.qmax * step / 2)
    else:  # f·2^E in steps of 2^(E−m) is f·2^m, and ½ ≤ f < 1
        assert torch.all(amax < 2**parsed.format.magnitude_bits * step)
        assert torch.all(amax >= 2**parsed.format.magnitude_bits * step / 2)


def test_factor_of_every_byte() -> None:
    stored = torch.arange(1, 256, dtype=torch.int32).to(torch.uint8)
    factors = scales.factor(stored)
    assert factors.dtype == torch.float32
    assert factors[:-1].tolist() == [2.0 ** (byte - 127) for byte in range(1, 255)]
    assert math.isnan(factors[-1])


def test_factor_of_a_real_scale_is_itself() -> None:
    stored = torch.tensor([0.1, NAN, 2.0**-126])
    assert scales.factor(stored) is stored


@pytest.mark.parametrize(
    ("low", "high", "levels", "expected"),
    [
        (0.0, 127.0, 127, 1.0),
        (-1.0, 2.0, 3, 1.0),
        (0.0, 1.0, 127, float(np.float32(1) / np.float32(127))),
        (-(2.0**127), 2.0**127, 255, float(np.float32(2.0**128 / 255))),  # high − low overflows, the scale does not
        (0.0, 0.0, 7, 2.0**-126),
        (0.0, 2.0**-140, 7, 2.0**-126),
        (-INF, 0.0, 7, NAN),
        (0.0, INF, 7, NAN),
        (NAN, NAN, 7, NAN),
    ],
)
def test_real_scale(low: float, high: float, levels: int, expected: float) -> None:
    got = scales.real_scale(torch.tensor([low]), torch.tensor([high]), levels)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), [expected])
