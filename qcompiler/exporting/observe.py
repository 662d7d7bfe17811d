"""Codes quantizer by quantizer: of the traced graph under PyTorch, and how many of a file differ."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.compiler import torch_compat
from qcompiler.compiler.plan import Site
from qcompiler.exporting.blocks import find_edges
from qcompiler.exporting.trace import Traced
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.meta import is_size
from qcompiler.passes.ir.quantizer import Quantizer
from qcompiler.runtime import ops
from qcompiler.runtime.execute.interpret import Hooks, make_runner
from qcompiler.runtime.numbers.blocks import TENSOR, view_blocks
from qcompiler.runtime.numbers.formats import FloatFormat

#: a difference of outputs that sums of floats in another order make without any flip, relative to the largest
SAME = 1e-6


class Observer(Hooks):
    """Runs the traced graph as it stands before weights and ranges were frozen, and keeps the codes of every site.

    The codes of a site in `calibrated` are those that its fixed range gives.
    """

    def __init__(
        self, traced: Traced, states: Mapping[str, Tensor], calibrated: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        self.module = traced.frozen.program.graph_module
        self.traced, self.states, self.calibrated = traced, states, calibrated or {}
        self.sites = {site.name: site for site in traced.plan.sites}
        self.found: dict[str, Tensor] = {}

    def codes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return site → codes."""
        self.outputs(args, kwargs)
        return self.found

    def outputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[np.ndarray]:
        """Return the tensors that the graph returns; `found` has the codes afterwards."""
        given = self.given(args, kwargs)
        held = {**self.traced.frozen.program.state_dict, **self.traced.frozen.program.constants}
        known = {InputKind.INPUT: given, InputKind.STATE: self.states}
        values = [self.held(fact.kind, known.get(fact.kind, held)[fact.name]) for fact in self.traced.inputs]
        returned = make_runner(self.module, self)(values)
        return [one.numpy() for one in torch_compat.list_leaves(returned) if isinstance(one, Tensor)]

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return input of the graph → the value that a call gives."""
        names = [fact.name for fact in self.traced.inputs if fact.kind is InputKind.INPUT]
        leaves = torch_compat.list_leaves((args, dict(kwargs)))
        if len(leaves) != len(names):
            raise TypeError(f"got {len(leaves)} inputs; valid: {len(names)}")
        return dict(zip(names, leaves, strict=True))

    def held(self, kind: InputKind, value: Any) -> Any:
        """Return the value that the graph gets for an input of this kind."""
        return value

    def after(self, node: Node, args: tuple[Any, ...], result: Any) -> None:
        """Shows the inputs and results of a quantizer."""
        if node.target is ops.QUANTIZE:
            self.see(Quantizer(node).site, args[0], result)

    def see(self, site: str, x: Tensor, codes: Tensor) -> None:
        """Called for every quantizer with inputs and results; keeps the codes."""
        fixed = self.calibrated.get(site)
        self.found[site] = codes if fixed is None else compute_codes(self.sites[site], x, None, fixed)

    def made(self, site: str, x: Tensor) -> Tensor:
        """Return the codes that this site makes of another tensor, one that a file computed."""
        return compute_codes(self.sites[site], x, self.states.get(site), self.calibrated.get(site))


class InDouble(Observer):
    """Runs the same graph in float64, also if the model names another type; states of ranges stay.

    Numbers that depend on no tensor of the model or the call, such as indices of an interpolation, keep the type.
    """

    def __init__(
        self, traced: Traced, states: Mapping[str, Tensor], calibrated: Mapping[str, Sequence[Any]] | None = None
    ):
        super().__init__(traced, states, calibrated)
        self.varies: dict[Node, bool] = {}
        for node in self.module.graph.nodes:
            found = node.op == "placeholder" or any(self.varies[source] for source in node.all_input_nodes)
            self.varies[node] = found and not is_size(node)

    def held(self, kind: InputKind, value: Any) -> Any:
        """Return a tensor of floats in float64, unless it is a state."""
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating and kind is not InputKind.STATE else value

    def load(self, node: Node, arguments: Any, values: Mapping[Node, Any]) -> Any:
        """Return the operands, with float64 for every float32 and float16 that varies."""

        def load_source(source: Node) -> Any:
            given = values[source]
            made = isinstance(given, Tensor) and given.dtype in _NARROW and not self.varies[source]
            return given.double() if made and self.varies[node] else given

        loaded = torch.fx.map_arg(arguments, load_source)
        return torch_compat.map_leaves(_widen_type, loaded) if self.varies[node] else loaded


def _widen_type(one: Any) -> Any:
    return torch.float64 if isinstance(one, torch.dtype) and one in _NARROW else one


#: types of floats that a model may compute in
_NARROW = (torch.float32, torch.float16)


def compute_codes(site: Site, x: Tensor, state: Tensor | None, calibrated: Sequence[Any] | None) -> Tensor:
    """Return the codes that our runtime makes of a tensor that a file computed; `calibrated`: (scale, zero point)."""
    if calibrated is not None:
        text, ones = str(dataclasses.replace(site.spec, block=TENSOR)), view_blocks(x.shape, site.layout, TENSOR).counts
        scale = torch.full(ones, calibrated[0], dtype=site.spec.scale.dtype)
        point = None if calibrated[1] is None else torch.full(ones, calibrated[1], dtype=site.spec.format.dtype)
        return cast(Tensor, ops.QUANTIZE(x, scale, point, None, text, site.layout, site.name))
    text, given = str(site.spec), (state, False, True) if state is not None else ()
    scale = ops.SCALE(x, text, site.layout, *given)
    point = ops.ZERO_POINT(x, scale, text, site.layout, *given) if site.spec.has_zero_point else None
    return cast(Tensor, ops.QUANTIZE(x, scale, point, None, text, site.layout, site.name))


def count_different(found: np.ndarray, expected: Tensor, site: Site) -> int:
    """Return the number of codes that differ; float codes as the levels that they stand for."""
    form = site.spec.format
    plain = expected.numpy()
    if isinstance(form, FloatFormat):
        plain = form.decode(expected).numpy()
        found = (
            form.decode(torch.from_numpy(found.view(np.uint8).copy())).numpy() if found.dtype.itemsize == 1 else found
        )
    found = _join_blocks(found, plain.shape, site)
    same = found.astype(np.float64) == plain.astype(np.float64)
    return int((~(same | (np.isnan(found.astype(np.float64)) & np.isnan(plain.astype(np.float64))))).sum())


def restore_codes(found: np.ndarray, one: Mapping[str, Any]) -> np.ndarray:
    """Return the codes of a weight as trained, without shift, transposition and negated output channels."""
    if one["shift"]:
        found = found.astype(np.int16) - one["shift"]
    if one["negated"]:
        found = found.copy()
        found[one["negated"]] = -found[one["negated"]]
    return found if one["order"] is None else found.transpose(np.argsort(one["order"]))


def _join_blocks(found: np.ndarray, shape: Sequence[int], site: Site) -> np.ndarray:
    """Return codes that lie block by block in the shape of their tensor: parts of a dimension are joined and cut."""
    if found.size == math.prod(shape):  # other dimensions at most: some are joined, or split without a rest
        return found.reshape(shape)
    edges = find_edges(list(shape), site.layout, site.spec.block)
    left = iter(found.shape)
    joined = [next(left) * (next(left) if dim in edges.split else 1) for dim, _ in enumerate(edges.edges)]
    return found.reshape(joined)[tuple(slice(extent) for extent in edges.extents)].reshape(shape)
