"""Which modules and parameters of a model the variables of a function hold, and which lines of it a graph runs."""

import dataclasses
import enum
import functools
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

#: containers, methods and closures that are looked into, one inside the other
_DEPTH: Final = 4


class StepKind(enum.Enum):
    """How a value is reached from the one that holds it."""

    ATTRIBUTE = "attribute"
    INDEX = "index"
    KEY = "key"


@dataclasses.dataclass(frozen=True)
class Part:
    """A module, parameter or buffer of the model, and the place at which a function finds the object."""

    variable: str
    steps: tuple[tuple[StepKind, Any], ...]
    value: nn.Module | Tensor
    #: its name in the model; empty for the model itself
    path: str

    @property
    def place(self) -> str:
        """The place at which the function finds the object: `old.__self__`."""
        steps = (f".{step}" if kind is StepKind.ATTRIBUTE else f"[{step!r}]" for kind, step in self.steps)
        return f"{self.variable}{''.join(steps)}"

    def __str__(self) -> str:
        """Return `old.__self__=blocks.1`."""
        return f"{self.place}={self.path}"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The lines of a function that one graph runs, from a graph break to the next one."""

    #: file, name and line of the whole function
    function: tuple[str, str, int]
    #: the parts of the model in the arguments of the function
    held: Mapping[str, str]
    #: the line of the graph break before it, and of the one behind it; None at the ends of the function
    start: int | None = None
    end: int | None = None

    def is_beside(self, other: "Stretch") -> bool:
        """Return True for two stretches of one function, called with the same modules and parameters."""
        same = all(other.held.get(argument, path) == path for argument, path in self.held.items())
        return self.function == other.function and same

    def replaces(self, other: "Stretch") -> bool:
        """Return True if this stretch runs over the graph break that another one begins at."""
        if other.start is None or not self.is_beside(other):
            return False
        return (self.start is None or self.start < other.start) and (self.end is None or other.start < self.end)


def find_stretch(
    code: types.CodeType, parts: Sequence[Part], start: int | None = None, end: int | None = None
) -> Stretch:
    """Return the stretch of a function with the code, whose variables hold the parts."""
    kinds = (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS)
    count = code.co_argcount + code.co_kwonlyargcount + sum(bool(code.co_flags & kind) for kind in kinds)
    arguments = {*code.co_varnames[:count], *code.co_freevars}
    held = {part.place: part.path for part in parts if part.variable in arguments}
    return Stretch((code.co_filename, code.co_name, code.co_firstlineno), held, start, end)


def find_parts(variables: Mapping[str, Any], names: Mapping[int, str]) -> list[Part]:
    """Return the parts of a model in the variables, in order; tuples, methods and closures are looked into.

    Args:
        variables: the local variables of a function.
        names: id of a module, parameter or buffer → its name in the model.
    """
    seen: set[int] = set()
    return [
        Part(variable, steps, value, names[id(value)])
        for variable, held in variables.items()
        for steps, value in _walk(held, names, seen, _DEPTH)
    ]


def _walk(
    held: Any, names: Mapping[int, str], seen: set[int], depth: int
) -> Iterator[tuple[tuple[tuple[StepKind, Any], ...], Any]]:
    if id(held) in names:
        yield (), held
    elif depth and id(held) not in seen:
        seen.add(id(held))
        for step, inner in _elements(held):
            for steps, value in _walk(inner, names, seen, depth - 1):
                yield (step, *steps), value


def _elements(held: Any) -> list[tuple[tuple[StepKind, Any], Any]]:
    """Return the contents of a value of Python, and the way to each."""
    if isinstance(held, tuple | list):
        return [((StepKind.INDEX, index), value) for index, value in enumerate(held)]
    if type(held) is dict:
        return [((StepKind.KEY, key), value) for key, value in held.items() if isinstance(key, str | int)]
    return [((StepKind.ATTRIBUTE, name), value) for name, value in _attributes(held).items()]


def _attributes(held: Any) -> Mapping[str, Any]:
    """Return the attributes through which a method, a closure or an object of the user holds modules."""
    if isinstance(held, types.MethodType):
        return {"__self__": held.__self__}
    if isinstance(held, functools.partial):
        return {"func": held.func, "args": held.args, "keywords": held.keywords}
    if isinstance(held, types.FunctionType):
        return {"__closure__": held.__closure__}
    if isinstance(held, types.CellType):
        return {"cell_contents": held.cell_contents} if held != types.CellType() else {}
    is_foreign = isinstance(held, Tensor | type | types.ModuleType)
    own = getattr(held, "__dict__", None)
    return own if isinstance(own, dict) and not is_foreign else {}


def find_owner(parts: Sequence[Part], code: types.CodeType) -> nn.Module | None:
    """Return the module whose method a function is, whatever the name of its first argument; None without one.

    Of a model that is a layer of torch.nn itself, Dynamo captures a function around it, which knows the layer as `fn`.
    """
    for part in parts:
        named = not part.steps and part.variable in ("self", "fn")
        if isinstance(part.value, nn.Module) and (named or _is_method(code, part.value)):
            return part.value
    return None


def _is_method(code: types.CodeType, module: nn.Module) -> bool:
    """Return True if the code belongs to an attribute of the module or the class, inside of any decorators."""
    classes = [cls for cls in type(module).__mro__ if cls not in (nn.Module, object)]
    return any(_has_code(value, code, _DEPTH) for holder in (module, *classes) for value in vars(holder).values())


def _has_code(function: Any, code: types.CodeType, depth: int) -> bool:
    if isinstance(function, types.FunctionType):
        cells = [cell for cell in function.__closure__ or () if cell != types.CellType()]
        inner: tuple[Any, ...] = tuple(cell.cell_contents for cell in cells)
    elif isinstance(function, types.MethodType | classmethod | staticmethod):
        inner = (function.__func__,)
    else:
        inner = (function.func,) if isinstance(function, functools.partial) else ()
    found = getattr(function, "__code__", None) is code if isinstance(function, types.FunctionType) else False
    return found or (depth > 0 and any(_has_code(value, code, depth - 1) for value in inner))
