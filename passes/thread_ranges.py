"""Give every quantizer with a range of the past its state: an input of the graph, and an output after the step."""

import dataclasses
import itertools
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qcompiler.passes.graph import (
    InputKind,
    add_input,
    add_output,
    aten,
    fake_mode,
    get_input,
    insert_call,
    is_backward,
    is_recomputed,
    quantizers,
    remove_outputs,
    value,
)
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec


@dataclasses.dataclass(frozen=True)
class ThreadRanges:
    """quantize(X, scale(X)) → quantize(X, scale(X, state)), checked(scale, X) for its readers, update(X, state) → out.

    1. For a quantizer of a forward tensor the state is an input of the forward half and the state after it an output of
       that half; for one of a gradient both belong to the backward half.
    2. A range of the past does not show a NaN or an infinity. Readers in the same half get the tensor beside its codes,
       in the same pass, and dequantize what is not finite to NaN; those of saved codes (in the other half, or in a
       region that is computed again) dequantize by the checked scale, NaN for the whole block.
    3. The state is called after the site; a site that meets another of its name in one graph is numbered, `…/input#2`,
       in the order of readers, so that one without backward has the names of one with it.
    4. The state of a learned range is a parameter: the gradients of its consumers are summed to one output, with the
       sign of the parameter, of which the quantizer uses the magnitude.
    5. In a graph without backward, and with `frozen` (eval), states are read and never changed; with `frozen` the range
       is that of the state alone.
    """

    name: ClassVar[str] = "thread-ranges"
    frozen: bool = False

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of quantizers that got a state."""
        graph = module.graph
        facts = [get_input(node) for node in graph.find_nodes(op="placeholder")]
        joint = any(fact is not None and fact.kind is InputKind.TANGENT for fact in facts)
        taken = {fact.name for fact in facts if fact is not None and fact.kind is InputKind.STATE}
        return sum(self.thread(codes, joint, taken) for codes in sorted(quantizers(graph), key=_first_reader))

    def thread(self, codes: Node, joint: bool, taken: set[str]) -> int:
        """Threads one quantizer; 0 where its range is the tensor's own, or is threaded already."""
        tensor, scale, point, _, text, layout, site = codes.args
        assert isinstance(tensor, Node)
        assert isinstance(scale, Node)
        estimator = parse_spec(str(text)).range
        if not (estimator.has_state or estimator.is_static) or not _show_what_is_not_finite(codes, tensor, scale):
            return 0
        if estimator.has_state:
            state = _state_input(codes, estimator.state_shape(tuple(value(scale).shape)), _free(str(site), taken))
            for node in (scale, point):
                if isinstance(node, Node):
                    node.args = (*node.args, state, False, self.frozen)
            if joint and not self.frozen:
                after = insert_call(codes.graph, ops.UPDATE, (tensor, state, text, layout, False), after=codes)
                add_output(codes.graph, after)
            if joint and estimator.is_learned:
                _sum_gradients(scale, state)
        return 1


def _show_what_is_not_finite(codes: Node, tensor: Node, scale: Node) -> bool:
    """Case 2; False where it is done already."""
    readers = [user for user in codes.users if user.target is ops.DEQUANTIZE]
    if any(user.target is ops.CHECKED for user in scale.users) or any(len(reader.args) > 6 for reader in readers):
        return False
    text, layout = codes.args[4:6]
    check = insert_call(codes.graph, ops.CHECKED, (scale, tensor, text, layout), after=codes)
    for reader in readers:
        if is_backward(reader) != is_backward(codes) or any(map(is_recomputed, reader.users)):
            reader.update_arg(1, check)
        else:
            reader.args = (*reader.args, tensor)
    return True


def _sum_gradients(scale: Node, state: Node) -> None:
    """Case 4: one output in place of the range gradients of all consumers."""
    graph = scale.graph
    parts = sorted(user for user in scale.users if user.target is ops.RANGE_GRADIENT)
    remove_outputs(graph, parts)
    if not parts:  # the input of the model, which needs no gradient: its range stays where it starts
        return add_output(graph, None)
    total = parts[0]
    for part in parts[1:]:
        total = insert_call(graph, aten.add.Tensor, (total, part), after=part)
    sign = insert_call(graph, aten.sign.default, (state,), after=total)
    return add_output(graph, insert_call(graph, aten.mul.Tensor, (total, sign), after=sign))


def _first_reader(codes: Node) -> Node:
    return min(codes.users, default=codes)


def _free(site: str, taken: set[str]) -> str:
    """Case 3: the site's name, numbered where it is taken; taken from now on."""
    names = (site if i == 1 else f"{site}#{i}" for i in itertools.count(1))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def _state_input(codes: Node, shape: tuple[int, ...], name: str) -> Node:
    with fake_mode(codes.graph):
        like = value(codes).new_empty(shape, dtype=torch.float32)
    return add_input(codes.graph, like, InputKind.STATE, name, backward=is_backward(codes))
