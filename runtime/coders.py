"""Quantize and dequantize whole tensors by a kernel of our own; where there is none, by the references.

The results are those of runtime/references.py, bit for bit. Scales that are found lie in memory as the blocks do.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from qcompiler.runtime import references, shapes, stacked
from qcompiler.runtime.kernels import packing
from qcompiler.runtime.kernels import quantize_blocks as kernel
from qcompiler.runtime.kernels import quantize_whole as whole
from qcompiler.runtime.kernels.quantizers import explain_format, explain_range
from qcompiler.runtime.kernels.triton_support import explain_triton
from qcompiler.runtime.numbers.packing import per_byte
from qcompiler.runtime.spec import parse_spec


def quantize_blocks(
    x: Tensor, key: Tensor | None, spec: str, layout: str, site: str, codes: bool, floats: bool, parts: int = 1
) -> list[Tensor]:
    """Return the codes and the floats of `x`, each if it is wanted, then the scale.

    Args:
        x: a floating tensor, any shape.
        key: int32 [2] from `draw_key`, for stochastic rounding.
        spec: of the range of the present tensor.
        codes: whether codes are wanted: what `quantize` returns.
        floats: whether floats are wanted: what `dequantize` returns.
        parts: codes in a byte; above 1 the codes are what `pack` returns of them.
    """
    job = _Job.start(x, spec, layout, site, codes=codes, floats=floats, parts=parts)
    scale = job.make_scale()
    if not job.run_kernel(scale, None, key, finds=True):
        scale.copy_(references.scale(x, spec, layout))
        job.run_references(scale, None, key)
    return [*job.results, scale]


def fake_quantize_blocks(
    x: Tensor, key: Tensor | None, spec: str, layout: str, site: str, codes: bool, floats: bool, parts: int = 1
) -> list[Tensor]:
    """Return empty results of the shape and strides of `x`, and scales in the order of the blocks in memory."""
    job = _Job.start(x, spec, layout, site, codes=codes, floats=floats, parts=parts)
    return [*job.results, job.make_scale()]


def quantize_by(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    key: Tensor | None,
    spec: str,
    layout: str,
    site: str,
    codes: bool,
    floats: bool,
    shows: bool,
) -> list[Tensor]:
    """Return the codes and the floats of `x`, each if it is wanted, by a scale that is known.

    Args:
        shows: the floats are NaN also where `x` is not finite.
    """
    job = _Job.start(x, spec, layout, site, codes=codes, floats=floats, shows=shows)
    if not job.run_kernel(scale, zero_point, key, finds=False):
        job.run_references(scale, zero_point, key)
    return job.results


def fake_quantize_by(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    key: Tensor | None,
    spec: str,
    layout: str,
    site: str,
    codes: bool,
    floats: bool,
    shows: bool,
) -> list[Tensor]:
    """Return empty results of the shape and strides of `x`."""
    return _Job.start(x, spec, layout, site, codes=codes, floats=floats).results


def quantize_measured(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    reach: Tensor,
    key: Tensor | None,
    spec: str,
    layout: str,
    site: str,
    codes: bool,
    floats: bool,
    shows: bool,
    checks: bool,
) -> list[Tensor]:
    """Return what `quantize_by` returns for one scale, then what `measure` and, if it is wanted, `checked` return.

    Args:
        reach: float32 [2, 1], from `read_ranges`.
        shows: the floats are NaN also where `x` is not finite.
        checks: whether the scale that is NaN for a tensor that is not finite is wanted.
    """
    job = _Job.start(x, spec, layout, site, codes=codes, floats=floats, shows=shows)
    measured, checked = _make_seen(x, scale, reach)
    if not job.run_measured(scale, zero_point, key, whole.Measured(reach.contiguous(), measured, checked)):
        job.run_references(scale, zero_point, key)
        measured.copy_(stacked.measure(x, reach, spec, layout))
        checked.copy_(references.checked(scale, x, spec, layout))
    return [*job.results, measured, *[checked] * checks]


def fake_quantize_measured(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    reach: Tensor,
    key: Tensor | None,
    spec: str,
    layout: str,
    site: str,
    codes: bool,
    floats: bool,
    shows: bool,
    checks: bool,
) -> list[Tensor]:
    """Return empty results of the shape and strides of `x`, numbers and a scale."""
    measured, checked = _make_seen(x, scale, reach)
    job = _Job.start(x, spec, layout, site, codes=codes, floats=floats)
    return [*job.results, measured, *[checked] * checks]


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    layout: str,
    dtype: torch.dtype,
    shape: Sequence[int] = (),
) -> Tensor:
    """Return what `dequantize` returns.

    Args:
        codes: what `quantize` or `pack` returns.
        dtype: of the floats.
        shape: of packed codes before they were packed; empty: codes are not packed.
    """
    floats = fake_dequantize_blocks(codes, scale, zero_point, spec, layout, dtype, shape)
    form, dense = parse_spec(spec).format, codes if shape else _make_dense(codes, floats.stride())
    parts = per_byte(form.bits) if shape else 1
    call = kernel.find_call(tuple(floats.shape), floats.stride(), spec, layout)
    if (
        codes.is_cpu
        and codes.element_size() == 1
        and dtype in kernel.DTYPES["cpu"]
        and _has_kernel(spec)
        and not kernel.dequantize(call, dense, scale, zero_point, floats, parts=parts)
    ):
        return floats
    plain = unpack_codes(codes, shape, form.bits, form.dtype is torch.int8) if shape else codes
    return floats.copy_(references.dequantize(plain, scale, zero_point, spec, layout, dtype))


def fake_dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    layout: str,
    dtype: torch.dtype,
    shape: Sequence[int] = (),
) -> Tensor:
    """Return floats of the shape and strides of the codes, before they were packed."""
    return _make_unpacked(codes, shape, dtype) if shape else torch.empty_like(codes, dtype=dtype)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return what `pack` returns, of int8 or uint8."""
    packed = shapes.pack(codes, bits)
    if not codes.is_cpu or packing.pack(_make_dense(codes, torch.empty_like(codes).stride()), bits, packed):
        packed.copy_(references.pack(codes, bits))
    return packed


def unpack_codes(packed: Tensor, shape: Sequence[int], bits: int, signed: bool) -> Tensor:
    """Return what `unpack` returns, as int8, or uint8 without a sign, in the order of the bytes in memory."""
    codes = fake_unpack_codes(packed, shape, bits, signed)
    if not packed.is_cpu or packing.unpack(packed, bits, codes):
        codes.copy_(references.unpack(packed, list(shape), bits, signed))
    return codes


def fake_unpack_codes(packed: Tensor, shape: Sequence[int], bits: int, signed: bool) -> Tensor:
    """Return empty codes."""
    return _make_unpacked(packed, shape, torch.int8 if signed else torch.uint8)


def _make_unpacked(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory for what was packed, in the order of the bytes in memory."""
    if packed.ndim != len(shape):  # filled up with zeros
        return packed.new_empty(shape, dtype=dtype)
    order = sorted(range(packed.ndim), key=lambda dim: (packed.stride(dim), dim), reverse=True)
    made = packed.new_empty([shape[dim] for dim in order], dtype=dtype)
    return made.permute([order.index(dim) for dim in range(packed.ndim)])


def find_kernel(device: str) -> Callable[..., str] | None:
    """Return the kernel that quantizes on a type of device; None: there is none."""
    if device == "cuda" and not explain_triton():
        from qcompiler.runtime.kernels import triton_quantizers  # needs Triton

        return triton_quantizers.quantize
    return _quantize_on_cpu if device == "cpu" else None


def _quantize_on_cpu(
    call: kernel.Call, x: Tensor, results: kernel.Results, key: Tensor | None, zero: Tensor | None, *, finds: bool
) -> str:
    if finds and results.parts == 1 and whole.finds_scales(call):
        return whole.quantize(call, x, results, key)
    return kernel.quantize(call, x, results, key, zero, finds=finds)


@functools.lru_cache(maxsize=4096)
def _has_kernel(spec: str, *, finds: bool = False) -> bool:
    """Return True if kernels know the codes of a spec and, if they have to find scales, the rule of the scales."""
    parsed = parse_spec(spec)
    return not explain_format(parsed) and not (finds and explain_range(parsed))


def _make_dense(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return a tensor with the strides of its results, which are dense: itself, or a copy."""
    return x if x.stride() == stride else torch.empty_like(x).copy_(x)


def _make_packed(codes: Tensor, spec: str, device: torch.device) -> Tensor:
    """Return memory for what `pack` returns of codes."""
    packed = shapes.pack(codes, parse_spec(spec).format.bits)
    return torch.empty_strided(packed.shape, packed.stride(), dtype=packed.dtype, device=device)


def _make_seen(x: Tensor, scale: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for what `measure` and `checked` return."""
    return x.new_empty((3, reach.shape[1]), dtype=torch.float32), torch.empty_like(scale)


@dataclasses.dataclass(slots=True)
class _Job:
    """One tensor that is quantized, and the memory for the results; None: not wanted."""

    x: Tensor
    call: kernel.Call
    codes: Tensor | None
    floats: Tensor | None
    #: codes in a byte of `codes`
    parts: int = 1

    @classmethod
    def start(
        cls,
        x: Tensor,
        spec: str,
        layout: str,
        site: str,
        *,
        codes: bool,
        floats: bool,
        shows: bool = False,
        parts: int = 1,
    ) -> Self:
        """Return a job with memory for what is wanted, of the strides of `x` if it is dense."""
        made_floats = torch.empty_like(x) if floats else None
        made_codes, stride = None, x.stride() if made_floats is None else made_floats.stride()
        if codes:
            packs = parts > 1
            whole = torch.empty_like(x, dtype=kernel.find_types(spec)[0], device="meta" if packs else x.device)
            made_codes, stride = _make_packed(whole, spec, x.device) if packs else whole, whole.stride()
        call = kernel.find_call(tuple(x.shape), stride, spec, layout, site, shows)
        return cls(x, call, made_codes, made_floats, parts if codes else 1)

    @property
    def results(self) -> list[Tensor]:
        """The memory for codes and floats, as far as they are wanted."""
        return [made for made in (self.codes, self.floats) if made is not None]

    def make_scale(self) -> Tensor:
        """Return memory for a scale of each block."""
        counts, strides = kernel.find_scale_stride(self.call)
        return torch.empty_strided(counts, strides, dtype=kernel.find_types(self.call.spec)[1], device=self.x.device)

    def run_kernel(self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None, *, finds: bool) -> bool:
        """Let the kernel write the results; return False if the kernel cannot."""
        quantize = find_kernel(self.x.device.type)
        if quantize is None or not self._fits(finds=finds):
            return False
        return not quantize(*self._describe(scale), key, zero_point, finds=finds)

    def run_measured(
        self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None, measured: whole.Measured
    ) -> bool:
        """Let the kernel write the results, and what the tensor shows; return False if the kernel cannot."""
        if not self.x.is_cpu or scale.numel() != 1 or not self._fits():
            return False
        return not whole.quantize_measured(*self._describe(scale), key, zero_point, measured)

    def _fits(self, *, finds: bool = False) -> bool:
        """Return True if a kernel writes what is wanted, of a tensor of this type."""
        if self.x.dtype not in kernel.DTYPES[self.x.device.type] or (self.codes is None and self.floats is None):
            return False
        if not _has_kernel(self.call.spec, finds=finds):
            return False
        return self.parts == 1 or (self.x.is_cpu and not kernel.explain_parts(self.call))

    def _describe(self, scale: Tensor) -> tuple[kernel.Call, Tensor, kernel.Results]:
        """Return what every kernel is told, reads and writes."""
        results = kernel.Results(scale, self.codes, self.floats, self.parts)
        return self.call, _make_dense(self.x, self.call.stride), results

    def run_references(self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None) -> None:
        """Let the references write the results."""
        spec, layout = self.call.spec, self.call.layout
        codes = references.quantize(self.x, scale, zero_point, key, spec, layout, self.call.site)
        if self.codes is not None:
            self.codes.copy_(references.pack(codes, parse_spec(spec).format.bits) if self.parts > 1 else codes)
        if self.floats is not None:
            shown = self.x if self.call.shows else None
            floats = references.dequantize(codes, scale, zero_point, spec, layout, self.x.dtype, shown)
            self.floats.copy_(floats)
