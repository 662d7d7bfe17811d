"""Save the derivative of an activation function in place of its input."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from torch.fx import Node

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.arguments import get_argument, get_arguments, iterate_arguments, pack_arguments
from qcompiler.passes.ir.edit import insert_call, replace_node
from qcompiler.passes.ir.quantizer import write_quantizer
from qcompiler.passes.ir.saved_floats import SavedFloat, find_codes, iterate_saved
from qcompiler.passes.ir.views import aten
from qcompiler.passes.rules import Rule, saves_floats
from qcompiler.runtime.numbers.blocks import TENSOR
from qcompiler.runtime.numbers.formats import IntFormat, Kind
from qcompiler.runtime.ranges.present import Fixed
from qcompiler.runtime.spec import QuantSpec, Scale, Vjp

_ALIASES: Final = (aten.detach.default, aten.alias.default)
#: gradient of an activation function → the argument that is saved, and the ends of the derivative, outward to 3 digits
_DERIVATIVES: Final[Mapping[Any, tuple[str, Callable[[Node], tuple[float, float]]]]] = {
    aten.gelu_backward.default: ("self", lambda _: (-0.130, 1.130)),
    aten.silu_backward.default: ("self", lambda _: (-0.100, 1.100)),
    aten.hardswish_backward.default: ("self", lambda _: (-0.5, 1.5)),
    aten.tanh_backward.default: ("output", lambda _: (0.0, 1.0)),
    aten.sigmoid_backward.default: ("output", lambda _: (0.0, 0.25)),
    aten.hardsigmoid_backward.default: ("self", lambda _: (0.0, 0.167)),
    aten.mish_backward.default: ("self", lambda _: (-0.114, 1.089)),
    aten.softplus_backward.default: ("self", lambda _: (0.0, 1.0)),
    aten.log_sigmoid_backward.default: ("self", lambda _: (0.0, 1.0)),
    aten.elu_backward.default: ("self_or_result", lambda node: _find_ends_of_elu(node)),
}


def _find_ends_of_elu(node: Node) -> tuple[float, float]:
    """Return the ends of the derivative of elu: `scale` above zero, up to alpha·scale·input_scale below."""
    alpha, scale, input_scale = get_arguments(node, "alpha", "scale", "input_scale")
    below = float(alpha) * float(scale) * float(input_scale)
    return min(0.0, below, float(scale)), max(0.0, below, float(scale))


@dataclasses.dataclass(frozen=True)
class SaveDerivatives:
    """forward saves X for dX = G·f′(X) → forward saves quantize(f′(X)), and backward computes G · dequantize.

    1. The range is that of f′, for all tensors: no pass that measures. GELU: −0.13 to 1.13.
    2. dX is linear in the codes, so stochastic rounding leaves it right on average; codes of X would be bent by f′.
       At equal bits the error is 14 dB smaller.
    3. Does not fire if a contraction has codes of X: these serve both; nor if X stays in float.
    """

    name: ClassVar[str] = "save-derivatives"
    rules: tuple[Rule, ...] = ()

    def __call__(self, halves: Halves) -> int:
        """Return the number of derivatives that are saved."""
        if halves.forward is None or halves.backward is None or not saves_floats(self.rules):
            return 0
        table = SavedTable(halves)
        found = [one for one in iterate_saved(table.inputs, self.rules) if one.spec is not None]
        changes = [(one, gradient) for one in found for gradient in _list_gradients(table, one)]
        for one, gradient in changes:
            _save_derivative(table, one, gradient)
        table.drop_unread()
        table.write()
        return len(changes)


def _list_gradients(table: SavedTable, saved: SavedFloat) -> list[Node]:
    """Return the gradients of functions of the table that read a float in backward, and nothing that forward lacks."""
    assert saved.spec is not None
    if find_codes(saved.node, saved.spec) is not None:
        return []
    given, inputs = table.inputs[saved.node], set(table.inputs.values())
    readers = dict.fromkeys(reader for one in _list_aliases(given) for reader in one.users)
    found = [one for one in readers if one.target in _DERIVATIVES]
    return [
        one
        for one in found
        if _find_source(get_argument(one, _DERIVATIVES[one.target][0])) is given
        and all(_find_source(node) in inputs for node in one.all_input_nodes if node is not one.args[0])
    ]


def _list_aliases(node: Node) -> list[Node]:
    """Return a tensor and its aliases, which have its shape and strides."""
    return [node, *(one for user in node.users if user.target in _ALIASES for one in _list_aliases(user))]


def _find_source(node: Node) -> Node:
    return _find_source(node.all_input_nodes[0]) if node.target in _ALIASES else node


def _save_derivative(table: SavedTable, saved: SavedFloat, gradient: Node) -> None:
    assert saved.spec is not None
    name, find_ends = _DERIVATIVES[gradient.target]
    low, high = find_ends(gradient)
    last = max([saved.node, *(one for one, given in table.inputs.items() if given in gradient.all_input_nodes)])
    ones = insert_call(table.forward, aten.ones_like.default, (saved.node,), after=last)
    args = pack_arguments(
        gradient.target, _list_forward_arguments(table, gradient) | {"grad_output": ones, name: saved.node}
    )
    derivative = insert_call(table.forward, gradient.target, args, after=ones)
    form = IntFormat(saved.spec.format.bits, Kind.AFFINE)
    spec = QuantSpec(
        format=form,
        scale=Scale.REAL,
        block=TENSOR,
        rounding=saved.spec.rounding,
        vjp=Vjp.PASS,
        range=Fixed(*_widen_ends(low, high, 2**form.bits - 1)),
    )
    quantizer = write_quantizer(derivative, spec, saved.layout, saved.site)
    factor = table.dequantize(quantizer, gradient, derivative)
    grad = get_argument(gradient, "grad_output")
    made = insert_call(table.backward, aten.mul.Tensor, (grad, factor), before=gradient)
    replace_node(gradient, made)


def _list_forward_arguments(table: SavedTable, gradient: Node) -> dict[str, Any]:
    """Return the arguments of a gradient by name, saved tensors as nodes of forward; without the gradient itself."""
    saved = {given: node for node, given in table.inputs.items()}
    given = {name: value for name, value in iterate_arguments(gradient) if name != "grad_output"}
    return {name: saved[_find_source(one)] if isinstance(one, Node) else one for name, one in given.items()}


def _widen_ends(low: float, high: float, largest: int) -> tuple[float, float]:
    """Return the nearest ends outward between which zero is a code: a rounded zero point would clip at one end.

    GELU in 4 bits: the step is 1.26 / 15, and 0.13 is 1.55 steps. With 2 of 15 codes below zero the step is 1.13 / 13.
    """
    counts = range(1, largest) if low < 0 else range(1)
    step, below = min((max(-low / max(count, 1), high / (largest - count)), count) for count in counts)
    return float(f"{-below * step:.5g}"), float(f"{(largest - below) * step:.5g}")
