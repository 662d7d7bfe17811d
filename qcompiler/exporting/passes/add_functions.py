"""The local functions that nodes call become part of the model."""

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.exporting.exported_model import ExportedModel
from qcompiler.exporting.functions import DOMAIN, FUNCTIONS


@dataclasses.dataclass(frozen=True)
class AddFunctions:
    """Adds each function of ours that a node calls, and the opset of our domain if there is one.

    A function names the version of the operators that the model has: onnx asks for one version in all of a file.
    """

    name: ClassVar[str] = "add-functions"

    def __call__(self, subject: ExportedModel) -> int:
        """Return the number of functions."""
        model, opsets = subject.model, subject.graph.opset_imports
        called = {node.op_type for node in subject.graph if node.domain == DOMAIN}
        missing = [name for name in sorted(called) if (DOMAIN, name, "") not in model.functions]
        for name in missing:
            function: ir.Function = ir.from_proto(FUNCTIONS[name].to_function_proto())
            function.opset_imports[""] = opsets[""]
            model.functions[DOMAIN, name, ""] = function
        opsets.pop(DOMAIN, None)
        if called:
            opsets[DOMAIN] = 1
        return len(missing)
