"""From a quantized graph to a `Step` that runs: partition, retrace, compile each half."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from qcompiler.collector import paused_collector
from qcompiler.compiler import dynamo_compat, torch_compat
from qcompiler.compiler.capture import Captured
from qcompiler.compiler.pipelines import halves_pipeline, kernel_pipeline, start_pipeline
from qcompiler.compiler.plan import Kept, QuantPlan, describe_contraction, describe_saved
from qcompiler.passes.halves.call_kernels import Tally
from qcompiler.passes.halves.halves import Halves, finish_halves
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.edit import copy_graph, list_outputs
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.inference import fake_mode
from qcompiler.passes.ir.meta import (
    find_value,
    get_value,
    is_backward,
    iterate_contractions,
    list_inputs,
)
from qcompiler.passes.ir.views import view_root
from qcompiler.passes.rules import Rule
from qcompiler.runtime import ops
from qcompiler.runtime.execute.interpret import Half, make_runner
from qcompiler.runtime.execute.step import Ranges, Step, Tangent
from qcompiler.runtime.ranges.store import RangeStore, StateSite
from qcompiler.runtime.spec import parse_spec

logger = logging.getLogger("qcompiler")

#: a name, None (compile, or run eagerly if that fails), or a function that makes a half out of a graph
Backend: TypeAlias = str | Callable[[GraphModule], Half] | None


@dataclasses.dataclass
class Lowered:
    """A step and what was learned on the way: saved bytes, products of integers, fallbacks with their reason."""

    step: Step
    saved_bytes: int
    saved_code_bytes: int
    notes: list[str]
    #: quantizers of floats that operators without a contraction keep, and the floats that they keep as they are
    saved: QuantPlan = dataclasses.field(default_factory=QuantPlan)
    #: contractions that are computed as integers
    integer: int = 0
    #: contractions of codes that are computed as floats although integers were asked for
    simulated: tuple[Kept, ...] = ()
    #: quantizers in kernels and in loops; backward is compiled, and counted, at its first call
    tally: Tally = dataclasses.field(default_factory=Tally)


def lower_graph(
    captured: Captured,
    backend: Backend,
    store: RangeStore,
    rules: Sequence[Rule] = (),
    execution: Execution = Execution.SIMULATE,
) -> Lowered:
    """Makes the step of a quantized graph.

    Args:
        captured: the graph after the passes.
        store: holds the ranges of the past.
        backend: "eager" runs node by node; "inductor" compiles, and raises if that fails; None compiles, and runs
            eagerly with the reason in `notes` if that fails. A function runs every half its own way.
        rules: of the recipe, for the floats that are saved for backward.
        execution: which contractions of codes are computed as integers.
    """
    notes: list[str] = []
    tally = Tally()
    sites = [_list_sites(captured.module, backward) for backward in (False, True)]
    if not captured.is_joint:
        halves = split_halves(captured, execution=execution)
        (whole,) = halves.graphs
        ranges = _make_ranges(store, sites, whole, None, backend, ())
        forward = _make_half(whole, captured, backend, notes, tally, is_backward=False)
        step = Step(
            forward, None, captured.writes, captured.differentiable, device_types=list_devices(captured), ranges=ranges
        )
        return Lowered(step, 0, 0, notes, QuantPlan(), *_list_products(halves), tally)
    with paused_collector():
        depends, states = _find_dependencies(captured)
        halves = split_halves(captured, rules=rules, execution=execution)
    first, second = halves.graphs
    ranges = _make_ranges(store, sites, first, second, backend, states)
    step = Step(
        forward=_make_half(first, captured, backend, notes, tally, is_backward=False),
        backward=_make_lazy_half(second, captured, backend, notes, tally),
        writes=captured.writes,
        differentiable=captured.differentiable,
        tangents=tuple(_list_tangents(captured)),
        depends=depends,
        device_types=list_devices(captured),
        ranges=ranges,
    )
    return Lowered(
        step, *saved_bytes(halves.saved), notes, describe_saved(halves, rules), *_list_products(halves), tally
    )


def _list_products(halves: Halves) -> tuple[int, tuple[Kept, ...]]:
    """Return the number of contractions that are computed as integers, and the others of codes, with reasons."""
    nodes = [pair for half in halves.graphs for pair in iterate_contractions(half.graph)]
    simulated = [Kept(fact.operator, describe_contraction(fact), fact.simulated) for _, fact in nodes if fact.simulated]
    return sum(node.target in ops.PRODUCTS_OF_CODES for node, _ in nodes), tuple(simulated)


def split_halves(
    captured: Captured,
    observe: Callable[[str, int, Halves], None] | None = None,
    rules: Sequence[Rule] = (),
    execution: Execution = Execution.SIMULATE,
) -> Halves:
    """Return the halves of a graph after the joint passes, verified. Changes the graph.

    Args:
        captured: the graph after the joint passes.
        observe: called after each pass with its name and count.
        rules: of the recipe, for the floats that are saved for backward.
        execution: which contractions of codes are computed as integers.

    Raises:
        PassError: a pass failed, or a half breaks a rule.
        VerifyError: a float is saved for which there are codes, or an operator reads other strides than traced.
    """
    if captured.is_joint:
        halves = Halves.of_joint(captured.module, captured.forward_outputs, captured.static_inputs)
    else:
        halves = Halves.of_forward(captured.module, captured.forward_outputs)
    with paused_collector():
        halves_pipeline(rules, execution)(halves, observe)
        finish_halves(halves)
    return halves


def _list_sites(module: GraphModule, backward: bool) -> list[StateSite]:
    """Return the sites whose state is an input of one half, in the order of those inputs."""
    sites = []
    for node, fact in list_inputs(module.graph, InputKind.STATE):
        if is_backward(node) == backward:
            (text,) = {str(get_argument(user, "spec")) for user in node.users if user.target is ops.SCALE}
            spec, val = parse_spec(text), get_value(node)
            meaning = spec.range.meaning(spec.format.bits)
            sites.append(StateSite(fact.name, spec.range, tuple(val.shape), val.device, meaning))
    return sites


def _make_ranges(
    store: RangeStore,
    sites: Sequence[list[StateSite]],
    forward: GraphModule,
    backward: GraphModule | None,
    backend: Backend,
    backward_depends: tuple[frozenset[int], ...],
) -> Ranges | None:
    """What a step needs to run with states; None if no quantizer keeps one."""
    if not any(sites):
        return None
    run = backend if callable(backend) else make_runner
    halves = [
        run(_copy_for(half, first=True)) if half is not None and found else None
        for half, found in zip((forward, backward), sites, strict=True)
    ]
    plain = None if backward is None else run(_copy_for(backward, first=False))
    learns = any(half is not None and _has_updates(half) for half in (forward, backward))
    return Ranges(learns, store, tuple(sites[False]), tuple(sites[True]), backward_depends, halves[0], halves[1], plain)


def _has_updates(module: GraphModule) -> bool:
    return bool(list(module.graph.find_nodes(op="call_function", target=ops.UPDATE)))


def _copy_for(half: GraphModule, *, first: bool) -> GraphModule:
    """Return a half for `first` steps, or for what follows them: such steps are rare, so it is never compiled."""
    copied = Halves.of_forward(copy_graph(half), 0)
    start_pipeline(first=first)(copied)
    (module,) = copied.graphs
    module.recompile()
    return module


def _make_half(
    module: GraphModule, captured: Captured, backend: Backend, notes: list[str], tally: Tally, *, is_backward: bool
) -> Half:
    """Return one half, compiled or interpreted."""
    inputs = [get_value(node) for node in module.graph.find_nodes(op="placeholder")]
    return _compile_half(module, inputs, captured, backend, notes, tally, is_backward=is_backward)


def _make_lazy_half(module: GraphModule, captured: Captured, backend: Backend, notes: list[str], tally: Tally) -> Half:
    """Return the backward half, compiled at its first call for the strides that forward really returned."""
    compiled: list[Half] = []

    def compile_once(args: list[Any]) -> None:
        with dynamo_compat.CAPTURING:
            if not compiled:  # another thread may have been first
                inputs = [fake_mode(module.graph).from_tensor(arg.detach(), static_shapes=True) for arg in args]
                compiled.append(_compile_half(module, inputs, captured, backend, notes, tally, is_backward=True))

    def run(args: list[Any]) -> Sequence[Any]:
        if not compiled:
            compile_once(args)
        return compiled[0](args)

    return run


def _compile_half(
    module: GraphModule,
    inputs: list[Any],
    captured: Captured,
    backend: Backend,
    notes: list[str],
    tally: Tally,
    *,
    is_backward: bool,
) -> Half:
    if callable(backend):
        return backend(module)
    if backend == "eager":
        return make_runner(module)
    try:
        called = copy_graph(module)
        kernel_pipeline(tally)(Halves.of_forward(called, 0))
        plain = torch_compat.retrace_graph(called, inputs, fake_mode(module.graph))
        return torch_compat.compile_inductor(
            plain,
            inputs,
            is_backward=is_backward,
            is_inference=not captured.is_joint,
            static_inputs=() if is_backward else captured.static_inputs,
            fixed_outputs=None if is_backward else captured.forward_outputs,
        )
    except Exception as error:
        if backend == "inductor":
            raise
        half = "backward" if is_backward else "forward"
        notes.append(f"{half} runs eagerly, Inductor failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        logger.warning("%s", notes[-1])
        return make_runner(module)


def _find_dependencies(captured: Captured) -> tuple[tuple[frozenset[int] | None, ...], tuple[frozenset[int], ...]]:
    """Return the tangents that gradients and states descend from.

    First for each input, then each learned range, None without gradient; second for each state of the backward half.
    """
    reach: dict[Node, frozenset[int]] = {}
    tangents = [node for node, _ in list_inputs(captured.module.graph, InputKind.TANGENT)]
    for node in captured.module.graph.nodes:
        own = frozenset({tangents.index(node)}) if node in tangents else frozenset()
        reach[node] = own.union(*(reach[source] for source in node.all_input_nodes))
    outputs = list_outputs(captured.module.graph)[captured.forward_outputs :]
    states = [node for node in outputs if isinstance(node, Node) and node.target is ops.UPDATE]
    grads = [node for node in outputs if node not in states]
    depends = tuple(reach[grad] if isinstance(grad, Node) else None for grad in grads)
    return depends, tuple(reach[state] for state in states if is_backward(state))


def _list_tangents(captured: Captured) -> list[Tangent]:
    nodes = list_inputs(captured.module.graph, InputKind.TANGENT)
    values = [get_value(node) for node, _ in nodes]
    return [
        Tangent(output, tuple(value.shape), value.stride(), value.dtype, value.device)
        for output, value in zip(captured.tangents, values, strict=True)
    ]


def list_devices(captured: Captured) -> tuple[str, ...]:
    """Return the types of the devices of all tensors of a graph."""
    values = [find_value(n) for n in captured.module.graph.nodes]
    return tuple(sorted({v.device.type for v in values if isinstance(v, torch.Tensor)}))


def saved_size(node: Node) -> int:
    """Bytes that a node takes if it is saved for backward; 0 for inputs and parameters, which are there anyway."""
    if view_root(node).op == "placeholder":
        return 0
    value = get_value(node)
    return int(value.numel()) * value.element_size()  # int(): the size of a random state is symbolic


def saved_bytes(saved: Sequence[Node]) -> tuple[int, int]:
    """(bytes that forward keeps for backward, of these codes, scales and masks); inputs and parameters not counted."""
    sizes = [(node, saved_size(node)) for node in saved if isinstance(node, Node)]
    quantized = (ops.SCALE, ops.CHECKED, ops.ZERO_POINT, ops.QUANTIZE, ops.PACK)
    return sum(size for _, size in sizes), sum(size for node, size in sizes if node.target in quantized)
