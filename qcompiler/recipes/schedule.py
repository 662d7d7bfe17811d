"""Changes in the course of a training: which recipe runs when, and the learning rate of DSGC."""

import dataclasses
import math
import os
from typing import Final

from qcompiler import recipes
from qcompiler.recipes.block_floating import IDENTITY
from qcompiler.recipes.block_papers import HBFP4, HBFP6, NVFP4
from qcompiler.recipes.recipe import Recipe, RecipeError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Recipes in the order of a training: `qmodel.use(schedule.at(epoch, epochs))` at the head of each epoch.

    A schedule keeps no state. So a resumed run asks for the present epoch, and nothing of the schedule is in a
    checkpoint. Every change costs one capture at most, since `use` keeps all captures.

    A stage is (start, recipe). The start is a whole number of steps, from the end if negative, as in indexing, or a
    float below 1, that share of all steps. A step is whatever the loop counts: an epoch, or a batch.

    Example: `Schedule(((0, "hbfp4"), (-1, "hbfp6")))` has 6 bits in the last epoch, `(0.9, "hbfp6")` in the last tenth.

    Raises:
        RecipeError: no stage, a first one that does not start at 0, a start that is neither of the two, or a recipe
            that is unknown or not valid. Names and files are looked up once, here.
    """

    #: (start, name, path or value of a recipe); afterwards the recipes themselves
    stages: tuple[tuple[float, str | os.PathLike[str] | Recipe], ...]
    #: how the schedule is called in reports
    name: str = ""
    #: the paper behind the schedule
    source: str = ""

    def __post_init__(self) -> None:
        valid = 'valid: a tuple of (start, recipe), the first one from 0, such as ((0, "hbfp4"), (-1, "hbfp6"))'
        if not isinstance(self.stages, tuple) or not self.stages:
            raise RecipeError(f"schedule: stages: got {self.stages!r}; {valid}")
        if any(not isinstance(stage, tuple) or len(stage) != 2 for stage in self.stages) or self.stages[0][0] != 0:
            raise RecipeError(f"schedule: stages: got {self.stages!r}; {valid}")
        for start, _ in self.stages:
            share = isinstance(start, float) and 0 <= start < 1
            if isinstance(start, bool) or not (isinstance(start, int) or share):
                number = "a whole number of steps, or a float from 0 to below 1, the share of all steps"
                raise RecipeError(f"schedule: start: got {start!r}; valid: {number}")
        found = tuple((start, recipes.get(recipe)) for start, recipe in self.stages)
        object.__setattr__(self, "stages", found)

    def at(self, step: int, steps: int) -> Recipe:
        """Return the recipe of one step: of the last stage, in order, that has begun.

        Args:
            step: counted from 0.
            steps: of the whole training.

        Raises:
            ValueError: not 0 ≤ step < steps.
        """
        if not 0 <= step < steps:
            raise ValueError(f"schedule: got step {step} of {steps}; valid: 0 to {steps - 1}, counted from 0")
        return recipes.get([recipe for start, recipe in self.stages if step >= _first_step(start, steps)][-1])


def _first_step(start: float, steps: int) -> int:
    """Return the first step of a stage."""
    if isinstance(start, float):
        return math.ceil(round(start * steps, 6))  # 0.07 of 100 is 7.000000000000001
    return int(start) if start >= 0 else max(0, steps + int(start))


def deviation_rate(deviation: float, decay: float = 20.0, least: float = 0.1) -> float:
    """Return the number that DSGC multiplies the learning rate by, so that steps along a bent gradient are short.

    max(e^(−decay·deviation), least), with the deviation 1 − cos(g, ĝ) of a gradient from its quantized self: the second
    number of a range `cosine` in `qmodel.ranges()`, as of the latest search (F. Zhu et al.: Towards Unified INT8
    Training for Convolutional Neural Network, CVPR 2020, §3.4). 1 for NaN, which stands there until a gradient other
    than zero has been searched.

    Raises:
        ValueError: the deviation is not from 0 to 2.
    """
    if math.isnan(deviation):
        return 1.0
    if not 0 <= deviation <= 2:
        raise ValueError(f"deviation_rate: deviation: got {deviation!r}; valid: 0 to 2, one minus a cosine")
    return max(math.exp(-decay * deviation), least)


#: HBFP4 with HBFP6 in the first and the last layer; the last epoch in HBFP6 throughout.
ACCURACY_BOOSTER: Final = Schedule(((0, HBFP4), (-1, HBFP6)), name="accuracy-booster", source=HBFP4.source)
#: NVFP4, and float for the last 18 % of the steps, which closes most of the gap of the loss.
NVFP4_THEN_FLOAT: Final = Schedule(((0, NVFP4), (0.82, IDENTITY)), name="nvfp4-then-float", source=NVFP4.source)

#: name → schedule
SCHEDULES: Final[dict[str, Schedule]] = {schedule.name: schedule for schedule in (ACCURACY_BOOSTER, NVFP4_THEN_FLOAT)}
