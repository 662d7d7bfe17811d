"""Which choice for each of many slots gives the least error within a budget: the frontier of Lagrange."""

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to fill a slot."""

    name: str
    cost: float
    error: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One choice for each slot, in order, and the sums."""

    choices: tuple[Choice, ...]

    @property
    def cost(self) -> float:
        """Σ cost."""
        return sum(choice.cost for choice in self.choices)

    @property
    def error(self) -> float:
        """Σ error."""
        return sum(choice.error for choice in self.choices)

    def with_choice(self, slot: int, choice: Choice) -> "Allocation":
        """Return the same with another choice for one slot."""
        return Allocation((*self.choices[:slot], choice, *self.choices[slot + 1 :]))


def find_hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull of error over cost, the cheapest first; error falls on the way."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.error)):
        if found and choice.error >= found[-1].error:
            continue
        while found and choice.cost == found[-1].cost:
            found.pop()
        while len(found) > 1 and _compute_gain(found[-2], found[-1]) <= _compute_gain(found[-2], choice):
            found.pop()
        found.append(choice)
    return found


def _compute_gain(cheap: Choice, dear: Choice) -> float:
    """Error saved for each unit of cost."""
    return (cheap.error - dear.error) / (dear.cost - cheap.cost)


def walk_frontier(slots: Sequence[Sequence[Choice]]) -> list[Allocation]:
    """From the cheapest choices to the best ones, a step at a time, the step that saves most for its cost first.

    Each allocation has the least error that the cost allows (the sum of the hulls of all slots is the hull of the sum).

    Raises:
        ValueError: a slot without a choice.
    """
    if not all(slots):
        raise ValueError("frontier: a slot has no choice; valid: at least one for each")
    hulls = [find_hull(choices) for choices in slots]
    steps = [
        (_compute_gain(cheap, dear), slot, dear)
        for slot, choices in enumerate(hulls)
        for cheap, dear in itertools.pairwise(choices)
    ]
    found = [Allocation(tuple(choices[0] for choices in hulls))]
    for _, slot, dear in sorted(steps, key=lambda step: -step[0]):  # stable: the steps of one slot stay in order
        found.append(found[-1].with_choice(slot, dear))
    return found


def allocate_budget(slots: Sequence[Sequence[Choice]], budget: float) -> Allocation | None:
    """Return the last allocation of the frontier within a budget, the rest spent on the best steps that still fit.

    None if the cheapest choices cost more. The error is above the least possible by less than one step of one slot.
    """
    fitting = [allocation for allocation in walk_frontier(slots) if allocation.cost <= budget]
    if not fitting:
        return None
    best = fitting[-1]
    while better := [one for one in _list_neighbors(best, slots) if one.cost <= budget]:
        best = min(better, key=lambda one: one.error)
    return best


def _list_neighbors(allocation: Allocation, slots: Sequence[Sequence[Choice]]) -> list[Allocation]:
    """Allocations with another choice for one slot, and less error."""
    return [
        allocation.with_choice(slot, choice)
        for slot, choices in enumerate(slots)
        for choice in choices
        if choice.error < allocation.choices[slot].error
    ]
