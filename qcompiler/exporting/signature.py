"""The arguments of `forward` by name: the keywords of a `**kw` are arguments like all others."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def get_signature(model: nn.Module, kwargs: Mapping[str, Any]) -> inspect.Signature:
    """Return the signature of `forward`; if it takes a `**kw`, each keyword of a call is an argument of its own.

    Raises:
        TypeError: a keyword of the `**kw` has the name of an argument that is given by position.
    """
    signature = inspect.signature(model.forward)
    kept = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    if len(kept) == len(signature.parameters):
        return signature
    known = {one.name for one in kept if one.kind not in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL)}
    twice = {one.name for one in kept} & kwargs.keys() - known
    if twice:
        raise TypeError(f"forward takes {min(twice)} by position, and by keyword too; valid: keywords of other names")
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in known]
    return signature.replace(parameters=[*kept, *more])


def flatten_shapes(model: nn.Module, kwargs: Mapping[str, Any], shapes: Any) -> Any:
    """Return dynamic shapes by the names of `get_signature`: those below the name of a `**kw` come out of it."""
    parameters = inspect.signature(model.forward).parameters.values()
    rest = next((one.name for one in parameters if one.kind is one.VAR_KEYWORD), None)
    if rest is None or rest in kwargs or not isinstance(shapes, Mapping) or rest not in shapes:
        return shapes
    return {**{name: spec for name, spec in shapes.items() if name != rest}, **(shapes[rest] or {})}


@contextlib.contextmanager
def named_keywords(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let `forward` show the signature of `get_signature`: torch.export matches no dimensions inside of a `**kw`."""
    signature, own = get_signature(model, kwargs), vars(model).get("forward")
    if signature == inspect.signature(model.forward):
        yield
        return
    forward = model.forward

    @functools.wraps(forward)
    def call(*args: Any, **options: Any) -> Any:
        return forward(*args, **options)

    call.__signature__ = signature  # type: ignore[attr-defined]
    vars(model)["forward"] = call
    try:
        yield
    finally:
        if own is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = own
