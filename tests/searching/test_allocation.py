"""The frontier against all combinations, tried one by one."""

import itertools
import random

import pytest

from qcompiler.searching.allocation import Allocation, Choice, allocate_budget, find_hull, walk_frontier


def slots(seed, count=4, width=4):
    """Random choices; some cost or err the same."""
    draw = random.Random(seed)
    return [
        [Choice(f"{slot}.{i}", draw.randint(1, 9), draw.randint(0, 30) / 8) for i in range(draw.randint(1, width))]
        for slot in range(count)
    ]


def best(choices, budget):
    """The least error within a budget, by brute force; None where nothing fits."""
    every = (Allocation(combination) for combination in itertools.product(*choices))
    return min((one.error for one in every if one.cost <= budget), default=None)


@pytest.mark.parametrize("seed", range(40))
def test_every_point_of_the_frontier_is_optimal(seed):
    points = walk_frontier(slots(seed))
    for point in points:
        assert point.error == best(slots(seed), point.cost)
    for cheap, dear in itertools.pairwise(points):
        assert cheap.cost < dear.cost
        assert cheap.error > dear.error
    assert points[-1].error == best(slots(seed), 1e9)


@pytest.mark.parametrize("seed", range(40))
def test_allocations_fit_and_are_near_the_best(seed):
    """Within the budget, and above the best by less than the frontier's next step saves."""
    choices = slots(seed)
    points = walk_frontier(choices)
    for budget in range(40):
        found, limit = allocate_budget(choices, budget), best(choices, budget)
        if found is None:
            assert budget < points[0].cost
            assert limit is None
            continue
        assert found.cost <= budget
        after = [point for point in points if point.cost > budget]
        assert limit <= found.error
        assert found.error < limit + points[len(points) - len(after) - 1].error - after[0].error if after else True
        assert found.error == limit or after


def test_hull():
    """Above the line between its neighbors a choice is left out; of equal costs the better one stays."""
    cheap, above, middle, dear = (Choice("", *pair) for pair in ((1, 8), (2, 7), (3, 2), (5, 0)))
    assert find_hull([dear, above, cheap, middle]) == [cheap, middle, dear]
    assert find_hull([cheap, Choice("", 1, 5), Choice("", 2, 5)]) == [Choice("", 1, 5)]
    assert find_hull([cheap]) == [cheap]


def test_a_slot_without_choices():
    with pytest.raises(ValueError, match="a slot has no choice"):
        walk_frontier([[Choice("", 1, 1)], []])
