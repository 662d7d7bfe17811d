"""What a pass is, and how passes run one after another."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol

from torch.fx import GraphModule

from qcompiler.passes.ir.edit import finish
from qcompiler.passes.ir.verify import verify


class Pass(Protocol):
    """A rewrite of one graph in place: verified graph in, verified graph out. Its fields are its options."""

    name: ClassVar[str]

    def __call__(self, module: GraphModule) -> int:
        """Rewrites the graph; returns the number of places it changed. Run again at once, it returns 0."""
        ...


class PassError(Exception):
    """A pass failed, or left an illegal graph; names the pass and those that ran before it."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in order. After each one the graph is cleaned, verified and handed to `observe(name, changes, module)`."""

    passes: tuple[Pass, ...]

    def __call__(self, module: GraphModule, observe: Callable[[str, int, GraphModule], None] | None = None) -> None:
        """Runs every pass.

        Raises:
            PassError: a pass raised, or the graph after it breaks a rule of passes/verify.py.
        """
        done: list[str] = []
        for step in self.passes:
            try:
                changes = step(module)
                finish(module)
                verify(module)
            except Exception as error:
                before = ", ".join(done) or "none"
                reason = str(error).partition("\n")[0]  # torch.fx appends the whole graph
                raise PassError(f"pass {step.name} failed (ran before it: {before}): {reason}") from error
            done.append(step.name)
            if observe is not None:
                observe(step.name, changes, module)
