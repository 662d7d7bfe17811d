"""Training steps that are watched: run node by node, beside the same step in float, without changing anything.

The quantized halves are the same as with `backend="eager"`, so a watched step gives the same numbers. The shadow is the
graph of the recipe `identity`: the same capture, parameters, inputs, random numbers and gradients of the outputs, and
no quantizer. The shadow writes no buffer, no gradient and no range.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qcompiler.compiler import torch_compat
from qcompiler.compiler.cache.texts import Key
from qcompiler.compiler.capture import Captured
from qcompiler.compiler.graph_compiler import GraphCompiler
from qcompiler.compiler.lower import Lowered, lower_graph
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.compiler.plan import QuantPlan, describe_contraction
from qcompiler.debugging.contractions import RecordedContraction
from qcompiler.passes.ir.edit import copy_graph
from qcompiler.passes.ir.facts import Contraction, Input, InputKind
from qcompiler.passes.ir.meta import get_contraction, get_input, iterate_contractions
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.passes.ir.site_name import Numbering
from qcompiler.passes.ir.views import is_view, view_root
from qcompiler.passes.ir.walk import find_quantizer
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.execute.interpret import Half, Hooks, make_runner
from qcompiler.runtime.execute.step import Step
from qcompiler.runtime.ranges.store import Moment, RangeStore


class QuantizeCall(NamedTuple):
    """The arguments of a quantize node."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    key: Tensor | None
    spec: str
    layout: str
    site: str


class Log(Protocol):
    """The reports of every watched step."""

    def quantized(self, site: str, call: "QuantizeCall", codes: Tensor) -> None:
        """A quantizer ran."""

    def multiplied(self, product: RecordedContraction, quantized: dict[int, Tensor]) -> None:
        """A contraction ran; argument → the operand behind the quantizer."""

    def compared(self, label: str, own: Tensor, reference: Tensor) -> None:
        """A contraction gave `own`, and in float `reference`."""

    def gradient(self, name: str, own: Tensor, reference: Tensor) -> None:
        """A parameter got this gradient, and in float `reference`."""

    def stepped(self) -> None:
        """A forward begins."""

    def given(self, what: str, tensor: Tensor) -> None:
        """The step, and its shadow as well, was given NaN or infinities."""


class Relay:
    """The place at which watched steps report; nobody listens outside of `to`, and nothing is kept then."""

    def __init__(self) -> None:
        self.log: Log | None = None

    @contextlib.contextmanager
    def to(self, log: Log) -> Iterator[None]:
        """While inside, this log is told."""
        before, self.log = self.log, log
        try:
            yield
        finally:
            self.log = before


@dataclasses.dataclass
class Record:
    """The record that one forward leaves for the backward."""

    #: site → the tensor that was quantized
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    #: contractions that were told already
    seen: set[str] = dataclasses.field(default_factory=set)
    #: contraction → the result, until the shadow has met the contraction
    results: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    #: the state of the generators in front of each random operator, until the shadow has met the operator
    random: deque[torch_compat.RandomState] = dataclasses.field(default_factory=deque)
    #: the tensors that the forward of the shadow saves for backward
    saved: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class WatchedMoment(Moment):
    """The moment of a forward, with its record."""

    record: Record


class Watch(Hooks):
    """Hooks that write all results into a record."""

    def __init__(self, labels: dict[str, str], relay: Relay) -> None:
        #: node name → the unique name of the contraction
        self.labels = labels
        self.relay = relay
        self.record = Record()

    def interpret(self, module: GraphModule) -> Half:
        """Return the half that runs a graph node by node under this watch."""
        return make_runner(module, self)

    @contextlib.contextmanager
    def writing(self, record: Record) -> Iterator[None]:
        """While inside, all results go to this record."""
        before, self.record = self.record, record
        try:
            yield
        finally:
            self.record = before


class QuantizedWatch(Watch):
    """Watches the quantized halves."""

    def __init__(self, module: GraphModule, labels: dict[str, str], relay: Relay) -> None:
        super().__init__(labels, relay)
        #: node name → the name of the quantizer, numbered if a graph has two of that name
        self.sites = site_names(module)
        #: contraction → argument → the quantizer whose codes are read
        self.operands = {
            labels[node.name]: self._operands(node, fact) for node, fact in _iterate_contractions(module.graph)
        }

    def _operands(self, node: Node, fact: Contraction) -> dict[int, str]:
        found = {operand.arg: find_quantizer(node.args[operand.arg]) for operand in fact.operands}
        return {arg: self.sites[one.codes.name] for arg, one in found.items() if one is not None}

    def before(self, node: Node) -> None:
        """Remembers the state of the generators in front of every random operator."""
        if torch_compat.is_random(node) and node.target is not ops.DRAW_KEY:
            self.record.random.append(torch_compat.random_state())

    def after(self, node: Node, args: tuple[Any, ...], result: Any) -> None:
        """Tells the log of quantizers and contractions; a contraction that is computed again is told once."""
        log = self.relay.log
        if log is None:
            return
        if node.target is ops.QUANTIZE:
            site = self.sites.get(node.name, Quantizer(node).site)
            if site not in self.record.tensors:
                values = QuantizeCall(*args)
                values = values._replace(x=_keep_value(Quantizer(node).tensor, values.x))
                self.record.tensors[site] = values.x
                log.quantized(site, values, result)
        fact, label = get_contraction(node), self.labels.get(node.name)
        if fact is None or label is None or label in self.record.seen:
            return
        self.record.seen.add(label)
        if not fact.is_bias:
            self.record.results[label] = _get_result(fact, result)
        sites = self.operands[label]
        floats = {o.arg: self._float(node.args[o.arg], args[o.arg], sites.get(o.arg)) for o in fact.operands}
        product = RecordedContraction.of(node, fact, label, args, floats, sites)
        log.multiplied(product, {arg: args[arg] for arg in sites})

    def _float(self, arg: Any, value: Tensor, site: str | None) -> Tensor:
        """Return the operand without the quantizer: the views in between, of the tensor that was quantized."""
        if site is None:
            return _keep_value(arg, value)
        views = []
        while is_view(arg):
            views.append(arg)
            arg = arg.args[0]
        floats = self.record.tensors[site]
        for view in reversed(views):
            floats = view.target(floats, *view.args[1:], **view.kwargs)
        return floats


class FloatWatch(Watch):
    """Watches the shadow, and compares the results with the record of the quantized half."""

    def before(self, node: Node) -> None:
        """Draws the numbers of the quantized step."""
        if torch_compat.is_random(node):
            torch_compat.set_random_state(self.record.random.popleft())

    def after(self, node: Node, args: tuple[Any, ...], result: Any) -> None:
        """Compares the result of every contraction."""
        fact, label = get_contraction(node), self.labels.get(node.name)
        if fact is not None and label in self.record.results and self.relay.log is not None:
            self.relay.log.compared(str(label), self.record.results.pop(str(label)), _get_result(fact, result))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchedStep(Step):
    """A step that reports to a log, and runs a shadow behind each half."""

    shadow: Step
    watch: QuantizedWatch
    shadow_watch: FloatWatch
    #: the kind of each input; gradients of parameters are compared
    inputs: tuple[Input, ...]

    def run_forward(self, inputs: Sequence[Any]) -> tuple[list[Any], Moment | None]:
        """Run forward as ever, then the forward of the shadow."""
        record = Record()
        if self.watch.relay.log is not None:
            self.watch.relay.log.stepped()
        for fact, tensor in zip(self.inputs, inputs, strict=True):
            # infinities are usual in masks
            self._tell(f"{fact.kind} {fact.name}", tensor, torch.isnan if fact.kind is not _PARAMETER else _not_finite)
        with self.watch.writing(record):
            results, moment = super().run_forward(inputs)
        with self.in_shadow(record):
            floats, _ = self.shadow.run_forward(inputs)
        saved = floats[len(self.writes) + len(self.differentiable) :]
        given = {tensor.untyped_storage().data_ptr() for tensor in inputs if isinstance(tensor, Tensor)}
        # the quantized step keeps codes, so the inputs may be written in place before backward
        record.saved = [t.clone() if t.untyped_storage().data_ptr() in given else t for t in saved]
        first, clock = (moment.is_first, moment.clock) if moment is not None else (False, ())
        return results, WatchedMoment(first, clock, record)

    def gradients(
        self, saved: list[Any], grads: Sequence[Tensor | None], forward: Moment | None
    ) -> list[Tensor | None]:
        """Run backward as ever, then the backward of the shadow, for the same gradients of the outputs."""
        assert isinstance(forward, WatchedMoment)
        for number, grad in enumerate(grads[len(self.writes) :]):
            self._tell(f"the gradient that the loss gives for output {number}", grad, _not_finite)
        with self.watch.writing(forward.record):
            own = super().gradients(saved, grads, forward)
        with self.in_shadow(forward.record):
            floats = self.shadow.gradients(list(forward.record.saved), grads, None)
        for fact, mine, exact in zip(self.inputs, own, floats, strict=False):
            log = self.watch.relay.log if fact.kind is _PARAMETER else None
            if log is not None and mine is not None and exact is not None:
                log.gradient(fact.name, mine, exact)
        return own

    def _tell(self, what: str, tensor: Any, is_wrong: Callable[[Tensor], Tensor]) -> None:
        """Tells the log of a tensor with a wrong number; 8-bit floats have no operators for such a look."""
        looked = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if self.watch.relay.log is not None and looked and bool(is_wrong(tensor).any()):
            self.watch.relay.log.given(what, tensor)

    @contextlib.contextmanager
    def in_shadow(self, record: Record) -> Iterator[None]:
        """While inside, the shadow writes to a record, and the drawn numbers are given back to the generators."""
        before = torch_compat.random_state()
        try:
            with self.shadow_watch.writing(record):
                yield
        finally:
            torch_compat.set_random_state(before)


class WatchedCompiler(GraphCompiler):
    """Makes watched steps out of the graphs that Dynamo hands over."""

    def __init__(self, recipe: Recipe, strict: bool, store: RangeStore) -> None:
        super().__init__(recipe, "eager", strict, store=store)
        self.relay = Relay()

    def lower(self, captured: Captured, key: Key | None) -> Lowered:
        """Quantize and lower the graph, and a copy of it in float for the shadow."""
        floats = dataclasses.replace(captured, module=copy_graph(captured.module))
        joint_pipeline(_FLOAT)(floats.module)
        plan = self.quantize(captured)
        watch = QuantizedWatch(captured.module, _make_labels(captured.module), self.relay)
        shadow_watch = FloatWatch(_make_labels(floats.module), self.relay)
        lowered = lower_graph(captured, plan, watch.interpret, self.store, self.recipe.rules)
        shadow = lower_graph(floats, QuantPlan(), shadow_watch.interpret, RangeStore(torch_compat.ENGINE)).step
        own = {field.name: getattr(lowered.step, field.name) for field in dataclasses.fields(Step)}
        step = WatchedStep(**own, shadow=shadow, watch=watch, shadow_watch=shadow_watch, inputs=captured.inputs)
        return dataclasses.replace(lowered, step=step)


_FLOAT = Recipe(name="identity", rules=())
_PARAMETER = InputKind.PARAMETER


def _not_finite(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor)


def _iterate_contractions(graph: Graph) -> Iterator[tuple[Node, Contraction]]:
    """Yield the contractions whose operands can be quantized, sums of biases too: nothing inside of fused kernels."""
    return ((node, fact) for node, fact in iterate_contractions(graph) if fact.operands)


def _make_labels(module: GraphModule) -> dict[str, str]:
    """Return node name → `layer1.0.conv1 weight gradient`, numbered if a graph has two of that name."""
    return _number_names((node.name, describe_contraction(fact)) for node, fact in _iterate_contractions(module.graph))


def site_names(module: GraphModule) -> dict[str, str]:
    """Return node name → the name of the quantizer, numbered if a graph has two of that name."""
    return numbered_sites(module.graph)


def numbered_sites(graph: Graph) -> dict[str, str]:
    """Return the same of a graph with quantizers that has not been split yet."""
    return _number_names((quantizer.codes.name, quantizer.site) for quantizer in list_quantizers(graph))


def _number_names(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Key → name, with #2, #3 … behind a name that was there before."""
    numbering = Numbering()
    return {key: numbering.number(name) for key, name in names}


def _keep_value(arg: Any, value: Tensor) -> Tensor:
    """Return the value of a node; a copy if a parameter or an input of the model is about to be written."""
    value = value.detach()
    return value.clone() if isinstance(arg, Node) and get_input(view_root(arg)) is not None else value


def _get_result(fact: Contraction, result: Any) -> Tensor:
    """Return the tensor that a contraction gives: of a convolution's gradients the wanted one."""
    if isinstance(result, Tensor):
        return result
    assert fact.gradient_of is not None
    found = result[fact.gradient_of]
    assert isinstance(found, Tensor)
    return found
