"""The base of all errors of the project."""


class QCompilerError(Exception):
    """Something cannot be done as asked; the message says what was given and what would be valid."""
