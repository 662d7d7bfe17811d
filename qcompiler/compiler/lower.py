"""From rewritten halves to a `Step` that runs: retrace and compile each half."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch.fx import GraphModule

from qcompiler.compiler import dynamo_compat, torch_compat
from qcompiler.compiler.cache import cache_compat
from qcompiler.compiler.cache.files import recall
from qcompiler.compiler.cache.texts import Key, UncachedError, describe_inputs
from qcompiler.compiler.capture import Captured
from qcompiler.compiler.pipelines import kernel_pipeline, start_pipeline
from qcompiler.compiler.plan import QuantPlan
from qcompiler.compiler.rewrite import Rewritten, list_devices, rewrite_halves
from qcompiler.passes.halves.call_kernels import Tally
from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.ir.edit import copy_graph
from qcompiler.passes.ir.inference import fake_mode
from qcompiler.passes.ir.meta import get_value
from qcompiler.passes.rules import Rule
from qcompiler.runtime import ops
from qcompiler.runtime.execute.interpret import Half, make_runner
from qcompiler.runtime.execute.step import Ranges, Step
from qcompiler.runtime.kernels.loader import call_until_compiled
from qcompiler.runtime.ranges.store import RangeStore

logger = logging.getLogger("qcompiler")

#: a name, None (compile, or run eagerly if that fails), or a function that makes a half out of a graph
Backend: TypeAlias = str | Callable[[GraphModule], Half] | None


@dataclasses.dataclass
class Lowered:
    """A step and what is learned on the way."""

    step: Step
    #: of the graph, before anything was compiled
    rewritten_plan: QuantPlan
    #: fallbacks with their reason
    notes: list[str] = dataclasses.field(default_factory=list)
    #: quantizers in kernels and in loops; backward is compiled, and counted, at its first call
    tally: Tally = dataclasses.field(default_factory=Tally)

    def make_plan(self) -> QuantPlan:
        """Return the plan as far as the halves are compiled."""
        plan, tally = self.rewritten_plan, self.tally
        sizes = plan.saved_bytes, plan.saved_code_bytes
        return plan.with_run(*sizes, self.notes, plan.integer, plan.simulated, tally.called, tally.reasons)


def lower_graph(
    captured: Captured,
    plan: QuantPlan,
    backend: Backend,
    store: RangeStore,
    rules: Sequence[Rule] = (),
    execution: Execution = Execution.SIMULATE,
) -> Lowered:
    """Make the step of a quantized graph; `rewrite_halves` and `make_step` explain the arguments."""
    return make_step(rewrite_halves(captured, plan, rules, execution), captured, backend, store)


def make_step(
    rewritten: Rewritten, captured: Captured, backend: Backend, store: RangeStore, key: Key | None = None
) -> Lowered:
    """Make the step of rewritten halves.

    Args:
        rewritten: the halves.
        captured: the graph that they were made of.
        backend: "eager" runs node by node; "inductor" compiles, and raises if that fails; None compiles, and runs
            eagerly with the reason in `notes` if that fails. A function runs every half its own way.
        store: holds the ranges of the past.
        key: stands for the halves in the cache on disk; None: what is made of them is not kept there.
    """
    notes: list[str] = []
    lowering = _Lowering(captured, backend, notes, Tally(), key)
    step = Step(
        forward=lowering.make_half(rewritten.forward),
        backward=None if rewritten.backward is None else lowering.make_lazy_half(rewritten.backward),
        writes=captured.writes,
        differentiable=captured.differentiable,
        tangents=rewritten.tangents,
        depends=rewritten.depends,
        device_types=list_devices(captured),
        ranges=_make_ranges(rewritten, backend, store),
    )
    return Lowered(step, rewritten.plan, notes, lowering.tally)


def _make_ranges(rewritten: Rewritten, backend: Backend, store: RangeStore) -> Ranges | None:
    """Return what a step needs to run with states; None if no quantizer keeps one."""
    if not any(rewritten.sites):
        return None
    run = backend if callable(backend) else make_runner
    forward, backward, (forward_sites, backward_sites) = rewritten.forward, rewritten.backward, rewritten.sites
    return Ranges(
        learns=any(half is not None and _has_updates(half) for half in (forward, backward)),
        store=store,
        forward_sites=forward_sites,
        backward_sites=backward_sites,
        backward_depends=rewritten.state_depends,
        first_forward=run(_copy_for(forward, first=True)) if forward_sites else None,
        first_backward=run(_copy_for(backward, first=True)) if backward is not None and backward_sites else None,
        plain_backward=None if backward is None else run(_copy_for(backward, first=False)),
    )


def _has_updates(module: GraphModule) -> bool:
    return bool(list(module.graph.find_nodes(op="call_function", target=ops.UPDATE)))


def _copy_for(half: GraphModule, *, first: bool) -> GraphModule:
    """Return a half for `first` steps, or for what follows them: such steps are rare, so it is never compiled."""
    copied = Halves.of_forward(copy_graph(half), 0)
    start_pipeline(first=first)(copied)
    (module,) = copied.graphs
    module.recompile()
    return module


@dataclasses.dataclass(frozen=True)
class _Lowering:
    """Makes of each half of one graph what runs."""

    captured: Captured
    backend: Backend
    notes: list[str]
    tally: Tally
    key: Key | None

    def make_half(self, module: GraphModule) -> Half:
        """Return forward, compiled or interpreted."""
        inputs = [get_value(node) for node in module.graph.find_nodes(op="placeholder")]
        return self._compile(module, inputs, is_backward=False)

    def make_lazy_half(self, module: GraphModule) -> Half:
        """Return backward, compiled at its first call for the strides that forward really returned."""
        compiled: list[Half] = []

        def compile_once(args: list[Any]) -> None:
            with dynamo_compat.CAPTURING:
                if not compiled:  # another thread may have been first
                    inputs = [fake_mode(module.graph).from_tensor(arg.detach(), static_shapes=True) for arg in args]
                    compiled.append(self._compile(module, inputs, is_backward=True))

        def run(args: list[Any]) -> Sequence[Any]:
            if not compiled:
                compile_once(args)
            return compiled[0](args)

        return run

    def _compile(self, module: GraphModule, inputs: list[Any], *, is_backward: bool) -> Half:
        if callable(self.backend):
            return self.backend(module)
        if self.backend == "eager":
            return make_runner(module)
        try:
            half, tally = call_until_compiled(lambda: self._run_inductor(module, inputs, is_backward=is_backward))
        except Exception as error:
            if self.backend == "inductor":
                raise
            name = "backward" if is_backward else "forward"
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            self.notes.append(f"{name} runs eagerly, Inductor failed: {reason}")
            logger.warning("%s", self.notes[-1])
            return make_runner(module)
        self.tally.add(tally)
        return half

    def _run_inductor(self, module: GraphModule, inputs: list[Any], *, is_backward: bool) -> tuple[Half, Tally]:
        """Return a compiled half, and the count of its quantizers."""
        plain, tally = self._retrace(module, inputs, is_backward=is_backward)
        half = torch_compat.compile_inductor(
            plain,
            inputs,
            is_backward=is_backward,
            is_inference=not self.captured.is_joint,
            static_inputs=() if is_backward else self.captured.static_inputs,
            fixed_outputs=None if is_backward else self.captured.forward_outputs,
        )
        return half, tally

    def _retrace(self, module: GraphModule, inputs: list[Any], *, is_backward: bool) -> tuple[GraphModule, Tally]:
        """Return a half as the compiler gets it, and the count of its quantizers."""
        mode = fake_mode(module.graph)

        def retrace() -> tuple[GraphModule, Tally]:
            called, tally = copy_graph(module), Tally()
            kernel_pipeline(tally)(Halves.of_forward(called, 0))
            return torch_compat.retrace_graph(called, inputs, mode), tally

        return recall(self._make_key(inputs, is_backward=is_backward), mode, retrace)

    def _make_key(self, inputs: Sequence[Any], *, is_backward: bool) -> Key | None:
        """Return the key of a half for inputs of some strides."""
        if self.key is None:
            return None
        try:
            given = describe_inputs(inputs)
        except UncachedError:  # of unusual form
            return None
        kind = "backward for Inductor" if is_backward else "forward for Inductor"
        return self.key.extend(kind, cache_compat.describe_settings(), given)
