"""Ranges, power-of-two exponents and real scales of blocks, against the oracle and by worked examples."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch

from qcompiler.runtime import scales
from qcompiler.runtime.numbers.formats import BITS
from qcompiler.runtime.spec import parse_spec

INF, NAN = math.inf, math.nan
RULES = ("max", "fit", "ceil", "round", "one")
NAMES = [f"{kind}{bits}:{rule}" for kind in ("int", "uint") for bits in BITS for rule in RULES]
FLOATS = ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e3m0", "e3m0r4", "e3m0r4x2", "e4m3b11"]
NAMES += [f"{name}:{rule}" for name in FLOATS for rule in ("max", "fit", "one")]
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
        ("int8:max", 127.00001, 0),  # MXINT8: 2^(⌊log2 127⌋ − 6)
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
        ("int8:ceil", 1.0, -7),  # a power of two: code 2^7, saturated to 127
        ("int8:ceil", 1.0000001, -6),
        ("int8:ceil", 0.9999999, -7),
        ("int8:round", 1.0, -7),
        ("int8:round", 1.4142135, -7),  # the last float32 below √2
        ("int8:round", 1.4142137, -6),
        ("int8:round", 2.0, -6),
        ("e2m1:max", 6.0, 0),  # OCP MX: 2^(⌊log2 6⌋ − 2)
        ("e2m1:max", 7.99, 0),  # saturates to 6
        ("e2m1:max", 3.99, -1),
        ("e2m1:fit", 6.0, 0),
        ("e2m1:fit", 6.0001, 1),
        ("e4m3:max", 511.0, 0),
        ("e4m3:fit", 448.0, 0),
        ("e4m3:fit", 448.1, 1),
        ("e5m2:fit", 57344.0, 0),
        ("e3m0:fit", 16.0, 0),
        ("e3m0:fit", 16.1, 1),
        ("e3m0r4:fit", 64.0, 0),
        ("e3m0r4x2:fit", 64.0, 0),  # both phases of a tensor have one scale, though this one reaches 128
        ("e3m0r4x2:fit", 65.0, 1),
        ("e5m2:fit", 2.0**-120, -126),
        ("e2m1:one", 1e30, 0),
        ("int8:one", 0.0, 0),
        ("int8:one", NAN, 128),
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
        tops = [read.reach * powers, (read.reach + 0.5) * powers, math.sqrt(2) * powers]
        edges = np.concatenate([[0], powers, *tops]).astype(np.float32)
    below, above = np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(INF))
    amax = np.concatenate([edges, below, above, np.array([INF, NAN], np.float32)])
    got = scales.power_of_two(torch.from_numpy(amax), parse_spec(spec)).numpy()
    assert oracle.same(got, oracle.step_bytes(amax, read))


@pytest.mark.parametrize("spec", SPECS)
def test_each_rule_keeps_what_it_promises(oracle: ModuleType, spec: str) -> None:
    amax = torch.from_numpy(np.abs(oracle.patterns("float16").astype(np.float32)))
    amax = amax[torch.isfinite(amax) & (amax > 0)].double()
    parsed = parse_spec(spec)
    step = scales.get_factor(scales.power_of_two(amax.float(), parsed)).double()
    form, power = parsed.format, 2**parsed.format.magnitude_bits
    if parsed.scale == "fit":
        assert torch.all(amax <= form.reach * step)
        assert torch.all(amax > form.reach * step / 2)
    elif parsed.scale == "max":  # f·2^E in steps of 2^(E−m) is f·2^m, and ½ ≤ f < 1
        assert torch.all(amax < power * step)
        assert torch.all(amax >= power * step / 2)
    elif parsed.scale == "ceil":
        assert torch.all(amax <= power * step)
        assert torch.all(amax > power * step / 2)
    elif parsed.scale == "round":
        assert torch.all(amax**2 < 2 * (power * step) ** 2)
        assert torch.all(amax**2 > (power * step) ** 2 / 2)
    else:
        assert torch.all(step == 1)


def test_factor_of_every_byte() -> None:
    stored = torch.arange(1, 256, dtype=torch.int32).to(torch.uint8)
    factors = scales.get_factor(stored)
    assert factors.dtype == torch.float32
    assert factors[:-1].tolist() == [2.0 ** (byte - 127) for byte in range(1, 255)]
    assert math.isnan(factors[-1])


def test_factor_of_a_real_scale_is_itself() -> None:
    stored = torch.tensor([0.1, NAN, 2.0**-126])
    assert scales.get_factor(stored) is stored


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


@pytest.mark.parametrize("spec", [spec for spec in SPECS if ":max:" in spec])
def test_max_is_the_rule_of_ocp_mx(oracle: ModuleType, spec: str) -> None:
    """2^(⌊log2 amax⌋ − emax), with emax of the element format (0 for MXINT8, whose step is 2^−6 of it)."""
    amax = np.abs(oracle.patterns("float16").astype(np.float64))
    amax = amax[np.isfinite(amax) & (amax >= 2.0**-24)]
    parsed = parse_spec(spec)
    emax = math.floor(math.log2(parsed.format.reach))
    expected = np.floor(np.log2(amax) + 1e-9).astype(int) - emax + 127  # no float16 is that near below a power of two
    got = scales.power_of_two(torch.from_numpy(amax.astype(np.float32)), parsed)
    assert np.array_equal(got.numpy(), expected)


def two_level(amax: list[float], name: str = "e2m1") -> list[float]:
    ends = torch.tensor(amax)
    return scales.from_ends(-ends, ends, parse_spec(f"{name}:two-level:each:nearest:pass")).tolist()


def test_two_level_by_hand() -> None:
    # amax of the tensor 2688 = 6·448: the unit is 1, and each scale is e4m3(amax/6)
    assert two_level([2688.0, 6.0, 6.3, 6.5, 0.0, 1e-6]) == [448, 1, 1, 1.125, 2**-9, 2**-9]
    # a block that is not finite is NaN and leaves the others alone
    assert two_level([2688.0, 6.0, 0.0])[1:] == [1, 2**-9]
    with_bad = two_level([2688.0, INF, 6.0, NAN])
    assert [with_bad[0], with_bad[2]] == [448, 1]
    assert math.isnan(with_bad[1])
    assert math.isnan(with_bad[3])
    # integers of 4 bits have 7·448; all zeros and subnormal tensors have the smallest scale there is
    assert two_level([3136.0, 7.0], "int4") == [448, 1]
    assert two_level([0.0, 0.0]) == [2**-126, 2**-126]
    assert two_level([2.0**-140]) == [2**-126]
    assert two_level([]) == []


@pytest.mark.parametrize("reach", [6.0, 7.0, 448.0])
def test_two_level_scales_of_normal_blocks_are_within_a_17th(reach: float) -> None:
    random = torch.Generator().manual_seed(0)
    amax = torch.rand(4096, generator=random) + 2.0**-7
    scale = scales.two_level_scale(amax, reach).double()
    # e4m3 rounds by at most half of 2^−3 of the lower end of a binade, relative to amax/reach 1/17; 2^−20: four float32
    # operations; blocks of 2^−7 of the largest are normal numbers of e4m3, as 448·2^−8 > 2^−6
    assert torch.all((scale * reach / amax.double() - 1).abs() <= 1 / 17 + 2.0**-20)
