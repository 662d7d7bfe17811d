"""compile(): the module that a user gets, and the backend of `torch.compile`."""

import contextlib
import copy
import inspect
import os
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import networkx
import torch
from torch import nn
from torch.fx import GraphModule

from qcompiler import recipes
from qcompiler.calling_twin import make_twin
from qcompiler.compiler import dynamo_compat
from qcompiler.compiler.graph_compiler import GraphCompiler
from qcompiler.compiler.network import build_network
from qcompiler.compiler.plan import QuantPlan
from qcompiler.compiler.stages import QUANTIZED, Stage, pick_stages, stage_text
from qcompiler.errors import CompileError
from qcompiler.files import RangeKeys
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.rules import did_you_mean
from qcompiler.recipes.recipe import Recipe
from qcompiler.recipes.saving import SAVINGS, add_saving
from qcompiler.runtime.ranges.store import PREFIX, RangeStore
from qcompiler.session import Session

BACKENDS: Final = ("eager", "inductor")
_OPTIONS: Final = ("recipe", "backend", "strict", "save", "execution")

_C = TypeVar("_C", bound=GraphCompiler)


def compile(  # noqa: A001
    model: nn.Module,
    recipe: str | os.PathLike[str] | Recipe = "hyperblock-int8",
    *,
    backend: str | None = None,
    strict: bool = False,
    save: str | None = None,
    execution: str = "simulate",
) -> "QuantizedModule":
    """Return a drop-in for `model` whose training graph, forward and backward, is quantized by `recipe`.

    It shares the parameters and buffers of the model, and its state_dict keys; each new signature of its inputs is
    captured at its first call. In `eval()` blocks span one sample, so no range depends on batch mates.

    Args:
        model: any module.
        recipe: the name of a recipe, the path of a .yaml file, or a `Recipe`.
        backend: "inductor" compiles (an error if that fails), "eager" runs node by node. None compiles, and if
            that fails runs eagerly, with the reason logged and in `plan()`.
        strict: everything that would stay in float without a rule that says so raises: graph breaks, fused kernels,
            operands without a rule or a legal block, a failed compilation. A recipe without rules asks for nothing.
        save: "int8" or "int4": what norms, activation functions, softmax and fused attention keep for their gradients
            is kept in codes of 8 or 4 bits, rounded stochastically. Outputs stay as they are bit for bit, gradients
            are right on average. None: floats, unless the recipe has rules of the role *saved*.
        execution: "simulate" turns codes back into floats and multiplies those; "integer" multiplies codes as integers
            if a kernel can, and raises if none can in a whole graph; "auto" does so if that is faster. `plan()` lists
            the simulated ones with the reason (docs/integer.md).

    Raises:
        CompileError: the model is not a module, is compiled already (by torch.compile too), or backend, save or
            execution is unknown.
        RecipeError: the recipe is unknown or not valid.
    """
    if isinstance(model, QuantizedModule):
        done = f"the model is compiled already, by recipe {model.recipe.name!r}"
        raise CompileError(f"compile: {done}; compile the model behind it")
    if not isinstance(model, nn.Module):
        raise CompileError(f"compile: got {type(model).__name__}; valid: a torch.nn.Module")
    if dynamo_compat.is_optimized(model):
        raise CompileError("compile: got what torch.compile returned; compile the model behind it, model._orig_mod")
    _check_backend(backend)
    if not isinstance(strict, bool):
        raise CompileError(f"compile: strict: got {strict!r}; valid: True or False")
    _check_save(save)
    return _wrap_model(model, recipes.get(recipe), backend, strict, save, _parse_execution(execution))


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
    save = options.pop("save", None)
    _check_save(save)
    _parse_execution(options.get("execution", "simulate"))
    recipe = add_saving(recipes.get(options.pop("recipe", "hyperblock-int8")), save)
    if recipe.has_state:
        raise CompileError(
            f"recipe {recipe.name!r} keeps ranges between steps, which torch.compile has no place for; "
            "use qcompiler.compile(model, recipe)"
        )
    compiler = GraphCompiler(recipe if torch.is_grad_enabled() else recipe.for_eval(), **options)
    return compiler(module, inputs)


def get_session(what: str, given: object, error: type[Exception] = CompileError) -> Session:
    """Return the session of a compiled module: its model, recipe, captures, plans and ranges.

    There is no attribute of that name: attributes of a compiled module come from the model, which may have a `model` or
    a `session` too.

    Raises:
        error: on behalf of `what`, for anything but a compiled module.
    """
    if not isinstance(given, QuantizedModule):
        raise error(f"{what}: got {type(given).__name__}; valid: what qcompiler.compile returned")
    return given._session


def _wrap_model(
    model: nn.Module,
    recipe: Recipe,
    backend: str | None,
    strict: bool,
    save: str | None = None,
    execution: Execution = Execution.SIMULATE,
) -> "QuantizedModule":
    kind = QuantizedContainer if hasattr(type(model), "__getitem__") else QuantizedModule
    return kind(model, recipe, backend, strict, save, execution)


def _check_save(save: object) -> None:
    if save is not None and save not in SAVINGS:
        raise CompileError(f"compile: save: got {save!r}; valid: {', '.join(SAVINGS)} or None")


def _parse_execution(execution: str) -> Execution:
    if execution not in tuple(Execution):
        hint = did_you_mean(str(execution), tuple(Execution))
        raise CompileError(f"compile: execution: got {execution!r}; valid: {', '.join(Execution)}{hint}")
    return Execution(execution)


def _check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        hint = did_you_mean(str(backend), BACKENDS)
        raise CompileError(f"compile: unknown backend {backend!r}; valid: {', '.join(BACKENDS)} or None{hint}")


class QuantizedModule(nn.Module):
    """A model that trains through its quantized joint graph. Made by `qcompiler.compile`.

    Its parameters, buffers and submodules are the model's own; attributes that it lacks are read and set on the model.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        backend: str | None,
        strict: bool,
        save: str | None = None,
        execution: Execution = Execution.SIMULATE,
    ) -> None:
        object.__setattr__(self, "_model", model)
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, name, getattr(model, name))
        #: the `self` of methods of the model
        self._twin: nn.Module | None = None
        self._session = Session(model, recipe, backend, strict, save, execution)

    @property
    def recipe(self) -> Recipe:
        """The recipe in use."""
        return self._session.recipe

    def use(self, recipe: str | os.PathLike[str] | Recipe) -> "QuantizedModule":
        """Goes on with another recipe: more bits in the last epoch, say (schedule.py). Parameters stay.

        Ranges stay if they mean the same (docs/numbers.md, "Checkpoints"), others start anew. Each recipe is
        captured once: going back to one costs nothing.

        Raises:
            RecipeError: the recipe is unknown or not valid.
        """
        self._session.use(recipes.get(recipe))
        return self

    def training_through(self, make: Callable[[Recipe, bool, RangeStore], _C]) -> contextlib.AbstractContextManager[_C]:
        """While inside, training runs through `make(recipe, strict, store)`; `use` ends it early. Eval is as always."""
        return self._session.training_through(make)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's forward, through the quantized graph of this mode and signature."""
        return self._session.run(args, kwargs)

    def plan(self, *, training: bool = True) -> QuantPlan:
        """Return the quantizers of the latest capture of each frame, in training or in eval mode.

        Raises:
            CompileError: the model has not been called in that mode.
        """
        return self._session.make_plan(training)

    def graph_text(self, *, training: bool = True) -> str:
        """Return the quantized graphs of that mode as text, forward and backward, one after the other.

        Raises:
            CompileError: the model has not been called in that mode.
        """
        self.check_captured("graph_text", training)
        return stage_text(self.stages(training=training), QUANTIZED)

    def stages(self, *, training: bool = True) -> list[list[Stage]]:
        """For each captured graph, that graph as captured, after each pass, and lowered (qcompiler/compiler/stages.py).

        All stages are made anew from the captured graph: looking costs the time of the passes, not looking costs
        nothing.

        Raises:
            CompileError: no graph of that mode has been captured.
        """
        return self._session.make_stages(training)

    def to_networkx(self, *, stage: str = "lowered", training: bool = True) -> "networkx.MultiDiGraph[str]":
        """Return the joint graph of forward and backward, of all captured graphs; docs/inspect.md lists the attributes.

        Args:
            stage: "captured", the name of a pass (the graph after it), or "lowered", the two halves that run.
            training: False for the graph of eval mode.

        Raises:
            CompileError: no graph of that mode has been captured.
            StageError: there is no such stage.
        """
        self.check_captured("to_networkx", training)
        return build_network(pick_stages(self.stages(training=training), stage))

    def check_captured(self, what: str, training: bool) -> None:
        """Raises CompileError, on behalf of `what`, if no graph of that mode has been captured."""
        self._session.check_captured(what, training)

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
        """Return a copy of the state of every site that keeps one; the estimator gives the numbers a meaning."""
        return self._session.get_ranges()

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """The learned ranges, for an optimizer group of their own; one number a site, in the order of `ranges()`.

        These are no parameters of the model: the optimizer of the model does not move them. After each backward under
        DDP the gradients are the mean over ranks. Parameters of a loaded or copied state are there before the first
        call, on the device of the model's parameters, so an optimizer resumes.

        Raises:
            CompileError: the recipe learns ranges, but nothing is captured yet nor loaded: they take their first values
                from the first batch.
        """
        return self._session.list_learned()

    @property
    def qcompiler(self) -> RangeKeys:
        """Return the start of keys of ranges: torch.distributed.checkpoint reads each part of a key as an attribute."""
        return RangeKeys()

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """Return the model's own state_dict; for a recipe that keeps ranges also these, under keys of their own."""
        self._session.follow()
        for before in self._state_dict_pre_hooks.values():
            before(self, prefix, keep_vars)
        states = self._model.state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        states.update({f"{prefix}{key}": state for key, state in self._session.store.state_dict().items()})
        metadata = getattr(states, "_metadata", {}).get(prefix[:-1], {})
        for after in self._state_dict_hooks.values():
            changed = after(self, states, prefix, metadata)
            states = states if changed is None else changed
        return states

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads into the model, and the ranges if there are any.

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
        keys = [key for key in states if key.startswith(f"{prefix}{PREFIX}")]
        self._session.load_ranges({key.removeprefix(prefix): states.pop(key) for key in keys})

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
        is_own = "_session" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name)
        super().__setattr__(name, value) if is_own else setattr(self._model, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedModule":
        own = self._session
        twin = _wrap_model(
            copy.deepcopy(self._model, memo), own.recipe, own.backend, own.strict, own.save, own.execution
        )
        twin._session.follow_source(own)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        own = self._session
        given = (own.recipe, own.backend, own.strict, own.store.state_dict(), own.save, str(own.execution))
        return _restore_module, (self._model, *given)

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


def _restore_module(
    model: nn.Module,
    recipe: Recipe,
    backend: str | None,
    strict: bool,
    ranges: dict[str, torch.Tensor],
    save: str | None = None,
    execution: str = "simulate",
) -> QuantizedModule:
    """Return the module that pickle has stored."""
    module = _wrap_model(model, recipe, backend, strict, save, Execution(execution))
    module._session.store.load_state_dict(ranges)
    return module
