"""A quantizer: the nodes that turn one tensor into codes and back, the fields by name, and every change.

scale = scale(X)    point = zero_point(X, scale)    codes = quantize(X, scale, point, key)
floats = dequantize(codes, scale, point), one for each reader, in the half of that reader
"""

import dataclasses
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from qcompiler.passes.ir.arguments import get_argument, pack_arguments, set_arguments
from qcompiler.passes.ir.edit import insert_call, last_placeholder
from qcompiler.passes.ir.inference import infer_value
from qcompiler.passes.ir.meta import get_value, is_backward, pin_saved, pin_to_backward
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.spec import QuantSpec, parse_spec


class _Coder:
    """The fields that a quantize and a dequantize node share, read from the graph at every access."""

    @property
    def node(self) -> Node:
        """The call itself."""
        raise NotImplementedError

    @property
    def scale(self) -> Node:
        """The node that gives the scale of every block; a checked one is NaN if the tensor was not finite."""
        return cast(Node, get_argument(self.node, "scale"))

    @property
    def zero_point(self) -> Node | None:
        """The node that gives the code of zero, for formats that have one."""
        return cast(Node | None, get_argument(self.node, "zero_point"))

    @property
    def text(self) -> str:
        """The spec in the graph."""
        return str(get_argument(self.node, "spec"))

    @property
    def spec(self) -> QuantSpec:
        """The spec."""
        return parse_spec(self.text)

    @property
    def layout(self) -> str:
        """A letter for each dimension of the tensor (runtime/numbers/blocks.py)."""
        return str(get_argument(self.node, "layout"))


@dataclasses.dataclass(frozen=True)
class Quantizer(_Coder):
    """One quantize node with all other nodes of the quantizer."""

    codes: Node

    @property
    def node(self) -> Node:
        """The quantize node."""
        return self.codes

    @property
    def tensor(self) -> Node:
        """The tensor that is quantized; of a frozen weight the codes."""
        return cast(Node, get_argument(self.codes, "x"))

    @property
    def key(self) -> Node | None:
        """The random key of the step, for stochastic rounding."""
        return cast(Node | None, get_argument(self.codes, "key"))

    @property
    def site(self) -> str:
        """The name, as passes/ir/site_name.py writes it: `layer1.0.conv1/input`."""
        return str(get_argument(self.codes, "site"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tensor."""
        return get_value(self.tensor).dtype

    @property
    def dequantizers(self) -> list["Dequantizer"]:
        """The dequantize nodes that read these codes directly."""
        return [Dequantizer(user) for user in self.codes.users if user.target is ops.DEQUANTIZE]

    def rename(self, site: str) -> None:
        """Give the quantizer another name."""
        set_arguments(self.codes, site=site)

    def respecify(self, spec: QuantSpec, site: str) -> None:
        """Write another spec and name; the scale changes shape, so all values are inferred again."""
        text = str(spec)
        parts = [part for part in (self.scale, self.zero_point) if part is not None]
        for part in parts:
            set_arguments(part, spec=text)
        set_arguments(self.codes, spec=text, site=site)
        for node in (*parts, self.codes):
            infer_value(node)
        for reader in self.dequantizers:
            reader.change(spec=text)

    def read(self, tensor: Node) -> None:
        """Quantize another tensor by the same scale."""
        set_arguments(self.codes, x=tensor)

    def fix(self, tensor: Node, scale: Node, zero_point: Node | None, spec: QuantSpec, layout: str) -> None:
        """Make a quantizer of a frozen graph read constants, by another spec and layout; no key is drawn."""
        text = str(spec)
        shared: dict[str, Any] = {"scale": scale, "zero_point": zero_point, "spec": text, "layout": layout}
        set_arguments(self.codes, x=tensor, key=None, **shared)
        infer_value(self.codes)
        for reader in self.dequantizers:
            reader.change(**shared)

    def write_beside(self, tensor: Node, layout: str) -> "Quantizer":
        """Return a new quantizer of another tensor by the same spec, key and name, behind the scale of this one."""
        return _write_nodes(tensor, self.spec, layout, self.site, self.key, self.scale)

    def remove(self) -> None:
        """Erase the quantizer, which nothing reads any more."""
        for node in (self.codes, self.zero_point, self.scale):
            if node is not None:
                self.codes.graph.erase_node(node)

    def insert_mask(self) -> Node:
        """Return a new clip mask of the tensor, behind scale and zero point: False for each element that is clipped."""
        given = {**self._shared(), "scale": self.scale, "zero_point": self.zero_point}
        return insert_operator(self.codes.graph, ops.IN_RANGE, given, after=self.zero_point or self.scale)

    def insert_check(self) -> Node:
        """Return a new checked scale, behind the codes: NaN for each block that is not finite."""
        given = {**self._shared(), "scale": self.scale}
        return insert_operator(self.codes.graph, ops.CHECKED, given, after=self.codes)

    def insert_update(self, state: Node) -> Node:
        """Return the state of the range after this step, behind the codes."""
        given = {**self._shared(), "state": state, "first": False}
        return insert_operator(self.codes.graph, ops.UPDATE, given, after=self.codes)

    def insert_gradient(self, target: Any, grad: Node) -> Node:
        """Return RANGE_GRADIENT or SCALE_GRADIENT of the gradient of the dequantized tensor, behind that gradient."""
        given = {"grad": grad, "x": self.tensor, "scale": self.scale, "spec": self.text}
        return insert_operator(self.codes.graph, target, given, after=grad)

    def read_state(self, state: Node, *, frozen: bool) -> None:
        """Make scale and zero point take the range from a state."""
        for node in (self.scale, self.zero_point):
            if node is not None:
                set_arguments(node, state=state, first=False, frozen=frozen)

    def _shared(self) -> dict[str, Any]:
        return {"x": self.tensor, "spec": self.text, "layout": self.layout}

    def insert_dequantizer(self, dtype: torch.dtype, reader: Node) -> Node:
        """Return a new dequantize in front of a reader, pinned to the half of that reader."""
        given = {
            "codes": self.codes,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "spec": self.text,
            "layout": self.layout,
            "dtype": dtype,
        }
        floats = insert_operator(self.codes.graph, ops.DEQUANTIZE, given, before=reader)
        if is_backward(reader):
            pin_to_backward(floats)
        return floats


@dataclasses.dataclass(frozen=True)
class Dequantizer(_Coder):
    """One dequantize node."""

    floats: Node

    @property
    def node(self) -> Node:
        """The dequantize node."""
        return self.floats

    @property
    def codes(self) -> Node:
        """The node of the codes: a quantize, an unpack, or an input that forward has saved."""
        return cast(Node, get_argument(self.floats, "codes"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the result."""
        return cast(torch.dtype, get_argument(self.floats, "dtype"))

    @property
    def shown(self) -> Node | None:
        """The tensor whose NaN and infinities this one shows; None if the scale shows them, or nothing needs to."""
        return cast(Node | None, get_argument(self.floats, "x"))

    def show(self, tensor: Node | None) -> None:
        """Show the NaN and infinities of a tensor, or of none."""
        set_arguments(self.floats, x=tensor)

    def change(self, **given: Any) -> None:
        """Write other arguments, by name; the value is inferred again."""
        set_arguments(self.floats, **given)
        infer_value(self.floats)


def list_quantizers(graph: Graph) -> list[Quantizer]:
    """Return every quantizer, in graph order."""
    return [Quantizer(node) for node in graph.find_nodes(op="call_function", target=ops.QUANTIZE)]


def list_dequantizers(graph: Graph) -> list[Dequantizer]:
    """Return every dequantizer, in graph order."""
    return [Dequantizer(node) for node in graph.find_nodes(op="call_function", target=ops.DEQUANTIZE)]


def insert_quantizer(tensor: Node, reader: Node, spec: QuantSpec, layout: str, site: str) -> Node:
    """Write scale, zero point and quantize behind a tensor, dequantize in front of a reader; return the latter."""
    return write_quantizer(tensor, spec, layout, site).insert_dequantizer(get_value(tensor).dtype, reader)


def write_quantizer(tensor: Node, spec: QuantSpec, layout: str, site: str) -> Quantizer:
    """Return a new quantizer without readers, behind its tensor."""
    key = _draw_key(tensor) if spec.rounding is Rounding.STOCHASTIC else None
    # behind the key for an input of the graph, behind the tensor otherwise: both are known there
    place = key if key is not None and tensor.op == "placeholder" else tensor
    return _write_nodes(tensor, spec, layout, site, key, place)


def insert_operator(
    graph: Graph,
    target: Any,
    given: dict[str, Any],
    *,
    after: Node | None = None,
    before: Node | None = None,
    name: str = "",
) -> Node:
    """Return a new call of one of our operators, with the arguments given by name."""
    return insert_call(graph, target, pack_arguments(target, given), after=after, before=before, name=name)


def _write_nodes(tensor: Node, spec: QuantSpec, layout: str, site: str, key: Node | None, place: Node) -> Quantizer:
    """Return a new quantizer without readers, behind a place in the graph."""
    shared: dict[str, Any] = {"x": tensor, "spec": str(spec), "layout": layout}
    scale = place = insert_operator(tensor.graph, ops.SCALE, shared, after=place)
    point = None
    if spec.has_zero_point:
        point = place = insert_operator(tensor.graph, ops.ZERO_POINT, {**shared, "scale": scale}, after=place)
    whole = {**shared, "scale": scale, "zero_point": point, "key": key, "site": site}
    return Quantizer(insert_operator(tensor.graph, ops.QUANTIZE, whole, after=place))


def _draw_key(tensor: Node) -> Node:
    """Return the node that draws the random key of the step: one for the graph, at the head."""
    graph = tensor.graph
    drawn: list[Node] = list(graph.find_nodes(op="call_function", target=ops.DRAW_KEY))
    if drawn:
        if tensor < drawn[0]:  # a half that so far drew for backward alone
            last_placeholder(graph).append(drawn[0])
        return drawn[0]
    node = insert_call(graph, ops.DRAW_KEY, (get_value(tensor).device,), after=last_placeholder(graph))
    pin_saved(node)
    return node
