"""qcompiler: quantized training by rewriting the joint forward and backward graph of any PyTorch model."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.compiler.plan import QuantPlan
    from qcompiler.compiler.stages import StageError
    from qcompiler.debugging.debugger import DebugError, Debugger, debug
    from qcompiler.drawing.drawing import DrawError, draw
    from qcompiler.drawing.explanation import Explanation, explain
    from qcompiler.errors import CaptureError, CompileError
    from qcompiler.exporting.export import export_onnx
    from qcompiler.exporting.report import ExportReport
    from qcompiler.exporting.stages import ExportStage, export_stages
    from qcompiler.exporting.trace import ExportError
    from qcompiler.exporting.verify import VerifyReport, verify_onnx
    from qcompiler.files import save
    from qcompiler.module import QuantizedModule, compile  # noqa: A004
    from qcompiler.passes.rules import Position, Role, Rule
    from qcompiler.recipes import RECIPES
    from qcompiler.recipes.recipe import Recipe, RecipeError
    from qcompiler.recipes.schedule import SCHEDULES, Schedule, deviation_rate
    from qcompiler.runtime.errors import QCompilerError
    from qcompiler.runtime.spec import QuantSpec, parse_spec
    from qcompiler.searching.searcher import search
    from qcompiler.searching.sensitivity import SearchError

__version__ = "0.1.0"
__all__ = [
    "RECIPES",
    "SCHEDULES",
    "CaptureError",
    "CompileError",
    "DebugError",
    "Debugger",
    "DrawError",
    "Explanation",
    "ExportError",
    "ExportReport",
    "ExportStage",
    "Position",
    "QCompilerError",
    "QuantPlan",
    "QuantSpec",
    "QuantizedModule",
    "Recipe",
    "RecipeError",
    "Role",
    "Rule",
    "Schedule",
    "SearchError",
    "StageError",
    "VerifyReport",
    "compile",
    "debug",
    "deviation_rate",
    "draw",
    "explain",
    "export_onnx",
    "export_stages",
    "parse_spec",
    "save",
    "search",
    "verify_onnx",
]

#: module → the exported names; imported at first use, since torch takes seconds and `qcompiler --help` needs none of it
_EXPORTS = {
    "qcompiler.module": ("QuantizedModule", "compile"),
    "qcompiler.errors": ("CaptureError", "CompileError"),
    "qcompiler.debugging.debugger": ("DebugError", "Debugger", "debug"),
    "qcompiler.drawing.drawing": ("DrawError", "draw"),
    "qcompiler.drawing.explanation": ("Explanation", "explain"),
    "qcompiler.files": ("save",),
    "qcompiler.exporting.export": ("export_onnx",),
    "qcompiler.exporting.report": ("ExportReport",),
    "qcompiler.exporting.stages": ("ExportStage", "export_stages"),
    "qcompiler.exporting.trace": ("ExportError",),
    "qcompiler.exporting.verify": ("VerifyReport", "verify_onnx"),
    "qcompiler.compiler.plan": ("QuantPlan",),
    "qcompiler.passes.rules": ("Position", "Role", "Rule"),
    "qcompiler.recipes.recipe": ("Recipe", "RecipeError"),
    "qcompiler.recipes": ("RECIPES",),
    "qcompiler.runtime.errors": ("QCompilerError",),
    "qcompiler.runtime.spec": ("QuantSpec", "parse_spec"),
    "qcompiler.recipes.schedule": ("SCHEDULES", "Schedule", "deviation_rate"),
    "qcompiler.searching.searcher": ("search",),
    "qcompiler.searching.sensitivity": ("SearchError",),
    "qcompiler.compiler.stages": ("StageError",),
}


_HOMES = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    modules = [name for name in globals() if f"{__name__}.{name}" in sys.modules]
    return sorted({*__all__, *modules, *(name for name in globals() if name.startswith("__"))})
