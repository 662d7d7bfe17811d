"""compile(): the module that a user gets, and the backend that Dynamo calls for each graph of it."""

import contextlib
import copy
import inspect
import logging
import os
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import networkx
import torch
from torch import nn
from torch.fx import GraphModule

from qcompiler import dynamo_compat, recipes, torch_compat
from qcompiler.calling_twin import make_twin
from qcompiler.errors import CompileError
from qcompiler.following import Following
from qcompiler.graph_compiler import GraphCompiler
from qcompiler.naming import ModelNames
from qcompiler.passes.ir.plan import QuantPlan
from qcompiler.passes.rules import Role, did_you_mean
from qcompiler.recipe import Recipe
from qcompiler.runtime.state import PREFIX, RangeStore
from qcompiler.sight.network import network
from qcompiler.sight.stages import QUANTIZED, Stage, pick, run_stages, stage_text

logger = logging.getLogger("qcompiler")

BACKENDS: Final = ("eager", "inductor")
#: captures of one model (signatures × modes) before an error; Dynamo's own limit of 8 would train on in float
CAPTURES: Final = 64
_OPTIONS: Final = ("recipe", "backend", "strict")
NO_GRAPH: Final = (
    "no graph ran: a call of the model was in float, outside of the compiler (inside of torch.func or a mode that sees "
    "every operator, with sparse inputs, or with layers that Dynamo does not capture)"
)


def compile(  # noqa: A001
    model: nn.Module,
    recipe: str | os.PathLike[str] | Recipe = "hyperblock-int8",
    *,
    backend: str | None = None,
    strict: bool = False,
) -> "QuantizedModule":
    """A drop-in for `model` whose training graph, forward and backward, is quantized by `recipe`.

    It shares the parameters and buffers of the model, and its state_dict keys; each new signature of its inputs is
    captured at its first call. In `eval()` blocks span one sample, so no range depends on batch mates.

    Args:
        model: any module.
        recipe: the name of a recipe, the path of a .yaml file, or a `Recipe`.
        backend: "inductor" compiles (an error where that fails), "eager" runs node by node. None compiles, and where
            that fails runs eagerly, with the reason logged and in `plan()`.
        strict: everything that would stay in float without a rule that says so raises: graph breaks, fused kernels,
            operands without a rule or a legal block, a failed compilation. A recipe without rules asks for nothing.

    Raises:
        CompileError: the model is not a module, is compiled already, or the backend is unknown.
        RecipeError: the recipe is unknown or not valid.
    """
    if isinstance(model, QuantizedModule):
        done = f"the model is compiled already, by recipe {model.recipe.name!r}"
        raise CompileError(f"compile: {done}; compile the model behind it")
    if not isinstance(model, nn.Module):
        raise CompileError(f"compile: got {type(model).__name__}; valid: a torch.nn.Module")
    _check_backend(backend)
    if not isinstance(strict, bool):
        raise CompileError(f"compile: strict: got {strict!r}; valid: True or False")
    return _wrap(model, recipes.get(recipe), backend, strict)


def check_compiled(what: str, given: object, error: type[Exception] = CompileError) -> None:
    """Raises `error`, on behalf of `what`, for anything but a compiled model."""
    if not isinstance(given, QuantizedModule):
        raise error(f"{what}: got {type(given).__name__}; valid: what qcompiler.compile returned")


def _wrap(model: nn.Module, recipe: Recipe, backend: str | None, strict: bool) -> "QuantizedModule":
    kind = QuantizedContainer if hasattr(type(model), "__getitem__") else QuantizedModule
    return kind(model, recipe, backend, strict)


def _check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        hint = did_you_mean(str(backend), BACKENDS)
        raise CompileError(f"compile: unknown backend {backend!r}; valid: {', '.join(BACKENDS)} or None{hint}")


_C = TypeVar("_C", bound=GraphCompiler)


def dynamo_backend(module: GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None) -> Any:
    """`torch.compile(model, backend="qcompiler", options={"recipe": …})`: the same path for users of torch.compile.

    Without gradients (`torch.no_grad`) blocks span one sample, as in `eval()` of a compiled module.
    """
    options = dict(options or {})
    for name in options:
        if name not in _OPTIONS:
            hint = did_you_mean(name, _OPTIONS)
            raise CompileError(f"options: unknown option {name!r}; valid: {', '.join(_OPTIONS)}{hint}")
    _check_backend(options.get("backend"))
    recipe = recipes.get(options.pop("recipe", "hyperblock-int8"))
    if recipe.has_state:
        raise CompileError(
            f"recipe {recipe.name!r} keeps ranges between steps, which torch.compile has no place for; "
            "use qcompiler.compile(model, recipe)"
        )
    compiler = GraphCompiler(recipe if torch.is_grad_enabled() else recipe.for_eval(), **options)
    return compiler(module, inputs)


class QuantizedModule(nn.Module):
    """A model that trains through its quantized joint graph. Made by `qcompiler.compile`.

    Its parameters, buffers and submodules are the model's own; attributes that it lacks are read and set on the model.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, backend: str | None, strict: bool) -> None:
        object.__setattr__(self, "_model", model)
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, name, getattr(model, name))
        self._options = (backend, strict)
        self._store = RangeStore(torch_compat.ENGINE)
        self._names = ModelNames(model)
        #: of a copy: the ranges that it takes over while others average its weights
        self._following: Following | None = None
        #: what methods of the model see as `self`
        self._twin: nn.Module | None = None
        #: what `training_through` has made
        self._through: dict[tuple[Recipe, Any], tuple[Any, Callable[..., Any]]] = {}
        #: recipe → training and eval mode, each with its compiler and the function that Dynamo guards
        self._made: dict[Recipe, dict[bool, tuple[GraphCompiler, Callable[..., Any]]]] = {}
        self.use(recipe)

    def use(self, recipe: str | os.PathLike[str] | Recipe) -> "QuantizedModule":
        """Goes on with another recipe: more bits in the last epoch, say (schedule.py). Parameters stay.

        Ranges stay where they mean the same (docs/numbers.md, "Checkpoints"), others start anew. Each recipe is
        captured once: going back to one costs nothing.

        Raises:
            RecipeError: the recipe is unknown or not valid.
        """
        recipe = recipes.get(recipe)
        if recipe not in self._made:
            self._made[recipe] = {True: self._make(recipe, frozen=False), False: self._make(recipe, frozen=True)}
        self.recipe = recipe
        modes = self._made[recipe]
        self._compilers = {mode: compiler for mode, (compiler, _) in modes.items()}
        self._functions = {mode: function for mode, (_, function) in modes.items()}
        return self

    def _make(self, recipe: Recipe, *, frozen: bool) -> tuple[GraphCompiler, Callable[..., Any]]:
        """The compiler of one mode, and the model behind it; `frozen` is eval mode."""
        backend, strict = self._options
        dynamo_compat.trace_checkpoint_sequential()
        rules = recipe.for_eval() if frozen else recipe
        compiler = GraphCompiler(rules, backend, strict, store=self._store, frozen=frozen, names=self._names)
        return compiler, dynamo_compat.compile_with(self._model, compiler, compiler.give_up, fullgraph=strict)

    @contextlib.contextmanager
    def training_through(self, make: Callable[[Recipe, bool, RangeStore], _C]) -> Iterator[_C]:
        """While inside, training runs through `make(recipe, strict, store)`; `use` ends it early. Eval is as always.

        What `make` gave for a recipe is kept, so that coming back to it captures nothing.
        """
        if (self.recipe, make) not in self._through:
            new = make(self.recipe, self._options[1], self._store)
            new.names = self._names
            function = dynamo_compat.compile_with(self._model, new, new.give_up, fullgraph=new.strict)
            self._through[self.recipe, make] = (new, function)
        compiler, function = self._through[self.recipe, make]
        before, ours = (self._compilers, self._functions), {**self._functions, True: function}
        self._compilers, self._functions = {**self._compilers, True: compiler}, ours
        try:
            yield compiler
        finally:
            if self._functions is ours:
                self._compilers, self._functions = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, through the quantized graph of this mode and signature."""
        backend, strict = self._options
        compiler, before = self._compilers[self.training], dynamo_compat.graph_breaks()
        runs = compiler.runs
        self._follow()
        plain_layers = backend != "eager" or bool(self.recipe.rules)
        with (
            _own_errors(strict),
            dynamo_compat.no_silent_eager(CAPTURES),
            torch_compat.plain_encoder_layers(plain_layers),
            compiler.calling(self._model, args, kwargs),
        ):
            result = self._functions[self.training](*args, **kwargs)
        breaks = [reason for reason, count in dynamo_compat.graph_breaks().items() if count > before.get(reason, 0)]
        notes = [f"graph break: {' '.join(reason.split())}" for reason in breaks]
        if compiler.runs == runs:
            notes.append(NO_GRAPH)
            if strict:
                raise CompileError(f"strict: {NO_GRAPH}")
            compiler.misses += 1
            if compiler.misses.bit_count() == 1:  # the first, second, fourth … call: not a line a step
                logger.warning("%s: %s", type(self._model).__name__, NO_GRAPH)
        compiler.breaks += [note for note in notes if note not in compiler.breaks]
        return result

    def _follow(self) -> None:
        """Takes over the ranges of the model that this one was copied from, while its weights follow that one's."""
        if self._following is not None and not self._following.refresh(self._store, self._model.parameters()):
            self._following = None

    def plan(self, *, training: bool = True) -> QuantPlan:
        """The quantizers of the latest capture of each frame, in training or in eval mode.

        Raises:
            CompileError: the model has not been called in that mode.
        """
        compiler = self._compilers[training]
        self._follow()
        if not compiler.plans and not compiler.breaks:
            raise CompileError(f"plan: {_not_called(training)}")
        plans = [make() for make in compiler.plans.values()]
        empty = bool(self.recipe.rules) and bool(plans) and not any(plan.sites for plan in plans)
        nothing = ["nothing was quantized: no product of the model matches a rule"] if empty else []
        notes = [*compiler.breaks, *nothing, *_unused(compiler.recipe, plans), *self._remarks(plans)]
        return QuantPlan.merge([*plans, QuantPlan(kept=tuple(compiler.outside))], notes)

    def _remarks(self, plans: Sequence[QuantPlan]) -> list[str]:
        """What the ranges of the past have to say: how often they were too small."""
        held = self._store.states
        sites = {site.name: site.spec.range for plan in plans for site in plan.sites if site.name in held}
        remarks = {name: estimator.remark(held[name]) for name, estimator in sites.items()}
        return [f"{name}: {text}" for name, text in remarks.items() if text]

    def graph_text(self, *, training: bool = True) -> str:
        """The quantized graphs of that mode as text, forward and backward, one after the other.

        Raises:
            CompileError: the model has not been called in that mode.
        """
        self.check_captured("graph_text", training)
        frames = self.stages(training=training)
        return stage_text(frames, QUANTIZED)

    def stages(self, *, training: bool = True) -> list[list[Stage]]:
        """For each captured graph, that graph as captured, after each pass, and lowered (qcompiler/sight/stages.py).

        They are made anew from what was captured: looking costs the time of the passes, not looking costs nothing.

        Raises:
            CompileError: no graph of that mode has been captured.
        """
        self.check_captured("stages", training)
        compiler = self._compilers[training]
        return [
            run_stages(captured, compiler.recipe, frozen=compiler.frozen) for captured in compiler.captures.values()
        ]

    def to_networkx(self, *, stage: str = "lowered", training: bool = True) -> "networkx.MultiDiGraph[str]":
        """The joint graph of forward and backward, of all captured graphs; docs/sight.md lists the attributes.

        Args:
            stage: "captured", the name of a pass (the graph after it), or "lowered", the two halves that run.
            training: False for the graph of eval mode.

        Raises:
            CompileError: no graph of that mode has been captured.
            StageError: there is no such stage.
        """
        self.check_captured("to_networkx", training)
        return network(pick(self.stages(training=training), stage))

    def check_captured(self, what: str, training: bool) -> None:
        """Raises CompileError, on behalf of `what`, where no graph of that mode has been captured."""
        if not self._compilers[training].captures:
            mode = "eval()" if training else "train()"
            other = f"; training={not training} takes the graph of {mode} mode"
            hint = other if self._compilers[not training].captures else ""
            raise CompileError(f"{what}: {_not_called(training)}{hint}")

    @property
    def training(self) -> bool:
        """The model's own flag."""
        return bool(self._model.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "_modules" in self.__dict__ and self.__dict__["_modules"] is self._model._modules:
            self._model.training = mode

    def train(self, mode: bool = True) -> "QuantizedModule":
        """Sets the model's mode; the model's own `train` decides, as always."""
        self._model.train(mode)
        return self

    def ranges(self) -> dict[str, torch.Tensor]:
        """A copy of the state of every site that keeps one; its estimator says what the numbers mean."""
        self._follow()
        return {name: state.detach().clone() for name, state in self._store.states.items()}

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """The learned ranges, for an optimizer group of their own; one number a site, in the order of `ranges()`.

        They are no parameters of the model: its own optimizer does not move them. After each backward under
        DDP their gradients are the mean over ranks. Those of a loaded or copied state are there before the first call,
        on the device of the model's parameters, so an optimizer resumes as it was.

        Raises:
            CompileError: the recipe learns ranges, but nothing is captured yet nor loaded: they take their first values
                from the first batch.
        """
        specs = [rule.spec for rule in self.recipe.rules if rule.spec is not None and rule.spec.range.is_learned]
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
        self._store.learn({spec.range.meaning(spec.format.bits) for spec in specs}, device)
        learned = [state for state in self._store.states.values() if isinstance(state, nn.Parameter)]
        if specs and not learned and not any(compiler.plans for compiler in self._compilers.values()):
            raise CompileError("quantizer_parameters: nothing is captured yet; call the model once in train() mode")
        return learned

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """The model's own state_dict; for a recipe that keeps ranges also these, under keys of their own."""
        self._follow()
        for before in self._state_dict_pre_hooks.values():
            before(self, prefix, keep_vars)
        states = self._model.state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        states.update({f"{prefix}{key}": state for key, state in self._store.state_dict().items()})
        metadata = getattr(states, "_metadata", {}).get(prefix[:-1], {})
        for after in self._state_dict_hooks.values():
            changed = after(self, states, prefix, metadata)
            states = states if changed is None else changed
        return states

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads into the model, and the ranges where there are any.

        A checkpoint without ranges loads as strictly as ever; they then start anew, and the log says so.
        """
        states, metadata = dict(state_dict), getattr(state_dict, "_metadata", {}).get("", {})
        errors: list[str] = []
        for before in self._load_state_dict_pre_hooks.values():
            before(states, "", metadata, strict, [], [], errors)
        if errors:
            raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(self).__name__}:", *errors]))
        rest = OrderedDict((key, state) for key, state in states.items() if not key.startswith(PREFIX))
        if hasattr(state_dict, "_metadata"):
            rest._metadata = state_dict._metadata  # type: ignore[attr-defined]
        result = self._model.load_state_dict(rest, strict, assign)  # first, since that may refuse the checkpoint
        self._load_ranges(states, "")
        for after in self._load_state_dict_post_hooks.values():
            after(self, result)
        return result

    def _load_ranges(self, states: dict[str, Any], prefix: str) -> None:
        """Takes the ranges out of a checkpoint."""
        self._following = None
        keys = [key for key in states if key.startswith(f"{prefix}{PREFIX}")]
        self._store.load_state_dict({key.removeprefix(prefix): states.pop(key) for key in keys})
        if self.recipe.has_state and not keys:
            logger.warning("the checkpoint holds no ranges of recipe %r: they start anew", self.recipe.name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._load_ranges(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> "QuantizedModule":
        self._model._apply(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_model"], name)
        if not inspect.ismethod(found) or found.__self__ is not self.__dict__["_model"]:
            return found
        # training_step, generate …: inside of them `self(x)` is a call of this module
        if self._twin is None:
            self._twin = make_twin(self._model, self.__call__)
        return types.MethodType(found.__func__, self._twin)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = "_functions" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name)
        super().__setattr__(name, value) if is_own else setattr(self._model, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedModule":
        twin = _wrap(copy.deepcopy(self._model, memo), self.recipe, *self._options)
        twin._store.load_state_dict(self._store.state_dict())
        twin._following = Following(self._store, twin._store, twin._model.parameters())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._model, self.recipe, *self._options, self._store.state_dict())

    def extra_repr(self) -> str:
        """Names the recipe when the module is printed."""
        return f"recipe={self.recipe.name!r}"


class QuantizedContainer(QuantizedModule):
    """A quantized module that is indexed, counted and walked as its model is: `qmodel[-1]`, `len(qmodel)`."""

    def __getitem__(self, index: Any) -> Any:
        return self._model[index]

    def __len__(self) -> int:
        return len(self._model)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._model)


def _restore(
    model: nn.Module, recipe: Recipe, backend: str | None, strict: bool, ranges: dict[str, torch.Tensor]
) -> QuantizedModule:
    """What pickle calls."""
    module = _wrap(model, recipe, backend, strict)
    module._store.load_state_dict(ranges)
    return module


def _not_called(training: bool) -> str:
    return f"nothing is captured yet; call the model once in {'train()' if training else 'eval()'} mode"


@contextlib.contextmanager
def _own_errors(strict: bool) -> Iterator[None]:
    """Raises what Dynamo raises for us as our own errors, chained to Dynamo's."""
    try:
        with dynamo_compat.unwrapped_errors():
            yield
    except dynamo_compat.GRAPH_BREAKS as error:
        if not strict:
            raise
        raise CompileError(
            f"strict: graph break: {str(error).splitlines()[0]}{dynamo_compat.error_line(error)}"
        ) from error
    except dynamo_compat.CAPTURE_LIMIT as error:
        reason = dynamo_compat.latest_recapture()
        raise CompileError(
            f"more than {CAPTURES} captures: each new shape, dtype or Python value among the inputs is captured "
            "anew; call it with fewer different ones (pad to a few shapes, pass numbers as tensors); "
            f"the latest differs in: {reason}"
        ) from error


def _unused(recipe: Recipe, plans: Sequence[QuantPlan]) -> list[str]:
    """The rules that people wrote and that decided nothing; named recipes have rules for parts a model may lack."""
    if recipe.name in recipes.RECIPES:
        return []
    matched = {index for plan in plans for index in plan.matched}
    backward = any(site.role is Role.GRADIENT for plan in plans for site in plan.sites)
    unused = [rule for rule in recipe.unused(matched) if backward or rule.role is not Role.GRADIENT]
    return [f"rule matched nothing: {rule}" for rule in unused] if plans else []
