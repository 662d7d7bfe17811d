"""Single kernels of benchmarks/gpu.py: what the tables of kernels need to know before they prefer one to float."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from gpu_checks import find_reason, quantize_plainly, trace_plainly
from gpu_section import Row, Setting, Task

from qcompiler.runtime import ops
from qcompiler.runtime.kernels.kernel import Kernel
from qcompiler.runtime.kernels.table import KERNELS, RUN_KERNELS

#: extents of a product, all three alike: a wide layer, and a narrow one
_EXTENTS: Final = (4096, 512)
_RUNS: Final = (32, 64, 128)
#: one block a program; no block at all
_SPECS: Final = (
    "int8:max:b2c8o4i4:nearest:pass",
    "int8:max:b2c8o4i4:stochastic:pass",
    "int8:max:tensor:stochastic:pass",
)


def list_kernels(setting: Setting) -> list[Task]:
    """Return products beside those of floats, then quantizers beside compiled loops."""
    extents = (64,) if setting.tiny else _EXTENTS
    products = [
        Task(f"{extent}³: {name}", functools.partial(_time_floats, extent, kind))
        for extent in extents
        for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ]
    whole = [
        Task(f"{extent}³: {one.name}", functools.partial(_time_sums, extent, one))
        for extent in extents
        for one in KERNELS
        if one.device == setting.device
    ]
    runs = [
        Task(f"{extent}³: {one.name} of {run}", functools.partial(_time_runs, extent, one, run))
        for extent in extents
        for one in RUN_KERNELS
        for run in _RUNS
        if one.device == setting.device
    ]
    specs = _SPECS[: 1 if setting.tiny else None]
    return [*products, *whole, *runs, *(Task(spec, functools.partial(_time_quantizer, spec)) for spec in specs)]


def _time(call: Callable[[], Any], setting: Setting) -> float:
    """Return milliseconds of one call among several, the median of five times."""
    several, times = 1 if setting.tiny else 10, []
    call()
    for _ in range(5):
        setting.wait()
        start = time.perf_counter()
        for _ in range(several):
            call()
        setting.wait()
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times) / several, 4)


def _time_floats(extent: int, dtype: torch.dtype, setting: Setting) -> Row:
    a, b = (torch.randn(extent, extent, device=setting.device, dtype=dtype) for _ in range(2))
    return {"ms": _time(lambda: a @ b, setting)}


def _draw_codes(extent: int, setting: Setting) -> torch.Tensor:
    return torch.randint(-128, 128, (extent, extent), device=setting.device, dtype=torch.int8)


def _time_sums(extent: int, kernel: Kernel[Any], setting: Setting) -> Row:
    """Time both orders of the right operand: forward reads it turned."""
    if reason := find_reason(kernel, 0):
        return {"detail": reason}
    a, b = _draw_codes(extent, setting), _draw_codes(extent, setting)
    return {
        "ms": _time(lambda: kernel.call(a, b), setting),
        "ms, right matrix turned": _time(lambda: kernel.call(a, b.t()), setting),
    }


def _time_runs(extent: int, kernel: Kernel[Any], run: int, setting: Setting) -> Row:
    if reason := find_reason(kernel, run):
        return {"detail": reason}
    a, b = _draw_codes(extent, setting), _draw_codes(extent, setting)
    factors = torch.rand(-(-extent // run), -(-extent // run), device=setting.device)
    return {
        "ms": _time(lambda: kernel.call(a, factors, run, b, factors, run, run), setting),
        "ms, right matrix turned": _time(lambda: kernel.call(a, factors, run, b.t(), factors, run, run), setting),
    }


def _time_quantizer(spec: str, setting: Setting) -> Row:
    """Time the operator that a kernel computes, the compiled loop, and plain torch code."""
    shape = (4, 16, 8, 8) if setting.tiny else (512, 16, 32, 32)
    x, key = torch.randn(shape, device=setting.device), torch.zeros(2, dtype=torch.int32, device=setting.device)
    own_key = key if "stochastic" in spec else None
    row = {"ms": _time(lambda: ops.QUANTIZE_BLOCKS(x, own_key, spec, "bcss", "site", True, True), setting)}
    if not setting.tiny:
        compiled = trace_plainly(spec, x, key)
        row["ms, compiled loop"] = _time(lambda: compiled([x, key]), setting)
    row["ms, node by node"] = _time(lambda: quantize_plainly(spec, x, own_key), setting)
    return row
