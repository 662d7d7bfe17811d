"""Arguments of operator calls by the names of the schema. Nobody else counts positions of our operators."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg


def get_argument(node: Node, name: str) -> Any:
    """Return the argument `name` of a call; the default of the schema if the call gives none."""
    try:
        place, default = _list_places(node.target)[name]
    except KeyError:
        raise _refuse_name(node.target, name) from None
    args = node.args
    return args[place] if place < len(args) else node.kwargs.get(name, default)


def get_arguments(node: Node, *names: str) -> tuple[Any, ...]:
    """Return several arguments of a call, in the order of the names."""
    return tuple([get_argument(node, name) for name in names])


def has_argument(node: Node, name: str) -> bool:
    """Return True if the call gives the argument `name`, and not None."""
    return get_argument(node, name) is not None


def set_arguments(node: Node, **given: Any) -> None:
    """Give a call other arguments, by name; the others stay."""
    node.args = pack_arguments(node.target, {**dict(iterate_arguments(node)), **given})


def pack_arguments(target: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    """Return arguments by position, up to the last one that is given and not None; defaults fill the gaps."""
    defaults = _list_defaults(target)
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise _refuse_name(target, ", ".join(sorted(unknown)))
    last = max((place for place, name in enumerate(defaults) if given.get(name) is not None), default=-1)
    return tuple(given.get(name, default) for name, default in itertools.islice(defaults.items(), last + 1))


def iterate_arguments(node: Node) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every argument that a call gives by position."""
    yield from zip(_list_defaults(node.target), node.args, strict=False)


def list_arguments(node: Node) -> list[Any]:
    """Return the arguments of a node without nesting; a node that stands there twice is listed twice."""
    leaves: list[Any] = []
    map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves


def number_arguments(node: Node) -> Iterator[tuple[int, Node]]:
    """Yield place and node of every argument; those in lists and keywords are counted on behind the others."""
    extra = len(node.args)
    for place, argument in enumerate(node.args):
        if isinstance(argument, Node):
            yield place, argument
    inside = [leaf for argument in node.args if isinstance(argument, list | tuple) for leaf in argument]
    for source in (*inside, *node.kwargs.values()):
        if isinstance(source, Node):
            yield extra, source
            extra += 1


def run_call(node: Node, replace: Callable[[Node], Any], **given: Any) -> Any:
    """Return the result of a call for other values of the nodes; `given` are further arguments by name."""
    args, kwargs = map_arg((node.args, node.kwargs), replace)
    if given:
        args = tuple(given.get(name, arg) for name, arg in zip(_list_defaults(node.target), args, strict=False))
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def replace_arguments(node: Node, replaced: Mapping[int, Node]) -> None:
    """Put other nodes at places of `list_arguments`."""
    places = itertools.count()
    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda arg: replaced.get(next(places), arg))


@functools.cache
def _list_defaults(target: Any) -> Mapping[str, Any]:
    """Return name → default of every parameter, in order; None without one. Torch lists a schema anew each time."""
    return {p.name: p.default_value if p.has_default_value() else None for p in target._schema.arguments}


#: id of an operator → the operator, and name → place and default of every parameter. By id, since torch computes the
#: hash of an operator in Python, and checks of graphs ask for half a million arguments
_PLACES: Final[dict[int, tuple[Any, Mapping[str, tuple[int, Any]]]]] = {}


def _list_places(target: Any) -> Mapping[str, tuple[int, Any]]:
    """Return name → place and default of every parameter."""
    known = _PLACES.get(id(target))
    if known is None:
        places = {name: (place, default) for place, (name, default) in enumerate(_list_defaults(target).items())}
        known = _PLACES[id(target)] = (target, places)
    return known[1]


def _refuse_name(target: Any, name: str) -> ValueError:
    return ValueError(f"{target}: no argument {name}; valid: {', '.join(_list_defaults(target))}")
