"""The MODEL of the command line: from `module:callable`, a file or a transformers config to a captured model."""

import contextlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn

import qcompiler
from qcompiler import recipes
from qcompiler.compiler import torch_compat
from qcompiler.errors import in_short, is_own
from qcompiler.runtime.errors import QCompilerError

#: batch and length of the tokens that a transformers model is captured with
_TOKENS: Final = (2, 32)


class ModelError(QCompilerError, ValueError):
    """MODEL leads to no model, or to one without inputs; names the given and a valid value."""


@contextlib.contextmanager
def told(what: str, again: Callable[[], Any] | None = None) -> Iterator[None]:
    """Errors of the user's code name the owner; errors of this project pass unchanged.

    Args:
        what: the owner of the code that runs inside, and the arguments.
        again: the same without the compiler, whose own words about an error are long: the error of this call is told.
            Without such an error the compiler is the cause, and the first error passes.

    Raises:
        ModelError: something else than our own exceptions was raised.
    """
    try:
        with torch_compat.without_error_log():
            yield
    except Exception as error:
        found = error if again is None else _raised(again)
        if is_own(error) or found is None:
            raise
        raise ModelError(f"{what}: {in_short(found)}") from found


def _raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def describe(model: str, **options: Any) -> str:
    """`model 'mynet.py:Net', --input '4,8'`: the model of a command, and the options with an influence."""
    given = {name: [value] if isinstance(value, str) else value or [] for name, value in options.items()}
    return ", ".join([f"model {model!r}", *(f"--{name} {one!r}" for name, values in given.items() for one in values)])


def captured(
    model: str, recipe: str, inputs: Sequence[str] = (), *, training: bool = True
) -> qcompiler.QuantizedModule:
    """The model of `compiled`, called once, so that its graphs are there.

    Args:
        training: False captures the graph of eval mode.
    """
    from qcompiler.module import get_session

    qmodel, arguments = compiled(model, recipe, inputs)
    qmodel.train(training)
    with torch.set_grad_enabled(training):
        args, kwargs = as_call(arguments)
        with told(describe(model, input=inputs), lambda: get_session("plan", qmodel).model(*args, **kwargs)):
            qmodel(*args, **kwargs)
    return qmodel


def as_call(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a model, a tensor, a tuple or a dict, as arguments (by position, by keyword)."""
    if isinstance(arguments, torch.Tensor):
        return (arguments,), {}
    return ((), arguments) if isinstance(arguments, dict) else (tuple(arguments), {})


def compiled(
    model: str, recipe: str, inputs: Sequence[str] = (), checkpoint: str | None = None, *, optional: bool = False
) -> tuple[qcompiler.QuantizedModule, Any]:
    """(the model that a text names, compiled by a recipe, on the CPU; its inputs, a tuple or a dict).

    Args:
        model: `module:callable`, `path.py:callable`, or the type of a transformers config.
        recipe: a name, or the path of a .yaml file.
        inputs: shapes, `8,3,32,32` or `4,16:int64`, for a callable that gives no inputs itself.
        checkpoint: a file of `torch.save` with the `state_dict()` of the compiled model, alone or under "model".
        optional: the inputs may be None, if batches come from elsewhere.

    Raises:
        ModelError: the text names no model, there are no inputs, or one is not valid; the checkpoint is none of it.
        RecipeError: the recipe is unknown or not valid.
    """
    recipes.get(recipe)  # quick refusals come first
    made, arguments = plain(model, inputs, optional=optional)
    qmodel = qcompiler.compile(made, recipe, backend="eager")
    if checkpoint is not None:
        with told(f"--checkpoint {checkpoint}"):
            qmodel.load_state_dict(read_state(checkpoint))
    return qmodel, arguments


def plain(
    model: str, inputs: Sequence[str] = (), checkpoint: str | None = None, *, optional: bool = False
) -> tuple[nn.Module, Any]:
    """(the model that a text names, its inputs) as `compiled`, in float. Random numbers are the same in every process.

    Raises:
        ModelError: the text names no model, there are no inputs, or one is not valid.
    """
    torch.manual_seed(0)
    given = tuple(parse_input(text) for text in inputs)
    made, own = load(model)
    arguments = given or own
    if arguments is None and not optional:
        raise ModelError(f"model {model!r}: it gives no inputs; add --input SHAPE, or return (model, inputs)")
    if checkpoint is not None:
        with told(f"--checkpoint {checkpoint}"):
            made.load_state_dict(read_state(checkpoint))
    return made, arguments


def read_state(checkpoint: str) -> Any:
    """The state_dict in a file of `torch.save`: alone, or under "model".

    Raises:
        ModelError: the file holds something else, or no tensor.
    """
    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError:
        raise  # it names the file
    except Exception as error:  # of many types; torch advises to load it with weights_only=False, which runs its code
        valid = "one that holds tensors and plain values alone"
        raise ModelError(f"--checkpoint {checkpoint}: not a whole file of torch.save; valid: {valid}") from error
    state = held.get("model", held) if isinstance(held, dict) else held
    if not isinstance(state, dict):
        raise ModelError(
            f'--checkpoint {checkpoint}: got {type(held).__name__}; valid: a state_dict, or {{"model": it}}'
        )
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        got = f"a dict of {', '.join(map(repr, state))} without a tensor" if state else "an empty dict"
        raise ModelError(f"--checkpoint {checkpoint}: got {got}; valid: the state_dict() of the trained model")
    return state


def load(text: str) -> tuple[nn.Module, Any]:
    """(model, its own inputs or None) of a MODEL.

    Raises:
        ModelError: the text leads to no model.
    """
    if ":" not in text and not text.endswith(".py"):
        return _transformers(text)
    found = named(text)
    with told(f"model {text!r}"):
        made = found() if callable(found) and not isinstance(found, nn.Module) else found
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {text!r}: got {type(model).__name__}; valid: a torch.nn.Module, or (module, inputs)")
    return model, (inputs,) if isinstance(inputs, torch.Tensor) else inputs


def named(text: str, what: str = "model") -> Any:
    """Return the object that `module:name` or `path.py:name` stands for.

    Args:
        text: as given.
        what: the purpose, in the words of errors.

    Raises:
        ModelError: the text has no colon, or there is no such module, file or name.
    """
    place, colon, name = text.rpartition(":")
    if not colon and text.endswith(".py"):
        names = _callables(_module(text, f"{what} {text!r}"))
        valid = ", ".join(f"{text}:{name}" for name in names)
        raise ModelError(f"{what} {text!r}: got no colon; valid: {valid or 'path.py:name'}")
    if not (place and name):
        missing = "no colon" if not colon else "nothing behind the colon" if place else "nothing in front of the colon"
        raise ModelError(f"{what} {text!r}: got {missing}; valid: module:name, path.py:name")
    found = module = _module(place, f"{what} {text!r}")
    for part in name.split("."):
        if not hasattr(found, part):
            raise ModelError(
                f"{what} {text!r}: {place} has no {name!r}; valid: {', '.join(_callables(module)) or 'none'}"
            )
        found = getattr(found, part)
    return found


def parse_input(text: str) -> torch.Tensor:
    """`8,3,32,32` → normal numbers of that shape; `4,16:int64` → zeros and ones of that type.

    Raises:
        ModelError: the shape or the type is not valid.
    """
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
        if not isinstance(dtype, torch.dtype) or min(shape) < 0:
            raise ValueError
        _random([0], dtype)
    except (ValueError, RuntimeError):  # RuntimeError: types without arithmetic, such as int3
        raise ModelError(f"--input: got {text!r}; valid: 8,3,32,32 or 4,16:int64") from None
    try:
        return _random(shape, dtype)
    except (RuntimeError, TypeError, OverflowError, MemoryError):
        size = math.prod(shape) * dtype.itemsize
        raise ModelError(f"--input: got {text!r}, which needs {size:,} bytes: more than can be allocated") from None


def _random(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.randint(0, 2, shape).to(dtype)


def _module(place: str, what: str) -> ModuleType:
    if place.endswith(".py") or os.sep in place:
        return _file(Path(place), what)
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return importlib.import_module(place)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{place}.".startswith(f"{missing}."):  # something inside of the module failed
            raise ModelError(f"{what}: {in_short(error)}") from error
        raise ModelError(f"{what}: there is no module {place!r}; valid: module:callable, path.py:callable") from None
    finally:
        sys.path.remove(os.getcwd())


def _file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"{what}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{what}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))  # as `python path.py` does
    try:
        with told(what):
            spec.loader.exec_module(module)
    except ModelError:
        del sys.modules[path.stem]  # half of it
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def _callables(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value) or _is_model(value, module)]


def _is_model(value: Any, module: ModuleType) -> bool:
    is_class = inspect.isclass(value) and issubclass(value, nn.Module)
    return isinstance(value, nn.Module) or (is_class and value.__module__ == module.__name__)


def _transformers(name: str) -> tuple[nn.Module, Any]:
    """The model of a transformers config with its default sizes and random weights: nothing is downloaded."""
    valid = "module:callable, path.py:callable, or the type of a transformers config"
    try:
        transformers = importlib.import_module("transformers")  # an optional library
    except ImportError:
        missing = "transformers is not installed (pip install 'qcompiler[text]')"
        raise ModelError(f"model {name!r}: got no colon and {missing}; valid: {valid}") from None
    if name not in transformers.CONFIG_MAPPING:
        raise ModelError(f"model {name!r}: transformers has no such config; valid: {valid}")
    config = transformers.CONFIG_MAPPING[name]()
    config.use_cache = False
    model = transformers.AutoModel.from_config(config)
    if model.main_input_name != "input_ids":
        return model, None
    return model, (torch.randint(0, config.vocab_size, _TOKENS),)
