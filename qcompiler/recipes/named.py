"""The named recipes in one table, and `get`."""

import os
from typing import Final

from qcompiler.passes.rules import did_you_mean
from qcompiler.recipes.block_floating import (
    CHANNELWISE_INT4,
    CHANNELWISE_INT8,
    HYPERBLOCK_INT4,
    HYPERBLOCK_INT8,
    HYPERBLOCK_INT8_WIDE,
    IDENTITY,
    TENSOR_INT4,
    TENSOR_INT8,
)
from qcompiler.recipes.block_papers import BLOCK_PAPERS
from qcompiler.recipes.deployment import DEPLOY_INT8
from qcompiler.recipes.float_papers import FLOAT_PAPERS
from qcompiler.recipes.hindsight import CURRENT_W8A8G8, IN_HINDSIGHT_W8A8G8, RUNNING_W8A8G8
from qcompiler.recipes.integer_papers import INTEGER_PAPERS
from qcompiler.recipes.large_gradients import (
    HYPERBLOCK_INT4_LARGE,
    INT4_DSGC,
    INT4_LARGE_GRADIENTS,
    INT4_LARGE_HINDSIGHT,
    INT4_MINMAX,
    INT5_LARGE_GRADIENTS,
    INT8_LARGE_GRADIENTS,
)
from qcompiler.recipes.low_bit_papers import LOW_BIT_PAPERS
from qcompiler.recipes.recipe import Recipe, RecipeError

#: name → recipe
RECIPES: Final[dict[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        IDENTITY,
        HYPERBLOCK_INT8,
        HYPERBLOCK_INT8_WIDE,
        HYPERBLOCK_INT4,
        CHANNELWISE_INT8,
        CHANNELWISE_INT4,
        TENSOR_INT8,
        TENSOR_INT4,
        IN_HINDSIGHT_W8A8G8,
        CURRENT_W8A8G8,
        RUNNING_W8A8G8,
        DEPLOY_INT8,
        INT4_LARGE_GRADIENTS,
        INT5_LARGE_GRADIENTS,
        INT8_LARGE_GRADIENTS,
        INT4_LARGE_HINDSIGHT,
        INT4_MINMAX,
        INT4_DSGC,
        HYPERBLOCK_INT4_LARGE,
        *INTEGER_PAPERS,
        *LOW_BIT_PAPERS,
        *FLOAT_PAPERS,
        *BLOCK_PAPERS,
    )
}


def get(recipe: str | os.PathLike[str] | Recipe) -> Recipe:
    """Return a recipe from its name, from the path of a file that ends in .yaml or .yml, or unchanged.

    Raises:
        RecipeError: no such name, or the file holds no valid recipe.
        OSError: the file cannot be read.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, os.PathLike):
        return Recipe.from_file(recipe)
    if not isinstance(recipe, str):
        raise RecipeError(f"recipe: got {recipe!r} ({type(recipe).__name__}); valid: a name, a path, or a Recipe")
    if recipe.endswith((".yaml", ".yml")):
        return Recipe.from_file(recipe)
    if recipe not in RECIPES:
        raise RecipeError(
            f"recipe: got {recipe!r}; valid: a name that `qcompiler recipes` lists, or the path of a .yaml file"
            f"{did_you_mean(recipe, RECIPES)}"
        )
    return RECIPES[recipe]
