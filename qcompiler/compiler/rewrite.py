"""From a captured graph to its halves: all passes, and everything that a step and the report need to know."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule, Node

from qcompiler.collector import paused_collector
from qcompiler.compiler.capture import Captured
from qcompiler.compiler.pipelines import halves_pipeline
from qcompiler.compiler.plan import Kept, QuantPlan, describe_contraction, describe_saved
from qcompiler.passes.halves.halves import Halves, finish_halves
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.edit import list_outputs
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import find_value, get_value, is_backward, iterate_contractions, list_inputs
from qcompiler.passes.ir.views import view_root
from qcompiler.passes.rules import Rule
from qcompiler.runtime import ops
from qcompiler.runtime.execute.step import Tangent
from qcompiler.runtime.ranges.store import StateSite
from qcompiler.runtime.spec import parse_spec


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A captured graph after all passes, as plain data: a step is made of it, in this process or in the next."""

    #: a graph without gradients is forward alone
    forward: GraphModule
    backward: GraphModule | None
    #: quantizers, refusals, saved bytes, and how contractions are computed
    plan: QuantPlan
    #: the sites of forward and of backward that keep a range, in the order of the inputs
    sites: tuple[tuple[StateSite, ...], tuple[StateSite, ...]]
    #: for each input, then each learned range: the tangents that the gradient descends from; None without a gradient
    depends: tuple[frozenset[int] | None, ...] = ()
    #: for each state of backward: the tangents that it descends from
    state_depends: tuple[frozenset[int], ...] = ()
    #: the gradients that backward reads
    tangents: tuple[Tangent, ...] = ()


def rewrite_halves(
    captured: Captured, plan: QuantPlan, rules: Sequence[Rule] = (), execution: Execution = Execution.SIMULATE
) -> Rewritten:
    """Split a graph after the joint passes, which it changes, and rewrite the halves.

    Args:
        captured: the graph after the joint passes.
        plan: of that graph.
        rules: of the recipe, for the floats that are saved for backward.
        execution: which contractions of codes are computed as integers.
    """
    sites = (_list_sites(captured.module, backward=False), _list_sites(captured.module, backward=True))
    if not captured.is_joint:
        halves = split_halves(captured, execution=execution)
        (whole,) = halves.graphs
        return Rewritten(whole, None, _complete_plan(plan, halves, ()), sites)
    with paused_collector():
        depends, states = _find_dependencies(captured)
        tangents = tuple(_list_tangents(captured))
        halves = split_halves(captured, rules=rules, execution=execution)
        complete = _complete_plan(plan, halves, rules)
    forward, backward = halves.graphs
    return Rewritten(forward, backward, complete, sites, depends, states, tangents)


def _complete_plan(plan: QuantPlan, halves: Halves, rules: Sequence[Rule]) -> QuantPlan:
    """Return the plan with saved tensors, and with the contractions of each half."""
    size, code_size = saved_bytes(halves.saved)
    integer, simulated = _list_products(halves)
    facts = {"saved_bytes": size, "saved_code_bytes": code_size, "integer": integer, "simulated": simulated}
    return dataclasses.replace(plan.with_saved(describe_saved(halves, rules)), **facts)  # type: ignore[arg-type]


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


def _list_sites(module: GraphModule, *, backward: bool) -> tuple[StateSite, ...]:
    """Return the sites whose state is an input of one half, in the order of those inputs."""
    sites = []
    for node, fact in list_inputs(module.graph, InputKind.STATE):
        if is_backward(node) == backward:
            (text,) = {str(get_argument(user, "spec")) for user in node.users if user.target is ops.SCALE}
            spec, val = parse_spec(text), get_value(node)
            meaning = spec.range.meaning(spec.format.bits)
            sites.append(StateSite(fact.name, spec.range, tuple(val.shape), val.device, meaning))
    return tuple(sites)


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
