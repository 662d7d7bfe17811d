"""Figures of a quantizer against the slow oracle and float64 numpy; agreement of tensors against its formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from qcompiler.runtime import references
from qcompiler.runtime.figures import (
    Agreement,
    Tally,
    compute_ratio,
    format_binades,
    measure_agreement,
    simulate_quantizer,
    tally_quantizer,
    to_decibels,
)
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.quantized import Quantized
from qcompiler.runtime.spec import parse_spec

INF, NAN = math.inf, math.nan
SPECS = (
    "int4:max:b2c4:nearest:pass",
    "int8:fit:tensor:nearest:pass",
    "uint4:real:b*s*g*:nearest:pass",
    "affine4:real:c*s*:nearest:pass",
    "int4:real:b2c4:stochastic:pass",
    "e2m1:max:b2c4:nearest:pass",
    "e4m3:one:tensor:nearest:pass",
    "e3m0r4:max:tensor:nearest:pass",
)
SHAPE, LAYOUT = (5, 6, 3), "bcs"


def tensor(dtype=torch.float32):
    """Numbers of many sizes, some zero."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE) * 10 ** torch.randn(SHAPE)
    return torch.where(torch.rand(SHAPE) < 0.1, 0.0, x).to(dtype)


def exponent(values):
    """⌊log2⌋ of positive numbers, from numpy's frexp."""
    return np.frexp(values)[1] - 1


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tally(spec, dtype, oracle, array):
    x = tensor(dtype)
    seen = simulate_quantizer(x, parse_spec(spec), LAYOUT)
    facts = oracle.read_spec(spec)
    expected = oracle.quantize(array(x), spec, LAYOUT, (0, 0), "what-if")
    name = str(dtype).removeprefix("torch.")
    values = oracle.cast(expected.values, name).astype(np.float64)
    exact = array(x).astype(np.float64)
    assert oracle.same(array(seen.values), oracle.cast(expected.values, name))
    found = seen.tally
    assert found.elements == exact.size
    assert found.signal == pytest.approx((exact**2).sum(), rel=1e-12)
    assert found.noise == pytest.approx(((exact - values) ** 2).sum(), rel=1e-12)
    assert found.sqnr == pytest.approx(10 * np.log10((exact**2).sum() / ((exact - values) ** 2).sum()), rel=1e-12)
    assert found.underflowed == ((exact != 0) & (values == 0)).mean()
    assert found.zeros == (values == 0).mean()
    factors = expected.scale.astype(np.float64)
    factors = factors if expected.scale.dtype.kind == "f" else 2.0 ** (factors - 127)
    assert (found.lowest_exponent, found.highest_exponent) == (exponent(factors).min(), exponent(factors).max())
    number, _ = oracle.block_numbers(SHAPE, LAYOUT, facts.edges)
    own = factors.ravel()[number]
    zero = np.zeros(1) if expected.zero is None else expected.zero.ravel()[number].astype(np.float64)
    place = exact / own + zero
    grid = oracle.numbers(facts.name) if facts.kind == "float" else np.arange(facts.top + 1)
    half = (grid[-1] - grid[-2]) / 2
    assert found.clipped == ((place < facts.bottom - half) | (place > facts.top + half)).mean()
    levels = np.rint(expected.values / own * 2**16) / 2**16
    used = set(exponent(np.abs(levels[levels != 0])).tolist())
    assert found.binades == used
    assert found.all_binades == len(set(exponent(grid[grid > 0]).tolist()))
    assert found.exponent_use == len(used) / found.all_binades
    (span,) = found.history
    assert (span.low, span.high, span.sqnr) == (exact.min(), exact.max(), found.sqnr)
    assert span.range_low <= expected.values.min() + 1e-6
    assert span.range_high >= expected.values.max() - 1e-6


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        ("int4:max:tensor:nearest:pass", -7.0, 7.0),  # amax 4 = ½·2³: step 2^(3−3)
        ("uint4:real:tensor:nearest:pass", 0.0, 4.0),
        ("affine4:real:tensor:nearest:pass", -1.0, 4.0),
        ("e4m3:one:tensor:nearest:pass", -448.0, 448.0),
    ],
)
def test_range_of_the_codes(spec, low, high):
    (span,) = simulate_quantizer(torch.tensor([-1.0, 4.0]), parse_spec(spec), "b").tally.history
    assert (span.range_low, span.range_high) == pytest.approx((low, high), rel=1e-6)


def test_tallies_add_up():
    """Of two tensors one after the other: every count and sum of the tensor that holds both."""
    spec = parse_spec("int4:real:tensor:nearest:pass:fixed(-1,1)")
    x = tensor()
    parts = [simulate_quantizer(part, spec, LAYOUT).tally for part in (x[:2], x[2:])]
    whole = simulate_quantizer(x, spec, LAYOUT).tally
    both = parts[0] + parts[1]
    assert both.signal == pytest.approx(whole.signal, rel=1e-12)
    assert both.noise == pytest.approx(whole.noise, rel=1e-12)
    assert both.history == parts[0].history + parts[1].history
    same = {"signal": 0, "noise": 0, "history": ()}
    assert dataclasses.replace(both, **same) == dataclasses.replace(whole, **same)
    assert Tally() + whole == whole


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite(bad):
    x = torch.tensor([[1.0, 2.0], [bad, 0.0]])
    seen = simulate_quantizer(x, parse_spec("int4:max:c2:nearest:pass"), "bc").tally
    assert seen.not_finite == 0.25
    assert math.isnan(seen.sqnr)
    assert (seen.clipped, seen.underflowed, seen.zeros) == (0, 0, 0)  # the NaN block has no zero
    assert seen.lowest_exponent == seen.highest_exponent == -1


def test_nothing_and_zeros():
    spec = parse_spec("int4:max:tensor:nearest:pass")
    assert simulate_quantizer(torch.empty(0, 3), spec, "bc").tally == Tally()
    assert (Tally().clipped, Tally().exponent_use) == (0, 0)
    zeros = simulate_quantizer(torch.zeros(2, 3), spec, "bc").tally
    assert (zeros.zeros, zeros.underflowed, zeros.exponent_use, zeros.sqnr) == (1, 0, 0, INF)


def test_a_simulation_draws_nothing():
    """The same bits at every call, and torch's generator as it was."""
    spec, x = parse_spec("int4:max:tensor:stochastic:pass"), tensor()
    state = torch.get_rng_state()
    assert torch.equal(simulate_quantizer(x, spec, LAYOUT).values, simulate_quantizer(x, spec, LAYOUT).values)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_range_from_elsewhere():
    """The tally is that of the scale which was used, not of the tensor's own."""
    spec, x = parse_spec("int8:real:tensor:nearest:pass"), tensor()
    scale = references.scale(x / 64, str(spec), LAYOUT)
    codes = references.quantize(x, scale, None, None, str(spec), LAYOUT, "")
    limit = float(scale) * 127
    seen = tally_quantizer(x, Quantized(codes, scale, None, spec, LAYOUT))
    assert seen.clipped == int((x.abs() > limit * 127.5 / 127).sum()) / x.numel() > 0
    assert seen.history[0].range_high == pytest.approx(limit)


@pytest.mark.parametrize(
    ("name", "binades"),
    [("int4", {0, 1, 2}), ("uint4", {0, 1, 2, 3}), ("e2m1", {-1, 0, 1, 2}), ("e3m0r4", {-6, -4, -2, 0, 2, 4, 6})],
)
def test_binades_of_formats(name, binades):
    assert format_binades(parse_format(name)) == binades


def test_agreement():
    torch.manual_seed(0)
    pairs = [(torch.randn(7, 5), torch.randn(7, 5)) for _ in range(2)]
    found = measure_agreement(*pairs[0]) + measure_agreement(*pairs[1])
    q, f = (np.concatenate([pair[side].double().numpy().ravel() for pair in pairs]) for side in (0, 1))
    assert found.cosine == pytest.approx(q @ f / np.sqrt(q @ q * (f @ f)), rel=1e-12)
    assert found.error == pytest.approx(((q - f) ** 2).sum() / (f @ f), rel=1e-12)
    assert found.error_db == pytest.approx(10 * np.log10(found.error), rel=1e-12)


@pytest.mark.parametrize(
    ("own", "reference", "cosine", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 1, 0),
        ([0.0, 0.0], [1.0, 2.0], 0, 1),
        ([1.0, 2.0], [0.0, 0.0], 0, INF),
        ([0.0, 0.0], [0.0, 0.0], 1, 0),
        ([NAN, 0.0], [1.0, 0.0], NAN, NAN),
        ([INF, 0.0], [1.0, 0.0], NAN, INF),
    ],
)
def test_agreement_at_the_edges(own, reference, cosine, error):
    found = measure_agreement(torch.tensor(own), torch.tensor(reference))
    assert found.cosine == pytest.approx(cosine, nan_ok=True)
    assert found.error == pytest.approx(error, nan_ok=True)


def test_ratios():
    assert (compute_ratio(0, 0), compute_ratio(1, 0), compute_ratio(1, 4)) == (0, INF, 0.25)
    assert (math.isnan(compute_ratio(NAN, 0)), to_decibels(0), to_decibels(INF), to_decibels(10)) == (
        True,
        -INF,
        INF,
        10,
    )
    assert math.isnan(to_decibels(NAN))
    assert Agreement().error == 0
