"""qcompiler: quantized training by rewriting the joint forward and backward graph of any PyTorch model."""

from qcompiler.compile import CompileError, QuantizedModule, compile  # noqa: A004
from qcompiler.passes.plan import QuantPlan
from qcompiler.recipe import Recipe, RecipeError
from qcompiler.recipes import RECIPES

__version__ = "0.1.0"
__all__ = ["RECIPES", "CompileError", "QuantPlan", "QuantizedModule", "Recipe", "RecipeError", "compile"]
