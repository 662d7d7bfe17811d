"""A slow, independent answer to runtime/ranges/, in numpy and plain Python: no torch, no qcompiler.

Written from the formulas of the papers and of docs/numbers.md, block by block in Python loops. Where float32 arithmetic
is specified, every operation here is one float32 operation, so the answer holds bit for bit; standard deviations, means
and the cosine of `cosine` are computed in float64, and the tests say how far float32 may be from them.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
F32 = np.float32
TINY = F32(2.0**-126)


class Case(NamedTuple):
    """An estimator in front of tensors of one shape: `number` gives the block of each element, row-major."""

    name: str
    numbers: tuple[float, ...]
    kind: str
    bits: int
    number: Array
    blocks: int

    @property
    def magnitude_bits(self) -> int:
        """One bit of a signed number is its sign."""
        return self.bits - (self.kind == "int")


class Step(NamedTuple):
    """The range in use for one tensor, one number a block, and the state [width, units] after it."""

    low: Array
    high: Array
    state: Array


def present(case: Case, x: Array) -> tuple[Array, Array]:
    """The range of each block of `x` itself; a NaN shows at both ends (of signed and unsigned formats)."""
    low, high = np.zeros(case.blocks, F32), np.zeros(case.blocks, F32)
    for block in range(case.blocks):
        members = x[case.number == block].astype(F32)
        if members.size == 0:
            continue
        least, most = min(F32(0), members.min()), max(F32(0), members.max())
        if np.isnan(members).any():
            least = most = F32(np.nan)
        if case.kind == "int":
            most = max(-least, most)
            least = -most
        elif case.kind == "uint":
            most = F32(np.inf) if least == -np.inf else most
            least = F32(0)
        low[block], high[block] = least, most
    return low, high


def clipped(case: Case, x: Array, low: Array, high: Array) -> Array:
    """How many of all elements lie outside, as a float32 quotient."""
    count = ((x < low[case.number]) | (x > high[case.number])).sum()
    return F32(count) / F32(max(1, x.size))


def beyond_codes(case: Case, x: Array, low: Array, high: Array) -> Array:
    """How many of all elements the codes between the ends do not reach, as a float32 quotient.

    Such an element lies half a step beyond the range and half a step beyond the outermost code; and is no negative one
    in front of an unsigned format.
    """
    top = 2**case.magnitude_bits - 1
    count = 0
    for value, block in zip(x.ravel(), case.number.ravel(), strict=True):
        least, most = low[block], high[block]
        levels = F32(2 * top if case.kind == "int" else top)
        step = max(TINY, most / levels - least / levels)
        first = np.rint(least / step)
        under = case.kind != "uint" and value < min(least, first * step) - step / F32(2)
        count += bool(under or value > max(most, (first + levels) * step) + step / F32(2))
    return F32(count) / F32(max(1, x.size))


def at_rank(values: Array, share: Fraction) -> Array:
    """What remains largest when the largest ⌊share·n⌋ are taken away; one always remains."""
    ordered = np.sort(values.ravel())  # NaN last
    return ordered[max(0, len(ordered) - 1 - math.floor(share * len(ordered)))] if len(ordered) else F32(0)


def decimal(number: float) -> Fraction:
    """The number that a person wrote, not its nearest binary fraction."""
    return Fraction(repr(number))


def mix(momentum: float, old: Array, new: Array) -> Array:
    """m·old + (1 − m)·new, three float32 operations."""
    return F32(momentum) * old + F32(1 - momentum) * new


def step(case: Case, x: Array, before: Array) -> Step:
    """One tensor: the range in use, and the state after it. NaN in the state before: nothing has been seen yet."""
    x = x.astype(F32)
    with np.errstate(all="ignore"):
        own = globals()[f"_first_{case.name}"](case, x)
        low, high, after = globals()[f"_{case.name}"](case, x, np.where(np.isnan(before), own, before))
    kept = np.array([not np.isfinite(after[:, unit]).all() for unit in range(after.shape[1])], bool)
    return Step(low.astype(F32), high.astype(F32), np.where(kept, before, after).astype(F32))


def _first_running(case: Case, x: Array) -> Array:
    return np.stack(present(case, x))


def _running(case: Case, x: Array, state: Array) -> tuple[Array, Array, Array]:
    after = mix(case.numbers[0], state, np.stack(present(case, x)))
    return after[0], after[1], after


def _first_hindsight(case: Case, x: Array) -> Array:
    low, high = present(case, x)
    return np.stack([low, high, np.zeros_like(low)])


def _hindsight(case: Case, x: Array, state: Array) -> tuple[Array, Array, Array]:
    momentum, guard = case.numbers
    now = np.stack(present(case, x))
    fired = beyond_codes(case, x, state[0], state[1]) > F32(guard)
    both = np.stack([np.minimum(state[0], now[0]), np.maximum(state[1], now[1])])
    ends = both if fired else mix(momentum, state[:2], now)
    return state[0], state[1], np.concatenate([ends, state[2:] + F32(fired)])


def _first_history(case: Case, x: Array) -> Array:
    low, high = present(case, x)
    return np.stack([np.maximum(-low, high)] * int(case.numbers[0]))


def _history(case: Case, x: Array, state: Array) -> tuple[Array, Array, Array]:
    length, deviations, headroom = case.numbers
    low, high = present(case, x)
    now = np.maximum(-low, high)
    wide = state.astype(np.float64)
    mean = wide.sum(0) / length
    top = headroom * (wide.max(0) + deviations * np.sqrt(((wide - mean) ** 2).sum(0) / length))
    after = np.concatenate([state[1:], now[None]])
    for block in range(case.blocks):
        if now[block] > top[block]:
            after[:, block] = F32(2) * now[block]
    return -top, top, after


def _target(case: Case) -> Fraction:
    return decimal(case.numbers[0]) / (2**case.bits - 1)


def _first_adaptive(case: Case, x: Array) -> Array:
    return present(case, x)[1][None]


def _adaptive(case: Case, x: Array, state: Array) -> tuple[Array, Array, Array]:
    rate, share = case.numbers
    _, high = present(case, x)
    after = F32(1 - rate) * state + F32(rate) * high[None]
    for block in range(case.blocks):
        members = x[case.number == block].astype(np.float64)
        if (np.abs(members - members.mean()) > members.std()).mean() > share:
            after[0, block] = high[block]
    return -after[0], after[0], after


def _first_large(case: Case, x: Array) -> Array:
    low, high = present(case, x)
    tops = np.maximum(-low, high)
    share = np.abs(x) / np.maximum(tops, TINY)[case.number]
    gamma = F32(1) if tops.max() == 0 else at_rank(share, _target(case)).clip(F32(0.001), F32(1))
    rows = [gamma, tops.max()] if case.numbers[2] > 0 else [gamma]
    return np.array(rows, F32)[:, None]


def _large(case: Case, x: Array, state: Array) -> tuple[Array, Array, Array]:
    _, rate, momentum = case.numbers
    low, high = present(case, x)
    top = np.maximum(-low, high).max()
    if momentum > 0:
        high = np.full(case.blocks, state[0, 0] * state[1, 0])
        low = -high
    else:
        low, high = low * state[0, 0], high * state[0, 0]
    moved = state[0, 0] + F32(rate) * np.sign(clipped(case, x, low, high) - F32(float(_target(case))))
    moved = moved.clip(F32(0.001), F32(1)) if np.isfinite(top) else F32(np.nan)
    rows = [moved, mix(momentum, state[1, 0], top)] if momentum > 0 else [moved]
    return low, high, np.array(rows, F32)[:, None]


def current(case: Case, x: Array) -> tuple[Array, Array]:
    """The range of the present tensor."""
    return present(case, x.astype(F32))


def percentile(case: Case, x: Array) -> tuple[Array, Array]:
    """The range of each block, cut at a rank of its magnitudes; a smaller last block has zeros added to it."""
    x = x.astype(F32)
    low, high = present(case, x)
    members = [np.abs(x[case.number == block]).ravel() for block in range(case.blocks)]
    whole = max((len(part) for part in members), default=0)
    for block, part in enumerate(members):
        if np.isfinite(low[block]) and np.isfinite(high[block]):
            padded = np.concatenate([part, np.zeros(whole - len(part), F32)])
            cut = at_rank(padded, 1 - decimal(case.numbers[0]) / 100)
            low[block], high[block] = np.maximum(low[block], -cut), np.minimum(high[block], cut)
    return low, high


def fixed(case: Case, x: Array) -> tuple[Array, Array]:
    """The two numbers, for every block."""
    low, high = case.numbers
    return np.full(case.blocks, low, F32), np.full(case.blocks, high, F32)


def sawb(case: Case, x: Array) -> tuple[Array, Array]:
    """±|c1·√E[x²] − c2·E|x|| of each block with the authors' coefficients, at most its largest magnitude."""
    c1, c2 = {2: (3.212, 2.178), 4: (12.68, 12.80), 5: (17.74, 18.64)}[case.bits]
    high = np.zeros(case.blocks, F32)
    for block in range(case.blocks):
        members = np.abs(x[case.number == block].astype(np.float64))
        high[block] = min(abs(c1 * np.sqrt((members**2).mean()) - c2 * members.mean()), members.max())
    return -high if case.kind == "int" else np.zeros_like(high), high


def learned_start(case: Case, x: Array) -> float:
    """What a learned range starts from: 2⟨|x|⟩/√top, deviations·std, the folded one of relu, or the given number."""
    wide = x.astype(np.float64)
    if case.name == "lsq":
        return float(2 * np.abs(wide).mean() / math.sqrt(2**case.magnitude_bits - 1))
    if case.name == "learned":
        return float(case.numbers[0] * wide.std(ddof=1) / (math.sqrt(1 - 2 / math.pi) if case.kind == "uint" else 1))
    return case.numbers[0]


def learned_ends(case: Case, state: Array) -> tuple[Array, Array]:
    """top·|step| of LSQ, |c| of the others; unsigned formats start at zero."""
    high = np.abs(state.ravel()) * F32(2**case.magnitude_bits - 1 if case.name == "lsq" else 1)
    return np.zeros_like(high) if case.kind == "uint" else -high, high


def learned_gradient(case: Case, grad: Array, x: Array, step: float) -> tuple[float, float]:
    """dL/d(parameter) by the formulas of the papers, and the sum of the magnitudes of its terms; float64."""
    grad, real = grad.astype(np.float64), x.astype(np.float64) / step
    top = 2**case.magnitude_bits - 1
    bottom = -top if case.kind == "int" else 0
    inside = (real >= bottom) & (real <= top)
    slope = np.where(inside, np.rint(real) - real, real.clip(bottom, top))
    if case.name == "pact":
        slope = np.where(real >= top, 1.0, np.where(real < bottom, bottom / top, 0.0))
    share = {"lsq": math.sqrt(x.size * top), "learned": top, "pact": 1}[case.name]
    return float((grad * slope).sum() / share), float(np.abs(grad * slope).sum() / share)


def cosines(case: Case, x: Array) -> list[tuple[Array, float]]:
    """(clip, cos(x, x̂)) for each clip, the largest first; the clips as float32, the cosine in float64."""
    steps = int(case.numbers[1])
    levels = 2**case.magnitude_bits - 1
    top = np.abs(x.astype(F32)).max()
    result = []
    for i in range(steps, 0, -1):
        clip = top * F32(i / steps)
        grid = max(float(clip) / levels, float(TINY))
        y = np.rint(x.astype(np.float64) / grid).clip(-levels, levels) * grid
        norm = math.sqrt((x.astype(np.float64) ** 2).sum()) * math.sqrt((y**2).sum())
        result.append((clip, float((x * y).sum() / norm) if norm else 0.0))
    return result
