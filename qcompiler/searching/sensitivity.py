"""How much of the error of gradients each quantizer makes: measured one by one, scaled to other specs."""

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from qcompiler.debugging.recording import Recording
from qcompiler.debugging.shadow import WatchedCompiler
from qcompiler.debugging.site_rules import site_rules
from qcompiler.module import compile  # noqa: A004
from qcompiler.passes.ir.site_name import get_role
from qcompiler.passes.joint.choose_blocks import legal_spec
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.errors import QCompilerError
from qcompiler.runtime.figures import compute_ratio, measure_agreement, simulate_quantizer
from qcompiler.runtime.numbers.blocks import parse_block, view_blocks
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.numbers.packing import per_byte
from qcompiler.runtime.ranges.present import Current
from qcompiler.runtime.spec import QuantSpec
from qcompiler.searching.allocation import Allocation, Choice
from qcompiler.searching.search_file import SearchFile, checksum_values
from qcompiler.searching.solo import Solo, SoloCompiler

#: pairs of a format and a block
Specs: TypeAlias = Sequence[tuple[str, str]]
#: (model, batch) → loss
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]


class SearchError(QCompilerError):
    """The search cannot be done as asked; names the given and a valid value."""


def change_spec(spec: QuantSpec, form: str, block: str) -> QuantSpec:
    """Return the spec with another format and block, and the tensor's own range.

    Raises:
        ValueError: the parts do not go together.
    """
    return dataclasses.replace(spec, format=parse_format(form), block=parse_block(block), range=Current())


class Sensitivity:
    """The cost of each quantizer of a recipe for the gradients of a model, and the choices that follow."""

    def __init__(self, model: nn.Module, base: Recipe, specs: Specs, loss: Loss, unit: str) -> None:
        self.base, self.specs, self.loss, self.unit = base, specs, loss, unit
        self.model = model.train()
        self.recording, self.solo = Recording(), Solo()
        #: by the names in the store
        self.batches: list[str] = []
        #: one watches contractions, in the other one site is at work; both are captured once
        self.watched, self.alone = (compile(self.model, base, backend="eager") for _ in range(2))

    def measure(self, batches: Sequence[Any], store: SearchFile, quiet: bool, budget: float) -> None:
        """Fills the store: for every batch the error of each site alone, and the losses by each spec.

        Raises:
            SearchError: in front of the first measurement, if no choice is legal or none within the budget.
        """
        with contextlib.ExitStack() as stack:
            watched = stack.enter_context(self.watched.training_through(WatchedCompiler))
            stack.enter_context(watched.relay.to(self.recording))
            self.solo = stack.enter_context(self.alone.training_through(SoloCompiler)).solo
            bar = stack.enter_context(Progress(console=Console(stderr=True), disable=quiet, transient=True))
            task = bar.add_task("search", total=None)
            for number, batch in enumerate(batches):
                name, sites = f"{number}:{checksum_values(batch)}", self.record(number, batch)
                self.refuse_below(budget)
                self.batches.append(name)
                bar.update(task, total=len(batches) * len(sites))
                missing = [site for site in sites if not store.has(name, site)]
                bar.advance(task, len(sites) - len(missing))
                exact = self.gradients(number, batch, None) if missing else {}
                for site in missing:
                    error = gradient_error(self.gradients(number, batch, site), exact)
                    if not math.isfinite(error):
                        raise SearchError(f"search: batch {number}: the gradients with {site} alone are not finite")
                    store.put(name, site, error, self.losses(site))
                    bar.advance(task)

    def refuse_below(self, budget: float) -> None:
        """Raises SearchError if the cheapest legal choices take more; costs follow from the shapes alone."""
        least = 0.0
        for sites in self.slots():
            legal = [pair for pair in self.specs if all(self.is_legal(site, *pair) for site in sites)]
            if not legal:
                raise SearchError(f"search: {sites[0]}: no choice of format and block is legal; valid: longer blocks")
            least += min(sum(self.cost(site, *pair) for site in sites) for pair in legal)
        if budget * self.scale < least:
            valid = f"at least {least / self.scale:.4g} {self.unit}"
            raise SearchError(f"search: budget: got {budget:g} {self.unit}; valid: {valid}")

    def is_legal(self, site: str, form: str, block: str) -> bool:
        """Return True if every reader of a site can take the spec."""
        spec = change_spec(self.recording.held[site].spec, form, block)
        return all(legal_spec(spec, operand) is not None for _, operand in self.recording.readers(site))

    def record(self, number: int, batch: Any) -> list[str]:
        """Watch one step, with tensors and contractions; return the sites."""
        self.recording.clear()
        self.step(self.watched, number, batch)
        if not self.recording.tallies:
            raise SearchError(f"search: recipe {self.base.name!r} quantizes nothing in this model")
        if self.recording.not_finite is not None:
            raise SearchError(f"search: batch {number}: float is not finite either ({self.recording.not_finite})")
        return list(self.recording.tallies)

    def gradients(self, number: int, batch: Any, site: str | None) -> dict[str, Tensor]:
        """Return the gradients of all weights with one site at work; None: in float."""
        self.solo.site = site
        self.step(self.alone, number, batch)
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None and p.ndim > 1}

    def step(self, qmodel: nn.Module, number: int, batch: Any) -> None:
        """Forward and backward, with the same random numbers for the same batch."""
        self.model.zero_grad(set_to_none=True)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            self.loss(qmodel, batch).backward()

    def losses(self, site: str) -> dict[str, float | None]:
        """Return spec → the losses of the contractions of a site; "" is the present one; None: illegal for a reader."""
        held = self.recording.held[site].spec
        found = {"": self.loss_of(site, held)}
        for form, block in self.specs:
            found[f"{form}:{block}"] = self.loss_of(site, change_spec(held, form, block))
        return found

    def loss_of(self, site: str, spec: QuantSpec) -> float | None:
        """Σ over contractions of ‖error‖²/‖contraction‖²; of a site that no contraction reads the noise."""
        readers = self.recording.readers(site)
        if any(legal_spec(spec, operand) is None for _, operand in readers):
            return None
        losses = [p.try_spec(operand.arg, spec).whole for p, operand in readers if not p.fact.is_bias]
        if losses and get_role(site) is not Role.OUTPUT:
            return sum(losses)
        held = self.recording.held[site]
        seen = simulate_quantizer(held.x, spec, held.layout).tally
        return sum(losses) + compute_ratio(seen.noise, seen.signal)

    def slots(self) -> list[list[str]]:
        """Sites that get one spec: those that one rule speaks of, and so on along shared quantizers."""
        groups: list[tuple[set[Rule], list[str]]] = []
        for site in self.recording.tallies:
            rules = set(site_rules(self.recording, self.base, site, lambda spec: spec))
            near = [group for group in groups if group[0] & rules]
            groups = [group for group in groups if group not in near]
            sites = [other for _, others in near for other in others]
            groups.append((rules.union(*(keys for keys, _ in near)), [*sites, site]))
        return [sites for _, sites in groups]

    def choices(self, store: SearchFile) -> list[list[Choice]]:
        """Return for each slot the specs that are legal for all sites of the slot, with cost and error."""
        names = [f"{form}:{block}" for form, block in self.specs]
        tables = [[self.choice(sites, name, store) for name in names] for sites in self.slots()]
        return [[choice for choice in table if choice is not None] for table in tables]

    def choice(self, sites: Sequence[str], name: str, store: SearchFile) -> Choice | None:
        """Return one spec for a slot; the error is measured for the present spec, and scaled by the losses."""
        form, block = name.split(":")
        error = 0.0
        for batch, site in itertools.product(self.batches, sites):
            alone, losses = store.found[batch][site]
            own, other = losses[""], losses[name]
            if other is None:
                return None
            error += alone * (compute_ratio(other, own) if own else 0.0) / len(self.batches)
        return Choice(name, sum(self.cost(site, form, block) for site in sites), error)

    def cost(self, site: str, form: str, block: str) -> float:
        """Return bits of codes and scales; or bytes that are saved for backward, 0 for unsaved tensors."""
        held = self.recording.held[site]
        spec = change_spec(held.spec, form, block)
        blocks = math.prod(view_blocks(tuple(held.x.shape), held.layout, spec.block).counts)
        words = spec.scale.dtype.itemsize + (spec.format.dtype.itemsize if spec.has_zero_point else 0)
        if self.unit == "bits":
            return held.x.numel() * spec.format.bits + 8 * words * blocks
        backward = any(product.fact.gradient_of is not None for product, _ in self.recording.readers(site))
        codes = math.ceil(held.x.numel() / per_byte(spec.format.bits)) * spec.format.dtype.itemsize
        # gradients are made in backward; parameters are alive there, and their codes are made again
        is_saved = backward and get_role(site) not in (Role.GRADIENT, Role.WEIGHT)
        return float(codes + words * blocks) if is_saved else 0.0

    @property
    def scale(self) -> float:
        """Cost for each unit of the budget: the elements of all sites, or 1."""
        return sum(held.x.numel() for held in self.recording.held.values()) if self.unit == "bits" else 1.0

    def recipe(self, chosen: Allocation, name: str) -> Recipe:
        """Return the chosen specs as rules in front of the rules of the recipe."""
        rules: list[Rule] = []
        for sites, choice in zip(self.slots(), chosen.choices, strict=True):
            form, block = choice.name.split(":")
            for site in sites:
                rules += site_rules(self.recording, self.base, site, lambda spec: change_spec(spec, form, block))  # noqa: B023
        return Recipe(name=name, rules=(*dict.fromkeys(rules), *self.base.rules))


def gradient_error(own: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Return the mean over weights of ‖g − f‖²/‖f‖²; a weight without gradient in float does not count."""
    errors = [measure_agreement(own[name], exact[name]).error for name in exact if bool(exact[name].any())]
    return statistics.fmean(errors) if errors else 0.0
