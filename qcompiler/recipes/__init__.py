"""Recipes: which tensors are quantized, and how; named ones, of papers and for deployment; schedules."""

from qcompiler.recipes.named import RECIPES, get

__all__ = ["RECIPES", "get"]
