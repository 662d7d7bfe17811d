"""qcompiler: quantized training by rewriting the joint forward and backward graph of any PyTorch model."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.compile import QuantizedModule, compile  # noqa: A004
    from qcompiler.debugging.debugger import DebugError, Debugger, debug
    from qcompiler.errors import CaptureError, CompileError
    from qcompiler.exporting.export import export_onnx
    from qcompiler.exporting.report import ExportReport
    from qcompiler.exporting.trace import ExportError
    from qcompiler.exporting.verify import VerifyReport, verify_onnx
    from qcompiler.files import save
    from qcompiler.passes.ir.plan import QuantPlan
    from qcompiler.passes.rules import Position, Role, Rule
    from qcompiler.recipe import Recipe, RecipeError
    from qcompiler.recipes import RECIPES
    from qcompiler.runtime.spec import QuantSpec, parse_spec
    from qcompiler.schedule import SCHEDULES, Schedule, deviation_rate
    from qcompiler.searching.searcher import search
    from qcompiler.searching.sensitivity import SearchError
    from qcompiler.sight.drawing import DrawError, draw
    from qcompiler.sight.explanation import Explanation, explain
    from qcompiler.sight.stages import StageError

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
    "StageError",
    "VerifyReport",
    "compile",
    "debug",
    "deviation_rate",
    "draw",
    "explain",
    "export_onnx",
    "parse_spec",
    "save",
    "search",
    "verify_onnx",
]

#: module → what it exports; imported at first use, since torch takes seconds and `qcompiler --help` needs none of it
_EXPORTS = {
    "qcompiler.compile": ("QuantizedModule", "compile"),
    "qcompiler.errors": ("CaptureError", "CompileError"),
    "qcompiler.debugging.debugger": ("DebugError", "Debugger", "debug"),
    "qcompiler.sight.drawing": ("DrawError", "draw"),
    "qcompiler.sight.explanation": ("Explanation", "explain"),
    "qcompiler.files": ("save",),
    "qcompiler.exporting.export": ("export_onnx",),
    "qcompiler.exporting.report": ("ExportReport",),
    "qcompiler.exporting.trace": ("ExportError",),
    "qcompiler.exporting.verify": ("VerifyReport", "verify_onnx"),
    "qcompiler.passes.ir.plan": ("QuantPlan",),
    "qcompiler.passes.rules": ("Position", "Role", "Rule"),
    "qcompiler.recipe": ("Recipe", "RecipeError"),
    "qcompiler.recipes": ("RECIPES",),
    "qcompiler.runtime.spec": ("QuantSpec", "parse_spec"),
    "qcompiler.schedule": ("SCHEDULES", "Schedule", "deviation_rate"),
    "qcompiler.searching.searcher": ("search",),
    "qcompiler.searching.sensitivity": ("SearchError",),
    "qcompiler.sight.stages": ("StageError",),
}


class _Package(ModuleType):
    """The package: imports a public name at its first use, and keeps `compile` the function.

    Python sets the module of that name on the package whenever something imports it.
    """

    def __getattr__(self, name: str) -> Any:
        for module, names in _EXPORTS.items():
            if name in names:
                setattr(self, name, getattr(importlib.import_module(module), name))
                return vars(self)[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in __all__:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        modules = [name for name in vars(self) if f"{__name__}.{name}" in sys.modules]
        return sorted({*__all__, *modules, *(name for name in vars(self) if name.startswith("__"))})


sys.modules[__name__].__class__ = _Package
