"""Quantize and dequantize whole tensors by a kernel of our own; where there is none, by the references.

The results are those of runtime/references.py, bit for bit. Scales that are found lie in memory as the blocks do.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from qcompiler.runtime import references, shapes, stacked
from qcompiler.runtime.kernels import packing
from qcompiler.runtime.kernels import quantize_blocks as kernel
from qcompiler.runtime.kernels import quantize_whole as whole
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
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, layout: str, shape: Sequence[int] = ()
) -> Tensor:
    """Return what `dequantize` returns, in float32.

    Args:
        codes: what `quantize` or `pack` returns.
        shape: of packed codes before they were packed; empty: codes are not packed.
    """
    floats = fake_dequantize_blocks(codes, scale, zero_point, spec, layout, shape)
    form, dense = parse_spec(spec).format, codes if shape else _make_dense(codes, floats.stride())
    parts, call = per_byte(form.bits) if shape else 1, kernel.Call(tuple(floats.shape), floats.stride(), spec, layout)
    if (
        codes.is_cpu
        and codes.element_size() == 1
        and not kernel.dequantize(call, dense, scale, zero_point, floats, parts=parts)
    ):
        return floats
    plain = unpack_codes(codes, shape, form.bits, form.dtype is torch.int8) if shape else codes
    return floats.copy_(references.dequantize(plain, scale, zero_point, spec, layout, torch.float32))


def fake_dequantize_blocks(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, layout: str, shape: Sequence[int] = ()
) -> Tensor:
    """Return floats of the shape and strides of the codes, before they were packed."""
    return _make_unpacked(codes, shape, torch.float32) if shape else torch.empty_like(codes, dtype=torch.float32)


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


@dataclasses.dataclass(frozen=True)
class _Job:
    """One tensor that is quantized, and the memory for the results; None: not wanted."""

    x: Tensor
    spec: str
    layout: str
    site: str
    #: the strides of what is not packed
    stride: tuple[int, ...]
    codes: Tensor | None
    floats: Tensor | None
    shows: bool = False
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
        made_floats = torch.empty_like(x, dtype=torch.float32) if floats else None
        if not codes:
            stride = x.stride() if made_floats is None else made_floats.stride()
            return cls(x, spec, layout, site, stride, None, made_floats, shows)
        packs = parts > 1
        whole = torch.empty_like(x, dtype=parse_spec(spec).format.dtype, device="meta" if packs else x.device)
        made_codes = _make_packed(whole, spec, x.device) if packs else whole
        return cls(x, spec, layout, site, whole.stride(), made_codes, made_floats, shows, parts)

    @property
    def results(self) -> list[Tensor]:
        """The memory for codes and floats, as far as they are wanted."""
        return [made for made in (self.codes, self.floats) if made is not None]

    def make_scale(self) -> Tensor:
        """Return memory for a scale of each block."""
        call = kernel.Call(tuple(self.x.shape), self.stride, self.spec, self.layout)
        counts, strides = kernel.find_scale_stride(call)
        return torch.empty_strided(counts, strides, dtype=parse_spec(self.spec).scale.dtype, device=self.x.device)

    def run_kernel(self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None, *, finds: bool) -> bool:
        """Let the kernel write the results; return False if the kernel cannot."""
        quantize, prepared = find_kernel(self.x.device.type), self._prepare(scale)
        if quantize is None or prepared is None:
            return False
        return not quantize(*prepared, key, zero_point, finds=finds)

    def run_measured(
        self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None, measured: whole.Measured
    ) -> bool:
        """Let the kernel write the results, and what the tensor shows; return False if the kernel cannot."""
        prepared = self._prepare(scale)
        if prepared is None or not self.x.is_cpu or scale.numel() != 1:
            return False
        return not whole.quantize_measured(*prepared, key, zero_point, measured)

    def _prepare(self, scale: Tensor) -> tuple[kernel.Call, Tensor, kernel.Results] | None:
        """Return what every kernel reads and writes; None: kernels cannot."""
        if not self.results or self.x.dtype is not torch.float32:
            return None
        call = kernel.Call(tuple(self.x.shape), self.stride, self.spec, self.layout, self.site, self.shows)
        if self.parts > 1 and (not self.x.is_cpu or kernel.explain_parts(call)):
            return None
        return call, _make_dense(self.x, self.stride), kernel.Results(scale, self.codes, self.floats, self.parts)

    def run_references(self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None) -> None:
        """Let the references write the results."""
        codes = references.quantize(self.x, scale, zero_point, key, self.spec, self.layout, self.site)
        if self.codes is not None:
            bits = parse_spec(self.spec).format.bits
            self.codes.copy_(references.pack(codes, bits) if self.parts > 1 else codes)
        if self.floats is not None:
            shown = self.x if self.shows else None
            floats = references.dequantize(codes, scale, zero_point, self.spec, self.layout, torch.float32, shown)
            self.floats.copy_(floats)
