"""A slow, independent answer to what runtime/references.py computes, in numpy and plain Python: no torch, no qcompiler.

Written from the words of docs and docstrings: a power-of-two scale is looked up in the list of all, the levels of a
float format stand in a table, a block is a set of
element numbers, a random word is a Python integer modulo 2³². Ranges are compared in float64, where every code times a
power of two is exact; where the specification says float32, the numpy operation is a float32 one.

A case is described by the text of its spec, `format:scale:block:rounding:vjp`, which is taken apart here once more.
"""

import functools
import itertools
import re
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
F32 = np.float32
#: the steps of power-of-two scales, smallest first
STEPS = 2.0 ** np.arange(-126, 128)
#: what each byte of a stored exponent means; 0 is never written
FACTORS = np.concatenate([[np.nan], STEPS, [np.nan]])
NAN_BYTE = 255
POWERS = 2.0 ** np.arange(-149, 129)
#: bits a pattern sweep runs over, by the name of the float type
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Quantized(NamedTuple):
    """What the operators return for one tensor; `zero` is None for formats without a zero point."""

    scale: Array
    zero: Array | None
    codes: Array
    values: Array  # float32, before the rounding to the dtype of the output
    in_range: Array


class Spec(NamedTuple):
    """The fields of a spec, as plain values; `edges` maps a letter to its edge, 0 for the whole axis."""

    name: str  # of the format
    kind: str  # int, uint, affine, float
    bits: int
    scale: str
    edges: dict[str, int]
    stochastic: bool

    @property
    def top(self) -> float:
        """Largest code of an integer, largest number of a float."""
        if self.kind == "float":
            return float(max(numbers(self.name)))
        return 2 ** (self.bits - 1) - 1 if self.kind == "int" else 2**self.bits - 1

    @property
    def bottom(self) -> float:
        """Smallest code or number."""
        return -self.top if self.kind in ("int", "float") else 0

    @property
    def reach(self) -> float:
        """What the largest magnitude of a block is set against: the second phase is that of the first."""
        return self.top / 2 if self.name.endswith("x2") else self.top

    @property
    def code_dtype(self) -> str:
        """Name of the type of one code."""
        return ("int" if self.kind == "int" else "uint") + ("16" if self.bits > 8 else "8")


def read_spec(text: str) -> Spec:
    """The fields of `int8:fit:b4c16:nearest:pass`."""
    number, scale, block, rounding, _ = text.split(":")
    if number.startswith("e"):
        kind, bits = "float", str(1 + sum(map(int, re.match(r"e(\d)m(\d+)", number).groups())))
    else:
        kind, bits = re.split(r"(?<=\D)(?=\d)", number)
    named = {"each": {}, "tensor": dict.fromkeys("bcsoig", 0)}
    edges = {pair[0]: int(pair[1:].replace("*", "0")) for pair in re.findall(r"\D(?:\d+|\*)", block)}
    return Spec(number, kind, int(bits), scale, named.get(block, edges), rounding == "stochastic")


@functools.cache
def magnitudes(name: str) -> Array:
    """What each code of a float format means without its sign, from the words of the specifications."""
    exponent, mantissa = (int(width) for width in re.match(r"e(\d)m(\d+)", name).groups())
    if "r4" in name:
        half = 2 ** (exponent - 1) - 1
        return np.array([0] + [4.0**power * (2 if "x2" in name else 1) for power in range(-half, half + 1)])
    own = re.search(r"b(\d+)", name)
    bias = int(own[1]) if own else 2 ** (exponent - 1) - 1
    tenths = np.arange(2**mantissa) / 2**mantissa
    binades = [(1 + tenths) * 2.0 ** (field - bias) for field in range(1, 2**exponent)]
    table = np.concatenate([tenths * 2.0 ** (1 - bias), *binades])
    if own is None and name.startswith("e4m3"):
        table[-1] = np.nan  # S.1111.111
    if own is None and (name.startswith("e5m2") or exponent + mantissa == 15):
        table[-(2**mantissa) :] = [np.inf] + [np.nan] * (2**mantissa - 1)
    return table


def numbers(name: str) -> Array:
    """The finite ones among them, in the order of their codes and of their size."""
    return magnitudes(name)[np.isfinite(magnitudes(name))]


def float_codes(real: Array, name: str, words: Array | None) -> Array:
    """The codes of a float format: the neighbors of each magnitude in the table, and one of them chosen."""
    table, grid = magnitudes(name), numbers(name)
    x = np.abs(np.where(np.isnan(real), 0, real)).astype(np.float64)
    if name.endswith(("nan", "inf")):
        grid = np.append(grid, 2 * grid[-1] - grid[-2])  # the level that would come next is the first that overflows
    x = np.minimum(x, grid[-1])
    below = np.searchsorted(grid, x, side="right").clip(1, len(grid) - 1) - 1
    share = (x - grid[below]) / (grid[below + 1] - grid[below])
    if "r4" in name:  # a place between levels of ratio 4 is held as the float32 1 + share
        third = (F32(1) * x / np.where(below > 0, grid[below], 1) - 1).astype(F32) / F32(3)
        share = np.where(below > 0, (third + F32(1)).astype(np.float64) - 1, share)
    up = words // 256 / 2.0**24 < share if words is not None else (share > 0.5) | ((share == 0.5) & (below % 2 == 1))
    nan = np.flatnonzero(np.isnan(table))
    codes = below + up + np.signbit(real) * len(table)
    return np.where(np.isnan(real), nan[(len(nan) - 1) // 2] if len(nan) else 0, codes)


def float_values(codes: Array, name: str) -> Array:
    """What codes mean, with their sign, as float32."""
    table = magnitudes(name)
    return np.concatenate([table, -table]).astype(F32)[codes]


def patterns(dtype: str) -> Array:
    """Every value of a 16-bit float type, once, in the order of its bits."""
    return np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])


def cast(values: Array, dtype: str) -> Array:
    """float32 rounded once to `dtype`, to nearest with ties to even (ml_dtypes for bfloat16)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(DTYPES[dtype])


def same(got: Array, expected: Array) -> bool:
    """Equal shape, type and bits, where every NaN counts as the same one; −0 differs from +0."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if got.dtype.kind in "iub":
        return bool(np.array_equal(got, expected))
    nan = np.isnan(expected)
    words = f"u{got.dtype.itemsize}"
    bits_got, bits_expected = np.ascontiguousarray(got).view(words), np.ascontiguousarray(expected).view(words)
    return bool(np.array_equal(np.isnan(got), nan) and np.array_equal(bits_got[~nan], bits_expected[~nan]))


def block_numbers(shape: tuple[int, ...], layout: str, edges: dict[str, int]) -> tuple[Array, tuple[int, ...]]:
    """For each element the row-major number of its block, and how many blocks there are along each axis."""
    index = np.indices(shape) if shape else np.zeros((0,), int)
    number = np.zeros(shape, int)
    counts = []
    for letter, run in itertools.groupby(range(len(shape)), key=layout.__getitem__):
        dims = list(run)
        for axis in [[dim] for dim in dims] if letter == "s" else [dims]:
            position, extent = np.zeros(shape, int), 1
            for dim in axis:
                position, extent = position * shape[dim] + index[dim], extent * shape[dim]
            edge = edges.get(letter, 1) or max(extent, 1)
            counts.append(len(range(0, extent, edge)))
            number = number * counts[-1] + position // edge
    return number, tuple(counts)


def block_ranges(x: Array, number: Array, blocks: int) -> tuple[Array, Array]:
    """(lowest, highest) of each block together with zero; a NaN member makes both NaN."""
    low, high = np.zeros(blocks, F32), np.zeros(blocks, F32)
    np.minimum.at(low, number.ravel(), x.ravel())
    np.maximum.at(high, number.ravel(), x.ravel())
    return low, high


def step_bytes(amax: Array, spec: Spec) -> Array:
    """The stored exponent of each block of a power-of-two scale."""
    bits = np.frexp(spec.reach)[1]
    finite = np.where(np.isfinite(amax), amax, 0).astype(np.float64)
    if spec.scale == "fit":
        # as many steps are too small as there are ranges reach·step below amax
        place = np.searchsorted(spec.reach * STEPS, finite, side="left")
    else:
        # exponents of: the power of two above amax, the one at or above it, the one that is nearest as a factor, 2^bits
        power = {
            "max": np.frexp(finite)[1],
            "ceil": np.searchsorted(POWERS, finite, side="left") - 149,
            "round": np.searchsorted(POWERS.astype(np.longdouble) ** 2 / 2, finite**2, side="right") - 150,
            "one": np.full(finite.shape, bits),
        }[spec.scale]
        place = np.where((finite > 0) | (spec.scale == "one"), power - bits, -126) + 126
    return np.where(np.isfinite(amax), place.clip(0, len(STEPS) - 1) + 1, NAN_BYTE).astype(np.uint8)


def two_level_scales(amax: Array, reach: float) -> Array:
    """The product of an e4m3 scale for each block and a float32 for the tensor; float32 operations throughout."""
    tiny, finite = F32(2.0**-126), np.where(np.isfinite(amax), amax, F32(0))
    unit = np.maximum(finite.max(initial=0) / F32(reach * 448), tiny)
    inner = float_values(float_codes(finite / F32(reach) / unit, "e4m3", None), "e4m3")
    product = np.maximum(np.maximum(inner, F32(2.0**-9)) * unit, tiny)
    return np.where(np.isfinite(amax), product, F32(np.nan)).astype(F32)


def measure(x: Array, text: str, layout: str, ends: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
    """(scale as stored, zero point) of every block, flat; `ends` are the ends of its range, None: its own."""
    spec = read_spec(text)
    number, counts = block_numbers(x.shape, layout, spec.edges)
    blocks = int(np.prod(counts))
    with np.errstate(all="ignore"):
        low, high = block_ranges(x.astype(F32), number, blocks) if ends is None else ends
        bad = ~(np.isfinite(low) & np.isfinite(high))
        zero = np.zeros(blocks, F32)
        amax = np.where(bad, F32(np.nan), np.maximum(-low, high) if spec.bottom < 0 else high)
        if spec.scale == "real":
            start, high = (low, high) if spec.kind == "affine" else (zero, amax)
            stored = np.maximum(high / F32(spec.reach) - start / F32(spec.reach), F32(2.0**-126))
            stored = np.where(bad, F32(np.nan), stored)
            return stored, np.where(bad, 0, np.rint(-start / stored).clip(0, spec.top)).astype(F32)
        return two_level_scales(amax, spec.reach) if spec.scale == "two-level" else step_bytes(amax, spec), zero


def encode(
    x: Array, text: str, layout: str, stored: Array, zero: Array, key: tuple[int, int] = (0, 0), site: str = ""
) -> Quantized:
    """Codes and values of `x` on the grid of a given scale and zero point, flat as `measure` returns them."""
    spec = read_spec(text)
    x = x.astype(F32)
    number, counts = block_numbers(x.shape, layout, spec.edges)
    with np.errstate(all="ignore"):
        factor = stored if stored.dtype == F32 else FACTORS[stored]
        bad = np.isnan(factor)
        # from here on one factor and one zero point for each element
        factors, zeros = factor.astype(F32)[number], zero.astype(F32)[number]
        real = x / factors
        words = random_words(key, site, x.size).reshape(x.shape) if spec.stochastic else None
        if spec.kind == "float":
            codes = float_codes(real, spec.name, words).astype(spec.code_dtype)
        else:
            rounded = np.rint(real) if words is None else round_up_or_down(real, words)
            rounded = np.where(bad[number], F32(0), rounded)
            codes = (rounded + zeros).clip(spec.bottom, spec.top).astype(spec.code_dtype)
    return Quantized(
        scale=stored.reshape(counts),
        zero=zero.astype(spec.code_dtype).reshape(counts) if spec.kind == "affine" else None,
        codes=codes,
        values=decode(codes, text, layout, stored, zero),
        in_range=~((real < spec.bottom) | (real > spec.top)),
    )


def decode(codes: Array, text: str, layout: str, stored: Array, zero: Array) -> Array:
    """float32: (level of the code − zero point)·factor, a float32 product."""
    spec = read_spec(text)
    number, _ = block_numbers(codes.shape, layout, spec.edges)
    levels = float_values(codes, spec.name) if spec.kind == "float" else codes.astype(F32) - zero.astype(F32)[number]
    with np.errstate(all="ignore"):
        return levels * (stored if stored.dtype == F32 else FACTORS[stored]).astype(F32)[number]


def rotation(size: int) -> Array:
    """Sylvester's matrix over √size, a random sign for each column."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix * np.where(random_words((0, 0), "rotation", size) >= 2**31, -1, 1) / np.sqrt(size)


def quantize(x: Array, text: str, layout: str, key: tuple[int, int] = (0, 0), site: str = "") -> Quantized:
    """Everything about a tensor of any float type, over its own range; `layout`: runtime/numbers/blocks.py."""
    return encode(x, text, layout, *measure(x, text, layout), key, site)


def mix(word: Any) -> Any:
    """The hash "lowbias32" of C. Wellons, on Python integers of 32 bits, or 64-bit arrays of such."""
    word = word ^ word >> 16
    word = word * 0x7FEB352D % 2**32
    word = word ^ word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ word >> 16


@functools.lru_cache(maxsize=64)
def random_words(key: tuple[int, int], site: str, count: int) -> Array:
    """mix(mix(mix(key₀ ⊕ crc32(site)) ⊕ key₁) + i·0x9E3779B1) modulo 2³², for i = 0 … count−1."""
    seed = mix(mix(key[0] % 2**32 ^ zlib.crc32(site.encode())) ^ key[1] % 2**32)
    return mix((seed + np.arange(count, dtype=np.uint64) * 0x9E3779B1) % 2**32).astype(np.uint32)


def round_up_or_down(real: Array, words: Array) -> Array:
    """Up where u = (top 24 bits)/2²⁴ is below the fraction; the fraction is a float32 difference."""
    below = np.floor(real)
    return below + (words // 256 / 2.0**24 < real - below)


def pack(codes: Array, bits: int) -> tuple[Array, int | None]:
    """The packed bytes, and the dimension that shrank (None: flattened): element by element."""
    parts = {1: 8, 2: 4, 3: 2, 4: 2}.get(bits, 1)
    width = 8 // parts
    dim = next((d for d, extent in enumerate(codes.shape) if extent > 0 and extent % parts == 0), None)
    if dim is None:
        flat = np.zeros(-(-codes.size // parts) * parts, codes.dtype)
        flat[: codes.size] = codes.ravel()
        return pack(flat, bits)[0] if flat.size else flat.astype(np.uint8), None
    size = codes.shape[dim] // parts
    packed = np.zeros((*codes.shape[:dim], size, *codes.shape[dim + 1 :]), np.uint8)
    for index in np.ndindex(codes.shape):
        part, place = divmod(index[dim], size)
        packed[(*index[:dim], place, *index[dim + 1 :])] += int(codes[index]) % 2**width << (part * width)
    return packed, dim
