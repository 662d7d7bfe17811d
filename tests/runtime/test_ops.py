"""The operators against the oracle: every 16-bit pattern, every shape, layout, block and memory order; then by hand."""

import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_calls import KEY, SITE, run

from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import AXES, Block
from qcompiler.runtime.numbers.formats import BITS, FloatFormat, parse_format
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.spec import QuantSpec, Scale, parse_spec

INF, NAN = math.inf, math.nan


#: format and scale: every legal pair of integers, floats of each shape and source with every scale
RULES = {"int": list(Scale), "uint": list(Scale), "affine": [Scale.REAL]}


PAIRS = [f"{kind}{bits}:{rule}" for kind, rules in RULES.items() for bits in BITS for rule in rules]


FLOAT_NAMES = ["e4m3", "e4m3nan", "e5m2", "e5m2inf", "e3m2", "e2m3", "e2m1", "e4m3b11", "e3m0", "e3m0r4", "e3m0r4x2"]


FLOAT_NAMES += ["e1m2", "e5m10", "e6m9inf"]


FLOAT_RULES = ("max", "fit", "real", "one", "two-level")


PAIRS += [f"{name}:{rule}" for name in FLOAT_NAMES for rule in FLOAT_RULES]


HALVES = (torch.float16, torch.bfloat16)


FLOATS = (*HALVES, torch.float32)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="session")
def check(oracle: ModuleType, array: Callable[[torch.Tensor], np.ndarray]) -> Callable[..., None]:
    """Asserts that the operators and the oracle agree bit for bit on a tensor."""

    def compare(x: torch.Tensor, spec: str, layout: str, dtype: torch.dtype, key: tuple[int, int] = KEY) -> None:
        expected = oracle.quantize(array(x), spec, layout, key, SITE)
        scale, zero, codes, values = run(x, spec, layout, dtype, key)
        assert oracle.same(array(scale), expected.scale), "scale"
        assert (zero is None) == (expected.zero is None)
        if zero is not None:
            assert oracle.same(array(zero), expected.zero), "zero point"
        else:
            assert oracle.same(array(ops.IN_RANGE(x, scale, spec, layout)), expected.in_range), "in_range"
        assert oracle.same(array(codes), expected.codes), "codes"
        assert oracle.same(array(values), oracle.cast(expected.values, name_of(dtype))), "values"

    return compare


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.sample(64)
def test_every_16_bit_pattern(oracle: ModuleType, tensor: Callable, check: Callable[..., None], pair: str) -> None:
    for dtype, rounding in itertools.product(HALVES, Rounding):
        x = oracle.patterns(name_of(dtype))
        # a block of its own for each pattern meets every exponent; beside a random other one it meets every inner code
        check(tensor(x), f"{pair}:each:{rounding}:pass", "c", dtype)
        other = np.random.default_rng(0).permutation(x)
        check(tensor(np.stack([x, other])), f"{pair}:b2:{rounding}:pass", "bc", torch.float32)


@st.composite
def cases(draw: Callable[..., Any]) -> tuple[torch.Tensor, str, str, torch.dtype]:
    """(tensor in a random memory order, spec, layout, output dtype)."""
    name, rule = draw(st.sampled_from(PAIRS)).split(":")
    spec = QuantSpec(
        format=parse_format(name),
        scale=Scale(rule),
        block=Block(**{name: draw(st.integers(0, 10)) for name in AXES.values()}),
        rounding=draw(st.sampled_from(list(Rounding))),
    )
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    letters, place, layout = draw(st.permutations(list(AXES))), 0, ""
    for _ in shape:
        layout += letters[place]
        place += draw(st.integers(0, 1))
    order = draw(st.permutations(range(len(shape))))
    stored = draw(values_of([shape[dim] for dim in order])).to(draw(st.sampled_from(FLOATS)))
    x = stored.permute([order.index(dim) for dim in range(len(shape))])
    return x, str(spec), layout, draw(st.sampled_from(FLOATS))


@st.composite
def values_of(draw: Callable[..., Any], shape: list[int]) -> torch.Tensor:
    """float32 values of one style: any bits, a bell of any size, ties, many magnitudes, one-sided; some poisoned."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    style = draw(st.sampled_from(["bits", "bell", "ties", "wide", "one-sided", "zero"]))
    unit = 2.0 ** draw(st.integers(-149, 118))
    if style == "bits":
        x = random.integers(0, 2**32, shape, np.uint32).view(np.float32)
        x = np.where(np.abs(x) < INF, x, 1).astype(np.float32)
    else:
        x = {
            "bell": lambda: random.standard_normal(shape),
            "ties": lambda: random.integers(-64, 65, shape) / 2,
            "wide": lambda: random.standard_normal(shape) * 2.0 ** random.integers(-40, 7, shape),
            "one-sided": lambda: random.uniform(3, 5, shape) * draw(st.sampled_from([-1, 1])),
            "zero": lambda: random.choice([0.0, -0.0], shape),
        }[style]()
        x = np.asarray(x * unit, np.float32)
    if x.size and draw(st.booleans()):
        x.reshape(-1)[draw(st.integers(0, x.size - 1))] = draw(st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 2.0**-149]))
    return torch.from_numpy(x)


@given(cases())
@settings(derandomize=True, deadline=None, max_examples=700)
def test_every_shape_layout_block_and_memory_order(
    check: Callable[..., None], case: tuple[torch.Tensor, str, str, torch.dtype]
) -> None:
    check(*case)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_block_that_is_not_finite_is_nan_throughout(pair: str) -> None:
    for poison, rounding in itertools.product([NAN, INF, -INF], Rounding):
        x = torch.tensor([[1.0, poison, 3.0], [1.0, 2.0, 3.0]])
        spec = f"{pair}:c3:{rounding}:pass"
        scale, zero, codes, values = run(x, spec, "bc", torch.float32)
        assert values[0].isnan().all(), (spec, poison)
        assert values[1].isfinite().all(), (spec, poison)
        form = parse_spec(spec).format
        assert codes[0].tolist() == [form.nan_code if isinstance(form, FloatFormat) else 0] * 3
        assert scale[0].isnan() if scale.is_floating_point() else scale[0] == 255
        assert zero is None or zero[0] == 0
        assert ops.IN_RANGE(x, scale, spec, "bc")[0].all()  # a gradient that is NaN stays so


@pytest.mark.parametrize("pair", PAIRS)
def test_integers_return_plus_zero_and_floats_the_zero_they_got(pair: str) -> None:
    for dtype, rounding in itertools.product(FLOATS, Rounding):
        check_zeros(pair, rounding, dtype)


def check_zeros(pair: str, rounding: Rounding, dtype: torch.dtype) -> None:
    # a block of zeros; zeros in blocks of either sign and of both; a range that does not reach zero by itself
    x = torch.tensor([[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, 5, 7], [-0.0, 0.0, -5, -7], [-0.0, 0.0, -5, 7]], dtype=dtype)
    scale, zero, codes, values = run(x, f"{pair}:c4:{rounding}:pass", "bc", dtype)
    zeros = values[x == 0]
    assert torch.equal(zeros, torch.zeros_like(zeros))
    form = parse_format(pair.partition(":")[0])
    code_of_zero = torch.zeros(4, 4) if zero is None else zero.float().expand(4, 4)
    if isinstance(form, FloatFormat):
        assert torch.equal(zeros.signbit(), x[x == 0].signbit())
        code_of_zero = torch.where(x.signbit(), 2.0 ** (form.bits - 1), 0.0)
    else:
        assert not zeros.signbit().any()
    assert torch.equal(codes.float()[x == 0], code_of_zero[x == 0])
    # two-level: the smallest level of e4m3, 2^−9, in units of what the other blocks reach
    fixed = {"real": 2.0**-126, "one": 127, "two-level": 2.0**-9 * float(np.float32(7) / np.float32(448 * form.reach))}
    assert scale[0] == fixed.get(pair.partition(":")[2], 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [[3.0, 5], [-5.0, -3], [-1.0, 3.0], [-1000.0, 1.0], [1e-40, -1e-42], [1e38, -1e38]])
def test_affine_holds_both_ends_and_zero(bits: int, block: list[float]) -> None:
    spec = f"affine{bits}:real:c2:nearest:pass"
    x = torch.tensor([block])
    scale, zero, _, values = run(x, spec, "bc", torch.float32)
    assert zero is not None
    assert 0 <= int(zero) <= 2**bits - 1
    assert ops.DEQUANTIZE(zero, scale, zero, spec, "bc", torch.float32).tolist() == [[0.0]]
    # half a step for x/s, half a step for the zero point, and 4 float32 roundings of numbers up to 2^b−1
    bound = float(scale) * (1 + 4 * (2**bits - 1) * 2.0**-24)
    assert torch.all((values.double() - x.double()).abs() <= bound)


@pytest.mark.parametrize("pair", PAIRS)
def test_types_and_shapes(pair: str) -> None:
    spec = parse_spec(f"{pair}:b2c4:nearest:pass")
    for dtype, out in itertools.product(FLOATS, FLOATS):
        x = torch.linspace(-1, 1, 30).reshape(5, 6).to(dtype)
        scale, zero, codes, values = run(x, str(spec), "bc", out)
        assert (values.dtype, values.shape) == (out, x.shape)
        assert (codes.dtype, codes.shape) == (spec.format.dtype, x.shape)
        assert (scale.dtype, scale.shape) == (
            torch.float32 if spec.scale in ("real", "two-level") else torch.uint8,
            (3, 2),
        )
        assert zero is None or (zero.dtype, zero.shape) == (spec.format.dtype, (3, 2))
        mask = ops.IN_RANGE(x, scale, str(spec), "bc")
        assert (mask.dtype, mask.shape) == (torch.bool, x.shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("int8", [0.5, 1.5, 2.5, 3.5, 126.5, 127.5, 200.0], [0, 2, 2, 4, 126, 127, 127]),
        ("int8", [-0.5, -1.5, -2.5, -3.5, -126.5, -127.5, -200.0], [0, -2, -2, -4, -126, -127, -127]),
        ("int4", [6.5, 7.5, -6.5, -7.5, 0.25, -0.75], [6, 7, -6, -7, 0, -1]),
        ("int2", [0.5, 0.75, 1.5, -0.5, -0.75, -9.0], [0, 1, 1, 0, -1, -1]),
        ("int16", [1.5, 2.5, -1.5, 60000.0, -60000.0], [2, 2, -2, 32767, -32767]),
        ("uint8", [0.5, 1.5, 2.5, 254.5, 255.5, -0.5, -9.0], [0, 2, 2, 254, 255, 0, 0]),
        ("uint4", [14.5, 15.5, 16.0, -1.0], [14, 15, 15, 0]),
    ],
)
def test_ties_and_saturation_at_step_one(name: str, values: list, expected: list, dtype: torch.dtype) -> None:
    x, one = torch.tensor(values).to(dtype), torch.tensor([127], dtype=torch.uint8)
    codes = ops.QUANTIZE(x, one, None, None, f"{name}:fit:tensor:nearest:pass", "c", SITE)
    exact = x.float() == torch.tensor(values)  # bfloat16 has no 254.5
    assert codes[exact].tolist() == torch.tensor(expected)[exact].tolist()
    assert exact.sum() >= len(values) - 3


@pytest.mark.parametrize(
    ("spec", "x", "codes", "values"),
    [
        ("int8:fit:tensor:nearest:pass", [1.0, -0.5, 0.0], [64, -32, 0], [1.0, -0.5, 0.0]),
        ("int4:max:tensor:nearest:pass", [1.0, 1.96875, -2.0], [2, 4, -4], [1.0, 2.0, -2.0]),
        ("int4:max:tensor:nearest:pass", [1.0, 1.96875, -0.25], [4, 7, -1], [1.0, 1.75, -0.25]),  # 7.875 saturates
        ("int4:real:tensor:nearest:pass", [3.5, -1.75, 0.2], [7, -4, 0], [3.5, -2.0, 0.0]),
        ("uint4:real:tensor:nearest:pass", [30.0, 3.0, -7.0], [15, 2, 0], [30.0, 4.0, 0.0]),
        ("affine4:real:tensor:nearest:pass", [-10.0, 20.0, 1.0], [0, 15, 5], [-10.0, 20.0, 0.0]),  # 1/2 ties to 0
        ("affine4:real:tensor:nearest:pass", [15.0, 30.0, 21.0], [8, 15, 10], [16.0, 30.0, 20.0]),
        ("affine4:real:tensor:nearest:pass", [-15.0, -30.0, 0.0], [7, 0, 15], [-16.0, -30.0, 0.0]),
        ("int8:fit:tensor:nearest:pass", [2.0**-149, 2.0**-126, 2.0**-127], [0, 1, 0], [0.0, 2.0**-126, 0.0]),
        ("e2m1:fit:tensor:nearest:pass", [12.0, -3.6, 0.2], [7, 12, 0], [12.0, -4.0, 0.0]),  # −1.8 is next to −2
        ("e2m1:max:tensor:nearest:pass", [15.0, -3.0, 1.0], [7, 11, 1], [12.0, -3.0, 1.0]),  # 7.5 saturates at 6
        ("e3m0:real:tensor:nearest:pass", [1.0, -0.3, 2.0**-9], [7, 13, 0], [1.0, -0.25, 0.0]),
        ("e4m3nan:one:tensor:nearest:pass", [500.0, 1.0, -448.0], [127, 56, 254], [NAN, 1.0, -448.0]),
    ],
)
def test_worked_examples(spec: str, x: list[float], codes: list[int], values: list[float]) -> None:
    result = run(torch.tensor(x), spec, "c", torch.float32)
    assert result[2].tolist() == codes
    np.testing.assert_array_equal(result[3].numpy(), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rule", ["max", "fit"])
def test_error_is_at_most_half_a_step_inside_the_range(bits: int, rule: str) -> None:
    spec = f"int{bits}:{rule}:c16:nearest:pass"
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    scale, _, _, values = run(x, spec, "bc", torch.float32)
    step = 2.0 ** (scale.double() - 127).repeat_interleave(16, 1)[:, :40]
    error = (values.double() - x.double()).abs() / step
    inside = ops.IN_RANGE(x, scale, spec, "bc")
    assert torch.all(error[inside] <= 0.5)
    assert bool(inside.all()) == (rule == "fit" or bits > 8)  # max: few of long codes lie beyond the last
    assert torch.all(error < 1)  # max: the last code is less than a step below 2^m


def test_in_range_by_hand() -> None:
    one = torch.tensor([127], dtype=torch.uint8)
    x = torch.tensor([-128.0, -127.0, 0.0, 127.0, 127.25, 255.0, 256.0])
    inner = [-127.0, 0.0, 127.0]
    for name, inside in (
        ("int8", inner),
        ("uint8", [0.0, 127.0, 127.25, 255.0]),
        ("e2m1", [0.0]),
        ("e4m3", x.tolist()),
    ):
        mask = ops.IN_RANGE(x, one, f"{name}:max:tensor:nearest:clip", "c")
        assert set(x[mask].tolist()) == set(inside)


@pytest.mark.parametrize("pair", ["int8:fit", "int8:real", "affine8:real", "e4m3:fit", "e2m1:two-level", "e3m0:real"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("rounding", Rounding)
def test_empty(pair: str, shape: tuple[int, ...], rounding: Rounding) -> None:
    for block in ("each", "tensor", "b2c2"):
        spec = f"{pair}:{block}:{rounding}:pass"
        scale, zero, codes, values = run(torch.empty(shape), spec, "bco"[: len(shape)], torch.float16)
        assert scale.numel() == 0
        assert zero is None or zero.numel() == 0
        assert (codes.shape, values.shape) == (shape, shape)
