"""Packing of short codes, several to a byte, along one dimension.

Element j of a packed byte row holds the codes j, j+n, j+2n … of the packed dimension (n = its packed extent): the
parts are contiguous, so packing and unpacking stay vectorized.
"""

import torch


def per_byte(bits: int) -> int:
    """Codes stored in one byte: 8 for masks (1 bit), 4 at 2 bits, 2 at 3 and 4 bits, 1 above."""
    return {1: 8, 2: 4, 3: 2, 4: 2}.get(bits, 1)


def packed_dim(shape: tuple[int, ...], bits: int) -> int | None:
    """The dimension that is packed: the first that divides evenly; None: the flattened tensor, filled up with zeros."""
    return next((dim for dim, extent in enumerate(shape) if extent and extent % per_byte(bits) == 0), None)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes (int8, uint8 or bool), `per_byte(bits)` to a byte, as uint8.

    The packed dimension shrinks by that factor (`packed_dim`); where none divides, the result is flat.

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
    packed = None
    for i in range(parts):
        part = (codes.narrow(dim, i * extent, extent).to(torch.uint8) & ((1 << width) - 1)) << (i * width)
        packed = part if packed is None else packed | part
    assert packed is not None
    return packed


def unpack(packed: torch.Tensor, shape: tuple[int, ...], bits: int, signed: bool) -> torch.Tensor:
    """The inverse of `pack`: codes of `shape` as int8 (signed) or uint8."""
    parts = per_byte(bits)
    width = 8 // parts
    dim = packed_dim(shape, bits)
    fields = [(packed >> (i * width)) & ((1 << width) - 1) for i in range(parts)]
    codes = torch.cat(fields, dim=dim or 0)
    if dim is None:
        numel = 1
        for extent in shape:
            numel *= extent
        codes = codes.narrow(0, 0, numel).reshape(shape)
    if not signed:
        return codes
    sign = 1 << (width - 1)
    return ((codes ^ sign).to(torch.int8)) - sign
