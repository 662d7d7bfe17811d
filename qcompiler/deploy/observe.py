"""Codes quantizer by quantizer: those of the traced graph as PyTorch runs it, and how many of a file differ."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from qcompiler import torch_compat
from qcompiler.deploy.blocks import find_edges
from qcompiler.deploy.trace import Traced
from qcompiler.passes.graph import InputKind
from qcompiler.passes.plan import Site
from qcompiler.runtime import ops
from qcompiler.runtime.formats import FloatFormat


class Observer(Interpreter):
    """Runs the traced graph as it stands before weights and ranges were frozen, and keeps the codes of every site."""

    def __init__(self, traced: Traced, states: Mapping[str, Tensor]) -> None:
        super().__init__(traced.frozen.program.graph_module)
        self.traced, self.states = traced, states
        self.found: dict[str, Tensor] = {}

    def codes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Site → codes."""
        given = iter(torch_compat.leaves((args, dict(kwargs))))
        held = {**self.traced.frozen.program.state_dict, **self.traced.frozen.program.constants}
        values = []
        for fact in self.traced.inputs:
            known = self.states if fact.kind is InputKind.STATE else held
            values.append(next(given) if fact.kind is InputKind.INPUT else known[fact.name])
        with torch.no_grad():
            self.run(*values)
        return self.found

    def run_node(self, n: Node) -> Any:
        """Keeps what a quantizer returns."""
        result = super().run_node(n)
        if n.target is ops.QUANTIZE:
            self.found[str(n.args[6])] = result
        return result


def codes_of(site: Site, x: Tensor, state: Tensor | None) -> Tensor:
    """What our runtime makes of the tensor that the file computed."""
    text, given = str(site.spec), (state, False, True) if state is not None else ()
    scale = ops.SCALE(x, text, site.layout, *given)
    point = ops.ZERO_POINT(x, scale, text, site.layout, *given) if site.spec.has_zero_point else None
    return cast(Tensor, ops.QUANTIZE(x, scale, point, None, text, site.layout, site.name))


def count_different(found: np.ndarray, expected: Tensor, site: Site) -> int:
    """The number of codes that differ; float codes as the levels that they stand for."""
    form = site.spec.format
    plain = expected.numpy()
    if isinstance(form, FloatFormat):
        plain = form.decode(expected).numpy()
        found = (
            form.decode(torch.from_numpy(found.view(np.uint8).copy())).numpy() if found.dtype.itemsize == 1 else found
        )
    found = _unblocked(found, plain.shape, site)
    same = found.astype(np.float64) == plain.astype(np.float64)
    return int((~(same | (np.isnan(found.astype(np.float64)) & np.isnan(plain.astype(np.float64))))).sum())


def as_trained(found: np.ndarray, one: Mapping[str, Any]) -> np.ndarray:
    """The codes of a weight before the file's changes to them: a shift, a transposition, negated output channels."""
    if one["shift"]:
        found = found.astype(np.int16) - one["shift"]
    if one["negated"]:
        found = found.copy()
        found[one["negated"]] = -found[one["negated"]]
    return found if one["order"] is None else found.transpose(np.argsort(one["order"]))


def _unblocked(found: np.ndarray, shape: Sequence[int], site: Site) -> np.ndarray:
    """Codes that lie block by block, in the shape of their tensor: parts of a split dimension are joined and cut."""
    if found.shape == tuple(shape):
        return found
    edges = find_edges(list(shape), site.layout, site.spec.block)
    left = iter(found.shape)
    joined = [next(left) * (next(left) if dim in edges.split else 1) for dim, _ in enumerate(edges.edges)]
    return found.reshape(joined)[tuple(slice(extent) for extent in edges.extents)].reshape(shape)
