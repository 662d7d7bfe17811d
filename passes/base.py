"""Passes, and the way in which passes run one after another."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Generic, Protocol, TypeVar

from qcompiler.runtime.errors import QCompilerError

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Pass(Protocol[T_contra]):
    """A rewrite of one subject in place: verified subject in, verified subject out. The fields are the options.

    A subject is a joint graph, the two halves of one, a frozen graph, or an ONNX model.
    """

    name: ClassVar[str]

    def __call__(self, subject: T_contra, /) -> int:
        """Rewrites the subject; returns the number of changed places. Run again at once, the pass returns 0."""
        ...


class PassError(QCompilerError):
    """A pass failed, or left an illegal subject; names the pass and all that ran before."""


@dataclasses.dataclass(frozen=True)
class Pipeline(Generic[T]):
    """Passes in order, and the check that holds behind every one."""

    passes: tuple[Pass[T], ...]
    #: cleans a subject and raises if the subject breaks a rule
    verify: Callable[[T], None]

    def __call__(self, subject: T, observe: Callable[[str, int, T], None] | None = None) -> None:
        """Runs every pass; after each one the subject is verified and handed to `observe(name, changes, subject)`.

        Raises:
            PassError: a pass raised, or left a subject that breaks a rule.
        """
        done: list[str] = []
        for step in self.passes:
            try:
                changes = step(subject)
                self.verify(subject)
            except Exception as error:
                before = ", ".join(done) or "none"
                reason = str(error).partition("\n")[0]  # torch.fx appends the whole graph
                raise PassError(f"pass {step.name} failed (ran before it: {before}): {reason}") from error
            done.append(step.name)
            if observe is not None:
                observe(step.name, changes, subject)
