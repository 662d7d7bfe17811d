"""Convolutions of codes and their gradients against those of float64, which hold every sum; kernel and reference."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompiler.runtime import ops
from qcompiler.runtime.kernels.convolutions import CONVOLVE, CONVOLVE_GRADIENT
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.scales import get_factor
from qcompiler.runtime.spec import parse_spec

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
FORMATS = ("int8", "int4", "uint8", "uint3", "affine8", "affine4")
WEIGHTS = ("int8", "int4")
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
OF_INPUT = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}
OF_WEIGHT = {1: torch.nn.grad.conv1d_weight, 2: torch.nn.grad.conv2d_weight, 3: torch.nn.grad.conv3d_weight}
INT8 = (parse_format("int8"), parse_format("int8"))
FACTS = Facts(device="cpu", formats=INT8, rows=64, length=144, columns=16, image="left")
REASON = CONVOLVE.explain(FACTS) or CONVOLVE_GRADIENT.explain(dataclasses.replace(FACTS, image="right"))


def with_kernel(name):
    """Parameters: the reference and a kernel, where this processor has one."""
    return pytest.mark.parametrize(
        "kernel", ["", pytest.param(name, marks=pytest.mark.skipif(bool(REASON), reason=REASON))]
    )


@dataclasses.dataclass
class Side:
    """Codes, and scale and zero point of every `edge` indices of a dimension."""

    spec: str
    codes: torch.Tensor
    scale: torch.Tensor
    point: torch.Tensor | None
    dim: int
    edge: int

    @classmethod
    def draw(cls, form, shape, dim, edge, seed, *, channels_last=False):
        generator = torch.Generator().manual_seed(seed)
        is_real = form.startswith("affine") or bool(torch.randint(2, (), generator=generator))
        spec = parse_spec(f"{form}:{'real' if is_real else 'fit'}:tensor:nearest:pass")
        low, high = int(spec.format.lowest), int(spec.format.largest) + 1
        codes = torch.randint(low, high, shape, generator=generator).to(spec.format.dtype)
        if channels_last:
            codes = codes.movedim(1, -1).contiguous().movedim(-1, 1)
        count = -(-shape[dim] // edge)
        scale = torch.rand(count, generator=generator) + 0.1
        if not is_real:
            scale = torch.randint(100, 140, (count,), generator=generator).to(torch.uint8)
        point = torch.randint(0, high, (count,), generator=generator).to(spec.format.dtype)
        return cls(str(spec), codes, scale, point if spec.has_zero_point else None, dim, edge)

    def spread(self, values):
        """One value for every index, in a shape that meets the codes."""
        shape = [-1 if dim == self.dim else 1 for dim in range(self.codes.ndim)]
        return values[torch.arange(self.codes.shape[self.dim]) // self.edge].reshape(shape)

    @property
    def exact(self):
        """Code less zero point as float64."""
        point = 0 if self.point is None else self.spread(self.point).to(torch.float64)
        return self.codes.to(torch.float64) - point

    @property
    def factor(self):
        """Float32 factor of every index."""
        return self.spread(get_factor(self.scale))

    def list_arguments(self):
        """Codes of 7 bits at most are int32, as `unpack` returns them."""
        codes = self.codes if parse_spec(self.spec).format.bits == 8 else self.codes.to(torch.int32)
        return codes, self.scale, self.point


def scaled(sums, left, right):
    """float32(sum) · the smaller factor · the larger one: two roundings, in this order."""
    return sums.to(torch.float32) * torch.minimum(left, right) * torch.maximum(left, right)


def call(operator, a, b, kernel, bias=None, **given):
    """Return the result in float32; those in types of 16 bits are this one, rounded once."""
    edges = a.edge, b.edge
    found, *shorts = (
        operator(*a.list_arguments(), *b.list_arguments(), bias, a.spec, b.spec, *edges, kernel, dtype, **given)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    for short in shorts:
        torch.testing.assert_close(short, found.to(short.dtype), rtol=0, atol=0, equal_nan=True)
    return found


@dataclasses.dataclass
class Case:
    """A convolution of 1 to 3 dimensions."""

    samples: int
    channels: int
    outs: int
    space: list[int]
    taps: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    @property
    def dims(self):
        return len(self.space)

    @property
    def count(self):
        sizes = zip(self.space, self.taps, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


@st.composite
def cases(draw, *, gradient=False):
    dims = draw(st.integers(1, 3))
    case = Case(
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 33])),
        draw(st.sampled_from([1, 2, 3, 16, 20, 32, 49])),
        *(
            draw(st.lists(st.integers(*ends), min_size=dims, max_size=dims))
            for ends in ((1, 20 if dims < 3 else 7), (1, 4))
        ),
        *(draw(st.lists(st.integers(*ends), min_size=dims, max_size=dims)) for ends in ((1, 3), (0, 2), (1, 3))),
    )
    if gradient and any(s > 1 and d > 1 for s, d in zip(case.stride, case.dilation, strict=True)):
        case.dilation = [1] * dims
    rows = zip(case.space, case.taps, case.padding, case.dilation, strict=True)
    case.space = [max(n, d * (k - 1) + 1 - 2 * p, 1) for n, k, p, d in rows]
    return case


#: runs of 16 positions, of 8 with two and three groups of columns, and sums of several chunks of rows
LARGE = [
    Case(2, 16, 16, [32, 33], [3, 3], [1, 1], [1, 1], [1, 1]),
    Case(1, 64, 96, [20, 17], [3, 3], [2, 1], [1, 1], [1, 1]),
    Case(2, 130, 36, [40, 40], [1, 3], [1, 2], [0, 1], [1, 1]),
]


def examples(test):
    """The property, and the large cases."""
    for case in LARGE:
        for channels_last in (False, True):
            test = example(case, "affine8", "int8", 1, 16, channels_last, True, 3)(test)
    return test


ARGUMENTS = (st.integers(1, 3), st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 2**32))


@with_kernel("convolve")
@examples
@given(cases(), st.sampled_from(FORMATS), st.sampled_from(WEIGHTS), *ARGUMENTS)
@PROPERTY
def test_forward(kernel, case, form, weight, edge, columns, reads_last, writes_last, seed):
    x = Side.draw(
        form, (case.samples, case.channels, *case.space), 0, min(edge, case.samples), seed, channels_last=reads_last
    )
    w = Side.draw(weight, (case.outs, case.channels, *case.taps), 0, min(columns, case.outs), seed + 1)
    bias = torch.randn(case.outs, generator=torch.Generator().manual_seed(seed)) if seed % 2 else None
    windows = {"start": [-p for p in case.padding], "count": case.count, "step": case.stride, "dilation": case.dilation}
    found = call(ops.CONVOLVE_CODES, x, w, kernel, bias, channels_last=writes_last, **windows)
    sums = CONV[case.dims](x.exact, w.exact, None, case.stride, case.padding, case.dilation)
    expected = scaled(sums, x.factor, w.factor.movedim(0, 1))
    if bias is not None:
        expected = expected + bias.reshape(-1, *(1,) * case.dims)
    assert torch.equal(found, expected)
    assert found.movedim(1, -1).is_contiguous() if writes_last else found.is_contiguous()


@with_kernel("convolve")
@examples
@given(cases(gradient=True), st.sampled_from(FORMATS), st.sampled_from(WEIGHTS), *ARGUMENTS)
@PROPERTY
def test_input_gradient(kernel, case, form, weight, edge, columns, reads_last, writes_last, seed):
    shape = (case.samples, case.outs, *case.count)
    y = Side.draw(form, shape, 0, min(edge, case.samples), seed, channels_last=reads_last)
    w = Side.draw(
        weight,
        (case.outs, case.channels, *case.taps),
        1,
        min(columns, case.channels),
        seed + 1,
        channels_last=bool(seed % 2),
    )
    given = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation, "space": case.space}
    found = call(ops.CONVOLVE_INPUT, y, w, kernel, channels_last=writes_last, **given)
    size = (case.samples, case.channels, *case.space)
    sums = OF_INPUT[case.dims](size, w.exact, y.exact, case.stride, case.padding, case.dilation)
    assert torch.equal(found, scaled(sums, y.factor, w.factor))
    assert found.movedim(1, -1).is_contiguous() if writes_last else found.is_contiguous()


@with_kernel("convolve-gradient")
@examples
@given(cases(), st.sampled_from(FORMATS), st.sampled_from(FORMATS), *ARGUMENTS)
@PROPERTY
def test_weight_gradient(kernel, case, form, other, edge, rows, reads_last, writes_last, seed):
    shape = (case.samples, case.outs, *case.count)
    y = Side.draw(other, shape, 1, min(rows, case.outs), seed, channels_last=bool(seed % 2))
    edge = case.channels if form.startswith("affine") else min(edge, case.channels)
    x = Side.draw(form, (case.samples, case.channels, *case.space), 1, edge, seed + 1, channels_last=reads_last)
    windows = {"start": [-p for p in case.padding], "count": case.count, "step": case.stride, "dilation": case.dilation}
    found = call(ops.CONVOLVE_GRADIENT, y, x, kernel, taps=case.taps, channels_last=writes_last, **windows)
    size = (case.outs, case.channels, *case.taps)
    sums = OF_WEIGHT[case.dims](x.exact, size, y.exact, case.stride, case.padding, case.dilation)
    assert torch.equal(found, scaled(sums, y.factor.movedim(1, 0), x.factor))
    assert found.movedim(1, -1).is_contiguous() if writes_last else found.is_contiguous()


@with_kernel("convolve-gradient")
@pytest.mark.parametrize("form", ["int8", "affine8"])
def test_weight_gradients_of_extreme_codes_leave_32_bits(kernel, form):
    """133,120 positions: the largest sum is 255² of them, 8.7e9."""
    y = Side.draw(form, (130, 2, 32, 32), 1, 2, 0)
    x = Side.draw("affine8", (130, 1, 32, 32), 0, 130, 1)
    y.codes.fill_(127 if form == "int8" else 255), x.codes.fill_(255)
    for side in (x, y):
        side.point = None if side.point is None else side.point.zero_()
    windows = {"start": [0, 0], "count": [32, 32], "step": [1, 1], "taps": [1, 1], "dilation": [1, 1]}
    x.edge = 1
    found = call(ops.CONVOLVE_GRADIENT, y, x, kernel, channels_last=False, **windows)
    sums = torch.full((2, 1, 1, 1), 130 * 1024 * 255.0 * (127 if form == "int8" else 255), dtype=torch.float64)
    assert float(sums[0]) > 2**31
    assert torch.equal(found, scaled(sums, y.factor.movedim(1, 0), get_factor(x.scale)))


@with_kernel("convolve-gradient")
@pytest.mark.parametrize("code", [0, 255])
def test_a_row_of_positions_whose_sum_leaves_32_bits(code, kernel):
    """140,000 positions beside each other, as in sound: 140,000·255·128 is above 2³¹."""
    length = 140_000
    y, x = Side.draw("affine8", (1, 3, length), 1, 3, 0), Side.draw("affine8", (1, 2, length), 1, 2, 1)
    y.codes.fill_(255), x.codes.fill_(code)
    for side in (x, y):
        side.point.zero_()
    windows = {"start": [0], "count": [length], "step": [1], "taps": [1], "dilation": [1]}
    found = call(ops.CONVOLVE_GRADIENT, y, x, kernel, channels_last=False, **windows)
    sums = torch.full((3, 2, 1), length * 255.0 * code, dtype=torch.float64)
    assert torch.equal(found, scaled(sums, y.factor.movedim(1, 0), x.factor))


@with_kernel("convolve")
@pytest.mark.parametrize("broken", ["image", "weight"])
def test_a_nan_scale_gives_nan_throughout(kernel, broken):
    """Of one sample, or of one column; also in inputs that no tap meets."""
    x, w = Side.draw("int8", (2, 3, 5, 5), 0, 1, 0), Side.draw("int8", (4, 3, 1, 1), 0, 1, 1)
    x.scale, w.scale = torch.ones(2), torch.ones(4)
    (x if broken == "image" else w).scale[1] = torch.nan
    windows = {"start": [0, 0], "count": [5, 5], "step": [1, 1], "dilation": [1, 1]}
    found = call(ops.CONVOLVE_CODES, x, w, kernel, channels_last=False, **windows).isnan()
    wanted = torch.zeros_like(found)
    wanted[(1,) if broken == "image" else (slice(None), 1)] = True
    assert torch.equal(found, wanted)
    y, w = Side.draw("int8", (2, 4, 3, 3), 0, 1, 0), Side.draw("int8", (4, 3, 1, 1), 1, 3, 1)
    y.scale, w.scale = torch.tensor([1.0, torch.nan]), torch.ones(1)
    given = {"stride": [2, 2], "padding": [0, 0], "dilation": [1, 1], "space": [5, 5]}
    found = call(ops.CONVOLVE_INPUT, y, w, kernel, channels_last=False, **given).isnan()
    assert torch.equal(found, torch.tensor([False, True]).reshape(2, 1, 1, 1).expand_as(found))


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize(("samples", "channels", "outs"), [(3, 20, 40), (40, 3, 17), (420, 1, 2), (40, 200, 200)])
def test_threads_change_nothing(samples, channels, outs):
    """Nor do batches that each thread sums for itself: in int64 those of 420 samples; or that all threads sum."""
    x, w = (
        Side.draw("affine8", (samples, channels, 9, 9), 0, 1, 0),
        Side.draw("int8", (outs, channels, 3, 3), 0, outs, 1),
    )
    y = Side.draw("int8", (samples, outs, 9, 9), 1, outs, 2)
    windows = {"start": [-1, -1], "count": [9, 9], "step": [1, 1], "dilation": [1, 1], "channels_last": True}
    whole = dataclasses.replace(x, scale=x.scale[:1], point=x.point[:1], edge=channels)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            forward = call(ops.CONVOLVE_CODES, x, w, "convolve", **windows)
            found.append((forward, call(ops.CONVOLVE_GRADIENT, y, whole, "convolve-gradient", taps=[3, 3], **windows)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for pair in found for one, other in zip(pair, found[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5)])
def test_without_elements(shape):
    """No sample gives no result, and an empty sum is 0."""
    x, w = torch.zeros(shape, dtype=torch.int8), torch.zeros(4, shape[1], 3, 3, dtype=torch.int8)
    given = (x, torch.ones(1), None, w, torch.ones(1), None, None, *("int8:real:tensor:nearest:pass",) * 2, 2, 4)
    found = ops.CONVOLVE_CODES(*given, "convolve", torch.float32, [0, 0], [3, 3], [1, 1], [1, 1], True)
    assert torch.equal(found, torch.zeros(shape[0], 4, 3, 3))


@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_have_shapes(channels_last):
    x, w = Side.draw("affine8", (2, 3, 5, 6), 0, 2, 0), Side.draw("int8", (4, 3, 3, 2), 0, 4, 1)
    y = Side.draw("int8", (2, 4, 3, 5), 1, 4, 2)
    forward = ([0, 0], [3, 5], [1, 1], [1, 1], channels_last)
    gradient = ([0, 0], [3, 5], [1, 1], [3, 2], [1, 1], channels_last)
    backward = ([1, 1], [0, 0], [1, 1], [5, 6], channels_last)
    for operator, a, b, last in (
        (ops.CONVOLVE_CODES, x, w, forward),
        (ops.CONVOLVE_GRADIENT, y, dataclasses.replace(x, edge=18), gradient),
        (ops.CONVOLVE_INPUT, dataclasses.replace(y, edge=2), dataclasses.replace(w, edge=3), backward),
    ):
        args = (*a.list_arguments(), *b.list_arguments(), None, a.spec, b.spec, a.edge, b.edge, "", torch.float32)
        torch.library.opcheck(operator, (*args, *last), test_utils=("test_schema", "test_faketensor"))
