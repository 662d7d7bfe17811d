"""The names that Dynamo gives to values, taken apart."""

import ast
import dataclasses
import functools
import re
from typing import Final

_INDEX: Final = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d+)"""
_ROOT: Final = re.compile(rf"(?:getattr\()*([LG])\[({_INDEX})\]")
#: `._modules['key']`, `[0]`, the `, 'key')` of a getattr; or `.name`, up to the next one
_STEP: Final = re.compile(
    rf"(?:(?:\._(?:modules|parameters|buffers))?\[|, )({_INDEX})[\])]|\.((?:(?!(?:\[|, ){_INDEX}[\])])[^.])+)"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """The place at which Dynamo has found a value: a variable of the frame, and the keys and attributes from there."""

    #: L for a local variable, G for a global one
    scope: str
    variable: str
    steps: tuple[str | int, ...]


@functools.lru_cache(maxsize=10_000)
def parse_source(text: str) -> Source | None:
    """Return the parts of `L['self']._modules['layer1']._modules['0']` or `L['self'].layer1[0]`; None without a root.

    Dynamo writes keys as `repr` does, and leaves out brackets and quotes of some.
    """
    root = _ROOT.match(text)
    if root is None:
        return None
    steps = (match.groups() for match in _STEP.finditer(text, root.end()))
    variable = str(ast.literal_eval(root.group(2)))
    return Source(root.group(1), variable, tuple(ast.literal_eval(key or f"'{name}'") for key, name in steps))


def clean_path(source: str) -> str:
    """`L['self']._modules['layer1']._modules['0']` → `layer1.0`, as in `named_modules()`; without a root unchanged."""
    parsed = parse_source(source)
    return source if parsed is None else ".".join(map(str, parsed.steps))
