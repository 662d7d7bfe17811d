"""The kernels of quantizers write the bits of the references, for any shape, blocks and order of memory.

In the interpreter of Triton, as tests/runtime/kernels/test_triton.py runs this file, that of CUDA is called; else that
of the CPU.
"""

import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompiler.runtime import coders, references, stacked
from qcompiler.runtime.kernels import quantize_blocks as kernel
from qcompiler.runtime.kernels import quantize_whole as whole
from qcompiler.runtime.kernels.loader import load_library
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.numbers.packing import per_byte
from qcompiler.runtime.spec import parse_spec

KEY = torch.tensor([123456789, -987654321], dtype=torch.int32)
ROUNDINGS = ("nearest", "stochastic")
#: numbers at which rounding, scales or comparisons can go wrong
SPECIAL = (math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 3.4e38, 0.5, 1.5, -2.5, 127.5)
#: Python runs every operation of a program of Triton
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST, EXAMPLES = (7, 40) if INTERPRETED else (20, 300)
ORDERS = ("plain", "last first", "transposed", "expanded", "sliced")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Without a compiler all results are those of the references, and nothing is tested."""
    assert not isinstance(load_library(kernel.NAME), str)


@pytest.fixture(scope="module", autouse=True)
def kernel_of_cuda():
    """In the interpreter the kernel in Triton is called, which refuses only what its row in the table refuses."""
    refused = ("a block of", "dimensions of one axis")
    reasons = []

    def quantize(*given, **options):
        reasons.append(quantize_in_triton(*given, **options))
        assert not reasons[-1] or reasons[-1].startswith(refused)
        return reasons[-1]

    if not INTERPRETED:
        yield
        return
    quantize_in_triton = coders.find_kernel("cuda")
    with mock.patch.object(coders, "find_kernel", return_value=quantize):
        yield
    assert reasons.count("") > 0.9 * len(reasons) > 0


def add_large_examples(test):
    """Several tiles, in several threads."""
    if INTERPRETED:
        return test
    image = torch.randn(70, 24, 30, 30)
    cases = (
        ((image, "bcss", "b2c8"), "int8", "max", "stochastic", (True, True), 2),
        ((lay(image, "last first"), "bcss", "b2c8"), "int8", "max", "stochastic", (True, True), 2),
        (
            (lay(make_tensor((6, 16, 32, 32), 1, 9), "last first"), "bcss", "b2c8"),
            "int8",
            "fit",
            "nearest",
            (True, True),
            1,
        ),
        ((torch.randn(3, 5000), "bc", "b2c*"), "int8", "max", "stochastic", (True, True), 1),
        ((torch.randn(300, 300), "bc", "tensor"), "int8", "fit", "nearest", (True, True), 2),
        ((image.bfloat16(), "bcss", "b2c8"), "int8", "max", "nearest", (True, True), 2),
        ((lay(image, "last first").bfloat16(), "bcss", "tensor"), "int8", "real", "stochastic", (True, True), 2),
    )
    for case in cases:
        test = example(*case)(test)
    return test


def lay(x, order):
    """The same shape in another order of memory; expanded and sliced tensors are not dense."""
    if order == "plain" or x.ndim < 2:
        return x
    if order == "last first":  # channels last
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "transposed":
        return x.mT.contiguous().mT
    if order == "expanded":
        return x[:1].expand(x.shape)
    return torch.stack([x, x], -1)[..., 0]


def make_tensor(shape, seed, special):
    """Numbers of very different sizes, and a few special ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-4, 4, shape, generator=generator)
    if special and x.numel():
        places = torch.randint(x.numel(), (special,), generator=generator)
        kinds = torch.randint(len(SPECIAL), (special,), generator=generator)
        x.view(-1)[places] = torch.tensor(SPECIAL)[kinds]
        x[:1] *= seed % 3 != 0  # a block of zeros
    return x


def same(left, right):
    """Equal bits, but for those of NaN, which no processor promises."""
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    left, right = (t.clone(memory_format=torch.contiguous_format).view(-1) for t in (left, right))
    if left.is_floating_point():
        left, right = (torch.where(t.isnan(), torch.nan, t) for t in (left, right))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


CASES = st.sampled_from(
    [
        ("bcss", "bc"),
        ("oiss", "oi"),
        ("bbc", "bc"),
        ("bc", "bc"),
        ("gbc", "gbc"),
        ("bcs", "bcs"),
        ("c", "c"),
        ("gggbc", "gb"),
    ]
)


#: those that the kernels read
DTYPES = st.sampled_from([torch.float32] if INTERPRETED else [torch.float32, torch.float32, torch.bfloat16])


@st.composite
def tensors(draw):
    """(tensor, layout, block)."""
    layout, letters = draw(CASES)
    shape = tuple(draw(st.integers(0 if draw(st.integers(0, 19)) == 0 else 1, MOST)) for _ in layout)
    edges = {letter: draw(st.sampled_from(["1", "2", "3", "4", "8", "16", "*"])) for letter in letters}
    named = "".join(f"{letter}{edge}" for letter, edge in edges.items() if edge != "1") or "each"
    x = make_tensor(shape, draw(st.integers(0, 99)), draw(st.sampled_from([0, 0, 1, 5]))).to(draw(DTYPES))
    return lay(x, draw(st.sampled_from(ORDERS))), layout, named


def assert_wanted(made, wanted, expected):
    """Codes and floats, each if it is wanted."""
    known = [one for one, is_wanted in zip(expected, wanted, strict=True) if is_wanted]
    assert len(made) == len(known)
    assert all(map(same, made, known))


def assert_blocks(case, form, rule, rounding, wanted, threads):
    """Scales, codes and floats are those of the references."""
    x, layout, block = case
    spec = str(parse_spec(f"{form}:{rule}:{block}:{rounding}:pass"))
    key = KEY if rounding == "stochastic" else None
    torch.set_num_threads(threads)
    try:
        *made, scale = coders.quantize_blocks(x, key, spec, layout, "site", *wanted)
    finally:
        torch.set_num_threads(1)
    expected = references.scale(x, spec, layout)
    expected_codes = references.quantize(x, expected, None, key, spec, layout, "site")
    assert same(scale, expected)
    expected_floats = references.dequantize(expected_codes, expected, None, spec, layout, x.dtype)
    assert_wanted(made, wanted, (expected_codes, expected_floats))
    if wanted[0]:
        again = coders.dequantize_blocks(made[0], scale, None, spec, layout, x.dtype)
        assert same(again, references.dequantize(expected_codes, expected, None, spec, layout, x.dtype))


QUANTIZERS = (
    st.sampled_from(["int8", "int4", "int2"]),
    st.sampled_from(["max", "fit", "ceil", "round", "one", "real"]),
    st.sampled_from(ROUNDINGS),
    st.sampled_from([(True, True), (True, False), (False, True)]),
    st.integers(1, 2),
)


@add_large_examples
@settings(max_examples=EXAMPLES, deadline=None)
@given(tensors(), *QUANTIZERS)
def test_scales_codes_and_floats(case, form, rule, rounding, wanted, threads):
    assert_blocks(case, form, rule, rounding, wanted, threads)


@settings(max_examples=EXAMPLES, deadline=None)
@given(tensors(), *QUANTIZERS)
def test_large_blocks_one_after_another(case, form, rule, rounding, wanted, threads):
    """As if nothing stayed in the cache: each is found by the kernel of one scale, where blocks follow each other."""
    with mock.patch.object(whole, "MOST_IN_CACHE", 0):
        whole.finds_scales.cache_clear()
        try:
            assert_blocks(case, form, rule, rounding, wanted, threads)
        finally:
            whole.finds_scales.cache_clear()


def add_large_packed(test):
    """Groups of lanes in registers, tiles that are read twice, and lanes that fill no group."""
    if INTERPRETED:
        return test
    for shape, order in (((72, 24, 30, 30), "plain"), ((72, 16, 32, 32), "last first"), ((8, 24, 9, 9), "last first")):
        case = lay(make_tensor(shape, 3, 5), order), "bcss", "b2c8"
        for form, rounding in (("int4", "stochastic"), ("int2", "nearest")):
            test = example(case, form, "max", rounding, (True, True), 2)(test)
    return test


@add_large_packed
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    tensors(),
    st.sampled_from(["int4", "int3", "int2"]),
    st.sampled_from(["max", "real"]),
    st.sampled_from(ROUNDINGS),
    st.sampled_from([(True, True), (True, False)]),
    st.integers(1, 2),
)
def test_codes_that_are_packed_at_once(case, form, rule, rounding, wanted, threads):
    x, layout, block = case
    spec = parse_spec(f"{form}:{rule}:{block}:{rounding}:pass")
    given, bits = (KEY if rounding == "stochastic" else None, str(spec), layout, "site"), spec.format.bits
    torch.set_num_threads(threads)
    try:
        packed, *others = coders.quantize_blocks(x, *given, *wanted, per_byte(bits))
        codes, *expected = coders.quantize_blocks(x, *given, *wanted)
    finally:
        torch.set_num_threads(1)
    assert same(packed, references.pack(codes, bits))
    assert all(map(same, others, expected))
    scale = others[-1]
    unpacked = coders.dequantize_blocks(packed, scale, None, str(spec), layout, x.dtype, x.shape)
    assert same(unpacked, coders.dequantize_blocks(codes, scale, None, str(spec), layout, x.dtype))
    floats, scale = coders.quantize_blocks(x, *given, False, True, per_byte(bits))  # nothing is packed
    assert same(scale, others[-1])
    assert len(others) == 1 or same(floats, others[0])


@settings(max_examples=EXAMPLES // 3, deadline=None)
@given(tensors(), st.sampled_from(["uint4", "uint2", "affine4"]))
def test_floats_of_packed_codes_with_zero_points(case, form):
    x, layout, block = case
    spec = str(parse_spec(f"{form}:real:{block}:nearest:pass"))
    scale = references.scale(make_tensor(x.shape, 7, 0), spec, layout)
    zero = references.zero_point(x, scale, spec, layout) if form.startswith("affine") else None
    codes = references.quantize(x, scale, zero, None, spec, layout, "site")
    packed = references.pack(codes, parse_spec(spec).format.bits)
    found = coders.dequantize_blocks(packed, scale, zero, spec, layout, x.dtype, x.shape)
    assert same(found, references.dequantize(codes, scale, zero, spec, layout, x.dtype))


@pytest.mark.parametrize(
    ("shape", "order", "block", "parts", "reason"),
    [
        ((8, 16, 3, 3), "plain", "b2c8", 2, ""),
        ((8, 16, 3, 3), "last first", "b2c8", 4, ""),
        ((8, 16, 3, 3), "last first", "b4c8", 4, "blocks of 4 along 8 elements reach from part to part of 4"),
        ((7, 16, 3, 3), "plain", "b2c8", 2, "codes that share a byte are not 2 equal parts of memory"),
        ((5, 3, 3, 3), "plain", "b2c8", 2, "codes that share a byte are not 2 equal parts of memory"),
        ((8, 16, 3, 3), "plain", "tensor", 2, "blocks of 1152 along 1152 elements reach from part to part of 2"),
    ],
)
def test_what_is_packed_at_once(shape, order, block, parts, reason):
    stride = lay(torch.empty(shape), order).stride()
    call = kernel.Call(shape, stride, str(parse_spec(f"int{8 // parts}:max:{block}:nearest:pass")), "bcss")
    assert kernel.explain_parts(call) == reason


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    tensors(),
    st.sampled_from(["int8", "int4", "uint8", "uint3", "affine8", "affine4"]),
    st.sampled_from(["max", "real", "two-level"]),
    st.sampled_from(ROUNDINGS),
    st.sampled_from([(True, True), (True, False), (False, True)]),
    st.booleans(),
)
def test_codes_and_floats_by_a_scale_that_is_known(case, form, rule, rounding, wanted, shows):
    x, layout, block = case
    spec = str(parse_spec(f"{form}:{'real' if form.startswith('affine') else rule}:{block}:{rounding}:pass"))
    key = KEY if rounding == "stochastic" else None
    scale = references.scale(make_tensor(x.shape, 7, 1), spec, layout)
    zero = references.zero_point(x, scale, spec, layout) if form.startswith("affine") else None
    made = coders.quantize_by(x, scale, zero, key, spec, layout, "site", *wanted, shows)
    expected = references.quantize(x, scale, zero, key, spec, layout, "site")
    shown = references.dequantize(expected, scale, zero, spec, layout, x.dtype, x if shows else None)
    expected_floats = references.dequantize(expected, scale, zero, spec, layout, x.dtype)
    assert_wanted(made, wanted, (expected, shown))
    assert same(coders.dequantize_blocks(expected, scale, zero, spec, layout, x.dtype), expected_floats)


def add_large_measured(test):
    """Several tiles, in two threads; and bounds of the range in the tensor itself."""
    image = torch.randn(70, 24, 30, 30)
    for x in (image, lay(image, "last first"), lay(image, "last first").bfloat16()):
        for rounding in ROUNDINGS:
            test = example((x, "bcss", ""), "affine8", "real", rounding, (True, True), True, True, 2)(test)
    return test


@add_large_measured
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    tensors(),
    st.sampled_from(["int8", "int4", "uint8", "uint3", "affine8", "affine4"]),
    st.sampled_from(["max", "fit", "real"]),
    st.sampled_from(ROUNDINGS),
    st.sampled_from([(True, True), (True, False), (False, True)]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 2),
)
def test_codes_by_one_known_scale_and_what_the_range_learns(case, form, rule, rounding, wanted, shows, checks, threads):
    x, layout, _ = case
    rule = "real" if form.startswith("affine") else rule
    spec = str(parse_spec(f"{form}:{rule}:tensor:{rounding}:pass:hindsight"))
    key = KEY if rounding == "stochastic" else None
    counts = view_blocks(tuple(x.shape), layout, parse_spec(spec).block).counts
    numbers = torch.tensor([0.0 if form.startswith("uint") else -2.5, 3.0, 0.0])
    state = numbers.reshape(3, *[1] * len(counts)).expand(3, *counts)
    scale, reach, *points = stacked.read_ranges([state], spec)
    scale, zero = scale.reshape(counts), points[0].reshape(counts) if points else None
    torch.set_num_threads(threads)
    try:
        found = coders.quantize_measured(x, scale, zero, reach, key, spec, layout, "site", *wanted, shows, checks)
    finally:
        torch.set_num_threads(1)
    made, (measured, *checked) = found[: sum(wanted)], found[sum(wanted) :]
    expected = references.quantize(x, scale, zero, key, spec, layout, "site")
    shown = references.dequantize(expected, scale, zero, spec, layout, x.dtype, x if shows else None)
    assert_wanted(made, wanted, (expected, shown))
    assert same(measured + 0.0, stacked.measure(x, reach, spec, layout) + 0.0)  # 0 and −0 are one end
    assert all(same(one, references.checked(scale, x, spec, layout)) for one in checked)
    assert len(checked) == checks


def test_the_references_measure_what_the_kernel_cannot():
    x, spec = torch.randn(4, 6, dtype=torch.float16), str(parse_spec("int8:real:tensor:nearest:pass:hindsight"))
    scale, reach = stacked.read_ranges([torch.tensor([-1.0, 1.0, 0.0]).reshape(3, 1, 1)], spec)
    scale = scale.reshape(1, 1)
    found = coders.quantize_measured(x, scale, None, reach, None, spec, "bc", "site", True, False, False, True)
    expected = references.quantize(x, scale, None, None, spec, "bc", "site")
    assert all(map(same, found, (expected, stacked.measure(x, reach, spec, "bc"), scale)))
    assert len(found) == 3


@pytest.mark.parametrize(
    "text", ["uint4:max:b2c8", "affine8:real:b2c8", "int8:two-level:c16", "e4m3:max:tensor", "int16:max:b2c8"]
)
def test_the_references_find_and_write_what_no_kernel_knows(text):
    x, spec = torch.randn(4, 16), str(parse_spec(f"{text}:nearest:pass"))
    codes, floats, scale = coders.quantize_blocks(x, None, spec, "bc", "site", True, True)
    expected = references.scale(x, spec, "bc")
    expected_codes = references.quantize(x, expected, None, None, spec, "bc", "site")
    expected_floats = references.dequantize(expected_codes, expected, None, spec, "bc", x.dtype)
    assert all(map(same, (scale, codes, floats), (expected, expected_codes, expected_floats)))
    by, shown = coders.quantize_by(x, expected, None, None, spec, "bc", "site", True, True, False)
    assert all(map(same, (by, shown), (expected_codes, expected_floats)))
    assert same(coders.dequantize_blocks(codes, scale, None, spec, "bc", x.dtype), expected_floats)


@pytest.mark.parametrize("rule", ["max", "fit", "ceil", "round", "one", "real"])
@pytest.mark.parametrize("form", ["int8", "int4", "int2"])
def test_exponents_beside_the_numbers_at_which_they_move(form, rule):
    """A block for each of reach·2^k, 2^k and √2·2^k, and for both neighbors."""
    spec = parse_spec(f"{form}:{rule}:each:nearest:pass")
    middle = torch.tensor([spec.format.reach, 1.0, math.sqrt(2), 0.75]) * 2.0 ** torch.tensor(
        [[-126.0], [-1], [0], [9]]
    )
    sides = [torch.nextafter(middle, torch.tensor(end)) for end in (-math.inf, math.inf)]
    x = torch.cat([middle, *sides])
    codes, floats, scale = coders.quantize_blocks(x, None, str(spec), "bc", "site", True, True)
    expected = references.scale(x, str(spec), "bc")
    expected_codes = references.quantize(x, expected, None, None, str(spec), "bc", "site")
    assert same(scale, expected)
    assert same(codes, expected_codes)
    assert same(floats, references.dequantize(expected_codes, expected, None, str(spec), "bc", x.dtype))
