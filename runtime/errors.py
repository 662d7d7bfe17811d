"""The base of all errors of the project."""


class QCompilerError(Exception):
    """Something cannot be done as asked; the message names the given and a valid value."""
