"""Give every quantizer with a range of the past a state: an input of the graph, and an output after the step."""

import dataclasses
import itertools
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import add_input, add_output, insert_call, remove_outputs
from qcompiler.passes.ir.facts import InputKind
from qcompiler.passes.ir.inference import fake_mode
from qcompiler.passes.ir.meta import get_value, is_backward, is_recomputed, list_inputs
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.passes.ir.site_name import number_name
from qcompiler.passes.ir.views import aten
from qcompiler.runtime import ops


@dataclasses.dataclass(frozen=True)
class ThreadRanges:
    """quantize(X, scale(X)) → quantize(X, scale(X, state)), checked(scale, X) for the readers, update(X, state) → out.

    1. For a quantizer of a forward tensor the state is an input of the forward half and the state after it an output of
       that half; for a quantizer of a gradient both belong to the backward half.
    2. A range of the past does not show a NaN or an infinity. Readers in the same half get the tensor beside the codes,
       in the same pass, and dequantize numbers that are not finite to NaN; readers of saved codes (in the other half,
       or in a region that is computed again) dequantize by the checked scale, NaN for the whole block.
    3. The state is called after the site; a site that meets another of the same name in one graph is numbered,
       `…/input#2`, in the order of readers, so that a graph without backward has the names of one with backward.
    4. The state of a learned range is a parameter: the gradients of all consumers are summed to one output, with the
       sign of the parameter, of which the quantizer uses the magnitude.
    5. In a graph without backward, and with `frozen` (evaluation mode), states are read and never changed; with
       `frozen` the range comes from the state alone.
    """

    name: ClassVar[str] = "thread-ranges"
    frozen: bool = False

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of quantizers that got a state."""
        graph = module.graph
        joint = bool(list_inputs(graph, InputKind.TANGENT))
        taken = {fact.name for _, fact in list_inputs(graph, InputKind.STATE)}
        found = sorted(list_quantizers(graph), key=_find_first_reader)
        return sum(self.thread(quantizer, joint, taken) for quantizer in found)

    def thread(self, quantizer: Quantizer, joint: bool, taken: set[str]) -> int:
        """Threads one quantizer; 0 if the range comes from the present tensor, or is threaded already."""
        estimator = quantizer.spec.range
        if not (estimator.has_state or estimator.is_static) or not _show_what_is_not_finite(quantizer):
            return 0
        if estimator.has_state:
            shape = estimator.state_shape(tuple(get_value(quantizer.scale).shape))
            state = _add_state(quantizer, shape, _find_free_name(quantizer.site, taken))
            quantizer.read_state(state, frozen=self.frozen)
            if joint and not self.frozen:
                add_output(quantizer.codes.graph, quantizer.insert_update(state))
            if joint and estimator.is_learned:
                _sum_gradients(quantizer.scale, state)
        return 1


def _show_what_is_not_finite(quantizer: Quantizer) -> bool:
    """Case 2; False if done already."""
    codes, readers = quantizer.codes, quantizer.dequantizers
    if any(user.target is ops.CHECKED for user in quantizer.scale.users) or any(reader.shown for reader in readers):
        return False
    check = quantizer.insert_check()
    for reader in readers:
        if is_backward(reader.floats) != is_backward(codes) or any(map(is_recomputed, reader.floats.users)):
            reader.change(scale=check)
        else:
            reader.show(quantizer.tensor)
    return True


def _sum_gradients(scale: Node, state: Node) -> None:
    """Case 4: one output in place of the range gradients of all consumers."""
    graph = scale.graph
    parts = sorted(user for user in scale.users if user.target is ops.RANGE_GRADIENT)
    remove_outputs(graph, parts)
    if not parts:  # the input of the model, which needs no gradient: the range stays at the first value
        return add_output(graph, None)
    total = parts[0]
    for part in parts[1:]:
        total = insert_call(graph, aten.add.Tensor, (total, part), after=part)
    sign = insert_call(graph, aten.sign.default, (state,), after=total)
    return add_output(graph, insert_call(graph, aten.mul.Tensor, (total, sign), after=sign))


def _find_first_reader(quantizer: Quantizer) -> Node:
    return min(quantizer.codes.users, default=quantizer.codes)


def _find_free_name(site: str, taken: set[str]) -> str:
    """Case 3: the name of the site, numbered if taken; taken from now on."""
    names = (number_name(site, index) for index in itertools.count(1))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def _add_state(quantizer: Quantizer, shape: tuple[int, ...], name: str) -> Node:
    codes = quantizer.codes
    with fake_mode(codes.graph):
        like = get_value(codes).new_empty(shape, dtype=torch.float32)
    return add_input(codes.graph, like, InputKind.STATE, name, backward=is_backward(codes))
