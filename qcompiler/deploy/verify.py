"""verify_onnx(): a file beside the module that it was exported from, quantizer by quantizer and end to end."""

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

import qcompiler
from qcompiler import torch_compat
from qcompiler.compile import QuantizedModule
from qcompiler.deploy.blocks import find_edges
from qcompiler.deploy.trace import ExportError, Traced, trace
from qcompiler.passes.graph import InputKind
from qcompiler.passes.plan import Site
from qcompiler.passes.tables import Table, to_text
from qcompiler.runtime import ops
from qcompiler.runtime.formats import FloatFormat


@dataclasses.dataclass(frozen=True)
class SiteCheck:
    """One quantizer: how its codes compare with those of PyTorch."""

    name: str
    elements: int
    #: codes that differ where both read the tensor that the file computed; the claim is 0
    wrong: int
    #: codes that differ where each reads its own tensor: the noise of the layers in front
    flipped: int


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify_onnx` found; `print(report)` shows it, quantizers in graph order."""

    sites: tuple[SiteCheck, ...]
    #: the largest difference of the outputs from PyTorch, relative to the largest output: onnxruntime with its
    #: optimizations, and without
    optimized: float
    plain: float
    #: the same between PyTorch in float32 and in float64: what float arithmetic alone does to this model
    spread: float

    @property
    def exact(self) -> bool:
        """True where every quantizer, fed the same input, gives the same codes."""
        return not any(site.wrong for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self) | {"exact": self.exact}

    def __str__(self) -> str:
        shares = [f"{site.flipped / max(site.elements, 1):.4%}" if site.flipped else "0" for site in self.sites]
        rows = [(s.name, f"{s.elements:,}", s.wrong, share) for s, share in zip(self.sites, shares, strict=True)]
        table = Table("Codes of ONNX beside those of PyTorch", ("quantizer", "codes", "wrong", "flipped"), rows)
        outputs = f"outputs: {self.plain:.2g} of the largest, {self.optimized:.2g} with optimizations"
        return to_text([table, outputs, f"PyTorch in float32 beside float64: {self.spread:.2g}"])


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
        inputs, kwargs: what the model is called with.

    Raises:
        ExportError: the file is not one of `export_onnx`, or has other quantizers than the module.
        OSError: the file cannot be read.
    """
    try:
        from qcompiler.deploy import run
    except ImportError as error:
        raise ExportError(f"verify: {error.name} is not installed; pip install 'qcompiler[onnx]'") from error
    path, options = Path(path), dict(kwargs or {})
    exported = run.sites(path)
    traced = trace(qmodel, inputs, options, None, frozen=False)
    sites = {site.name: site for site in traced.plan.sites}
    if sites.keys() != exported.keys():
        others = ", ".join(sorted(sites.keys() ^ exported.keys()))
        raise ExportError(f"verify: {path} has other quantizers than the module: {others}")
    own = _Observer(traced, qmodel.ranges()).codes(inputs, options)
    values = run.inner(path, [name for one in exported.values() for name in one["values"]], inputs, options)
    states = qmodel.ranges()
    checks = []
    for name, site in sites.items():
        found = [values[value] for value in exported[name]["values"]]
        found[-1] = _as_trained(found[-1], exported[name])
        expected = own[name] if len(found) == 1 else _codes(site, torch.from_numpy(found[0].copy()), states.get(name))
        wrong, flipped = (_differ(found[-1], codes, site) for codes in (expected, own[name]))
        checks.append(SiteCheck(name, own[name].numel(), wrong, flipped))
    expected_outputs = run.reference(qmodel, inputs, options)
    plain, optimized = (run.outputs(path, inputs, options, optimize=flag) for flag in (False, True))
    return VerifyReport(
        tuple(checks),
        optimized=run.difference(optimized, expected_outputs),
        plain=run.difference(plain, expected_outputs),
        spread=_spread(qmodel, inputs, options, expected_outputs),
    )


class _Observer(Interpreter):
    """Runs the traced graph as it stands before weights and ranges were frozen, and keeps the codes of every site."""

    def __init__(self, traced: Traced, states: Mapping[str, Tensor]) -> None:
        super().__init__(traced.frozen.program.graph_module)
        self.traced, self.states = traced, states
        self.found: dict[str, Tensor] = {}

    def codes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Site → codes."""
        given = iter(torch_compat.leaves((args, dict(kwargs))))
        held = {**self.traced.frozen.program.state_dict, **self.traced.frozen.program.constants}
        values = []
        for fact in self.traced.inputs:
            known = self.states if fact.kind is InputKind.STATE else held
            values.append(next(given) if fact.kind is InputKind.INPUT else known[fact.name])
        with torch.no_grad():
            self.run(*values)
        return self.found

    def run_node(self, n: Node) -> Any:
        """Keeps what a quantizer returns."""
        result = super().run_node(n)
        if n.target is ops.QUANTIZE:
            self.found[str(n.args[6])] = result
        return result


def _codes(site: Site, x: Tensor, state: Tensor | None) -> Tensor:
    """What our runtime makes of the tensor that the file computed."""
    text, given = str(site.spec), (state, False, True) if state is not None else ()
    scale = ops.SCALE(x, text, site.layout, *given)
    point = ops.ZERO_POINT(x, scale, text, site.layout, *given) if site.spec.has_zero_point else None
    return cast(Tensor, ops.QUANTIZE(x, scale, point, None, text, site.layout, site.name))


def _differ(found: np.ndarray, expected: Tensor, site: Site) -> int:
    """The number of codes that differ; float codes as the levels that they stand for."""
    form = site.spec.format
    plain = expected.numpy()
    if isinstance(form, FloatFormat):
        plain = form.decode(expected).numpy()
        found = (
            form.decode(torch.from_numpy(found.view(np.uint8).copy())).numpy() if found.dtype.itemsize == 1 else found
        )
    found = _unblocked(found, plain.shape, site)
    same = found.astype(np.float64) == plain.astype(np.float64)
    return int((~(same | (np.isnan(found.astype(np.float64)) & np.isnan(plain.astype(np.float64))))).sum())


def _as_trained(found: np.ndarray, one: Mapping[str, Any]) -> np.ndarray:
    """The codes of a weight before the file's changes to them: a transposition, negated output channels."""
    if one["negated"]:
        found = found.copy()
        found[one["negated"]] = -found[one["negated"]]
    return found if one["order"] is None else found.transpose(np.argsort(one["order"]))


def _unblocked(found: np.ndarray, shape: Sequence[int], site: Site) -> np.ndarray:
    """Codes that lie block by block, in the shape of their tensor: parts of a split dimension are joined and cut."""
    if found.shape == tuple(shape):
        return found
    edges = find_edges(list(shape), site.layout, site.spec.block)
    left = iter(found.shape)
    joined = [next(left) * (next(left) if dim in edges.split else 1) for dim, _ in enumerate(edges.edges)]
    return found.reshape(joined)[tuple(slice(extent) for extent in edges.extents)].reshape(shape)


def _spread(
    qmodel: QuantizedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Sequence[np.ndarray]
) -> float:
    """The largest difference of PyTorch's own outputs between float32 and float64."""
    from qcompiler.deploy import run

    twin = qcompiler.compile(copy.deepcopy(qmodel._model).double(), qmodel.recipe, backend="eager")
    twin._store.load_state_dict(qmodel._store.state_dict())
    double = torch_compat.map_leaves(
        lambda one: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one, (args, dict(kwargs))
    )
    return run.difference(outputs, run.reference(twin, *double))
