"""Quantize and dequantize whole tensors by a kernel of our own; where there is none, by the references.

The results are those of runtime/references.py, bit for bit. Scales that are found lie in memory as the blocks do.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qcompiler.runtime import references, stacked
from qcompiler.runtime.kernels import quantize_blocks as kernel
from qcompiler.runtime.kernels import quantize_measured as measured
from qcompiler.runtime.kernels.triton_support import explain_triton
from qcompiler.runtime.spec import parse_spec


def quantize_blocks(
    x: Tensor, key: Tensor | None, spec: str, layout: str, site: str, codes: bool, floats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes, the scale and the floats of `x`: `quantize`, `scale` and `dequantize` at once.

    Args:
        x: a floating tensor, any shape.
        key: int32 [2] from `draw_key`, for stochastic rounding.
        spec: of the range of the present tensor.
        codes: False: the codes are empty.
        floats: False: the floats are empty.
    """
    made = made_codes, scale, made_floats = fake_quantize_blocks(x, key, spec, layout, site, codes, floats)
    job = _Job(x, spec, layout, site, made_codes if codes else None, made_floats if floats else None)
    if not job.run_kernel(scale, None, key, finds=True):
        scale.copy_(references.scale(x, spec, layout))
        job.run_references(scale, None, key)
    return made


def fake_quantize_blocks(
    x: Tensor, key: Tensor | None, spec: str, layout: str, site: str, codes: bool, floats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty results of the shape and strides of `x`, and scales in the order of the blocks in memory."""
    made_codes, made_floats = _make_results(x, spec, codes, floats)
    order = (made_codes if codes else made_floats).stride()
    counts, strides = kernel.find_scale_stride(kernel.Call(tuple(x.shape), order, spec, layout))
    scale = torch.empty_strided(counts, strides, dtype=parse_spec(spec).scale.dtype, device=x.device)
    return made_codes, scale, made_floats


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
) -> tuple[Tensor, Tensor]:
    """Return the codes and the floats of `x` by a scale that is known: `quantize` and `dequantize` at once.

    Args:
        shows: the floats are NaN also where `x` is not finite.
    """
    made = made_codes, made_floats = _make_results(x, spec, codes, floats)
    job = _Job(x, spec, layout, site, made_codes if codes else None, made_floats if floats else None, shows)
    if not job.run_kernel(scale, zero_point, key, finds=False):
        job.run_references(scale, zero_point, key)
    return made


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
) -> tuple[Tensor, Tensor]:
    """Return empty results of the shape and strides of `x`."""
    return _make_results(x, spec, codes, floats)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return codes, floats, then what `measure` returns, then what `checked` returns, for one scale that is known.

    Args:
        reach: float32 [2, 1], from `read_ranges`.
        shows: the floats are NaN also where `x` is not finite.
    """
    made = fake_quantize_measured(x, scale, zero_point, reach, key, spec, layout, site, codes, floats, shows)
    job = _Job(x, spec, layout, site, made[0] if codes else None, made[1] if floats else None, shows)
    if not job.run_measured(scale, zero_point, key, reach.contiguous(), measured.Seen(*made[2:])):
        job.run_references(scale, zero_point, key)
        seen = *stacked.measure(x, reach, spec, layout), references.checked(scale, x, spec, layout)
        for place, found in zip(made[2:], seen, strict=True):
            place.copy_(found)
    return made


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return empty results of the shape and strides of `x`, and of one number each."""
    low, high, outside = (x.new_empty(shape, dtype=torch.float32) for shape in (scale.shape, scale.shape, ()))
    return *_make_results(x, spec, codes, floats), low, high, outside, torch.empty_like(scale)


def dequantize_blocks(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, layout: str) -> Tensor:
    """Return what `dequantize` returns, in float32."""
    floats = fake_dequantize_blocks(codes, scale, zero_point, spec, layout)
    dense = _make_dense(codes, floats)
    call = kernel.Call(tuple(codes.shape), floats.stride(), spec, layout)
    if not codes.is_cpu or codes.element_size() > 1 or kernel.dequantize(call, dense, scale, zero_point, floats):
        floats.copy_(references.dequantize(codes, scale, zero_point, spec, layout, torch.float32))
    return floats


def fake_dequantize_blocks(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, layout: str) -> Tensor:
    """Return floats of the shape and strides of the codes."""
    return torch.empty_like(codes, dtype=torch.float32)


def find_kernel(device: str) -> Callable[..., str] | None:
    """Return the kernel that quantizes on a type of device; None: there is none."""
    if device == "cuda" and not explain_triton():
        from qcompiler.runtime.kernels import triton_quantizers  # needs Triton

        return triton_quantizers.quantize
    return kernel.quantize if device == "cpu" else None


def _make_dense(x: Tensor, made: Tensor) -> Tensor:
    """Return a tensor with the strides of its results, which are dense: itself, or a copy."""
    return x if x.stride() == made.stride() else torch.empty_like(x).copy_(x)


def _make_results(x: Tensor, spec: str, codes: bool, floats: bool) -> tuple[Tensor, Tensor]:
    """Return memory for codes and floats, of the strides of `x` if it is dense."""
    kind = parse_spec(spec).format.dtype
    return (
        torch.empty_like(x, dtype=kind) if codes else x.new_empty(0, dtype=kind),
        torch.empty_like(x, dtype=torch.float32) if floats else x.new_empty(0, dtype=torch.float32),
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """One tensor that is quantized, and the memory for the results; None: not wanted."""

    x: Tensor
    spec: str
    layout: str
    site: str
    codes: Tensor | None
    floats: Tensor | None
    shows: bool = False

    def run_kernel(self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None, *, finds: bool) -> bool:
        """Let the kernel write the results; return False if the kernel cannot."""
        quantize, prepared = find_kernel(self.x.device.type), self._prepare(scale)
        if quantize is None or prepared is None:
            return False
        return not quantize(*prepared, key, zero_point, finds=finds)

    def run_measured(
        self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None, reach: Tensor, seen: measured.Seen
    ) -> bool:
        """Let the kernel write the results, and what the tensor shows; return False if the kernel cannot."""
        prepared = self._prepare(scale)
        if prepared is None or not self.x.is_cpu or scale.numel() != 1:
            return False
        return not measured.quantize(*prepared, key, zero_point, reach, seen)

    def _prepare(self, scale: Tensor) -> tuple[kernel.Call, Tensor, kernel.Results] | None:
        """Return what every kernel reads and writes; None: kernels cannot."""
        made = self.floats if self.codes is None else self.codes
        if made is None or self.x.dtype is not torch.float32:
            return None
        call = kernel.Call(tuple(self.x.shape), made.stride(), self.spec, self.layout, self.site, self.shows)
        return call, _make_dense(self.x, made), kernel.Results(scale, self.codes, self.floats)

    def run_references(self, scale: Tensor, zero_point: Tensor | None, key: Tensor | None) -> None:
        """Let the references write the results."""
        codes = references.quantize(self.x, scale, zero_point, key, self.spec, self.layout, self.site)
        if self.codes is not None:
            self.codes.copy_(codes)
        if self.floats is not None:
            shown = self.x if self.shows else None
            floats = references.dequantize(codes, scale, zero_point, self.spec, self.layout, torch.float32, shown)
            self.floats.copy_(floats)
