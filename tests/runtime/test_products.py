"""The product of codes against products of rational numbers, and against the products of dequantized floats."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompiler.runtime import ops, references
from qcompiler.runtime.kernels.kernel import Facts, explain_sums
from qcompiler.runtime.kernels.loader import explain_vectors
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.numbers.packing import per_byte
from qcompiler.runtime.products import explain_product, matmul_codes
from qcompiler.runtime.spec import parse_spec

PROPERTY = settings(derandomize=True, deadline=None, max_examples=150)
#: half of the distance between 1 and the next float32
UNIT = 2.0**-24
KERNELS = ("", "int-mm")
FORMATS = ("int8", "int4", "uint8", "uint3", "affine8", "affine4")


@dataclasses.dataclass
class Side:
    """One operand: codes [outer, length], and scale and zero point of every `edge` of the outer rows."""

    spec: str
    codes: torch.Tensor
    scale: torch.Tensor
    point: torch.Tensor | None
    edge: int

    @classmethod
    def draw(cls, form, outer, length, edge, seed, scale="real"):
        spec = parse_spec(f"{form}:{scale}:tensor:nearest:pass")
        generator = torch.Generator().manual_seed(seed)
        low, high = int(spec.format.lowest), int(spec.format.largest) + 1
        codes = torch.randint(low, high, (outer, length), generator=generator).to(spec.format.dtype)
        count = -(-outer // edge)
        factors = torch.rand(count, generator=generator) + 0.1
        if scale != "real":
            factors = torch.randint(100, 140, (count,), generator=generator).to(torch.uint8)
        point = torch.randint(0, high, (count,), generator=generator).to(spec.format.dtype)
        return cls(str(spec), codes, factors, point if spec.has_zero_point else None, edge)

    def exact(self):
        """Code less zero point as int64, and the factor of every row as float64."""
        row = torch.arange(self.codes.shape[0]) // self.edge
        shift = 0 if self.point is None else self.point.to(torch.int64)[row].unsqueeze(1)
        factor = self.scale.to(torch.float64) if self.scale.is_floating_point() else 2.0 ** (self.scale.double() - 127)
        return (self.codes.to(torch.int64) - shift).numpy(), factor[row].numpy()


def multiply(a, b, kernel, dtype=torch.float32, bias=None):
    """The operator: the right operand is turned."""
    given = (a.codes, a.scale, a.point, b.codes.t(), b.scale, b.point, bias, a.spec, b.spec, a.edge, b.edge)
    return ops.MATMUL_CODES(*given, kernel, dtype)


def expected(a, b):
    """Exact but for the 53 bits of float64."""
    (left, rows), (right, columns) = a.exact(), b.exact()
    return (left @ right.T).astype(np.float64) * rows[:, None] * columns[None, :]


@given(
    *(st.sampled_from(FORMATS),) * 2,
    *(st.integers(2, 40),) * 3,
    *(st.integers(1, 45),) * 2,
    st.sampled_from(KERNELS),
    st.booleans(),
    st.integers(0, 2**32),
)
@PROPERTY
def test_against_exact_sums(left, right, rows, length, columns, a_edge, b_edge, kernel, biased, seed):
    a = Side.draw(left, rows, length, min(a_edge, rows), seed)
    b = Side.draw(right, columns, length, min(b_edge, columns), seed + 1)
    bias = torch.randn(columns, generator=torch.Generator().manual_seed(seed)) if biased else None
    found, exact = multiply(a, b, kernel, bias=bias).double().numpy(), expected(a, b)
    # the sum becomes a float32 and is multiplied twice; the sum with the bias is rounded once more
    bound = 4 * UNIT * np.abs(exact)
    if bias is not None:
        exact = exact + bias.double().numpy()
        bound = bound + UNIT * (np.abs(exact) + bound)
    assert (np.abs(found - exact) <= bound).all()


def lay(codes, turned):
    """The same codes, with the second dimension outermost in memory."""
    return codes.t().contiguous().t() if turned else codes


needs_vectors = pytest.mark.skipif(bool(explain_vectors()), reason=explain_vectors())


@needs_vectors
@given(
    *(st.sampled_from(FORMATS),) * 2,
    st.integers(1, 140),
    st.integers(1, 140) | st.integers(500, 1100),
    st.integers(1, 140),
    *(st.integers(1, 150),) * 2,
    *(st.booleans(),) * 3,
    st.sampled_from([None, (), ("columns",), ("rows", 1)]),
    st.integers(0, 2**32),
)
@example("int4", "affine4", 20, 7, 30, 150, 150, False, False, True, None, 0)
@PROPERTY
def test_the_kernel_of_whole_sums_multiplies_as_the_reference_does(
    left, right, rows, length, columns, a_edge, b_edge, a_turned, b_turned, unpacked, bias, seed
):
    """Bit for bit: sums are exact, and scaled and rounded in the same order. `unpack` returns int32."""
    a = Side.draw(left, rows, length, min(a_edge, rows), seed)
    b = Side.draw(right, columns, length, min(b_edge, columns), seed + 1)
    a.codes, b.codes = lay(a.codes, a_turned), lay(b.codes, b_turned)
    for side in (a, b):
        if unpacked and parse_spec(side.spec).format.bits < 8:
            side.codes = side.codes.to(torch.int32)
    extents = {"rows": rows, "columns": columns}
    shape = bias if bias is None else [extents.get(name, name) for name in bias]
    given = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(multiply(a, b, "whole", bias=given), multiply(a, b, "", bias=given))


@needs_vectors
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "length", "columns"), [(700, 30, 900), (64, 33025, 20), (9, 140000, 21)])
def test_many_tasks_and_the_longest_sums(rows, length, columns, threads, monkeypatch):
    """Of 48 or 64 rows and 384 or 768 columns each; 33025·255² < 2³¹ is the most that a sum of int32 can be."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    a, b = Side.draw("affine8", rows, length, rows, 0), Side.draw("affine8", columns, length, columns, 1)
    a.codes[0], a.point[:], b.codes[0], b.point[:] = 255, 0, 255, 0
    assert torch.equal(multiply(a, b, "whole"), multiply(a, b, ""))


@needs_vectors
@pytest.mark.parametrize(("form", "nan"), [("int8:max", 255), ("int8:real", torch.nan), ("affine8:real", torch.nan)])
def test_the_kernel_of_whole_sums_keeps_nan(form, nan):
    form, scale = form.split(":")
    a, b = (Side.draw(form, extent, 5, 2, seed, scale) for extent, seed in ((30, 0), (40, 1)))
    a.scale[1], b.scale[0] = nan, nan
    found, wanted = multiply(a, b, "whole"), multiply(a, b, "")
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [2, 7, 1040])
def test_bit_for_bit_the_product_of_floats(length, dtype, kernel):
    """Powers of two and 1040·127² < 2²⁴: float32 holds every partial sum, so the order of sums does not matter."""
    a, b = (Side.draw("int8", extent, length, extent, seed, "max") for extent, seed in ((9, 0), (12, 1)))
    a.scale, b.scale = (torch.full((1, 1), code, dtype=torch.uint8) for code in (125, 121))
    floats = [references.dequantize(s.codes, s.scale, None, s.spec, "bc", torch.float32) for s in (a, b)]
    assert torch.equal(multiply(a, b, kernel, dtype), (floats[0] @ floats[1].t()).to(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_unpacked_codes(kernel):
    a, b = (Side.draw("int4", 6, 8, 6, seed) for seed in (0, 1))
    whole = multiply(a, b, kernel)
    a.codes = references.unpack(references.pack(a.codes, 4), [6, 8], 4, True)
    assert per_byte(4) == 2
    assert a.codes.dtype is torch.int32
    assert torch.equal(multiply(a, b, kernel), whole)


@pytest.mark.parametrize(("form", "nan"), [("int8:max", 255), ("int8:real", torch.nan), ("affine8:real", torch.nan)])
def test_a_block_that_is_not_finite(form, nan):
    """NaN throughout its rows or columns, and nowhere else, even if all codes are those of zero."""
    form, scale = form.split(":")
    a, b = (Side.draw(form, extent, 5, 2, seed, scale) for extent, seed in ((4, 0), (6, 1)))
    a.scale[1] = nan
    a.codes[2:] = 0 if a.point is None else a.point[1]
    expected_nan = torch.zeros(4, 6, dtype=torch.bool)
    expected_nan[2:] = True
    assert torch.equal(multiply(a, b, "int-mm").isnan(), expected_nan)
    b.scale[0] = nan
    expected_nan[:, :2] = True
    assert torch.equal(multiply(a, b, "int-mm").isnan(), expected_nan)


@pytest.mark.parametrize(("first", "second"), [(-126, 20), (20, -126), (-126, -10), (97, -100), (-100, 97)])
def test_extreme_scales_meet_in_the_range_of_float32(first, second):
    """Neither order of the scales may overflow or vanish on the way: 2⁻¹²⁶·2⁻¹⁰ is no float32 by itself."""
    a, b = (Side.draw("int8", 3, 4, 3, seed, "max") for seed in (0, 1))
    a.scale[:], b.scale[:] = first + 127, second + 127
    exact = torch.from_numpy(expected(a, b))
    assert torch.equal(multiply(a, b, "int-mm"), exact.to(torch.float32))


def test_infinite_results():
    a, b = (Side.draw("int8", 2, 4, 2, seed, "max") for seed in (0, 1))
    a.codes[:], b.codes[:] = 127, 127
    a.scale[:], b.scale[:] = 254, 254
    assert torch.equal(multiply(a, b, "int-mm"), torch.full((2, 2), torch.inf))


@pytest.mark.parametrize("kernel", ["", pytest.param("whole", marks=needs_vectors)])
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (1, 1, 1), (3, 4, 0)])
def test_every_shape(shape, kernel):
    rows, length, columns = shape
    a, b = Side.draw("affine8", rows, length, max(rows, 1), 0), Side.draw("int8", columns, length, max(columns, 1), 1)
    for side in (a, b):
        side.scale = torch.ones(1)
    a.point = torch.full((1,), 3, dtype=torch.uint8)
    assert torch.equal(multiply(a, b, kernel), torch.from_numpy(expected(a, b)).to(torch.float32))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("edges", [(12, 15), (4, 5), (2, 1), (1, 15)])
def test_a_batch_is_matrix_after_matrix(edges, kernel):
    """Rows and columns are counted throughout the batch: 3 matrices of 4 rows and 5 columns."""
    a, b = Side.draw("affine8", 12, 7, edges[0], 0), Side.draw("affine4", 15, 7, edges[1], 1)
    codes = a.codes.reshape(3, 4, 7), b.codes.reshape(3, 5, 7).transpose(1, 2)
    sides = (codes[0], a.scale, a.point, codes[1], b.scale, b.point, None, a.spec, b.spec, *edges)
    given = (*sides, kernel, torch.float32)
    found = ops.MATMUL_CODES(*given).double()
    whole = torch.from_numpy(expected(a, b)).reshape(3, 4, 3, 5)
    exact = torch.stack([whole[i, :, i] for i in range(3)])
    assert ((found - exact).abs() <= 4 * UNIT * exact.abs()).all()
    torch.library.opcheck(ops.MATMUL_CODES, given, test_utils=("test_schema", "test_faketensor"))


def test_traced_it_is_the_same(same_bits_of):
    a, b = Side.draw("affine8", 6, 8, 2, 0), Side.draw("uint8", 4, 8, 4, 1)
    given = (a.codes, a.scale, a.point, b.codes.t(), b.scale, b.point, torch.randn(4), a.spec, b.spec, 2, 4)
    same_bits_of(matmul_codes, ops.MATMUL_CODES, (*given, "int-mm", torch.float32))


@pytest.fixture
def same_bits_of():
    """same_bits_of(function, operator, args): shape and type of the fake result are those of the real one."""

    def check(function, operator, args):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(operator(*args), function(*args))

    return check


def facts(left="int8", right="int8", length=64):
    formats = (parse_format(left), parse_format(right))
    return Facts(device="cpu", formats=formats, rows=4, length=length, columns=4)


@pytest.mark.parametrize(
    ("given", "dtype", "reason"),
    [
        (facts(), torch.float32, ""),
        (facts("uint8", "affine8"), torch.float16, ""),
        (facts(), torch.float64, "the result is float64"),
        (facts("e4m3"), torch.float32, "e4m3 is no integer of at most 8 bits"),
        (facts(right="int16"), torch.float32, "int16 is no integer of at most 8 bits"),
        (facts(length=133145), torch.float32, "a sum of 133145 products can leave 32 bits"),
        (facts(length=133144), torch.float32, ""),
        (facts("affine8", "affine8", 33026), torch.float32, "a sum of 33026 products can leave 32 bits"),
        (facts("affine8", "affine8", 33025), torch.float32, ""),
    ],
)
def test_what_cannot_be_computed(given, dtype, reason):
    found = explain_product(given, dtype) or explain_sums(given)
    assert found == reason if reason == "" else reason in found


def test_compiled_code_has_no_call_of_ours_inside_a_loop():
    """Inductor fuses scales and what follows only if it sees the plain code; calls are what a pass chose as one."""
    operators = {value for value in vars(ops).values() if isinstance(value, torch._ops.OpOverload)}
    assert operators - ops.DECOMPOSITIONS.keys() == {
        ops.CONVOLVE_CODES,
        ops.CONVOLVE_GRADIENT,
        ops.CONVOLVE_INPUT,
        ops.DEQUANTIZE_BLOCKS,
        ops.DRAW_KEY,
        ops.MOVE_RANGES,
        ops.MULTIPLY_BATCH,
        ops.MULTIPLY_RUNS,
        ops.MULTIPLY_WHOLE,
        ops.PACK_CODES,
        ops.PATCHES,
        ops.QUANTIZE_BLOCKS,
        ops.QUANTIZE_BY,
        ops.QUANTIZE_MEASURED,
        ops.READ_RANGES,
        ops.TURN_TAPS,
        ops.UNPACK_CODES,
    }
