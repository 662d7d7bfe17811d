"""verify_onnx(): a file beside the module that it was exported from, quantizer by quantizer and end to end."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompiler.exporting.checksums import compute_checksum, list_changed
from qcompiler.exporting.inputs import (
    check_constants,
    check_inputs,
    copy_tensors,
    describe_given,
    free_as,
    read_keywords,
)
from qcompiler.exporting.observe import SAME, InDouble, Observer, count_different, restore_codes
from qcompiler.exporting.trace import ExportError, name_errors, trace_model
from qcompiler.module import QuantizedModule, get_session
from qcompiler.tables import Table, to_text


@dataclasses.dataclass(frozen=True)
class SiteCheck:
    """One quantizer: the comparison of the codes with PyTorch."""

    name: str
    elements: int
    #: codes that differ if both read the tensor that the file computed; the claim is 0
    wrong: int
    #: codes that differ if each reads its own tensor: the noise of the layers in front
    flipped: int
    #: the same in the graph that onnxruntime optimizes
    optimized: int
    #: the same between PyTorch in float32 and in float64
    own: int


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """The findings of `verify_onnx`; `print(report)` shows all, quantizers in graph order.

    Differences of outputs are the largest of all, relative to the largest output.
    """

    sites: tuple[SiteCheck, ...]
    #: from PyTorch: onnxruntime with its optimizations, and without
    optimized: float
    plain: float
    #: between PyTorch in float32 and in float64: the effect of float arithmetic alone on this quantized model
    spread: float
    #: parameters and buffers of the module that are not those that the file was made of
    changed: tuple[str, ...] = ()
    #: quantizers that onnxruntime merged with others, so that the file computes other numbers than it says
    merged: tuple[str, ...] = ()
    #: the operators of onnxruntime's optimized graph that compute on codes, with their counts
    integer_kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """True if the file was made of this module and every quantizer, fed the same input, gives the same codes."""
        return not self.changed and not any(site.wrong for site in self.sites)

    @property
    def close(self) -> bool:
        """True if no arithmetic moves outputs by more than twice the spread: neither floats, nor integer kernels.

        Nor may onnxruntime's optimizations merge quantizers, or flip many more codes than floats do: four times as many
        and 20, which chance makes of counts that are alike.

        Flips are rare and have a large effect, so `spread` is known only if some of the inputs show one: give a few
        hundred.
        """
        flipped, optimized, own = (sum(getattr(site, key) for site in self.sites) for key in _COUNTS)
        near = max(self.plain, self.optimized) <= 2 * max(self.spread, SAME)
        return near and not self.merged and optimized <= 4 * max(flipped, own) + 20

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return dataclasses.asdict(self) | {"exact": self.exact, "close": self.close}

    def __str__(self) -> str:
        columns = ("quantizer", "codes", "wrong", "flipped", "flipped, optimized", "float32 to float64")
        rows = [
            (
                s.name,
                f"{s.elements:,}",
                s.wrong,
                *(_as_share(n, s.elements) for n in (s.flipped, s.optimized, s.own)),
            )
            for s in self.sites
        ]
        kernels = ", ".join(f"{count} {name}" for name, count in self.integer_kernels.items())
        lines = (
            *([f"the file was made of another {', '.join(self.changed)}"] if self.changed else []),
            *([f"merged by onnxruntime, with other numbers: {', '.join(self.merged)}"] if self.merged else []),
            f"integer kernels of onnxruntime: {kernels or 'none'}",
            f"outputs: {self.plain:.2g} of the largest, {self.optimized:.2g} with optimizations",
            f"PyTorch in float32 beside float64: {self.spread:.2g}",
            *(() if self.close else ("the file is off by more than floats are; with few inputs, by chance too",)),
        )
        return to_text([Table("Codes of ONNX beside those of PyTorch", columns, rows), *lines])


_COUNTS = ("flipped", "optimized", "own")


def _as_share(count: int, elements: int) -> str:
    return f"{count / max(elements, 1):.4%}" if count else "0"


@name_errors("verify")
def verify_onnx(
    qmodel: QuantizedModule,
    path: str | os.PathLike[str],
    inputs: tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Run both on `inputs`; compares the codes of every quantizer, and the outputs.

    Args:
        qmodel: the module that the file was exported from, unchanged since.
        path: the file.
        inputs, example_kwargs: the arguments of the model; a few hundred samples for `VerifyReport.close` to mean
            something.
        kwargs: another name of `example_kwargs`.

    Raises:
        ExportError: the file is not one of `export_onnx`, or has other quantizers than the module; a number or another
            constant differs from the export; both names of the keyword inputs are given.
        OSError: the file cannot be read.
    """
    try:
        from qcompiler.exporting import run
    except ImportError as error:
        raise ExportError(f"verify: {error.name} is not installed; pip install 'qcompiler[onnx]'") from error
    if kwargs is not None and example_kwargs is not None:
        raise ExportError("verify: got example_kwargs and kwargs; valid: one of them, they are the same")
    path, options = Path(path), read_keywords(kwargs if example_kwargs is None else example_kwargs)
    held, model = run.read_file(path), get_session("verify", qmodel).model
    check_inputs(model, inputs, options)
    inputs, options = copy_tensors(inputs, options)
    fixed = {name: one["calibrated"] for name, one in held.sites.items() if one["calibrated"] is not None}
    traced = trace_model(qmodel, *free_as(model, inputs, options, held.inputs), frozen=False)
    states = qmodel.ranges()
    if held.given is not None:
        check_constants(model, held.given, describe_given(traced.frozen.program))
    single, double = Observer(traced, states, fixed), InDouble(traced, states, fixed)
    single.outputs(inputs, options)
    exact = double.outputs(inputs, options)
    given = _order_inputs(list(held.inputs), single.given(inputs, options))
    expected = run.run_reference(qmodel, inputs, options)
    plain, optimized = (run.run_file(path, given, {}, optimize=optimize) for optimize in (False, True))
    shown, merged = run.find_fused(path, [one["values"][-1] for one in held.sites.values() if one["values"]], given, {})
    return VerifyReport(
        _check_sites(path, held.sites, given, single, double, shown),
        optimized=run.measure_difference(optimized, expected),
        plain=run.measure_difference(plain, expected),
        spread=run.measure_difference(expected, exact),
        changed=list_changed(model, held.tensors),
        merged=tuple(name for name, one in held.sites.items() if one["values"] and one["values"][-1] in merged),
        integer_kernels=run.count_kernels(path),
    )


def _order_inputs(names: list[str], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the inputs in the order of the file: keywords may come in another order than at export."""
    known = set(names) <= given.keys()
    return tuple(given[name] for name in names) if known else tuple(given.values())


def _check_sites(
    path: Path,
    exported: Mapping[str, Mapping[str, Any]],
    given: tuple[Any, ...],
    single: Observer,
    double: Observer,
    shown: Mapping[str, np.ndarray],
) -> tuple[SiteCheck, ...]:
    """Check every quantizer by the codes that PyTorch found in float32 and in float64, and `shown` optimized."""
    from qcompiler.exporting import run

    if single.sites.keys() != exported.keys():
        others = ", ".join(sorted(single.sites.keys() ^ exported.keys()))
        raise ExportError(f"verify: {path} has other quantizers than the module: {others}")
    values = run.run_inner(path, [name for one in exported.values() for name in one["values"]], given, {})
    own, checks = single.found, []
    for name, site in single.sites.items():
        apart = int((own[name] != double.found[name]).sum())
        if exported[name]["kind"] == "folded":  # its codes are part of a weight's, and only known by their checksum
            count = 0 if compute_checksum(own[name]) == exported[name]["checksum"] else own[name].numel()
            checks.append(SiteCheck(name, own[name].numel(), count, count, optimized=count, own=apart))
            continue
        *source, codes = exported[name]["values"]
        same = own[name]
        if source:
            same = single.made(name, torch.from_numpy(values[source[0]].copy()))
        found, optimized = (restore_codes(of[codes], exported[name]) for of in (values, shown))
        wrong, flipped, fused_flips = (
            count_different(*pair, site) for pair in ((found, same), (found, own[name]), (optimized, own[name]))
        )
        checks.append(SiteCheck(name, own[name].numel(), wrong, flipped, optimized=fused_flips, own=apart))
    return tuple(checks)
