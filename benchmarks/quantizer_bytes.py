"""Bytes that one quantizer of 2 samples x 8 channels moves between memory and the caches, against what it must move.

    python benchmarks/quantizer_bytes.py [--batch 256]

Time depends on the arithmetic too (benchmarks/quantizers.py); bytes do not. cachegrind of valgrind runs the kernel with
a simulated last cache of 1 MB, and counts the lines of 64 bytes that are fetched into it, for a read or for a write. A
quantizer must read 4 bytes an element, and write a byte for the code, or half a byte for one of 4 bits, which is
packed, one for the scale of 16, and 4 for a float.
"""

import argparse
import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch
from quantizers import count_must
from rich.console import Console
from rich.table import Table
from torch._inductor import config

from qcompiler.runtime.kernels import quantize_blocks as kernel
from qcompiler.runtime.kernels.loader import load_library
from qcompiler.runtime.numbers.packing import per_byte

_ORDERS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
_LINE: Final = 64
#: library, task, elements, random bits, floats, codes in a byte, and what runs: nothing, the kernel or a copy
_DRIVER: Final = r"""
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

struct Data {
    const float* x; const uint8_t* read; uint8_t* codes; float* floats; void* scale; const uint8_t* zero;
    const int32_t* key; int64_t threads, parts;
};

using Quantize = void (*)(const void*, const Data*, bool, bool);

int main(int, char** given) {
    auto quantize = (Quantize)dlsym(dlopen(given[1], RTLD_NOW), "quantize_blocks");
    char task[4096];
    if (!fread(task, 1, sizeof task, fopen(given[2], "rb"))) return 1;
    const int64_t n = atoll(given[3]);
    auto x = (float*)aligned_alloc(64, 4 * n), floats = (float*)aligned_alloc(64, 4 * n);
    auto codes = (uint8_t*)aligned_alloc(64, n), scale = (uint8_t*)aligned_alloc(64, n);
    uint32_t number = 1;
    for (int64_t i = 0; i < n; ++i) x[i] = (int32_t)(number = number * 1664525u + 1013904223u);
    memset(codes, 0, n), memset(scale, 0, n), memset(floats, 0, 4 * n);
    const int32_t key[2] = {1, 2};
    const bool draws = atoi(given[4]), shows = atoi(given[5]);
    const int64_t parts = atoi(given[6]);
    const Data data{x, nullptr, codes, shows ? floats : nullptr, scale, nullptr, draws ? key : nullptr, 1, parts};
    if (atoi(given[7]) == 1) quantize(task, &data, false, true);
    if (atoi(given[7]) == 2) memcpy(floats, x, 4 * n);
}
"""


class Counter:
    """Counts lines of memory in a folder of its own."""

    def __init__(self, folder: Path, elements: int) -> None:
        self._folder, self._elements = folder, elements
        source, self._driver = folder / "driver.cpp", folder / "driver"
        source.write_text(_DRIVER)
        subprocess.run(["g++", "-O2", str(source), "-o", str(self._driver), "-ldl"], check=True)
        library = load_library(kernel.NAME)
        if isinstance(library, str):
            raise SystemExit(library)
        self._library = str(library._name)
        (folder / "task").write_bytes(bytes(1))
        self._before = self._count(0, 0, 1, 0)

    def count(self, call: kernel.Call | None, *, floats: bool, parts: int = 1) -> tuple[float, float]:
        """Return the bytes an element that a call reads and writes; of a copy of the tensor without a call."""
        if call is not None:
            task = kernel.make_task(call, kernel.find_scale_stride(call)[1], finds_scale=True)
            if isinstance(task, str):
                raise SystemExit(task)
            (self._folder / "task").write_bytes(bytes(task))
        found = self._count(call is not None and "stochastic" in call.spec, floats, parts, 2 if call is None else 1)
        pairs = zip(found, self._before, strict=True)
        reads, writes = (_LINE * (now - before) / self._elements for now, before in pairs)
        return reads, writes

    def _count(self, draws: int, floats: int, parts: int, what: int) -> tuple[int, int]:
        options = ["--tool=cachegrind", "--cache-sim=yes", "--LL=1048576,16,64", "--cachegrind-out-file=/dev/null"]
        given = [self._library, self._folder / "task", self._elements, int(draws), int(floats), parts, what]
        command = ["valgrind", *options, str(self._driver), *map(str, given)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        line = re.search(r"LLd misses: .*\(\s*([\d,]+) rd\s*\+\s*([\d,]+) wr\)", printed)
        if line is None:
            raise SystemExit(f"valgrind: no count in\n{printed}")
        reads, writes = (int(number.replace(",", "")) for number in line.groups())
        return reads, writes


def main() -> None:
    """Counts every combination of memory order, rounding, bits and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed")
    config.cpp.simdlen = 256  # valgrind knows no AVX-512
    shape = (args.batch, 16, 32, 32)
    table = Table("order", "rounding", "bits", "floats", "read, bytes an element", "written", "of what it must")
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder), torch.Size(shape).numel())
        reads, writes = counter.count(None, floats=True)
        table.add_row("copy of the tensor", "", "", "", f"{reads:.3f}", f"{writes:.3f}", f"{(reads + writes) / 8:.3f}×")
        for order, rounding, bits, floats in itertools.product(
            _ORDERS, ("nearest", "stochastic"), (8, 4), (False, True)
        ):
            stride = torch.empty(shape).contiguous(memory_format=_ORDERS[order]).stride()
            call = kernel.Call(shape, stride, f"int{bits}:max:b2c8o4i4:{rounding}:pass", "bcss", "site")
            reads, writes = counter.count(call, floats=floats, parts=per_byte(bits))
            share = (reads + writes) / count_must(bits, floats=floats)
            cells = f"{reads:.3f}", f"{writes:.3f}", f"{share:.3f}×"
            table.add_row(order, rounding, str(bits), "and floats" * floats, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
