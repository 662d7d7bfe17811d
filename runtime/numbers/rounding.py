"""Rounding of a real number to an integer: to nearest with ties to even, or stochastically from a counter hash.

The random bits are a function of (step key, site, logical element index) and nothing else. So they are the same in
eager and compiled code, for every memory layout, and when a checkpointed region is computed again; and no random
tensor is ever stored.
"""

import enum
import zlib

import torch


class Rounding(enum.StrEnum):
    """How a real number becomes a code."""

    #: to the nearest integer, ties to even: 0.5 → 0, 1.5 → 2
    NEAREST = "nearest"
    #: up with the probability of the fraction: the expected code is the real number itself
    STOCHASTIC = "stochastic"


def _to_signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _shift_right(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int32 (torch shifts arithmetically)."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _mix_bits(x: torch.Tensor) -> torch.Tensor:
    """Return a bijection of 32 bits whose every output bit depends on every input bit (C. Wellons, "lowbias32")."""
    x = (x ^ _shift_right(x, 16)) * 0x7FEB352D
    x = (x ^ _shift_right(x, 15)) * _to_signed(0x846CA68B)
    return x ^ _shift_right(x, 16)


def random_bits(key: torch.Tensor, site: str, index: torch.Tensor) -> torch.Tensor:
    """32 random bits for each element, as int32.

    bits(i) = mix(mix(mix(key₀ ⊕ crc32(site)) ⊕ key₁) + i·0x9E3779B1), modulo 2³².

    Args:
        key: int32 [2], the key of the training step.
        site: the name of the quantizer.
        index: int32, the logical (row-major) index of each element, modulo 2³².
    """
    seed = store_once(_mix_bits(_mix_bits(key[0] ^ _to_signed(zlib.crc32(site.encode()))) ^ key[1]))
    return _mix_bits(seed + _spread_index(index))


def _spread_index(index: torch.Tensor) -> torch.Tensor:
    """Return index·0x9E3779B1 modulo 2³², as int32.

    The product is taken in int64, below 2³¹·2³² = 2⁶³. In int32 Inductor writes the product of a loop variable, whose
    overflow C++ does not define: gcc 12 then ends the loop early, and codes of small tensors are never written.
    """
    return ((index.to(torch.int64) * 0x9E3779B1) & 0xFFFFFFFF).to(torch.int32)


def store_once(x: torch.Tensor) -> torch.Tensor:
    """Return the same small tensor, computed once: Inductor stores a tensor before taking a strided view.

    Otherwise Inductor would write the whole computation of a seed or of a block's factor into the loop over the
    elements: ten times slower, and four times as long to compile.
    """
    return x.as_strided(x.shape, x.stride())


def round_stochastic(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """⌊x⌋ or ⌊x⌋+1; up if the top 24 of the random bits, as a number u in [0, 1), are below the fraction of x.

    The fraction x − ⌊x⌋ of a float32 is exact, but for small negative x, whose fraction is rounded to a multiple of
    2⁻²⁴; so E[result] differs from x by at most 2⁻²⁴. (x + u rounded down would not do: the sum of 100.3 and u is
    itself rounded to a multiple of 2⁻¹⁷.)
    """
    floor = torch.floor(x)
    threshold = (x - floor) * 2.0**24
    return floor + (_shift_right(bits, 8).to(torch.float32) < threshold).to(torch.float32)


def round_code(x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Return `x` rounded stochastically by random bits; if there are none, to nearest with ties to even."""
    return torch.round(x) if noise is None else round_stochastic(x, noise)


def is_finite(x: torch.Tensor) -> torch.Tensor:
    """Return False for NaN and infinity: |x| < ∞, two operators for a compiler; `torch.isfinite` is four."""
    return x.abs() < torch.inf
