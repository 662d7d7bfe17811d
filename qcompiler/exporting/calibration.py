"""Ranges of the present tensor, frozen for a file: from the smallest to the largest value on data of the user."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.compiler.plan import Site
from qcompiler.exporting.inputs import describe_inputs
from qcompiler.exporting.observe import Observer
from qcompiler.exporting.trace import ExportError, Traced
from qcompiler.passes.frozen.calibrate_ranges import Calibrated
from qcompiler.passes.rules import Role
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import TENSOR
from qcompiler.runtime.ranges.present import Current
from qcompiler.runtime.spec import Scale


def measure_ranges(
    traced: Traced, states: Mapping[str, Tensor], examples: Iterable[Any], as_call: Callable[[Any], dict[str, Any]]
) -> dict[str, Calibrated]:
    """Return site → the range over all examples, for every site with the range of the present tensor (`current`).

    Args:
        traced: not frozen, with the dimensions free that differ between examples.
        states: the ranges of the past.
        examples: the material of calls for `as_call`.
        as_call: example → the inputs by name, in the order of the trace.

    Raises:
        ExportError: no example; one that is no call, or does not fit the model; no site has such a range; a site has
            one range for each block; a tensor holds NaN or infinity.
    """
    sites = _find_measured(traced.plan.sites)
    ends = _Ends(traced, states)
    for index, example in enumerate(examples):
        try:
            named = as_call(example)
        except TypeError as error:
            raise ExportError(f"export: calibration: example {index}: {error}") from error
        try:
            ends.codes((), named)
        except (RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ExportError(
                f"export: calibration: example {index}: the model does not run on {describe_inputs(named)}: {reason}; "
                "valid: the sizes of example_inputs, but for free dimensions"
            ) from error
    missing = sites.keys() - ends.seen.keys()
    if missing:
        raise ExportError(
            f"export: calibration: no example has numbers for {min(missing)}; valid: at least one example"
        )
    return {name: _make_range(site, ends.seen[name]) for name, site in sites.items()}


def _find_measured(sites: Iterable[Site]) -> dict[str, Site]:
    """Return the sites with the range of the present tensor, weights aside."""
    found = {
        site.name: site
        for site in sites
        if isinstance(site.spec.range, Current) and site.role is not Role.WEIGHT and site.spec.scale is not Scale.ONE
    }
    for name, site in found.items():
        if site.spec.block.per_sample() != TENSOR.per_sample():
            raise ExportError(
                f"export: calibration: {name} has a range for each block {site.spec.block}, which follows its tensor; "
                "valid: calibration=None, or a recipe with ranges over whole tensors"
            )
    if not found:
        raise ExportError(
            "export: calibration: no activation has the range of the present tensor; valid: calibration=None"
        )
    return found


class _Ends(Observer):
    """Keeps the smallest and the largest value of every site, over all calls."""

    def __init__(self, traced: Traced, states: Mapping[str, Tensor]) -> None:
        super().__init__(traced, states)
        self.seen: dict[str, Tensor] = {}

    def see(self, site: str, x: Tensor, codes: Tensor) -> None:
        """Widen the ends of a site."""
        if x.numel():
            own = torch.stack(x.float().aminmax())
            old = self.seen.get(site, own)
            self.seen[site] = torch.stack([torch.minimum(old[0], own[0]), torch.maximum(old[1], own[1])])


def _make_range(site: Site, ends: Tensor) -> Calibrated:
    """Return the scale that a tensor with these ends has."""
    if not ends.isfinite().all():
        raise ExportError(f"export: calibration: {site.name} reads what is not finite: {ends.tolist()}")
    text = str(dataclasses.replace(site.spec, block=TENSOR))
    x = ends.reshape(-1, *[1] * (len(site.layout) - 1))
    scale = ops.SCALE(x, text, site.layout)
    point = ops.ZERO_POINT(x, scale, text, site.layout) if site.spec.has_zero_point else None
    lowest, highest = ends.tolist()
    return Calibrated(lowest, highest, scale, point)
