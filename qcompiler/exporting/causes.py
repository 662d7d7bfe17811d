"""Why an export finds other quantizers than training had: recurrent layers, graph breaks, a tensor given twice."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.compiler import torch_compat
from qcompiler.compiler.naming import RESUMED
from qcompiler.exporting.trace import MissingRangeError, enter_eval_mode
from qcompiler.module import QuantizedModule, get_session
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.site_name import SiteName
from qcompiler.tables import join_some


def explain_missing(qmodel: QuantizedModule, error: MissingRangeError, args: Any, kwargs: Mapping[str, Any]) -> str:
    """Return the cause of ranges without a value, in the model or the training; empty if only training is missing.

    Args:
        args, kwargs: the arguments of the user.
    """
    model = get_session("export", qmodel).model
    if all(state.isnan().any() for state in qmodel.ranges().values()):
        return explain_recurrent(model, error.sites)
    _capture_eval(qmodel, args, kwargs)
    given = dict(zip(error.inputs, torch_compat.list_leaves((args, dict(kwargs))), strict=True))
    return explain_parts(qmodel, error.sites) or _explain_twice(qmodel, error.readers, given)


def explain_parts(qmodel: QuantizedModule, sites: Iterable[str]) -> str:
    """Return which recurrent layer or graph break gives PyTorch other quantizers at `sites`; empty if there is none."""
    return explain_recurrent(get_session("export", qmodel).model, sites) or _explain_breaks(qmodel)


def explain_recurrent(model: nn.Module, sites: Iterable[str] = ()) -> str:
    """Name the recurrent layers that hold a site; or, if the model has a recurrent layer at all, all of them."""
    layers = {name: type(part).__name__ for name, part in model.named_modules() if isinstance(part, nn.RNNBase)}
    paths = {SiteName.parse(site).contraction.partition("#")[0] for site in sites}
    found = {name: kind for name, kind in layers.items() if name in paths} or layers
    if not found:
        return ""
    names = join_some([f"{name or 'the model'} ({kind})" for name, kind in found.items()])
    what = "are recurrent layers" if len(found) > 1 else "is a recurrent layer"
    return (
        f"{names} {what}, which PyTorch runs in float, outside of the captured graphs; valid: a model without "
        "recurrent layers, a first rule that keeps them in float (module), or a recipe without rules (identity)"
    )


def _explain_breaks(qmodel: QuantizedModule) -> str:
    """Name the graph breaks of both modes with their lines, as far as PyTorch tells them."""
    compilers = [get_session("export", qmodel).get_compiler(training) for training in (True, False)]
    notes = dict.fromkeys(_shorten(note) for one in compilers for note in one.breaks)
    keys = dict.fromkeys(key for one in compilers for key in one.captures)
    lines = dict.fromkeys(f"{file}:{line}" for file, name, line, _ in keys if name.startswith(RESUMED))
    if not notes and not lines:
        return ""
    at = f" at {join_some([*lines])}" if lines else ""
    return (
        f"PyTorch captures the model in parts, each with quantizers of its own, because of a graph break{at} "
        f"({join_some([*notes]) or 'no reason is known'}), and a file is one graph; valid: a model without graph "
        "breaks (qcompiler.compile(model, recipe, strict=True) raises at each)"
    )


def _shorten(note: str) -> str:
    """Return a note without the hints of PyTorch."""
    return note.removeprefix("graph break: ").partition(" Hint: ")[0]


def _capture_eval(qmodel: QuantizedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Call the model in eval mode if no call has shown yet how PyTorch captures it."""
    compilers = [get_session("export", qmodel).get_compiler(training) for training in (True, False)]
    if not any(one.captures or one.breaks for one in compilers):
        with enter_eval_mode(get_session("export", qmodel).model), torch.no_grad():
            qmodel(*args, **kwargs)


def _explain_twice(qmodel: QuantizedModule, readers: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """Return which inputs were one tensor in training, so that one quantizer has the range of both; empty if none.

    Args:
        readers: site without a range → the input in front.
        given: input → the argument of the user.
    """
    for site, name in readers.items():
        twins = [other for other, one in given.items() if other != name and one is given[name]]
        if twins or not _was_given(qmodel, name, given):
            others = f"one tensor was {join_some([*twins, name])}" if twins else f"{name} was no tensor of its own"
            return (
                f"{site} reads the input {name}, and in training {others}, so that there was no quantizer of it alone; "
                "in a file each tensor is an input of its own; valid: training with a tensor of its own for each input "
                f"({name}.clone()), or a model of one input that calls this one with it twice"
            )
    return ""


def _was_given(qmodel: QuantizedModule, name: str, given: Mapping[str, Any]) -> bool:
    """Return False if training was captured as one graph that has fewer inputs than a call, and not this one."""
    captures = [*get_session("export", qmodel).get_compiler(training=True).captures.values()]
    if len(captures) != 1:
        return True
    known = [fact.name for fact in captures[0].inputs if fact.kind is InputKind.INPUT]
    return name in known or len(known) >= sum(isinstance(one, Tensor) for one in given.values())
