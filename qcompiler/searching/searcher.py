"""search(): bits and blocks for each layer under a budget, for the least error of the gradients."""

import copy
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler import recipes
from qcompiler.module import QuantizedModule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.figures import to_decibels
from qcompiler.searching.allocation import Allocation, allocate_budget, walk_frontier
from qcompiler.searching.search_file import SearchFile, checksum_values
from qcompiler.searching.sensitivity import Loss, SearchError, Sensitivity, change_spec
from qcompiler.tables import Table, to_text

FORMATS: Final = ("int2", "int3", "int4", "int5", "int6", "int8")
BLOCKS: Final = ("b2c8o4i4", "b4c16o8i8")


def search(
    model: nn.Module,
    data: Iterable[Any],
    *,
    budget: float,
    unit: str = "bits",
    recipe: str | os.PathLike[str] | Recipe = "hyperblock-int4",
    formats: Sequence[str] = FORMATS,
    blocks: Sequence[str] = BLOCKS,
    loss: Loss | None = None,
    batches: int = 4,
    file: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Recipe:
    """Return a recipe with a format and a block for each layer and role, within a budget, for the least error.

    For every batch and every quantizer of `recipe` one step runs with this quantizer alone at work. The error of the
    site is the mean over weights of ‖g − g_float‖²/‖g_float‖². The error of another spec follows from the losses of the
    contractions that read the quantizer, on the recorded tensors. Errors are taken to add up, so the best choice is a
    line of Lagrange. The model itself is not changed: a copy runs.

    Args:
        model: in the state in which the gradients are to be kept; a network at initialization tells little.
        data: batches, of one shape.
        budget: the limit for all tensors that are quantized.
        unit: of the budget. "bits": on average over all elements, scales included. "bytes": the weights and activations
            that forward keeps for backward; gradients then cost nothing.
        recipe: the quantized operands, with scale rule and rounding; operands in float stay so.
        formats: to choose from.
        blocks: to choose from.
        loss: (model, batch) → loss; by default the cross entropy of batches (inputs, labels).
        batches: the number of batches in use, from the first; each takes a step for each quantizer.
        file: the file of measurements (JSON, replaced as a whole); an interrupted search goes on from there.
        quiet: without progress bar and without the table of the frontier.

    Raises:
        SearchError: nothing to search, an unknown unit, a budget below the cheapest choice, formats and blocks that do
            not go together with the recipe, or a file of another search.
    """
    _check_arguments(model, data, budget, unit)
    base, given = recipes.get(recipe), list(itertools.islice(data, batches))
    if not given:
        raise SearchError("search: data: got no batch; valid: at least one")
    specs = _list_candidates(base, formats, blocks)
    store = SearchFile(file, {"recipe": base.to_yaml(), "specs": specs, "model": checksum_values(model.state_dict())})
    found = Sensitivity(copy.deepcopy(model), base, specs, loss or _cross_entropy, unit)
    found.measure(given, store, quiet, budget)
    slots = found.choices(store)
    chosen = allocate_budget(slots, budget * found.scale)
    assert chosen is not None  # measure() has refused such a budget
    if not quiet:
        print(to_text([_make_table(walk_frontier(slots), chosen, found.scale, unit)]))
    return found.recipe(chosen, f"{base.name}-{budget:g}-{unit}")


def _check_arguments(model: object, data: object, budget: object, unit: str) -> None:
    """Raise SearchError for an argument of another kind."""
    if not isinstance(model, nn.Module) or isinstance(model, QuantizedModule):
        raise SearchError(
            f"search: model: got {type(model).__name__}; valid: a torch.nn.Module that is not compiled yet"
        )
    if unit not in ("bits", "bytes"):
        raise SearchError(f"search: unit: got {unit!r}; valid: bits, bytes")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise SearchError(f"search: budget: got {budget!r}; valid: a finite number above 0")
    if not isinstance(data, Iterable):
        raise SearchError(f"search: data: got {type(data).__name__}; valid: an iterable of batches")


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        given = type(batch).__name__
        raise SearchError(f"search: loss: a batch is a {given}; valid: a pair (inputs, labels), or a loss=… of yours")
    return F.cross_entropy(model(batch[0]), batch[1])


def _list_candidates(base: Recipe, formats: Sequence[str], blocks: Sequence[str]) -> list[tuple[str, str]]:
    """Return every (format, block); those that contradict a rule of the recipe are an error."""
    if base.has_state:
        raise SearchError(f"search: recipe {base.name!r} keeps ranges between steps; valid: one without")
    pairs = list(itertools.product(formats, blocks))
    rules = [rule.spec for rule in base.rules if rule.spec is not None]
    if not pairs or not rules:
        raise SearchError("search: nothing to choose; valid: formats, blocks, and a recipe that quantizes")
    for spec, (form, block) in itertools.product(rules, pairs):
        try:
            change_spec(spec, form, block)
        except ValueError as error:
            raise SearchError(f"search: {form} with block {block} for {spec}: {error}") from None
    return pairs


def _make_table(points: Sequence[Allocation], chosen: Allocation, scale: float, unit: str) -> Table:
    """Return some points of the frontier, and the chosen one."""
    step = max(1, len(points) // 12)
    shown = sorted([*points[::step], points[-1], chosen], key=lambda point: point.cost)
    marks = {point: "chosen" if point is chosen else "" for point in shown}
    rows = [(f"{point.cost / scale:.4g}", f"{to_decibels(point.error):.2f}", mark) for point, mark in marks.items()]
    return Table("Frontier", (unit, "expected error of gradients, dB", ""), rows)
