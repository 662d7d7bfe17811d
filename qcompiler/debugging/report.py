"""The report of the debugger: tables for people, JSON for programs, scalars for TensorBoard."""

import dataclasses
import json
import math
import os
from typing import TYPE_CHECKING, Any

from qcompiler.runtime.figures import Agreement, Tally
from qcompiler.runtime.spec import QuantSpec
from qcompiler.tables import Table, to_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: the columns of `SiteFigures.cells`
_SITE_HEAD = ("quantizer", "spec", "harm", "SQNR, dB", "clipped", "underflow", "zeros", "exponents", "range", "codes")


@dataclasses.dataclass(frozen=True)
class SiteFigures:
    """One quantizer over all watched steps."""

    name: str
    spec: QuantSpec
    harm: float
    tally: Tally

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the history as lists, a number a step."""
        seen = self.tally
        figures = ("sqnr", "clipped", "underflowed", "zeros", "not_finite", "exponent_use")
        exponents = [seen.lowest_exponent, seen.highest_exponent]
        return {
            "name": self.name,
            "spec": str(self.spec),
            "harm": self.harm,
            **{name: getattr(seen, name) for name in figures},
            "scale_exponents": exponents,
            "history": [dataclasses.asdict(span) for span in seen.history],
        }

    def to_figures(self) -> dict[str, Any]:
        """The figures of the picture, as JSON values: all of `to_dict`, and of the history the last step alone."""
        found = self.to_dict()
        last = found.pop("history")[-1:]
        del found["name"], found["spec"]
        ends = {f"{end}_of_last_step": value for step in last for end, value in step.items() if end != "sqnr"}
        return {key: to_plain(value) for key, value in (found | ends).items()}

    def cells(self) -> tuple[str, ...]:
        """Return the row of a table."""
        seen, last = self.tally, self.tally.history[-1:]
        spans = [(span.low, span.high) for span in last] + [(span.range_low, span.range_high) for span in last]
        shares = [f"{100 * share:.1f} %" for share in (seen.clipped, seen.underflowed, seen.zeros)]
        ends = [f"{low:.3g} … {high:.3g}" for low, high in spans] or ["", ""]
        figures = f"{self.harm:.3g}", f"{seen.sqnr:.1f}", *shares, f"{100 * seen.exponent_use:.0f} %"
        return self.name, str(self.spec), *figures, *ends


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """One contraction, or the gradient of one parameter, against float."""

    name: str
    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "cosine": self.agreement.cosine, "error_db": self.agreement.error_db}

    def cells(self) -> tuple[str, ...]:
        """Return the row of a table."""
        return self.name, f"{self.agreement.cosine:.4f}", f"{self.agreement.error_db:.1f}"


@dataclasses.dataclass(frozen=True)
class DebugReport:
    """Figures of some training steps. `print(report)` shows tables, the most harmful site first."""

    recipe: str
    steps: int
    #: the most harmful first
    sites: tuple[SiteFigures, ...]
    #: results of contractions, in the order of the run: forward, then backward
    layers: tuple[LayerFigures, ...]
    #: gradients of parameters
    gradients: tuple[LayerFigures, ...]
    #: the remedy for the worst site, or why there is none
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, NaN and infinities unchanged."""
        return {
            "recipe": self.recipe,
            "steps": self.steps,
            "sites": [site.to_dict() for site in self.sites],
            "layers": [layer.to_dict() for layer in self.layers],
            "gradients": [gradient.to_dict() for gradient in self.gradients],
            "advice": self.advice,
        }

    def to_json(self) -> str:
        """Return the figures as JSON; numbers that JSON lacks are the texts "nan", "inf" and "-inf"."""
        return json.dumps(to_plain(self.to_dict()), indent=1, allow_nan=False, ensure_ascii=False)

    def to_tensorboard(self, writer: "SummaryWriter | str | os.PathLike[str]", step: int = 0) -> None:
        """Writes a scalar a site (harm, sqnr, clipped, underflowed), a layer and a parameter (cosine, error).

        Args:
            writer: a SummaryWriter, which stays open, or the folder of a new one.
            step: the place of the last step on the axis.

        Raises:
            ImportError: TensorBoard is not installed.
        """
        if isinstance(writer, str | os.PathLike):
            with _make_writer(writer) as own:
                self._write(own, step)
        else:
            self._write(writer, step)

    def _write(self, writer: "SummaryWriter", step: int) -> None:
        for site in self.sites:
            for name in ("sqnr", "clipped", "underflowed", "zeros"):
                writer.add_scalar(f"quantizer/{name}/{site.name}", getattr(site.tally, name), step)
            writer.add_scalar(f"quantizer/harm/{site.name}", site.harm, step)
        for kind, rows in (("layer", self.layers), ("gradient", self.gradients)):
            for row in rows:
                writer.add_scalar(f"{kind}/cosine/{row.name}", row.agreement.cosine, step)
                writer.add_scalar(f"{kind}/error_db/{row.name}", row.agreement.error_db, step)

    def __str__(self) -> str:
        head, steps = (
            ("result", "cosine", "error, dB"),
            f"{self.recipe}, {self.steps} step{'s' if self.steps != 1 else ''}",
        )
        layers, gradients = ([row.cells() for row in rows] for rows in (self.layers, self.gradients))
        cells, parted = [site.cells() for site in self.sites], {"quantizer": ".", "spec": ":"}
        quantizers = Table(f"Quantizers of {steps}", _SITE_HEAD, cells, parted)
        tables = [
            Table("Against float", head, layers, {"result": "."}),
            Table("Gradients of parameters against float", head, gradients, {"result": "."}),
        ]
        return to_text([quantizers, *tables, self.advice])


def _make_writer(folder: "str | os.PathLike[str]") -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("to_tensorboard: TensorBoard is missing; pip install 'qcompiler[tensorboard]'") from error
    return SummaryWriter(os.fspath(folder))


def to_plain(value: Any) -> Any:
    """Return the value in a form for JSON: NaN and infinities are the texts "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
