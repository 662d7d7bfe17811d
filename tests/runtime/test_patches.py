"""Patches against loops over positions and taps."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
FORMATS = ("int8", "int4", "uint8", "uint3", "affine8", "affine4")


def draw_codes(form, shape, seed):
    """(spec, codes) throughout the format."""
    spec = parse_spec(f"{form}:real:tensor:nearest:pass")
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(int(spec.format.lowest), int(spec.format.largest) + 1, shape, generator=generator)
    return spec, codes.to(spec.format.dtype)


def expected(codes, points, shift, windows):
    """Row by row in Python; `points` has the code of zero of each sample."""
    samples, channels, *space = codes.shape
    rows = []
    for sample in range(samples):
        for position in itertools.product(*(range(count) for _, count, *_ in windows)):
            row = []
            for tap in itertools.product(*(range(taps) for *_, taps, _ in windows)):
                at = [w[0] + w[2] * t + w[4] * u for w, t, u in zip(windows, position, tap, strict=True)]
                inside = all(0 <= index < extent for index, extent in zip(at, space, strict=True))
                for channel in range(channels):
                    code = codes[(sample, channel, *at)].item() if inside else points[sample]
                    row.append(code - shift)
            rows.append(row)
    return torch.tensor(rows)


@given(
    st.sampled_from(FORMATS),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.lists(
        st.tuples(*(st.integers(*ends) for ends in ((1, 5), (-6, 6), (1, 4), (1, 3), (1, 3), (1, 3)))),
        min_size=1,
        max_size=2,
    ),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**32),
)
@PROPERTY
def test_against_loops(form, outer, dims, edge, channels_last, seed):
    """Any start, also one that leaves the tensor altogether."""
    samples, channels = outer
    shape = (samples, channels, *(dim[0] for dim in dims))
    windows = [dim[1:] for dim in dims]
    edge = min(edge, samples)
    spec, codes = draw_codes(form, shape, seed)
    _, points = draw_codes(form, (-(-samples // edge),), seed + 1)
    given_points = points if spec.has_zero_point else None
    if channels_last:
        codes = codes.movedim(1, -1).contiguous().movedim(-1, 1)
    found = ops.PATCHES(codes, given_points, str(spec), edge, *map(list, zip(*windows, strict=True)))
    whole = [points[i // edge].item() if spec.has_zero_point else 0 for i in range(samples)]
    shift = 128 if form in ("uint8", "affine8") else 0
    assert found.dtype is torch.int8
    assert torch.equal(found.to(torch.int64), expected(codes, whole, shift, windows))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), (3, 2, 2)])
def test_products_are_convolutions(stride, padding, dilation, channels_last):
    x, w = torch.randint(-128, 128, (2, 3, 9, 7), dtype=torch.int8), torch.randint(-128, 128, (5, 3, 3, 2))
    whole = torch.nn.functional.conv2d(x.double(), w.double(), None, stride, padding, dilation)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    windows = ([-padding] * 2, list(whole.shape[2:]), [stride] * 2, [3, 2], [dilation] * 2)
    rows = ops.PATCHES(x, None, "int8:fit:tensor:nearest:pass", 2, *windows).double()
    found = rows @ w.permute(2, 3, 1, 0).reshape(-1, 5).double()
    assert torch.equal(found, whole.movedim(1, -1).reshape(-1, 5))


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_to_copy(shape):
    codes = torch.zeros(shape, dtype=torch.uint8)
    found = ops.PATCHES(codes, None, "uint8:fit:tensor:nearest:pass", 1, [-1], [3], [1], [2], [1])
    assert torch.equal(found, torch.full((shape[0] * 3, shape[1] * 2), -128, dtype=torch.int8))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1), (2, 4)])
@pytest.mark.parametrize("taps", [(3, 3), (1, 1), (2, 5)])
def test_turned_taps(taps, stride):
    """Entry by entry: tap stride·u + r stands where position t reads output t − u; zeros elsewhere."""
    weight = torch.randint(-128, 128, (2, 3, *taps), dtype=torch.int8)
    turned = [-(-k // s) for k, s in zip(taps, stride, strict=True)]
    found = ops.TURN_TAPS(weight, list(stride)).reshape(*turned, 2, *stride, 3)
    for u, v, r, q in itertools.product(*map(range, (*turned, *stride))):
        tap = stride[0] * u + r, stride[1] * v + q
        inside = tap[0] < taps[0] and tap[1] < taps[1]
        entry = found[turned[0] - 1 - u, turned[1] - 1 - v, :, r, q]
        assert torch.equal(entry, weight[:, :, *tap] if inside else torch.zeros(2, 3, dtype=torch.int8))


def test_traced_they_are_the_same():
    spec, codes = draw_codes("affine8", (2, 3, 4, 4), 0)
    given = (codes, torch.tensor([3], dtype=torch.uint8), str(spec), 2, [-1, 0], [2, 2], [2, 1], [3, 2], [1, 2])
    torch.library.opcheck(ops.PATCHES, given, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.TURN_TAPS, (codes, [2, 3]), test_utils=("test_schema", "test_faketensor"))
