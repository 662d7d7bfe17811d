"""Ranges of many sites side by side: the bits of each site alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime import ops, stacked
from qcompiler.runtime.spec import parse_spec

NAN, INF = float("nan"), float("inf")
FORMS = ["affine8:real", "affine4:real", "int8:real", "int4:max", "uint8:real", "uint4:fit"]
RANGES = ["hindsight(0.9,0.01)", "hindsight(0.75,0.3)"]
#: layout and block: one range for a tensor, one for each channel, one for each pair of channels
LAYOUTS = [("bc", "tensor"), ("bcss", "tensor"), ("bc", "b*"), ("bcss", "b*c2s*")]


def text(form, block, past, rounding="nearest"):
    return f"{form}:{block}:{rounding}:pass:{past}"


def make_site(spec, layout, scale, seed):
    """A tensor of some sites, some of them with what no range holds, and the state that a first tensor left."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5, 2, 2)[: len(layout)]
    first, x = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    counts = ops.SCALE(first, spec, layout).shape
    estimator = parse_spec(spec).range
    empty = torch.full(estimator.state_shape(tuple(counts)), NAN)
    return x, ops.UPDATE(first, empty, spec, layout, True)


def check_beside(spec, layout, sites):
    """All results of the calls for many sites are the bits of the calls for one."""
    tensors, states = zip(*sites, strict=True)
    results = ops.READ_RANGES(list(states), spec)
    count = len(states)
    reaches, measured = results[count : 2 * count], []
    for place, (x, state) in enumerate(sites):
        scale = ops.SCALE(x, spec, layout, state, False)
        assert torch.equal(results[place].reshape(scale.shape).view(torch.uint8), scale.view(torch.uint8))
        if parse_spec(spec).has_zero_point:
            point = ops.ZERO_POINT(x, scale, spec, layout, state, False)
            assert torch.equal(results[2 * count + place].reshape(point.shape), point)
        measured.append(ops.MEASURE(x, reaches[place], spec, layout))
    dims = [(place % 3) * (state[0].numel() == 1) for place, state in enumerate(states)]
    shaped = ops.READ_RANGES(list(states), spec, dims)
    assert [one.ndim for one in shaped[:count]] == [dim or 1 for dim in dims]
    assert all(torch.equal(one.flatten(), other.flatten()) for one, other in zip(shaped, results, strict=True))
    for op, rest in ((ops.READ_RANGES, (spec, dims)), (ops.MOVE_RANGES, (measured, spec))):
        torch.library.opcheck(op, (list(states), *rest), test_utils=("test_schema", "test_faketensor"))
    for x, state, after in zip(tensors, states, ops.MOVE_RANGES(list(states), measured, spec), strict=True):
        alone = ops.UPDATE(x, state, spec, layout, False)
        assert after.shape == state.shape
        assert after.is_contiguous()
        assert torch.equal(after.view(torch.int32), alone.view(torch.int32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("past", RANGES)
@pytest.mark.parametrize(("layout", "block"), LAYOUTS)
def test_the_bits_are_those_of_each_site_alone(form, past, layout, block):
    spec = text(form, block, past)
    sites = [make_site(spec, layout, 2.0**-step, step) for step in range(7)]
    for x, value in ((sites[1][0], NAN), (sites[2][0], INF), (sites[3][0], -INF)):
        x.view(-1)[0] = value
    sites[4][0].zero_()
    sites[5][0].mul_(100)  # the guard fires
    check_beside(spec, layout, sites)
    check_beside(spec, layout, sites[:1])


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    past=st.sampled_from(RANGES),
    scales=st.lists(st.floats(2.0**-126, 2.0**100), min_size=1, max_size=5),
)
def test_any_number_of_sites_of_any_size(form, past, scales):
    spec = text(form, "tensor", past)
    check_beside(spec, "bc", [make_site(spec, "bc", scale, place) for place, scale in enumerate(scales)])


def test_a_state_that_would_not_be_finite_stays():
    spec = text("int8:real", "tensor", "hindsight(0.9,0.01)")
    x, state = make_site(spec, "bc", 1.0, 0)
    measured = ops.MEASURE(torch.full_like(x, NAN), ops.READ_RANGES([state], spec)[1], spec, "bc")
    (after,) = ops.MOVE_RANGES([state], [measured], spec)
    assert torch.equal(after, state)
    assert after.data_ptr() != state.data_ptr()


@pytest.mark.parametrize(
    "spec",
    [
        "e2m1:two-level:tensor:nearest:pass:hindsight(0.9,0.01)",
        "int8:real:tensor:nearest:pass:running(0.9)",
        "int8:real:tensor:nearest:pass:history(16,3,2)",
    ],
)
def test_ranges_that_need_their_tensor_do_not_stand_side_by_side(spec):
    assert stacked.find_hindsight(parse_spec(spec)) is None
    with pytest.raises(ValueError, match=r"side by side: got .* valid: a range in hindsight"):
        stacked.read_ranges([torch.ones(3, 1)], spec)
