"""Arguments of operator calls by the names of the schema. Nobody else counts positions of our operators."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg


def get_argument(node: Node, name: str) -> Any:
    """Return the argument `name` of a call; the default of the schema if the call does not give it."""
    place, default = _find_parameter(node, name)
    if place < len(node.args):
        return node.args[place]
    return node.kwargs.get(name, default)


def has_argument(node: Node, name: str) -> bool:
    """Return True if the call gives the argument `name`, and not None."""
    return get_argument(node, name) is not None


def set_arguments(node: Node, **given: Any) -> None:
    """Give a call other arguments, by name; the others stay as they are."""
    now = {name: get_argument(node, name) for name in _list_names(node.target)[: len(node.args)]}
    node.args = pack_arguments(node.target, {**now, **given})


def pack_arguments(target: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    """Return arguments by position, up to the last one that is given and not None; defaults fill the gaps."""
    parameters = target._schema.arguments
    unknown = given.keys() - {parameter.name for parameter in parameters}
    if unknown:
        raise ValueError(f"{target}: no argument {', '.join(sorted(unknown))}; valid: {', '.join(_list_names(target))}")
    packed = [given.get(p.name, p.default_value if p.has_default_value() else None) for p in parameters]
    last = max((i for i, p in enumerate(parameters) if given.get(p.name) is not None), default=-1)
    return tuple(packed[: last + 1])


def iterate_arguments(node: Node) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every argument that a call gives by position."""
    yield from zip(_list_names(node.target), node.args, strict=False)


def list_arguments(node: Node) -> list[Any]:
    """Return the arguments of a node without their nesting; a node that stands there twice is listed twice."""
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


def map_arguments(node: Node, replace: Callable[[Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, by position and by keyword, with something else for each node among them."""
    args, kwargs = map_arg((node.args, node.kwargs), replace)
    return args, kwargs


def run_call(node: Node, replace: Callable[[Node], Any], **given: Any) -> Any:
    """Return what a call gives for other values of its nodes; `given` are further arguments by name."""
    args, kwargs = map_arguments(node, replace)
    places = {name: place for place, name in enumerate(_list_names(node.target))} if given else {}
    by_place = {places[name]: value for name, value in given.items()}
    args = tuple(by_place.get(place, argument) for place, argument in enumerate(args))
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def replace_arguments(node: Node, replaced: Mapping[int, Node]) -> None:
    """Put other nodes at places of `list_arguments`."""
    places = itertools.count()
    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda arg: replaced.get(next(places), arg))


def _list_names(target: Any) -> list[str]:
    return [parameter.name for parameter in target._schema.arguments]


def _find_parameter(node: Node, name: str) -> tuple[int, Any]:
    """Return position and default of a parameter."""
    target: Any = node.target
    for place, parameter in enumerate(target._schema.arguments):
        if parameter.name == name:
            return place, parameter.default_value if parameter.has_default_value() else None
    raise ValueError(f"{target}: no argument {name}; valid: {', '.join(_list_names(target))}")
