"""The memory of a quantized module: recipes × modes × captures, ranges, notes."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import nn

from qcompiler import recipes
from qcompiler.compiler import dynamo_compat, dynamo_graphs, torch_compat
from qcompiler.compiler.graph_compiler import GraphCompiler
from qcompiler.compiler.naming import ModelNames
from qcompiler.compiler.plan import QuantPlan
from qcompiler.compiler.stages import Stage, run_stages
from qcompiler.errors import CompileError
from qcompiler.following import Following
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.rules import Role
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.saving import add_saving
from qcompiler.runtime.ranges.store import RangeStore

logger = logging.getLogger("qcompiler")

#: captures of one model (signatures × modes) before an error; Dynamo's own limit of 8 would train on in float
CAPTURES: Final = 64
NO_GRAPH: Final = (
    "no graph ran: a call of the model was in float, outside of the compiler (inside of torch.func or a mode that sees "
    "every operator, with sparse inputs, or with layers that Dynamo does not capture)"
)

_C = TypeVar("_C", bound=GraphCompiler)
#: a compiler, and the model behind it: the function that Dynamo guards
_Mode = tuple[GraphCompiler, Callable[..., Any]]


class Session:
    """One model and everything that is compiled for it. `qcompiler.compile` makes one for each quantized module.

    The module imitates `nn.Module` and hands its calls to the session; tools that look at a module ask the session.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        backend: str | None,
        strict: bool,
        save: str | None,
        execution: Execution,
    ) -> None:
        self.model, self.backend, self.strict, self.execution = model, backend, strict, execution
        #: the format of floats that operators without a contraction keep for their gradients
        self.save = save
        #: ranges of the past, shared by all recipes and modes
        self.store = RangeStore(torch_compat.ENGINE)
        #: names of the parts of the model, shared by all recipes and modes
        self.names = ModelNames(model)
        #: of a copy: the ranges that it takes over while others average its weights
        self._following: Following | None = None
        #: the compilers that `training_through` has made
        self._through: dict[tuple[Recipe, Any], _Mode] = {}
        #: recipe → training (True) and evaluation mode
        self._made: dict[Recipe, dict[bool, _Mode]] = {}
        self.use(recipe)

    def use(self, recipe: Recipe) -> None:
        """Go on with another recipe; each one is compiled once."""
        if recipe not in self._made:
            self._made[recipe] = {mode: self._make_mode(recipe, frozen=not mode) for mode in (True, False)}
        self.recipe = recipe
        self._modes = self._made[recipe]

    def _make_mode(self, recipe: Recipe, *, frozen: bool) -> _Mode:
        dynamo_compat.trace_checkpoint_sequential()
        rules = add_saving(recipe.for_eval() if frozen else recipe, self.save)
        kept: dict[str, Any] = {"store": self.store, "names": self.names, "execution": self.execution}
        compiler = GraphCompiler(rules, self.backend, self.strict, frozen=frozen, **kept)
        return compiler, self._compile_with(compiler)

    def _compile_with(self, compiler: GraphCompiler) -> Callable[..., Any]:
        return dynamo_compat.compile_with(self.model, compiler, compiler.give_up, fullgraph=compiler.strict)

    def get_compiler(self, training: bool) -> GraphCompiler:
        """Return the compiler of a mode, with its captures and plans."""
        return self._modes[training][0]

    @contextlib.contextmanager
    def training_through(self, make: Callable[[Recipe, bool, RangeStore], _C]) -> Iterator[_C]:
        """While inside, train through `make(recipe, strict, store)`; `use` ends it early. Evaluation is as always.

        Whatever `make` returned for a recipe is kept, so that coming back captures nothing.
        """
        if (self.recipe, make) not in self._through:
            new = make(self.recipe, self.strict, self.store)
            new.names = self.names
            self._through[self.recipe, make] = (new, self._compile_with(new))
        before, ours = self._modes, {**self._modes, True: self._through[self.recipe, make]}
        self._modes = ours
        try:
            yield ours[True][0]  # type: ignore[misc]
        finally:
            if self._modes is ours:
                self._modes = before

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the outputs of the model, through the quantized graph of the mode and of the signature of the inputs.

        Raises:
            CompileError: `strict` and something would stay in float, or there are too many captures.
        """
        compiler, function = self._modes[bool(self.model.training)]
        before, runs = dynamo_compat.graph_breaks(), compiler.runs
        self.follow()
        plain_layers = self.backend != "eager" or bool(self.recipe.rules)
        with (
            _raise_own_errors(self.strict),
            dynamo_compat.no_silent_eager(CAPTURES),
            torch_compat.plain_encoder_layers(plain_layers),
            compiler.calling(self.model, args, kwargs),
        ):
            dynamo_compat.wait_for_captures()
            result = function(*args, **kwargs)
        breaks = [reason for reason, count in dynamo_compat.graph_breaks().items() if count > before.get(reason, 0)]
        notes = [f"graph break: {' '.join(reason.split())}" for reason in breaks]
        if compiler.runs == runs:
            notes.append(NO_GRAPH)
            self._count_miss(compiler)
        compiler.breaks += [note for note in notes if note not in compiler.breaks]
        return result

    def _count_miss(self, compiler: GraphCompiler) -> None:
        if self.strict:
            raise CompileError(f"strict: {NO_GRAPH}")
        compiler.misses += 1
        if compiler.misses.bit_count() == 1:  # the first, second, fourth … call: not a line a step
            logger.warning("%s: %s", type(self.model).__name__, NO_GRAPH)

    def follow(self) -> None:
        """Take over the ranges of the model that this one was copied from, while its weights follow that one's."""
        if self._following is not None and not self._following.refresh(self.store, self.model.parameters()):
            self._following = None

    def follow_source(self, source: "Session") -> None:
        """Start with the ranges of another session, and follow them while others average the weights."""
        self.store.load_state_dict(source.store.state_dict())
        self._following = Following(source.store, self.store, self.model.parameters())

    def load_ranges(self, states: Mapping[str, Any]) -> None:
        """Take ranges out of a checkpoint; they follow no other model any more."""
        self._following = None
        self.store.load_state_dict(states)
        if self.recipe.has_state and not states:
            logger.warning("the checkpoint holds no ranges of recipe %r: they start anew", self.recipe.name)

    def get_ranges(self) -> dict[str, torch.Tensor]:
        """Return a copy of the state of every site that keeps one."""
        self.follow()
        return {name: state.detach().clone() for name, state in self.store.states.items()}

    def list_learned(self) -> list[nn.Parameter]:
        """Return the learned ranges, one parameter a site.

        Raises:
            CompileError: the recipe learns ranges, but nothing is captured yet nor loaded.
        """
        specs = [rule.spec for rule in self.recipe.rules if rule.spec is not None and rule.spec.range.is_learned]
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        self.store.learn({spec.range.meaning(spec.format.bits) for spec in specs}, device)
        learned = [state for state in self.store.states.values() if isinstance(state, nn.Parameter)]
        if specs and not learned and not any(compiler.plans for compiler, _ in self._modes.values()):
            raise CompileError("quantizer_parameters: nothing is captured yet; call the model once in train() mode")
        return learned

    def make_plan(self, training: bool) -> QuantPlan:
        """Return the quantizers of the latest capture of each frame.

        Raises:
            CompileError: the model has not been called in that mode.
        """
        compiler = self.get_compiler(training)
        self.follow()
        if not compiler.plans and not compiler.breaks:
            hint = f"; plan(training={not training}) shows {'eval()' if training else 'train()'} mode"
            raise CompileError(
                f"plan: {_explain_missing(training)}{hint if self.get_compiler(not training).plans else ''}"
            )
        plans = [make() for make in compiler.plans.values()]
        empty = bool(self.recipe.rules) and bool(plans) and not any(plan.sites for plan in plans)
        nothing = ["nothing was quantized: no contraction of the model matches a rule"] if empty else []
        ranges = [*self._remark_ranges(plans), *([] if training else self._list_without_range(plans))]
        notes = [*compiler.breaks, *nothing, *_list_unused(compiler.recipe, plans), *ranges]
        return QuantPlan.merge([*plans, QuantPlan(kept=tuple(compiler.outside))], notes)

    def _remark_ranges(self, plans: Sequence[QuantPlan]) -> list[str]:
        """Return remarks of the ranges of the past: how often they were too small."""
        states = self.store.states
        sites = {site.name: site.spec.range for plan in plans for site in plan.sites if site.name in states}
        remarks = {name: estimator.remark(states[name]) for name, estimator in sites.items()}
        return [f"{name}: {text}" for name, text in remarks.items() if text]

    def _list_without_range(self, plans: Sequence[QuantPlan]) -> list[str]:
        """Return a note on tensors that evaluation quantizes by their own range, since training quantizes none."""
        states = self.store.states
        kept = [site.name for plan in plans for site in plan.sites if site.spec.range.has_state]
        new = [name for name in dict.fromkeys(kept) if name not in states] if states else []
        none = "no range from training, which quantizes no such tensor: each call takes the tensor's own"
        return [f"{', '.join(new)}: {none}"] if new else []

    def make_stages(self, training: bool) -> list[list[Stage]]:
        """Return all stages of each captured graph, made anew from the capture.

        Raises:
            CompileError: no graph of that mode has been captured.
        """
        self.check_captured("stages", training)
        compiler = self.get_compiler(training)
        return [
            run_stages(captured, compiler.recipe, frozen=compiler.frozen, execution=compiler.execution)
            for captured in compiler.captures.values()
        ]

    def check_captured(self, what: str, training: bool) -> None:
        """Raise CompileError, on behalf of `what`, if no graph of that mode has been captured."""
        if not self.get_compiler(training).captures:
            mode = "eval()" if training else "train()"
            other = f"; training={not training} takes the graph of {mode} mode"
            hint = other if self.get_compiler(not training).captures else ""
            raise CompileError(f"{what}: {_explain_missing(training)}{hint}")


def _explain_missing(training: bool) -> str:
    return f"nothing is captured yet; call the model once in {'train()' if training else 'eval()'} mode"


@contextlib.contextmanager
def _raise_own_errors(strict: bool) -> Iterator[None]:
    """Raise errors of Dynamo as our own, chained to Dynamo's."""
    try:
        with dynamo_compat.unwrapped_errors():
            yield
    except dynamo_compat.GRAPH_BREAKS as error:
        if not strict:
            raise
        line = dynamo_graphs.error_line(error)
        raise CompileError(f"strict: graph break: {str(error).splitlines()[0]}{line}") from error
    except dynamo_compat.CAPTURE_LIMIT as error:
        reason = dynamo_compat.latest_recapture()
        raise CompileError(
            f"more than {CAPTURES} captures: each new shape, dtype or Python value among the inputs is captured "
            "anew; call it with fewer different ones (pad to a few shapes, pass numbers as tensors); "
            f"the latest differs in: {reason}"
        ) from error


def _list_unused(recipe: Recipe, plans: Sequence[QuantPlan]) -> list[str]:
    """Return rules that people wrote and that decided nothing; named recipes have rules for parts a model may lack."""
    if recipe.name in recipes.RECIPES:
        return []
    matched = {index for plan in plans for index in plan.matched}
    backward = any(site.role is Role.GRADIENT for plan in plans for site in plan.sites)
    unused = [rule for rule in recipe.unused(matched) if backward or rule.role is not Role.GRADIENT]
    return [f"rule matched nothing: {rule}" for rule in unused] if plans else []
