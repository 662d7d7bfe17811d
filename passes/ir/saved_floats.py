"""The floats that forward saves for operators without a contraction: which they are, their names, layouts and rules."""

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch.fx import Graph, Node

from qcompiler.passes.ir.meta import find_value, get_contraction, get_owner, get_value, is_backward, is_recomputed
from qcompiler.passes.ir.quantizer import Quantizer, list_quantizers
from qcompiler.passes.ir.saved_reads import find_bending, list_gradients
from qcompiler.passes.ir.site_name import Numbering
from qcompiler.passes.ir.views import aten, is_view, view_root
from qcompiler.passes.rules import Role, Rule, first_match
from qcompiler.runtime import ops
from qcompiler.runtime.spec import QuantSpec

#: results whose exponential backward takes: half a step of a logarithm of 20 / 127 is 8 percent of a probability
_LOGARITHMS: Final = (aten._log_softmax.default,)


@dataclasses.dataclass(frozen=True)
class SavedFloat:
    """One float that is saved, and what a rule says of it."""

    node: Node
    #: `layer1.0.bn1/saved`, unique in the graph
    site: str
    #: index of the rule that matched; None: no rule did
    rule: int | None
    #: None: it stays in float
    spec: QuantSpec | None
    #: why it stays in float; empty: a rule gives a spec
    reason: str

    @property
    def layout(self) -> str:
        """Samples, then all other dimensions as one axis: the runs of a block lie side by side in memory."""
        dims = get_value(self.node).ndim
        return "b" + "c" * (dims - 1) if dims > 1 else "c" * dims


def iterate_saved(
    inputs: Mapping[Node, Node], rules: Sequence[Rule], *, masks_follow: bool = False
) -> Iterator[SavedFloat]:
    """Yield every float that forward makes and saves.

    Args:
        inputs: saved node of forward → the input of backward that holds it.
        rules: of the recipe.
        masks_follow: comparisons that backward makes are no reason to stay in float; a pass moves them later.
    """
    if not inputs:
        return
    saved, given = next(iter(inputs.items()))
    names = Numbering(quantizer.site for quantizer in list_quantizers(saved.graph))
    gradients, sources = set(list_gradients(given.graph)), _find_sources(given.graph)
    for node in filter(_is_float, inputs):
        module = get_owner(node) or ""
        site = names.number(f"{module or '(root)'}/saved")
        again = "the model computes again from it (checkpoint)" if inputs[node] in sources else ""
        reason = again or _explain_float(node, inputs[node])
        bending = None if reason else find_bending(inputs[node], gradients, masks_follow=masks_follow)
        if bending is not None:
            reason = f"codes would be bent by {_name_operator(bending)} of backward"
        found = first_match(rules, Role.SAVED, "saved", module, frozenset()) if not reason else None
        index, rule = found or (None, None)
        yield SavedFloat(node, site, index, rule.spec if rule else None, reason or _explain_rule(rule))


def _find_sources(backward: Graph) -> set[Node]:
    """Return all nodes from which a region that the user checkpoints, or codes of forward, are computed again.

    Also through views. The codes are to be those of forward, so they must not be computed from codes.
    """
    sources: set[Node] = set()
    for node in reversed(backward.nodes):
        again = (user for user in node.users if not is_backward(user))
        if any(user in sources or is_recomputed(user) or user.target is ops.QUANTIZE for user in again):
            sources.add(node)
    return sources


def _is_float(node: Node) -> bool:
    """Return True for a floating tensor that the graph makes: no input, no part of a quantizer."""
    value = find_value(node)
    own = getattr(node.target, "namespace", "") == "qcompiler"
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and not own
        and view_root(node).op != "placeholder"
    )


def _explain_float(node: Node, given: Node) -> str:
    """Return why a saved float cannot be quantized; empty if it can."""
    source = view_root(node)
    if is_statistic(source):
        return "a statistic"
    if source.target in _LOGARITHMS:
        return "backward takes its exponential"
    if any(_keeps_operand(user, given) for user in given.users):
        return "a rule keeps it in float for a contraction"
    return "one number" if get_value(node).numel() < 2 else ""


def _name_operator(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _explain_rule(rule: Rule | None) -> str:
    """Return why a float stays that could be quantized; empty if the rule quantizes it."""
    if rule is None:
        return "no rule for it"
    return "" if rule.spec is not None else rule.reason or "a rule keeps it"


def _keeps_operand(reader: Node, given: Node) -> bool:
    """Return True for a contraction, if a rule keeps this operand in float."""
    fact = get_contraction(reader)
    return fact is not None and any(o.asked and reader.args[o.arg] is given for o in fact.operands)


def is_statistic(node: Node) -> bool:
    """Return True for the second and later results of an operator: mean, deviation, log-sum-exp of each row."""
    if node.target is not operator.getitem or node.args[1] == 0:
        return False
    schema = getattr(node.all_input_nodes[0].target, "_schema", None)
    return schema is not None and len(schema.returns) > 1  # split returns one list


def find_codes(node: Node, spec: QuantSpec) -> Quantizer | None:
    """Return the quantizer of a contraction that has the elements of a tensor in the same order, and the bits."""
    found = [node]
    while _keeps_order(found[0]):
        found.insert(0, found[0].all_input_nodes[0])
    for one in found:
        found += [user for user in one.users if user not in found and _keeps_order(user)]
    quantizers = [Quantizer(user) for one in found for user in one.users if user.target is ops.QUANTIZE]
    own = (one for one in quantizers if one.tensor in found and one.spec.format.bits >= spec.format.bits)
    return next(own, None)


#: views that give the elements other sizes, but leave their order
_IN_ORDER: Final = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default, ops.LAY_OUT),
)


def _keeps_order(view: Node) -> bool:
    """Return True for a view that arranges the elements in other sizes, but in the same order."""
    return view.target in _IN_ORDER and is_view(view)
