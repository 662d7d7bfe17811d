"""Names that start at the model, whichever part of it Dynamo captures."""

import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from torch import nn

from qcompiler.compiler.dynamo_compat import TracedFrame
from qcompiler.compiler.model_parts import Part, Stretch, find_owner, find_parts, find_stretch
from qcompiler.passes.ir.frame import Frame, Positions, whole_model
from qcompiler.passes.ir.source_names import clean_path, parse_source
from qcompiler.passes.rules import Position

#: one part of the model: file, function and line, and the modules and parameters that its variables hold
FrameKey: TypeAlias = tuple[str, str, int, str]
#: the name of Dynamo for the rest of a function behind a graph break
RESUMED: Final = "torch_dynamo_resume_in_"
#: the module path of each contraction of a forward of the whole model, in order; None: not to be had
Order: TypeAlias = Callable[[], Sequence[str] | None]


@dataclasses.dataclass(frozen=True)
class FrameNames:
    """The names of one captured graph."""

    key: FrameKey
    #: the lines of a function that the graph runs
    stretch: Stretch
    #: the module whose method was captured; empty for the model itself, and if no module is known
    root: str
    #: False if the graph is a part of the model
    is_whole: bool
    #: the parts of the model in the variables of the function
    parts: tuple[Part, ...]
    modules: Mapping[int, str]
    tensors: Mapping[int, str]
    #: all names of modules, parameters and buffers
    paths: frozenset[str]
    scopes: Mapping[str, Mapping[str, Any]]
    #: the class of the module whose method was captured; empty if no module is known
    owner: str = ""
    #: the paths that were asked for
    known: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> str:
        """What was captured: `layers.0: forward of Encoder at model.py:12`; `a graph` if nothing is known."""
        file, function, line, _ = self.key
        path, owner = (f"{self.root}: " if self.root else ""), (f" of {self.owner}" if self.owner else "")
        return f"{path}{function}{owner} at {file}:{line}" if file else "a graph"

    def forget(self) -> "FrameNames":
        """Return the same names without objects of the user: inputs, modules. Paths must have been asked for before."""
        return dataclasses.replace(self, parts=(), scopes={})

    def path(self, source: str) -> str:
        """Return the path in the model of a module that Dynamo found at `source`: `blocks.1.up`."""
        if source not in self.known:
            self.known[source] = self._find_path(source)
        return self.known[source]

    def _find_path(self, source: str) -> str:
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
        """Return the name of a parameter or buffer: from the source in Dynamo, or as the model knows the tensor."""
        path = self.path(source)
        known = self.tensors.get(id(tensor))
        return known if known is not None and path == clean_path(source) else path


#: of a graph that no model is known of: names start at its own variables
PLAIN: Final = FrameNames(("", "", 0, ""), Stretch(("", "", 0), {}), "", True, (), {}, {}, frozenset(), {})


def _step(value: Any, step: str | int) -> Any:
    """Return an element or attribute of a value; None if there is none."""
    held = {**value._modules, **value._parameters, **value._buffers} if isinstance(value, nn.Module) else value
    try:
        return held[step] if isinstance(held, Mapping | Sequence) else getattr(value, str(step))  # type: ignore[index]
    except (LookupError, AttributeError, TypeError):
        return getattr(value, str(step), None)


def _all_names(model: nn.Module) -> set[str]:
    """Return the names of all modules, parameters and buffers; each name of an object with several."""
    walks = (model.named_modules, model.named_parameters, model.named_buffers)
    return {name for walk in walks for name, _ in walk(remove_duplicate=False)}


class ModelNames:
    """The names of the parts of one model, over all its graphs.

    A layer that several graphs use has a name in each: `layer` in the graph that was captured first, `layer@2` in the
    second. Graphs of the same code and module, such as one captured again for another signature, share the name.

    Training and evaluation count apart, since one may have graph breaks that the other has not (gradient checkpoints
    that log, say), and evaluation reads the ranges of training. Code that both run has the same name in both.
    """

    def __init__(self, model: nn.Module | None) -> None:
        #: Dynamo keeps steps, which ask for names, until the model is gone
        self._model = None if model is None else weakref.ref(model)
        #: for training and evaluation: name of a layer → the parts that have had contractions of it, with their numbers
        self._claims: dict[bool, dict[str, dict[FrameKey, int]]] = {False: {}, True: {}}
        #: for training and evaluation: part → the layers of its latest capture
        self._layers: dict[bool, dict[FrameKey, set[str]]] = {False: {}, True: {}}
        #: for training and evaluation: part → how many contractions of each module path it has, in the order of capture
        self._counts: dict[bool, dict[FrameKey, Counter[str]]] = {False: {}, True: {}}
        #: part → the lines of a function that it runs
        self._stretches: dict[FrameKey, Stretch] = {}

    @property
    def model(self) -> nn.Module | None:
        """The model; None without one."""
        return None if self._model is None else self._model()

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
        stretch = find_stretch(frame.origin, parts, *frame.breaks)
        kind = "" if owner is None else type(owner).__name__
        return FrameNames(key, stretch, root, is_whole, tuple(parts), modules, tensors, frozenset(paths), scopes, kind)

    def frame(self, names: FrameNames, order: Order, *, frozen: bool = False) -> Frame:
        """Return the facts of one graph for the passes.

        Args:
            names: of the graph.
            order: is asked to place a part of the model.
            frozen: True for a graph of evaluation.
        """

        self._begin(names.key, names.stretch, frozen)

        key = names.key  # the names themselves hold inputs of the user

        def positions(paths: Sequence[str]) -> list[frozenset[Position]]:
            found = order()
            return whole_model(paths) if found is None else self._place(key, paths, found, frozen)

        placed: Positions = whole_model if names.is_whole else positions
        return Frame(lambda layer: self._claim(layer, key, frozen), placed)

    def _begin(self, key: FrameKey, stretch: Stretch, frozen: bool) -> None:
        """Begin the latest capture of a part; the rest behind a former graph break runs no more."""
        self._layers[frozen][key] = set()
        for part, other in self._stretches.items():
            if part != key and stretch.replaces(other):
                self._layers[frozen][part] = set()
                self._counts[frozen].pop(part, None)
        self._stretches[key] = stretch

    def _claim(self, layer: str, key: FrameKey, frozen: bool) -> int:
        """Return the number of a part among those that have contractions of a layer.

        If a graph break comes or goes, the parts of a function take over the numbers of layers from one another.
        """
        claims, others = (self._claims[mode].setdefault(layer, {}) for mode in (frozen, not frozen))
        layers = self._layers[frozen]
        layers.setdefault(key, set()).add(layer)
        if key not in claims:
            taken = {number for part, number in claims.items() if layer in layers.get(part, ())}
            held = [(part, number) for mode in (others, claims) for part, number in mode.items()]
            beside = [number for part, number in held if self._stretches[part].is_beside(self._stretches[key])]
            wanted = itertools.chain([others[key]] if key in others else [], beside, itertools.count(1))
            claims[key] = next(number for number in wanted if number not in taken)
        return claims[key]

    def release(self, function: tuple[str, str, int], *, frozen: bool = False) -> None:
        """Give the names of a function (file, name, line) that is not captured any more to the parts in its place."""
        for claims in self._claims[frozen].values():
            for key in [key for key in claims if key[:3] == function]:
                del claims[key]
        counts = self._counts[frozen]
        self._counts[frozen] = {key: count for key, count in counts.items() if key[:3] != function}

    def _place(
        self, key: FrameKey, paths: Sequence[str], order: Sequence[str], frozen: bool
    ) -> list[frozenset[Position]]:
        """Return the positions of the contractions of a part, from the order of all contractions of the model."""
        earlier: Counter[str] = Counter()
        for other, counts in self._counts[frozen].items():
            if other == key:
                break
            earlier.update(counts)
        self._counts[frozen][key] = Counter(paths)
        ends = ((Position.FIRST, (order[0], 1)), (Position.LAST, (order[-1], order.count(order[-1])))) if order else ()
        placed = []
        for path in paths:
            earlier[path] += 1
            found = {position for position, end in ends if end == (path, earlier[path])}
            placed.append(frozenset(found or {Position.INNER}))
        return placed
