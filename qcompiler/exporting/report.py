"""The report of an export: counts, bytes, differences, and notes on everything a reader of the file should know."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompiler.compiler.plan import Kept, QuantPlan
from qcompiler.module import QuantizedModule
from qcompiler.passes.ir.site_name import get_role
from qcompiler.passes.rules import Role
from qcompiler.recipes.recipe import Recipe
from qcompiler.tables import Table, to_text


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """The facts of the written file; `print(report)` shows a text."""

    path: Path
    #: quantizers of the plan of evaluation mode, and in the file, by kind: weight, static, dynamic; also folded, if
    #: there are some: of the factors of a weight, such as B in W + B·A, whose codes are part of the weight's
    trained: int
    exported: Mapping[str, int]
    #: operands of contractions that stay in float, and why
    kept: tuple[Kept, ...]
    #: bytes of the file and of the tensors beside; bytes of the parameters and buffers of the model
    file_bytes: int
    float_bytes: int
    #: the largest difference from the outputs of PyTorch on the example, relative to the largest output
    difference: float
    #: the operators of onnxruntime's optimized graph that compute on integers, with their counts
    integer_kernels: Mapping[str, int]
    notes: tuple[str, ...] = ()
    #: site → the smallest and the largest value on the calibration data, which its range was fixed to
    calibrated: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        return to_text([Table(f"ONNX: {self.path.name}", ("what", "value"), [*self._list_rows()])])

    def _list_rows(self) -> Iterator[tuple[str, str]]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.exported.items() if count)
        yield "quantizers trained", str(self.trained)
        yield "quantizers exported", f"{sum(self.exported.values())} ({kinds or 'none'})"
        yield "file", f"{self.file_bytes:,} bytes, {self.file_bytes / max(self.float_bytes, 1):.2f} of float"
        yield "largest difference", f"{self.difference:.2g} of the largest output"
        kernels = ", ".join(f"{count} {name}" for name, count in self.integer_kernels.items())
        yield "integer kernels of onnxruntime", kernels or "none"
        yield from (("calibrated", f"{site}: {low:.4g} to {high:.4g}") for site, (low, high) in self.calibrated.items())
        yield from (("in float", f"{kept.name} in {kept.consumer}: {kept.reason}") for kept in self.kept)
        yield from (("note", note) for note in self.notes)


def list_approximate(kernels: Mapping[str, int], reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield the note about operators that onnxruntime computes with other numbers than the file says."""
    for name, why in reasons.items():
        if count := kernels.get(name):
            yield f"onnxruntime makes {count} operators {name}, which {why}"


def list_float_biases(layers: Sequence[str], recipe: Recipe) -> Iterator[str]:
    """Yield the note about layers between known scales whose bias is no whole number of their unit."""
    if layers:
        why = "the recipe does not ask for integer_biases"
        if recipe.integer_biases:
            why = "a batch norm there is not folded or multiplies by 0, or a bias needs more than 32 bits"
        yield (
            f"added in float behind {len(layers)} layers, so that no kernel rounds them: "
            f"the biases of {_join_first(layers)}; {why}"
        )


def list_signed(weights: Sequence[str]) -> Iterator[str]:
    """Yield the note about weights whose codes were asked to be int8."""
    if weights:
        yield (
            f"codes of {len(weights)} weights are int8, as asked ({_join_first(weights)}): x86 CPUs without VNNI "
            "saturate their sums at 16 bits, so codes behind them can be wrong there"
        )


def list_unread(qmodel: QuantizedModule, plan: QuantPlan) -> Iterator[str]:
    """Yield the note about ranges that no quantizer of eval reads, and none of the gradients, as far as known."""
    gradients = any(
        rule.spec is not None and rule.spec.range.has_state and rule.role in (None, Role.GRADIENT)
        for rule in qmodel.recipe.rules
    )
    held = [name for name in qmodel.ranges() if not (gradients and get_role(name) is Role.GRADIENT)]
    others = sorted(set(held) - {site.name for site in plan.sites if site.spec.range.has_state})
    if others:
        yield (
            f"{len(others)} of {len(qmodel.ranges())} ranges belong to no quantizer of recipe {qmodel.recipe.name!r} "
            f"and were not used, as if of another recipe or model: {_join_first(others)}"
        )


def _join_first(names: Sequence[str]) -> str:
    """Return the first three names."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
