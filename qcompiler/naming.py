"""Names that start at the model, whichever part of it Dynamo captures."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from torch import nn

from qcompiler.dynamo_compat import TracedFrame
from qcompiler.model_parts import Part, find_owner, find_parts
from qcompiler.passes.ir.frame import Frame, Positions, whole_model
from qcompiler.passes.ir.source_names import clean_path, parse_source
from qcompiler.passes.rules import Position

#: one part of the model: file, function and line, and the modules and parameters that its variables hold
FrameKey: TypeAlias = tuple[str, str, int, str]
#: the module path of each contraction of a forward of the whole model, in order; None: not to be had
Order: TypeAlias = Callable[[], Sequence[str] | None]


@dataclasses.dataclass(frozen=True)
class FrameNames:
    """The names of one captured graph."""

    key: FrameKey
    #: the module whose method was captured; empty for the model itself, and where no module is known
    root: str
    #: False if the graph is a part of the model
    is_whole: bool
    #: what the variables of the function hold of the model
    parts: tuple[Part, ...]
    modules: Mapping[int, str]
    tensors: Mapping[int, str]
    #: all names of modules, parameters and buffers
    paths: frozenset[str]
    scopes: Mapping[str, Mapping[str, Any]]

    def path(self, source: str) -> str:
        """Return the path in the model of a module that Dynamo found at `source`: `blocks.1.up`."""
        parsed = parse_source(source)
        if parsed is None:
            return source
        value = self.scopes.get(parsed.scope, {}).get(parsed.variable)
        found = []
        for index in range(len(parsed.steps) + 1):
            if id(value) in self.modules:
                found.append(".".join(filter(None, (self.modules[id(value)], *map(str, parsed.steps[index:])))))
            if index < len(parsed.steps):
                value = _step(value, parsed.steps[index])
        # an object in between may lead back to the model: `self.runner.model.layer`
        return next((path for path in found if path in self.paths), (*found, clean_path(source))[0])

    def tensor(self, source: str, tensor: Any) -> str:
        """Return the name of a parameter or buffer: from where Dynamo found it, or as the model knows the tensor."""
        path = self.path(source)
        known = self.tensors.get(id(tensor))
        return known if known is not None and path == clean_path(source) else path


#: of a graph that no model is known of: names start at its own variables
PLAIN: Final = FrameNames(("", "", 0, ""), "", True, (), {}, {}, frozenset(), {})


def _step(value: Any, step: str | int) -> Any:
    """Return an element or attribute of a value; None if there is none."""
    held = {**value._modules, **value._parameters, **value._buffers} if isinstance(value, nn.Module) else value
    try:
        return held[step] if isinstance(held, Mapping | Sequence) else getattr(value, str(step))  # type: ignore[index]
    except (LookupError, AttributeError, TypeError):
        return getattr(value, str(step), None)


def _all_names(model: nn.Module) -> set[str]:
    """Return the names of all modules, parameters and buffers; each name of what has several."""
    walks = (model.named_modules, model.named_parameters, model.named_buffers)
    return {name for walk in walks for name, _ in walk(remove_duplicate=False)}


class ModelNames:
    """The names of the parts of one model, over all its graphs.

    A layer that several graphs of one mode use has a name in each: `layer` in the graph that was captured first,
    `layer@2` in the second. Graphs of the same code and modules share the name: those of training and of evaluation,
    and one captured again for another signature.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        #: mode → name of a layer → the parts of the model that have contractions of it, with their numbers
        self._claims: dict[bool, dict[str, dict[FrameKey, int]]] = {True: {}, False: {}}
        #: mode → part → how many contractions of each module path it has
        self._counts: dict[bool, dict[FrameKey, Counter[str]]] = {True: {}, False: {}}

    def of(self, frame: TracedFrame | None) -> FrameNames:
        """Return the names of the graph that Dynamo is capturing; plain names without a model or a frame."""
        if frame is None:
            return PLAIN
        modules: dict[int, str] = {}
        tensors: dict[int, str] = {}
        paths: set[str] = set()
        if self.model is not None:
            modules = {id(module): name for name, module in self.model.named_modules()}
            held = (*self.model.named_parameters(), *self.model.named_buffers())
            tensors = {id(tensor): name for name, tensor in held}
            paths = _all_names(self.model)
        parts = find_parts(frame.locals, {**tensors, **modules})
        owner = find_owner(parts, frame.origin)
        is_whole = self.model is None or (owner is self.model and frame.is_outermost)
        key = (frame.file, frame.function, frame.line, ",".join(map(str, parts)))
        scopes = {"L": frame.locals, "G": frame.globals}
        root = modules.get(id(owner), "")
        return FrameNames(key, root, is_whole, tuple(parts), modules, tensors, frozenset(paths), scopes)

    def frame(self, names: FrameNames, order: Order, *, training: bool) -> Frame:
        """Return what the passes need to know of one graph; `order` is asked to place a part of the model."""

        def claim(layer: str) -> int:
            claims = self._claims[training].setdefault(layer, {})
            if names.key not in claims:
                other = self._claims[not training].get(layer, {}).get(names.key, 1)
                claims[names.key] = next(
                    n for n in itertools.chain([other], itertools.count(1)) if n not in claims.values()
                )
            return claims[names.key]

        def positions(paths: Sequence[str]) -> list[frozenset[Position]]:
            found = order()
            return whole_model(paths) if found is None else self._place(names.key, paths, found, self._counts[training])

        placed: Positions = whole_model if names.is_whole else positions
        return Frame(claim, placed)

    def release(self, function: tuple[str, str, int], *, training: bool) -> None:
        """Give the names of a function (file, name, line) that is not captured any more to the parts in its place."""
        held: list[dict[FrameKey, Any]] = [*self._claims[training].values(), self._counts[training]]
        for parts in held:
            for key in [key for key in parts if key[:3] == function]:
                del parts[key]

    @staticmethod
    def _place(
        key: FrameKey, paths: Sequence[str], order: Sequence[str], counts: dict[FrameKey, Counter[str]]
    ) -> list[frozenset[Position]]:
        """Return the positions of the contractions of a part, from the order of all those of the model."""
        earlier: Counter[str] = Counter()
        for other, found_there in counts.items():
            if other == key:
                break
            earlier.update(found_there)
        counts[key] = Counter(paths)
        ends = ((Position.FIRST, (order[0], 1)), (Position.LAST, (order[-1], order.count(order[-1])))) if order else ()
        placed = []
        for path in paths:
            earlier[path] += 1
            found = {position for position, end in ends if end == (path, earlier[path])}
            placed.append(frozenset(found or {Position.INNER}))
        return placed
