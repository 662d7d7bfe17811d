"""Time of one quantizer of 2 samples x 8 channels on a tensor beyond the cache, against a copy of as many bytes.

    OMP_NUM_THREADS=1 python benchmarks/quantizers.py [--batch 1024] [--rounds 25]

A quantizer must read 4 bytes an element, and write a byte for the code, or half a byte for one of 4 bits, which is
packed, and one for the scale of 16. With floats it must write 4 bytes more. All rows take their turn in every round,
and a copy of the tensor with them; medians are printed.
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from qcompiler.demo.measure import paired_times
from qcompiler.runtime import shapes
from qcompiler.runtime.kernels import quantize_blocks as kernel
from qcompiler.runtime.numbers.packing import per_byte

_ORDERS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
_ROWS = [(rounding, bits) for rounding in ("nearest", "stochastic") for bits in (8, 4)]


def main() -> None:
    """Times every combination of memory order, rounding, bits and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    table = Table(
        "order", "rounding", "bits", "codes, ms", "of a copy of as many bytes", "with floats, ms", "of a copy"
    )
    for order, memory in _ORDERS.items():
        x = torch.randn(args.batch, 16, 32, 32).contiguous(memory_format=memory)
        y = torch.empty_like(x)
        steps = {f"{row} {floats}": _make_step(x, *row, floats=floats) for row in _ROWS for floats in (False, True)}
        times = paired_times({"copy": lambda x=x, y=y: y.copy_(x), **steps}, args.rounds)
        table.add_row(order, "copy of the tensor", "", f"{1000 * times['copy']:.1f}")
        for row in _ROWS:
            cells = []
            for floats in (False, True):
                spent, must = times[f"{row} {floats}"], count_must(row[1], floats=floats)
                cells += [f"{1000 * spent:.1f}", f"{8 * spent / times['copy'] / must:.2f}×"]
            table.add_row(order, row[0], str(row[1]), *cells)
    Console(width=120).print(table)


def count_must(bits: int, *, floats: bool) -> float:
    """Return the bytes an element that a quantizer must read and write; a copy reads and writes 8."""
    return 4 + 1 / per_byte(bits) + 1 / 16 + 4 * floats


def _make_step(x: torch.Tensor, rounding: str, bits: int, *, floats: bool) -> Callable[[], None]:
    """Return a call of the kernel into memory that is there already, as that of the copy is."""
    spec = f"int{bits}:max:b2c8o4i4:{rounding}:pass"
    call, parts = kernel.Call(tuple(x.shape), x.stride(), spec, "bcss", "site"), per_byte(bits)
    scale = torch.empty_strided(*kernel.find_scale_stride(call), dtype=torch.uint8)
    codes = torch.zeros_like(x, dtype=torch.int8)
    packed = shapes.pack(codes, bits).zero_() if parts > 1 else codes
    results = kernel.Results(scale, packed, torch.zeros_like(x) if floats else None, parts)
    key = torch.tensor([1, 2], dtype=torch.int32) if rounding == "stochastic" else None

    def run() -> None:
        reason = kernel.quantize(call, x, results, key, None, finds=True)
        if reason:
            raise SystemExit(reason)

    return run


if __name__ == "__main__":
    main()
