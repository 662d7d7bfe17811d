"""Errors as one line: of a file its path and the reason, of foreign code the type of the exception too."""

from typing import Final

from qcompiler.runtime.errors import QCompilerError

#: characters; torch says the essential first, and may say a page
_LENGTH: Final = 400


class CompileError(QCompilerError):
    """The model cannot be compiled as asked; names the given and a valid value."""


class CaptureError(QCompilerError):
    """The training graph could not be captured; names the obstacle in the model."""


def is_own(error: BaseException) -> bool:
    """Return True for exceptions of this project, whose messages name the fault themselves."""
    return isinstance(error, QCompilerError)


def in_short(error: BaseException) -> str:
    """Return one line: `PATH: reason` for a file, the message of our own exceptions, `Type: message` for all others."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if is_own(error) or (isinstance(error, OSError) and text):
        return text
    name = type(error).__name__
    return f"{name}: {text if len(text) <= _LENGTH else text[:_LENGTH] + ' …'}" if text else name
