"""Products of codes whose scales change along the summed axis: scales of both operands, bias, type and traced code."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompiler.runtime import ops, references
from qcompiler.runtime.kernels.kernel import Facts, explain_sums
from qcompiler.runtime.kernels.runs import RUNS
from qcompiler.runtime.numbers.blocks import Block
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.products import matmul_codes
from qcompiler.runtime.spec import parse_spec

PROPERTY = settings(derandomize=True, deadline=None, max_examples=150)
UNIT = 2.0**-24
FORMATS = (parse_format("int8"), parse_format("int8"))
REASON = RUNS.explain(Facts(device="cpu", formats=FORMATS, rows=2, length=64, columns=2, run=32))
KERNELS = ["", pytest.param("runs", marks=pytest.mark.skipif(bool(REASON), reason=REASON))]


class Side:
    """Random numbers [outer, length] and their codes, in blocks of `edge` × `run`; a run of 0 is the whole sum."""

    def __init__(self, outer, length, edge, run, seed, rule="max"):
        generator = torch.Generator().manual_seed(seed)
        self.run = run if run < length else 0
        self.spec = str(parse_spec(f"int8:{rule}:{Block(batch=edge, channel=run)}:nearest:pass"))
        floats = torch.randn(outer, length, generator=generator)
        self.scale = references.scale(floats, self.spec, "bc")
        self.codes = references.quantize(floats, self.scale, None, None, self.spec, "bc", "")
        self.edge = min(edge, outer)

    def floats(self, dtype=torch.float32):
        """The numbers that the codes stand for."""
        return references.dequantize(self.codes, self.scale, None, self.spec, "bc", torch.float32).to(dtype)


def arguments(a, b, kernel, dtype=torch.float32, bias=None):
    given = (a.codes, a.scale, None, b.codes.t(), b.scale, None, bias, a.spec, b.spec, a.edge, b.edge)
    return (*given, kernel, dtype, a.run, b.run)


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    *(st.integers(1, 40),) * 2,
    st.integers(33, 300),
    *(st.integers(1, 45),) * 2,
    st.sampled_from([(32, 32), (32, 64), (128, 32), (96, 64), (0, 32), (48, 0)]),
    st.booleans(),
    st.integers(0, 2**32),
)
@PROPERTY
def test_against_float64(kernel, rows, columns, length, a_edge, b_edge, runs, biased, seed):
    """Each term is off by as many units as there are runs, and 2 more (factor, product); the bias by one of the sum."""
    a = Side(rows, length, a_edge, runs[0], seed, "real")
    b = Side(columns, length, b_edge, runs[1], seed + 1, "real")
    assume(a.run or b.run)
    bias = torch.randn(columns, generator=torch.Generator().manual_seed(seed)) if biased else None
    found = ops.MATMUL_CODES(*arguments(a, b, kernel, bias=bias)).double()
    left, right = a.floats(torch.float64), b.floats(torch.float64)
    exact, magnitude = left @ right.t(), left.abs() @ right.abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    # floats are codes times factors, rounded to float32 once more
    assert ((found - exact).abs() <= (length // 32 + 8) * UNIT * magnitude).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [33, 64, 100])
def test_bit_for_bit_the_product_of_floats(length, dtype, kernel):
    """Factors of 2^-6 or 2^-7 and at most 100·127² products in steps of 2^-14: below 2^24 steps, float32 is exact."""
    a, b = (Side(extent, length, 4, 32, seed) for extent, seed in ((9, 0), (12, 1)))
    for side in (a, b):
        side.scale = (120 + torch.arange(side.scale.numel()) % 2).to(torch.uint8).reshape(side.scale.shape)
    found = ops.MATMUL_CODES(*arguments(a, b, kernel, dtype))
    assert 4 * length * 127**2 < 2**24
    assert torch.equal(found, (a.floats() @ b.floats().t()).to(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_block_that_is_not_finite(kernel):
    a, b = Side(24, 96, 8, 32, 0), Side(40, 96, 4, 32, 1)
    a.scale[1, 2] = 255
    wanted = torch.zeros(24, 40, dtype=torch.bool)
    wanted[8:16] = True
    assert torch.equal(ops.MATMUL_CODES(*arguments(a, b, kernel)).isnan(), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_of_zeros(kernel):
    """The smallest scale with codes of zero: their runs add nothing to the others."""
    a, b = Side(8, 96, 8, 32, 0), Side(8, 96, 8, 32, 1)
    a.codes[:, 32:64], a.scale[:, 1] = 0, 1
    b.codes[:, 64:], b.scale[:, 2] = 0, 1
    first = [side.floats(torch.float64)[:, :32] for side in (a, b)]
    assert torch.equal(ops.MATMUL_CODES(*arguments(a, b, kernel)), (first[0] @ first[1].t()).float())


@pytest.mark.parametrize("kernel", KERNELS)
def test_schema_and_shape(kernel):
    given = arguments(Side(4, 70, 2, 32, 0), Side(6, 70, 2, 64, 1), kernel, torch.bfloat16)
    torch.library.opcheck(ops.MATMUL_CODES, given, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(matmul_codes(*given), ops.MATMUL_CODES(*given))


def test_the_run_must_fit_into_32_bits_not_the_sum():
    long = Facts(device="cpu", formats=FORMATS, rows=2, length=10**6, columns=2, run=32)
    assert explain_sums(long) == ""
    with_long_runs = Facts(device="cpu", formats=FORMATS, rows=2, length=10**6, columns=2, run=133145)
    assert explain_sums(with_long_runs) == "a sum of 133145 products can leave 32 bits"
