"""Float formats: levels, codes and names; every 16-bit pattern against ml_dtypes and gfloat; stochastic rounding."""

import itertools
import math
from collections.abc import Callable
from types import ModuleType

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat.formats import format_info_ocp_e4m3, format_info_ocp_e5m2
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime.numbers.floats import E4M3, FloatFormat, Top
from qcompiler.runtime.numbers.formats import Kind, parse_format
from qcompiler.runtime.numbers.rounding import random_bits

INF, NAN = math.inf, math.nan
PROPERTY = settings(derandomize=True, deadline=None, max_examples=300)
#: bound on |z|: a correct hash exceeds it with p = 2·(1 − Φ(5)) = 5.7e-7; the keys are fixed
Z = 5.0


def every_format() -> list[FloatFormat]:
    """Each width there is, with one bias of its own; radix 4 in both phases; both overflow policies."""
    options = [{}, {"saturates": False}, {"bias": 1}, {"radix": 4}, {"radix": 4, "doubled": True}]
    found = []
    for exponent, mantissa, option in itertools.product(range(1, 7), range(15), options):
        try:
            found.append(FloatFormat(exponent, mantissa, **option))
        except ValueError:
            continue
    return found


ALL = every_format()
#: format → the type of ml_dtypes that has the same levels, codes and overflow
ML_DTYPES = {
    "e4m3nan": ml_dtypes.float8_e4m3fn,
    "e5m2inf": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e5m10inf": np.float16,
}
NAMED = ["e4m3", "e4m3nan", "e5m2", "e5m2inf", "e4m3b11", "e3m2", "e2m3", "e2m1", "e3m0", "e3m0r4", "e3m0r4x2", "e5m10"]


def noise(words: list[int] | np.ndarray) -> torch.Tensor:
    """Random words of 32 bits, as the int32 that rounding takes."""
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32))


def encode(x: np.ndarray, name: str, words: np.ndarray | None = None) -> np.ndarray:
    """Codes of float32 numbers."""
    bits = None if words is None else noise(words)
    return parse_format(name).encode(torch.from_numpy(np.asarray(x, np.float32)), bits, None).numpy()


def patterns(oracle: ModuleType) -> np.ndarray:
    """Every float16 and every bfloat16, as float32."""
    return np.concatenate([oracle.patterns(dtype).astype(np.float32) for dtype in ("float16", "bfloat16")])


@pytest.mark.parametrize(
    ("name", "bits", "largest", "smallest", "top", "magnitude_bits", "nan_code"),
    [
        ("e4m3", 8, 448, 2**-9, Top.NAN, 9, 0x7F),
        ("e5m2", 8, 57344, 2**-16, Top.IEEE, 16, 0x7E),
        ("e4m3b7", 8, 480, 2**-9, Top.FINITE, 9, 0),
        ("e4m3b11", 8, 30, 2**-13, Top.FINITE, 5, 0),
        ("e3m4", 8, 31, 2**-6, Top.FINITE, 5, 0),
        ("e3m2", 6, 28, 2**-4, Top.FINITE, 5, 0),
        ("e2m3", 6, 7.5, 2**-3, Top.FINITE, 3, 0),
        ("e2m1", 4, 6, 0.5, Top.FINITE, 3, 0),
        ("e1m2", 4, 3.5, 0.5, Top.FINITE, 2, 0),
        ("e3m0", 4, 16, 0.25, Top.FINITE, 5, 0),
        ("e3m0r4", 4, 64, 2**-6, Top.FINITE, 7, 0),
        ("e3m0r4x2", 4, 128, 2**-5, Top.FINITE, 7, 0),
        ("e5m10", 16, 65504, 2**-24, Top.IEEE, 16, 0x7E00),
        ("e6m9", 16, 2.0**32 - 2.0**22, 2**-39, Top.IEEE, 32, 0x7F00),
    ],
)
def test_facts(
    name: str, bits: int, largest: float, smallest: float, top: Top, magnitude_bits: int, nan_code: int
) -> None:
    form = parse_format(name)
    assert isinstance(form, FloatFormat)
    assert (form.bits, form.largest, form.lowest, form.smallest) == (bits, largest, -largest, smallest)
    assert (form.top, form.magnitude_bits, form.nan_code) == (top, magnitude_bits, nan_code)
    assert form.reach == (64 if name == "e3m0r4x2" else largest)
    assert (form.kind, form.dtype) == (Kind.SIGNED, torch.uint16 if bits == 16 else torch.uint8)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("e1m2", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),  # one exponent bit makes a uniform grid
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        ("e3m0r4", [0, 1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64]),
        ("e3m0r4x2", [0, 1 / 32, 1 / 8, 1 / 2, 2, 8, 32, 128]),
    ],
)
def test_levels(name: str, levels: list[float]) -> None:
    values = parse_format(name).decode(torch.arange(16, dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert values.tolist() == [*levels, *(-level for level in levels)]
    assert values[8] == 0
    assert values[8].signbit()


@pytest.mark.parametrize("form", ALL, ids=str)
def test_every_code_decodes_as_the_words_say_and_encodes_to_itself(
    oracle: ModuleType, form: FloatFormat, array: Callable
) -> None:
    codes = torch.arange(2**form.bits, dtype=torch.int32)
    values = form.decode(codes.to(form.dtype))
    assert oracle.same(array(values), oracle.float_values(codes.numpy(), str(form)))
    kept = ~values.isnan() if not form.saturates else values.isfinite()
    for bits in (None, torch.zeros_like(codes), torch.full_like(codes, -1)):
        again = form.encode(values, bits)
        assert again.dtype == form.dtype
        assert torch.equal(again.to(torch.int32)[kept], codes[kept])
    finite = values[values.isfinite()]
    assert (finite.max(), finite.min()) == (form.largest, form.lowest)
    assert finite[finite > 0].min() == form.smallest
    assert 2 ** (form.magnitude_bits - 1) <= form.reach < 2**form.magnitude_bits


@pytest.mark.parametrize("form", ALL, ids=str)
def test_nearest_and_stochastic_of_every_pattern(oracle: ModuleType, form: FloatFormat) -> None:
    x, name = patterns(oracle), str(form)
    words = oracle.random_words((5, 7), "floats", 2**16)
    words = np.concatenate([words, words[::-1]])
    with np.errstate(invalid="ignore"):
        assert np.array_equal(encode(x, name), oracle.float_codes(x, name, None))
        assert np.array_equal(encode(x, name, words), oracle.float_codes(x, name, words))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_pattern_as_ml_dtypes_casts_it(oracle: ModuleType, name: str) -> None:
    x = patterns(oracle)
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        expected = x.astype(ML_DTYPES[name])
    assert np.array_equal(encode(x, name), expected.view(f"u{expected.itemsize}"))
    # a saturating format differs in what overflows, and there only
    form = parse_format(name.removesuffix("nan").removesuffix("inf"))
    saturated = form.decode(form.encode(torch.from_numpy(x), None, None)).numpy()
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(expected.astype(np.float32))
    assert np.array_equal(saturated[finite], expected.astype(np.float32)[finite])
    assert np.all(np.abs(saturated[~finite]) == form.largest)


def test_the_bias_of_hfp8_is_that_of_e4m3b11(oracle: ModuleType) -> None:
    # float8_e4m3b11fnuz has NaN for −0, and overflows to it above 31; the levels are the same
    x = patterns(oracle)
    x = x[np.abs(x) < 31]
    codes = encode(x, "e4m3b11")
    expected = x.astype(ml_dtypes.float8_e4m3b11fnuz).astype(np.float32)
    assert np.array_equal(parse_format("e4m3b11").decode(torch.from_numpy(codes)).numpy(), expected)


def as_gfloat(form: FloatFormat) -> gfloat.FormatInfo:
    """The same format in the words of another library."""
    special = {Top.FINITE: 0, Top.NAN: 1, Top.IEEE: (1 << form.mantissa_bits) - 1}[form.top]
    return gfloat.FormatInfo(
        name=str(form),
        k=form.bits,
        precision=form.mantissa_bits + 1,
        bias=1 - form.first_exponent,
        is_signed=True,
        domain=gfloat.Domain.Extended if form.top is Top.IEEE else gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=special,
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize("name", [name for name in NAMED if "r4" not in name])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_pattern_as_gfloat_rounds_it(oracle: ModuleType, name: str, dtype: str) -> None:
    """Both policies: gfloat's `sat`. In formats without NaN and infinity it has no other."""
    form = parse_format(name)
    assert isinstance(form, FloatFormat)
    x = oracle.patterns(dtype).astype(np.float32)
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        expected = gfloat.round_ndarray(as_gfloat(form), x.astype(np.float64), sat=form.saturates).astype(np.float32)
    values = form.decode(form.encode(torch.from_numpy(x), None)).numpy()
    assert oracle.same(values, expected)


@pytest.mark.parametrize(("name", "info"), [("e4m3", format_info_ocp_e4m3), ("e5m2", format_info_ocp_e5m2)])
def test_gfloat_describes_the_same_ocp_formats(name: str, info: gfloat.FormatInfo) -> None:
    values = parse_format(name).decode(torch.arange(256))
    np.testing.assert_array_equal(values.numpy(), gfloat.decode_ndarray(info, np.arange(256)))


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("e2m1", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0, 1, 1, 2, 2, 4, 4]),  # ties to the even mantissa
        ("e2m1", [5.01, 6.5, 7.0, 1e30, INF, -INF], [6, 6, 6, 6, 6, -6]),
        ("e4m3", [464, 465, INF], [448, 448, 448]),
        ("e4m3nan", [464, 465, -INF], [448, NAN, NAN]),  # 464 ties with what would be 480
        ("e5m2", [61439, 61440, INF], [57344, 57344, 57344]),
        ("e5m2inf", [61439, 61440, -61440], [57344, INF, -INF]),
        ("e3m0", [0.125, 0.126, 0.375, 0.75, 1.5, 3, 6, 12], [0, 0.25, 0.5, 0.5, 2, 2, 8, 8]),  # ties to even codes
        ("e3m0", [12.1, 24, 1000], [16, 16, 16]),
        ("e3m0r4", [1 / 128, 2.5, 2.4, 2.6, 10, 40], [0, 1, 1, 4, 16, 16]),
        ("e3m0r4x2", [80, 80.1, 79.9, 200], [32, 128, 32, 128]),
        ("e4m3", [NAN], [NAN]),
        ("e2m1", [NAN], [0]),  # no code for it: the scale of the block says NaN
    ],
)
def test_nearest_by_hand(name: str, x: list[float], expected: list[float]) -> None:
    form = parse_format(name)
    np.testing.assert_array_equal(form.decode(form.encode(torch.tensor(x), None, None)).numpy(), expected)


@given(st.sampled_from(ALL), st.floats(width=32), st.integers(0, 2**32 - 1))
@PROPERTY
def test_only_a_neighbor(oracle: ModuleType, form: FloatFormat, x: float, word: int) -> None:
    grid = np.unique(np.concatenate([oracle.numbers(str(form)), -oracle.numbers(str(form))]))
    value = float(
        form.decode(form.encode(torch.tensor([x]), torch.from_numpy(np.array([word], np.uint32).view(np.int32))))
    )
    if not math.isfinite(x) or abs(x) > form.largest:
        assert not math.isfinite(value) or abs(value) == form.largest or (math.isnan(x) and value == 0)
    else:
        assert grid[grid <= x].max() <= value <= grid[grid >= x].min()


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("share", [0.5, 0.1, 0.99, 1 / 3])
def test_stochastic_rounding_is_unbiased(oracle: ModuleType, name: str, share: float) -> None:
    form, count = parse_format(name), 2**14
    grid = oracle.numbers(name)
    grid = grid[:: max(1, len(grid) // 8)]
    x = torch.from_numpy((grid[:-1] + share * np.diff(grid)).astype(np.float32)).repeat_interleave(count)
    key, index = torch.tensor([3, 5], dtype=torch.int32), torch.arange(len(x), dtype=torch.int32)
    values = form.decode(form.encode(x, random_bits(key, name, index), None)).double().reshape(-1, count)
    exact, full = x.double()[::count].contiguous(), torch.from_numpy(oracle.numbers(name))
    above = torch.searchsorted(full, exact, right=True)
    lower, upper = full[above - 1], full[above.clamp(max=len(full) - 1)]
    # lower + (upper − lower)·Bernoulli(p): σ of the mean √((x−lower)(upper−x)/n); radix 4 has float32 shares: 2^−22
    bound = Z * ((exact - lower) * (upper - exact) / count).sqrt() + (upper - lower) * 2.0**-22
    assert torch.all((values.mean(1) - exact).abs() <= bound)


@pytest.mark.parametrize("draws", [1, 2**20, 2**23, 2**24 - 1])
def test_exactly_the_share_of_all_draws_goes_up(draws: int) -> None:
    # of the 2²⁴ values of the top bits, those below share·2²⁴ round up: between 0 and ½ of e2m1, and between 4 and 6
    tops = np.array([top for top in (0, draws - 1, draws, 2**24 - 1) if top < 2**24])
    for lower, upper in ((0.0, 0.5), (-0.0, -0.5)):
        x = np.full(len(tops), lower + (upper - lower) * draws / 2**24)
        assert (encode(x, "e2m1", tops << 8) & 7).tolist() == (tops < draws).astype(int).tolist()
    if draws % 2 == 0:  # else x is no float32
        x = np.full(len(tops), 4 + 2 * draws / 2**24)
        assert encode(x, "e2m1", tops << 8).tolist() == (6 + (tops < draws)).tolist()


@given(st.floats(-16, 16, width=32), st.integers(0, 2**24 - 1))
@PROPERTY
def test_stochastic_e3m0_is_the_rounding_of_luq(x: float, top: int) -> None:
    """LUQ (Chmiel et al. 2023) in its own words, α = ¼: snap below α, and between 2^n·α and 2^(n+1)·α linearly."""
    alpha, size, u = 0.25, abs(x), top / 2**24
    if size < alpha:
        expected = alpha if u < size / alpha else 0.0
    else:
        low = alpha
        while 2 * low <= size:
            low *= 2
        expected = 2 * low if u < (size - low) / low else low
    form = parse_format("e3m0")
    assert float(form.decode(form.encode(torch.tensor([x]), noise([top << 8])))) == math.copysign(expected, x)


@pytest.mark.parametrize("form", ALL, ids=str)
def test_text_round_trip(form: FloatFormat) -> None:
    assert parse_format(str(form)) == form


def test_texts_are_distinct_and_the_documented_ones() -> None:
    assert len({str(form) for form in ALL}) == len(ALL)
    assert [str(parse_format(name)) for name in NAMED] == NAMED
    assert str(FloatFormat(3, 0, radix=4, doubled=True)) == "e3m0r4x2"
    assert str(FloatFormat(4, 3, bias=7)) == "e4m3b7"  # not e4m3: all of its codes are numbers
    assert str(FloatFormat(5, 2, saturates=False)) == "e5m2inf"
    assert FloatFormat(4, 3) == E4M3


@pytest.mark.parametrize("text", ["e4", "m3", "e4m3fn", "E4M3", "e4m3 ", "e-4m3", "e4m3r2", "e4m3x2", "e4m3b", "fp8"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^number format: got '{text}'; valid: int, uint or .*, such as e4m3$"):
        parse_format(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e0m3", r"^float format: e0m3 is not supported; valid: 1 to 6 exponent bits, and 3 to 8 or 16 bits"),
        ("e7m0", r"^float format: e7m0 is not supported"),
        ("e1m0", r"^float format: e1m0 is not supported"),
        ("e5m3", r"^float format: e5m3 is not supported"),
        (
            "e4m3b16",
            r"^float format: bias 16 is not supported; valid: 0 to 15, so that the",
        ),
        ("e2m1r4", r"^float format: got radix 4; valid: 2, or 4 without mantissa and bias$"),
        ("e5m2nan", r"^number format: got 'e5m2nan', which does not overflow to nan; valid: e5m2inf$"),
        ("e4m3inf", r"^number format: got 'e4m3inf', which does not overflow to inf; valid: e4m3nan$"),
        ("e2m1inf", r"^float format: no NaN and no infinity to overflow to; valid: saturates=True$"),
    ],
)
def test_parse_refuses_formats(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_format(text)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"radix": 3}, r"^float format: got radix 3;"),
        ({"doubled": True}, r"^float format: doubled is the second phase"),
    ],
)
def test_options_refused(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FloatFormat(3, 0, **option)
