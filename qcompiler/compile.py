"""compile(): the module that a user gets, and the backend that Dynamo calls for each graph of it."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.fx import GraphModule

from qcompiler import recipes, torch_compat
from qcompiler.capture import capture
from qcompiler.lower import lower
from qcompiler.passes.graph import graph_text
from qcompiler.passes.plan import QuantPlan
from qcompiler.passes.rules import Role, did_you_mean
from qcompiler.pipeline import pipeline
from qcompiler.recipe import Recipe
from qcompiler.runtime.state import PREFIX, RangeStore

logger = logging.getLogger("qcompiler")

BACKENDS: Final = ("eager", "inductor")
#: captures of one model (signatures × modes) before an error; Dynamo's own limit of 8 would train on in float
CAPTURES: Final = 64
_OPTIONS: Final = ("recipe", "backend", "strict")
_NO_GRAPH: Final = "no graph was captured: the model ran in float, outside of the compiler"


class CompileError(Exception):
    """The model cannot be compiled as asked; says what was given and what would be valid."""


def compile(  # noqa: A001
    model: nn.Module, recipe: str | Recipe = "hyperblock-int8", *, backend: str | None = None, strict: bool = False
) -> "QuantizedModule":
    """A drop-in for `model` whose training graph, forward and backward, is quantized by `recipe`.

    It shares the parameters and buffers of the model, and its state_dict keys; each new signature of its inputs is
    captured at its first call. In `eval()` blocks span one sample, so no result depends on its batch mates.

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
    return QuantizedModule(model, recipes.get(recipe), backend, strict)


def _check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        hint = did_you_mean(str(backend), BACKENDS)
        raise CompileError(f"compile: unknown backend {backend!r}; valid: {', '.join(BACKENDS)} or None{hint}")


class GraphCompiler:
    """The backend that Dynamo calls: one graph in, one running step out."""

    def __init__(
        self,
        recipe: Recipe,
        backend: str | None = None,
        strict: bool = False,
        *,
        store: RangeStore | None = None,
        frozen: bool = False,
    ) -> None:
        self.recipe = recipe
        self.backend = backend
        self.strict = strict
        #: ranges of the past, shared by all graphs of a model
        self.store = RangeStore(torch_compat.ENGINE) if store is None else store
        #: True in eval mode, where ranges do not move
        self.frozen = frozen
        #: frame → the plan of its latest capture
        self.plans: dict[int | None, Callable[[], QuantPlan]] = {}
        #: frame → the graph behind it, after the passes and before the partition, as text
        self.texts: dict[int | None, str] = {}
        #: what ran outside of the captured graphs, as notes for the plan
        self.breaks: list[str] = []

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        captured = capture(module, inputs)
        pipeline(self.recipe, frozen=self.frozen)(captured.module)
        plan = QuantPlan.of(captured.module)
        rows = "; ".join(f"{kept.name} in {kept.consumer}: {kept.reason}" for kept in plan.kept if not kept.asked)
        if self.strict and self.recipe.rules and rows:
            raise CompileError(f"strict: left in float: {rows}")
        frame = torch_compat.frame_id()
        self.texts[frame] = graph_text(captured.module)
        lowered = lower(captured, "inductor" if self.strict and self.backend is None else self.backend, self.store)
        self.plans[frame] = lambda: plan.with_run(lowered.saved_bytes, lowered.saved_code_bytes, lowered.notes)
        return lowered.step


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
        self.recipe = recipe
        self._options = (backend, strict)
        self._store = RangeStore(torch_compat.ENGINE)
        self._compilers = {
            mode: GraphCompiler(rules, backend, strict, store=self._store, frozen=not mode)
            for mode, rules in ((True, recipe), (False, recipe.for_eval()))
        }
        self._functions = {
            mode: torch_compat.compile_with(model, compiler, fullgraph=strict)
            for mode, compiler in self._compilers.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, through the quantized graph of this mode and signature."""
        backend, strict = self._options
        compiler, before = self._compilers[self.training], torch_compat.graph_breaks()
        plain_layers = backend != "eager" or bool(self.recipe.rules)
        with (
            _own_errors(strict),
            torch_compat.no_silent_eager(CAPTURES),
            torch_compat.plain_encoder_layers(plain_layers),
        ):
            result = self._functions[self.training](*args, **kwargs)
        breaks = [reason for reason, count in torch_compat.graph_breaks().items() if count > before.get(reason, 0)]
        notes = [f"graph break: {' '.join(reason.split())}" for reason in breaks]
        if not compiler.plans:
            notes.append(_NO_GRAPH)
            if strict:
                raise CompileError(f"strict: {_NO_GRAPH}")
            if _NO_GRAPH not in compiler.breaks:
                logger.warning(_NO_GRAPH)
        compiler.breaks += [note for note in notes if note not in compiler.breaks]
        return result

    def plan(self, *, training: bool = True) -> QuantPlan:
        """The quantizers of the latest capture of each frame, in training or in eval mode.

        Raises:
            CompileError: the model has not been called in that mode.
        """
        compiler = self._compilers[training]
        if not compiler.plans and not compiler.breaks:
            mode = "train()" if training else "eval()"
            raise CompileError(f"plan: nothing is captured yet; call the model once in {mode} mode")
        plans = [make() for make in compiler.plans.values()]
        return QuantPlan.merge(plans, [*compiler.breaks, *_unused(compiler.recipe, plans)])

    def graph_text(self, *, training: bool = True) -> str:
        """The quantized graphs of that mode as text, forward and backward, one after the other."""
        return "\n".join(self._compilers[training].texts.values())

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
        return {name: state.detach().clone() for name, state in self._store.states.items()}

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """The learned ranges, for an optimizer group of their own; one number a site, in the order of `ranges()`.

        They are no parameters of the model: its own optimizer does not move them. Under DDP each rank moves its own.

        Raises:
            CompileError: the recipe learns ranges, but nothing is captured yet: they take their first values from the
                first batch.
        """
        learned = [state for state in self._store.states.values() if isinstance(state, nn.Parameter)]
        learns = any(rule.spec is not None and rule.spec.range.is_learned for rule in self.recipe.rules)
        if learns and not learned and not any(compiler.plans for compiler in self._compilers.values()):
            raise CompileError("quantizer_parameters: nothing is captured yet; call the model once in train() mode")
        return learned

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The model's own state_dict; for a recipe that keeps ranges also these, under keys of their own."""
        states = self._model.state_dict(*args, prefix=prefix, **kwargs)
        states.update({f"{prefix}{key}": state for key, state in self._store.state_dict().items()})
        return states

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads into the model, and the ranges where there are any.

        A checkpoint without ranges loads as strictly as ever; they then start anew, and the log says so.
        """
        rest = dict(state_dict)
        self._load_ranges(rest, "")
        return self._model.load_state_dict(rest, *args, **kwargs)

    def _load_ranges(self, states: dict[str, Any], prefix: str) -> None:
        """Takes the ranges out of a checkpoint."""
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
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = "_functions" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name)
        super().__setattr__(name, value) if is_own else setattr(self._model, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedModule":
        twin = QuantizedModule(copy.deepcopy(self._model, memo), self.recipe, *self._options)
        twin._store.load_state_dict(self._store.state_dict())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._model, self.recipe, *self._options, self._store.state_dict())

    def extra_repr(self) -> str:
        """Names the recipe when the module is printed."""
        return f"recipe={self.recipe.name!r}"


def _restore(
    model: nn.Module, recipe: Recipe, backend: str | None, strict: bool, ranges: dict[str, torch.Tensor]
) -> QuantizedModule:
    """What pickle calls."""
    module = QuantizedModule(model, recipe, backend, strict)
    module._store.load_state_dict(ranges)
    return module


@contextlib.contextmanager
def _own_errors(strict: bool) -> Iterator[None]:
    """Raises what Dynamo raises for us as our own errors, chained to Dynamo's."""
    try:
        with torch_compat.unwrapped_errors():
            yield
    except torch_compat.GRAPH_BREAKS as error:
        if not strict:
            raise
        raise CompileError(f"strict: graph break: {str(error).splitlines()[0]}") from error
    except torch_compat.CAPTURE_LIMIT as error:
        raise CompileError(
            f"more than {CAPTURES} captures: each new shape, dtype or Python value among the inputs is captured "
            "anew; call it with fewer different ones (pad to a few shapes, pass numbers as tensors)"
        ) from error


def _unused(recipe: Recipe, plans: Sequence[QuantPlan]) -> list[str]:
    matched = {index for plan in plans for index in plan.matched}
    backward = any(site.role is Role.GRADIENT for plan in plans for site in plan.sites)
    unused = [rule for rule in recipe.unused(matched) if backward or rule.role is not Role.GRADIENT]
    return [f"rule matched nothing: {rule}" for rule in unused] if plans else []
