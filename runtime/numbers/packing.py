"""Packing of short codes, several to a byte, along one dimension.

Element j of a packed byte row holds the codes j, j+n, j+2n … of the packed dimension (n = the packed extent): the parts
are contiguous, so packing and unpacking stay vectorized.
"""

import functools
import math

import torch


def per_byte(bits: int) -> int:
    """Return codes stored in one byte: 8 for masks (1 bit), 4 at 2 bits, 2 at 3 and 4 bits, 1 above."""
    return {1: 8, 2: 4, 3: 2, 4: 2}.get(bits, 1)


def packed_dim(shape: tuple[int, ...], bits: int) -> int | None:
    """The dimension that is packed: the first that divides evenly; None: the flattened tensor, filled up with zeros."""
    return next((dim for dim, extent in enumerate(shape) if extent and extent % per_byte(bits) == 0), None)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes (int8, uint8 or bool), `per_byte(bits)` to a byte, as uint8.

    The packed dimension shrinks by that factor (`packed_dim`); if none divides, the result is flat.

    Raises:
        ValueError: the codes are longer than a byte.
    """
    if codes.element_size() > 1:
        raise ValueError(f"pack: got {codes.dtype} codes of {bits} bits; valid: int8, uint8 or bool")
    parts = per_byte(bits)
    dim = packed_dim(tuple(codes.shape), bits)
    if dim is None:
        codes, dim = codes.reshape(-1), 0
        codes = torch.nn.functional.pad(codes.to(torch.uint8), [0, -codes.numel() % parts])
    width = 8 // parts
    extent = codes.shape[dim] // parts
    # in int32, and by products: Inductor vectorizes products on every processor, and computes bytes and shifts one by
    # one
    placed = []
    for i in range(parts):
        part = codes.narrow(dim, i * extent, extent).to(torch.int32)
        part = part if codes.dtype is torch.bool else part & ((1 << width) - 1)
        placed.append(part * (1 << (i * width)) if i else part)
    return functools.reduce(torch.add, placed).to(torch.uint8)


def unpack_codes(packed: torch.Tensor, shape: tuple[int, ...], bits: int, signed: bool) -> torch.Tensor:
    """Return the inverse of `pack_codes`: codes of `shape` as int32, or bool (1 bit).

    Unpacked codes are not stored but turned into floats at once, for which int32 takes half the time of int8.
    """
    parts = per_byte(bits)
    width = 8 // parts
    dim = packed_dim(shape, bits)
    at = dim or 0
    words = packed.to(torch.int32).unsqueeze(at)
    places = torch.arange(0, 8, width, dtype=torch.int32, device=packed.device)
    places = places.reshape([parts if d == at else 1 for d in range(words.ndim)])
    if bits == 1:
        codes = (words & (1 << places)) != 0
    elif signed:
        # the code moved to the top of the word, and back down with its sign
        codes = (words * (1 << (32 - width - places))) >> (32 - width)
    else:
        codes = (words >> places) & ((1 << width) - 1)
    if dim is None:
        return codes.reshape(-1).narrow(0, 0, math.prod(shape)).reshape(shape)
    return codes.reshape(shape)
