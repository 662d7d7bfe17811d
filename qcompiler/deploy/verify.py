"""verify_onnx(): a file beside the module that it was exported from, quantizer by quantizer and end to end."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qcompiler.compile import QuantizedModule
from qcompiler.deploy.checksums import changed, checksum
from qcompiler.deploy.inputs import check_inputs, copy_tensors, free_as
from qcompiler.deploy.observe import InDouble, Observer, as_trained, count_different
from qcompiler.deploy.trace import ExportError, errors_of, trace
from qcompiler.passes.tables import Table, to_text


@dataclasses.dataclass(frozen=True)
class SiteCheck:
    """One quantizer: how its codes compare with those of PyTorch."""

    name: str
    elements: int
    #: codes that differ where both read the tensor that the file computed; the claim is 0
    wrong: int
    #: codes that differ where each reads its own tensor: the noise of the layers in front
    flipped: int
    #: the same with onnxruntime's optimizations
    optimized: int
    #: the same between PyTorch in float32 and in float64
    own: int


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify_onnx` found; `print(report)` shows it, quantizers in graph order.

    Differences of outputs are the largest of all, relative to the largest output.
    """

    sites: tuple[SiteCheck, ...]
    #: from PyTorch: onnxruntime with its optimizations, and without
    optimized: float
    plain: float
    #: between PyTorch in float32 and in float64: what float arithmetic alone does to this quantized model
    spread: float
    #: parameters and buffers of the module that are not those that the file was made of
    changed: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """True where the file was made of this module and every quantizer, fed the same input, gives the same codes."""
        return not self.changed and not any(site.wrong for site in self.sites)

    @property
    def close(self) -> bool:
        """True where no arithmetic moves outputs by more than twice the spread: neither floats, nor integer kernels.

        Flips are rare and their effect is large, so `spread` is known only where some of the inputs show one: give a
        few hundred.
        """
        return max(self.plain, self.optimized) <= 2 * max(self.spread, _FLOAT)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self) | {"exact": self.exact, "close": self.close}

    def __str__(self) -> str:
        columns = ("quantizer", "codes", "wrong", "flipped", "flipped, optimized", "float32 to float64")
        rows = [
            (s.name, f"{s.elements:,}", s.wrong, *(_share(n, s.elements) for n in (s.flipped, s.optimized, s.own)))
            for s in self.sites
        ]
        others = [f"the file was made of another {', '.join(self.changed)}"] if self.changed else []
        lines = (
            *others,
            f"outputs: {self.plain:.2g} of the largest, {self.optimized:.2g} with optimizations",
            f"PyTorch in float32 beside float64: {self.spread:.2g}",
            *(() if self.close else ("the file is off by more than twice that; with few inputs, by chance too",)),
        )
        return to_text([Table("Codes of ONNX beside those of PyTorch", columns, rows), *lines])


#: a difference that sums of floats in another order make without any flip
_FLOAT = 1e-6


def _share(count: int, elements: int) -> str:
    return f"{count / max(elements, 1):.4%}" if count else "0"


@errors_of("verify")
def verify_onnx(
    qmodel: QuantizedModule,
    path: str | os.PathLike[str],
    inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Runs both on `inputs`; compares the codes of every quantizer, and the outputs.

    Args:
        qmodel: the module that the file was exported from, unchanged since.
        path: the file.
        inputs, kwargs: what the model is called with; a few hundred samples for `VerifyReport.close` to mean something.

    Raises:
        ExportError: the file is not one of `export_onnx`, or has other quantizers than the module.
        OSError: the file cannot be read.
    """
    try:
        from qcompiler.deploy import run
    except ImportError as error:
        raise ExportError(f"verify: {error.name} is not installed; pip install 'qcompiler[onnx]'") from error
    path, options = Path(path), dict(kwargs or {})
    held = run.read(path)
    check_inputs(qmodel._model, inputs, options)
    inputs, options = copy_tensors(inputs, options)
    fixed = {name: one["calibrated"] for name, one in held.sites.items() if one["calibrated"] is not None}
    traced, states = trace(qmodel, *free_as(qmodel._model, inputs, options, held.inputs), frozen=False), qmodel.ranges()
    single, double = Observer(traced, states, fixed), InDouble(traced, states, fixed)
    single.outputs(inputs, options)
    exact = double.outputs(inputs, options)
    given = _in_order(list(held.inputs), single.given(inputs, options))
    expected = run.reference(qmodel, inputs, options)
    plain, optimized = (run.outputs(path, given, {}, optimize=optimize) for optimize in (False, True))
    return VerifyReport(
        _sites(path, held.sites, given, single, double),
        optimized=run.difference(optimized, expected),
        plain=run.difference(plain, expected),
        spread=run.difference(expected, exact),
        changed=changed(qmodel._model, held.tensors),
    )


def _in_order(names: list[str], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the inputs of the file are given: those by keyword may come in another order than at export."""
    known = set(names) <= given.keys()
    return tuple(given[name] for name in names) if known else tuple(given.values())


def _sites(
    path: Path,
    exported: Mapping[str, Mapping[str, Any]],
    given: tuple[Any, ...],
    single: Observer,
    double: Observer,
) -> tuple[SiteCheck, ...]:
    """Every quantizer of the file, by the codes that PyTorch found in float32 and in float64."""
    from qcompiler.deploy import run

    if single.sites.keys() != exported.keys():
        others = ", ".join(sorted(single.sites.keys() ^ exported.keys()))
        raise ExportError(f"verify: {path} has other quantizers than the module: {others}")
    values = run.inner(path, [name for one in exported.values() for name in one["values"]], given, {})
    fused = run.inner(path, [one["values"][-1] for one in exported.values() if one["values"]], given, {}, optimize=True)
    own, checks = single.found, []
    for name, site in single.sites.items():
        apart = int((own[name] != double.found[name]).sum())
        if exported[name]["kind"] == "folded":  # its codes are part of a weight's, and only known by their checksum
            count = 0 if checksum(own[name]) == exported[name]["checksum"] else own[name].numel()
            checks.append(SiteCheck(name, own[name].numel(), count, count, optimized=count, own=apart))
            continue
        *source, codes = exported[name]["values"]
        same = own[name]
        if source:
            same = single.made(name, torch.from_numpy(values[source[0]].copy()))
        found, optimized = (as_trained(of[codes], exported[name]) for of in (values, fused))
        wrong, flipped, fused_flips = (
            count_different(*pair, site) for pair in ((found, same), (found, own[name]), (optimized, own[name]))
        )
        checks.append(SiteCheck(name, own[name].numel(), wrong, flipped, optimized=fused_flips, own=apart))
    return tuple(checks)
