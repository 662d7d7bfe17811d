"""A model whose methods call the quantized model: training_step, generate, closures and generators of theirs."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn


def make_twin(model: nn.Module, quantized: Callable[..., Any]) -> nn.Module:
    """Return an object with the attributes of a model, in one and the same dict, that is called through `quantized`.

    The class is made from the model's, so `super()`, `isinstance` and class attributes hold. Whatever a method keeps of
    the object (a lambda, a generator, a coroutine) goes on to call the quantized model. Copies, also by pickle, are
    copies of the model.

    Raises:
        TypeError: no class can be made from the model's.
    """
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return quantized(*args, **kwargs)

    body = {
        "forward": forward,
        "__call__": forward,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__deepcopy__": lambda self, memo: copy.deepcopy(model, memo),
        "__reduce_ex__": lambda self, protocol: model.__reduce_ex__(protocol),
    }
    kind = types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(body))
    twin: nn.Module = object.__new__(kind)
    object.__setattr__(twin, "__dict__", model.__dict__)
    return twin
