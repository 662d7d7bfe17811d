"""qcompiler: quantized training by rewriting the joint forward and backward graph of any PyTorch model."""

from qcompiler.capture import CaptureError
from qcompiler.compile import CompileError, QuantizedModule, compile  # noqa: A004
from qcompiler.debug import DebugError, Debugger, debug
from qcompiler.files import save
from qcompiler.passes.plan import QuantPlan
from qcompiler.passes.rules import Position, Role, Rule
from qcompiler.recipe import Recipe, RecipeError
from qcompiler.recipes import RECIPES
from qcompiler.runtime.spec import QuantSpec, parse_spec
from qcompiler.schedule import SCHEDULES, Schedule, deviation_rate
from qcompiler.search import search
from qcompiler.sensitivity import SearchError

__version__ = "0.1.0"
__all__ = [
    "RECIPES",
    "SCHEDULES",
    "CaptureError",
    "CompileError",
    "DebugError",
    "Debugger",
    "Position",
    "QuantPlan",
    "QuantSpec",
    "QuantizedModule",
    "Recipe",
    "RecipeError",
    "Role",
    "Rule",
    "Schedule",
    "SearchError",
    "compile",
    "debug",
    "deviation_rate",
    "parse_spec",
    "save",
    "search",
]
