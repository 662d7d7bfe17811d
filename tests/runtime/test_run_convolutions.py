"""Convolutions of codes whose scales change along the summed axis, and their gradients: run by run in float32."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime import ops
from qcompiler.runtime.kernels.loader import explain_vectors

SPEC = "int8:real:tensor:nearest:pass"
REASON = explain_vectors()
KERNEL = pytest.param("convolve", marks=pytest.mark.skipif(bool(REASON), reason=REASON))


@dataclasses.dataclass
class Blocks:
    """Codes with a scale for each block of `edge` free and of `run` summed indices."""

    codes: torch.Tensor
    scale: torch.Tensor
    edge: int
    run: int
    free: int

    @classmethod
    def draw(cls, shape, free, edge, run, seed):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        counts = -(-shape[free] // edge), -(-shape[1 - free] // run)
        return cls(codes, torch.rand(counts, generator=generator) + 0.1, edge, run, free)

    def cut(self, first, run):
        """The codes as float64 and the float32 factors of some summed indices, which share a scale."""
        extent = self.codes.shape[self.free]
        shape = [-1 if dim == self.free else 1 for dim in range(self.codes.ndim)]
        factors = self.scale[torch.arange(extent) // self.edge, first // self.run].reshape(shape)
        return self.codes.narrow(1 - self.free, first, run).to(torch.float64), factors


@pytest.mark.parametrize("kernel", ["", KERNEL])
@given(
    st.sampled_from([(32, 32), (64, 32), (40, 20), (7, 14), (70, 32), (20, 70), (70, 70)]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_runs_are_added_in_float32_in_ascending_order(kernel, runs, channels_last, seed):
    """Of channels, of rows and of samples: 70 summed indices in each of the three contractions.

    A run of 70 is no run. The result in bfloat16 is that in float32, rounded once.
    """
    x, y = (6, 13), (4, 11)
    shapes = (
        {"x": (3, 70, *x), "w": (9, 70, 3, 3)},
        {"y": (3, 70, *y), "w": (70, 9, 3, 3)},
        {"y": (70, 9, *y), "x": (70, 8, *x)},
    )
    windows = {"start": [0, 0], "count": [*y], "step": [1, 1], "dilation": [1, 1]}
    given = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "space": [*x]}
    ways = (
        (ops.CONVOLVE_CODES, (0, 0), windows, lambda x, w: F.conv2d(x, w)),
        (ops.CONVOLVE_INPUT, (0, 1), given, lambda y, w: F.conv_transpose2d(y, w)),
        (
            ops.CONVOLVE_GRADIENT,
            (1, 1),
            {**windows, "taps": [3, 3]},
            lambda y, x: F.conv2d(x.movedim(1, 0), y.movedim(1, 0)).movedim(1, 0),
        ),
    )
    for (operator, free, last, compute), pair in zip(ways, shapes, strict=True):
        drawn = zip(pair.values(), free, (2, 5), runs, strict=True)
        a, b = (Blocks.draw(shape, dim, edge, run, seed + run) for shape, dim, edge, run in drawn)
        name = "convolve-gradient" if kernel and operator is ops.CONVOLVE_GRADIENT else kernel
        bias = torch.randn(9) if operator is ops.CONVOLVE_CODES else None
        args = a.codes, a.scale, None, b.codes, b.scale, None, bias, SPEC, SPEC, a.edge, b.edge, name
        parts = {"a_run": a.run % 70, "b_run": b.run % 70}
        found, short = (
            operator(*args, dtype, **last, **parts, channels_last=channels_last)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert torch.equal(short, found.to(torch.bfloat16))
        expected, step = torch.zeros_like(found), math.gcd(*parts.values()) or 70
        for first in range(0, 70, step):
            (left, own), (right, other) = (side.cut(first, min(step, 70 - first)) for side in (a, b))
            own = own.movedim(free[0], 0)
            other = other.movedim(free[1], 1)
            sums = compute(left, right).to(torch.float32)
            expected += sums * torch.minimum(own, other) * torch.maximum(own, other)
        expected += 0 if bias is None else bias.reshape(-1, 1, 1)
        assert torch.equal(found, expected)


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("broken", [False, True])
def test_runs_are_added_to_inputs_that_no_tap_meets(taps, stride, broken):
    """Zeros, or NaN of the scale of a later run."""
    y, w = Blocks.draw((3, 64, 4, 4), 0, 1, 32, 0), Blocks.draw((64, 5, taps, taps), 1, 1, 32, 1)
    w.scale[3, 1] = torch.nan if broken else 1.0
    args = y.codes, y.scale, None, w.codes, w.scale, None, None, SPEC, SPEC, 1, 1
    size = [3 * stride + taps] * 2
    given = {"stride": [stride] * 2, "padding": [0, 0], "dilation": [1, 1], "space": size, "channels_last": True}
    found, expected = (
        ops.CONVOLVE_INPUT(*args, name, torch.float32, **given, a_run=32, b_run=32) for name in ("convolve", "")
    )
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any() == broken
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.fixture
def poisoned():
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", ["", KERNEL])
@pytest.mark.parametrize("runs", [(0, 0), (32, 32), (32, 64)])
@pytest.mark.usefixtures("poisoned")
def test_sums_of_nothing_are_zero(kernel, runs):
    """Of no channels, no rows and no samples, as in an empty batch."""
    assert torch.empty(1).isnan()
    shapes = {
        "forward": ((2, 0, 4, 4), (3, 0, 3, 3), [-1, -1], [4, 4], [1, 1], [1, 1]),
        "input": ((2, 0, 4, 4), (0, 3, 3, 3), [1, 1], [1, 1], [1, 1], [4, 4]),
        "gradient": ((0, 3, 4, 4), (0, 5, 4, 4), [-1, -1], [4, 4], [1, 1], [3, 3], [1, 1]),
    }
    for name, (left, right, *windows) in shapes.items():
        a, b = (torch.empty(shape, dtype=torch.int8) for shape in (left, right))
        scales = [torch.ones(1, 0) if run else torch.ones(1) for run in runs]
        bias = torch.tensor([1.0, 2.0, 3.0]) if name == "forward" else None
        operator = {"forward": ops.CONVOLVE_CODES, "input": ops.CONVOLVE_INPUT, "gradient": ops.CONVOLVE_GRADIENT}[name]
        own = f"{kernel}-gradient" if kernel and name == "gradient" else kernel
        sides = a, scales[0], None, b, scales[1], None, bias
        found = operator(*sides, SPEC, SPEC, 9, 9, own, torch.float32, *windows, False, *runs)
        expected = torch.zeros(found.shape) if bias is None else bias.reshape(-1, 1, 1).expand(found.shape)
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_products_of_nothing_are_the_bias():
    a, b, bias = torch.empty(3, 0, dtype=torch.int8), torch.empty(0, 4, dtype=torch.int8), torch.randn(4)
    sides = a, torch.ones(1), None, b, torch.ones(1), None
    assert torch.equal(ops.MULTIPLY_WHOLE(*sides, bias, SPEC, SPEC, 3, 4, "whole"), bias.expand(3, 4))
    # nothing behind a single scale is read
    behind = torch.full((9,), torch.nan)
    behind[0] = 1
    sides = a, behind[:1], None, b, behind[:1], None
    assert torch.equal(ops.MULTIPLY_WHOLE(*sides, bias, SPEC, SPEC, 3, 4, "whole"), bias.expand(3, 4))
    factors = torch.ones(1, 0)
    assert torch.equal(ops.MULTIPLY_RUNS(a, factors, 3, b, factors, 4, 32, "runs"), torch.zeros(3, 4))
