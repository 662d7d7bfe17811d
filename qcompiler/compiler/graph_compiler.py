"""The backend that Dynamo calls: one graph in, one running step out."""

import contextlib
import dataclasses
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from torch import nn
from torch.fx import GraphModule

from qcompiler.collector import paused_collector
from qcompiler.compiler import dynamo_compat, dynamo_graphs, torch_compat
from qcompiler.compiler.cache.capture_key import make_capture_key
from qcompiler.compiler.cache.files import recall
from qcompiler.compiler.cache.frames import FrameRecord
from qcompiler.compiler.cache.texts import Key
from qcompiler.compiler.capture import Captured, capture
from qcompiler.compiler.lower import Lowered, make_step
from qcompiler.compiler.naming import FrameKey, FrameNames, ModelNames
from qcompiler.compiler.outside import Recorder, forward_order, is_working, recording_threads, working
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.compiler.plan import Kept, QuantPlan, join_reasons
from qcompiler.compiler.rewrite import Rewritten, list_devices, rewrite_halves
from qcompiler.compiler.variants import Variants
from qcompiler.errors import CompileError
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.ir.edit import copy_graph
from qcompiler.passes.ir.inference import find_mode
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.execute.step import Step, without_autocast
from qcompiler.runtime.kernels import convolutions, quantize_blocks, quantize_whole, repeat, runs, whole
from qcompiler.runtime.kernels.loader import start_loading, wait_for_processor
from qcompiler.runtime.kernels.table import describe_machine
from qcompiler.runtime.numbers.blocks import TENSOR, WHOLE
from qcompiler.runtime.ranges.store import RangeStore

logger = logging.getLogger("qcompiler")

#: the shorter side of a weight whose products are probably long enough for a kernel
_LEAST_EDGE: Final = 32


class GraphCompiler:
    """The backend of one mode (training or evaluation) of one recipe."""

    def __init__(
        self,
        recipe: Recipe,
        backend: str | None = None,
        strict: bool = False,
        *,
        execution: str = Execution.SIMULATE,
        store: RangeStore | None = None,
        frozen: bool = False,
        names: ModelNames | None = None,
    ) -> None:
        self.recipe = recipe
        self.backend = backend
        self.strict = strict
        self.execution = Execution(execution)
        #: ranges of the past, shared by all graphs of a model
        self.store = RangeStore(torch_compat.ENGINE) if store is None else store
        #: True in evaluation mode, in which ranges do not move
        self.frozen = frozen
        #: names of the model's parts, shared by all modes
        self.names = ModelNames(None) if names is None else names
        #: part of the model → the plan of its latest capture
        self.plans: dict[FrameKey, Callable[[], QuantPlan]] = {}
        #: part of the model → its graph before the passes, of which every later stage is made anew for who looks at it
        self.captures: dict[FrameKey, Captured] = {}
        #: contractions that ran outside of the captured graphs, as notes for the plan
        self.breaks: list[str] = []
        #: contractions that ran outside of the captured graphs
        self.outside: dict[Kept, None] = {}
        #: calls of captured graphs so far: a call of the model that adds none ran in float
        self.runs = 0
        #: calls of the model in which none ran
        self.misses = 0
        #: captures that no recorded call has followed yet; at the start the first call is recorded
        self._unrecorded = 1
        self._call: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        #: the module path of each contraction of a whole forward, if a part of the model had to be placed
        self._order: list[str] | None = None

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        if (nested := dynamo_graphs.find_nested(module)) is not None:
            self._leave(f"a graph with nested tensors is left in float: {nested}")
            return module.forward
        # only `strict` captures such graphs; without it Dynamo breaks them there
        if (found := dynamo_graphs.find_data_number(module)) is not None:
            raise CompileError(f"strict: graph break: a number depends on the data of a tensor: {found}")
        with working():
            names = self.names.of(dynamo_compat.traced_frame(module))
            if not names.is_whole:
                dynamo_compat.guard_instances(names.parts, module, lambda value: id(value) in names.modules)
            return Variants(module, names, self._build, self._running).first(inputs)

    def _build(self, module: GraphModule, inputs: Sequence[Any], names: FrameNames) -> tuple[Captured, Step]:
        """Captures, rewrites and lowers one graph."""
        self._unrecorded += 1
        if self.recipe.has_state and any(getattr(given, "is_meta", False) for given in inputs):
            raise CompileError(
                f"recipe {self.recipe.name!r} keeps ranges, which need the values of tensors; got tensors on the meta "
                "device; valid: another device, or a recipe of the present tensor such as hyperblock-int8"
            )
        key = make_capture_key(module, inputs, names)
        mode = torch_compat.find_fake_mode(inputs)
        with paused_collector():
            captured = recall(key, mode, lambda: capture(module, inputs, names))
        captured = dataclasses.replace(captured, frame=self.names.frame(names, self._find_order, frozen=self.frozen))
        with without_autocast(list_devices(captured)):
            with paused_collector():
                untouched = dataclasses.replace(captured, module=copy_graph(captured.module))
            lowered = self.lower(captured, key)
            self._refuse_simulation(lowered.rewritten_plan)
        self.captures[names.key], self.plans[names.key] = untouched, lowered.make_plan
        return captured, lowered.step

    def lower(self, captured: Captured, key: Key | None) -> Lowered:
        """Quantize and lower a captured graph, which is changed.

        Args:
            captured: the graph.
            key: stands for it in the cache on disk.
        """
        backend = "inductor" if self.strict and self.backend is None else self.backend
        key, record = self._make_key(key), FrameRecord()

        def rewrite() -> tuple[FrameRecord, Rewritten]:
            watched = dataclasses.replace(captured, frame=record.watch(captured.frame))
            plan = self.quantize(watched)
            return record, rewrite_halves(captured, plan, self.recipe.rules, self.execution)

        mode = find_mode(captured.module.graph)
        _, rewritten = recall(key, mode, rewrite, lambda found: found[0].holds(captured.frame))
        self._refuse_floats(rewritten.plan.kept)  # of a graph that was kept, without `strict`
        return make_step(rewritten, captured, backend, self.store, key)

    def quantize(self, captured: Captured) -> QuantPlan:
        """Run the joint passes over a captured graph, which is changed; return the plan.

        Raises:
            CompileError: `strict`, and a tensor stays in float.
        """
        with paused_collector():
            joint_pipeline(self.recipe, frozen=self.frozen, frame=captured.frame)(captured.module)
            plan = QuantPlan.of(captured.module)
        self._refuse_floats(plan.kept)
        wait_for_processor()
        return plan

    def _make_key(self, key: Key | None) -> Key | None:
        """Return the key of the halves of a graph by the key of the graph."""
        if key is None:
            return None
        is_machine_asked = self._is_compiled or self.execution is not Execution.SIMULATE
        machine = describe_machine() if is_machine_asked else ""
        kind = f"halves for {self.recipe.name}" + " in evaluation" * self.frozen
        return key.extend(kind, self.recipe.to_yaml(), self.execution, machine)

    def _leave(self, note: str) -> None:
        """Notes that a graph is left in float; `strict` refuses it."""
        if self.strict and self.recipe.rules:
            raise CompileError(f"strict: {note}")
        self._unrecorded += 1
        if note not in self.breaks:
            logger.warning("%s", note)
            self.breaks.append(note)

    @contextlib.contextmanager
    def calling(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """A context around a call of the model: notes contractions outside of the graphs, if graphs are new.

        Raises:
            CompileError: `strict`, and a contraction ran outside.
        """
        if self._call is not None:  # the model calls itself
            yield
            return
        self._call = (args, kwargs)
        repeat.start_when_loaded()
        watched = bool(self._unrecorded and self.recipe.rules)
        recorder = Recorder(model, is_paused=is_working) if watched else None
        if watched:
            self._start_loading(model)
        try:
            with contextlib.ExitStack() as stack:
                if recorder is not None:
                    stack.enter_context(recorder)
                    stack.enter_context(recording_threads(recorder))
                yield
        finally:
            self._call = None
            wait_for_processor()  # whatever the user compiles next
        if recorder is not None:
            self._unrecorded = 0
            self._add_outside([kept for kept in recorder.found if kept not in self.outside])

    def _start_loading(self, model: nn.Module) -> None:
        """Compile kernels while Dynamo traces: g++ takes 1 to 4 s for each library, and Inductor 10 s to start."""
        parameters = list(model.parameters())
        if not any(parameter.device.type == "cpu" for parameter in parameters):
            return
        shapes = [parameter.shape for parameter in parameters]
        has_matrices = any(len(shape) == 2 and min(shape) >= _LEAST_EDGE for shape in shapes)
        names = self._list_libraries(has_images=any(len(shape) > 2 for shape in shapes), has_matrices=has_matrices)
        if names:
            start_loading(*names, inductor=self._is_compiled, then=repeat.load)

    @property
    def _is_compiled(self) -> bool:
        return self.backend in (None, "inductor")

    def _list_libraries(self, *, has_images: bool, has_matrices: bool) -> list[str]:
        """Return the libraries that the first graph will probably call; others are compiled at their first call."""
        specs = [rule.spec for rule in self.recipe.rules if rule.spec is not None]
        has_blocks = any(spec.block != TENSOR for spec in specs)
        packs = any(spec.format.bits < 8 for spec in specs)  # several codes in a byte
        names: list[str] = []
        if self._is_compiled:
            names += [quantize_blocks.NAME] * (has_blocks or packs)
            # of one scale, or of large blocks, as those that hold all of an image are
            names += [quantize_whole.NAME] * any(spec.block == TENSOR or spec.block.space == WHOLE for spec in specs)
        if self.execution is Execution.SIMULATE:
            return names
        names += convolutions.LIBRARIES * has_images
        has_whole_sums = any(spec.has_zero_point or spec.block == TENSOR for spec in specs)
        names += [whole.LIBRARY] * (has_whole_sums and has_matrices)
        has_runs = any(max(spec.block.channel, spec.block.in_) >= runs.LEAST_RUN for spec in specs)
        return names + [runs.LIBRARY] * (has_runs and has_matrices)

    def give_up(self, code: types.CodeType, reason: str) -> None:
        """Notes that the parts of a function are captured alone from now on."""
        file, name, line = function = (code.co_filename, code.co_name, code.co_firstlineno)
        note = f"{name} at {file}:{line} is captured in parts, since every call of it needs a new capture: {reason}"
        logger.warning("%s", note)
        self.breaks.append(note)
        self.names.release(function, frozen=self.frozen)
        for key in [key for key in self.plans if key[:3] == function]:
            del self.plans[key], self.captures[key]

    def _add_outside(self, found: Sequence[Kept]) -> None:
        self.outside.update(dict.fromkeys(found))
        self._refuse_floats(found)
        if found and self.plans:  # without any graph there is one warning for the whole model
            logger.warning("left in float: %s", join_reasons(found))

    def _refuse_floats(self, found: Sequence[Kept]) -> None:
        rows = "; ".join(f"{kept.name} in {kept.consumer}: {kept.reason}" for kept in found if not kept.asked)
        if self.strict and self.recipe.rules and rows:
            raise CompileError(f"strict: left in float: {rows}")

    def _refuse_simulation(self, plan: QuantPlan) -> None:
        if self.execution is Execution.INTEGER and plan.simulated and not plan.integer:
            raise CompileError(
                f"execution='integer': no contraction can be computed as integers: {join_reasons(plan.simulated)}; "
                "valid: execution='auto', which simulates them"
            )

    def _find_order(self) -> list[str] | None:
        """Return the order of the contractions of the model; None if no rule asks for it, or it is not to be had."""
        asks = any(rule.position is not None for rule in self.recipe.rules)
        if self._order is None and asks and self._call is not None and self.names.model is not None:
            try:
                self._order = forward_order(self.names.model, *self._call)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                note = f"first and last are those of each graph, not of the model: a copy of it cannot run: {reason}"
                self.breaks += [note] if note not in self.breaks else []
        return self._order

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self.runs += 1
        with working():
            yield
