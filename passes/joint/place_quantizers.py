"""Write a quantizer in front of every operand of every contraction that a rule asks to quantize."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch.fx import GraphModule, Node

from qcompiler.passes.ir.edit import insert_call
from qcompiler.passes.ir.facts import Contraction, Operand
from qcompiler.passes.ir.frame import WHOLE, Frame
from qcompiler.passes.ir.layers import end_layout, layer_end, residual_sums, sum_layout
from qcompiler.passes.ir.masks import adds_mask, split_mask
from qcompiler.passes.ir.meta import (
    get_contraction,
    get_value,
    is_backward,
    iterate_contractions,
    module_path,
    pin_to_backward,
    record_operand,
    set_fact,
)
from qcompiler.passes.ir.quantizer import insert_quantizer
from qcompiler.passes.ir.signs import Signs
from qcompiler.passes.ir.site_name import Numbering, SiteName
from qcompiler.passes.ir.views import aten, is_view
from qcompiler.passes.ir.walk import find_dequantizer
from qcompiler.passes.rules import ADDITION, Behind, Position, Product, Role, Rule, Sign, first_match
from qcompiler.runtime.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class PlaceQuantizers:
    """contraction(X, …) → contraction(dequantize(quantize(X, scale(X)), …), …), one quantizer for each operand.

    1. The first rule that matches role, operator, module path and position gives the spec, or keeps the operand in
       float; so does the absence of a rule. The reason is recorded on the contraction.
    2. An empty tensor, or one that is not floating, is kept.
    3. A quantizer stands right behind the tensor; the dequantize right in front of the contraction, and in backward
       pinned there, so that only codes and scales can be saved.
    4. A rule for the role *output* puts one behind a forward contraction, for all readers; an operand that is the
       result has codes already. Backward reads the codes through views of its own. *Behind the layer* means behind the
       batch norm and the relu that are the only readers (passes/ir/layers.py); relu's own gradient reads relu.
    5. A rule that names a product puts the product into the site, `…/grad.weight-gradient`: the two quantizers of one
       tensor round with bits of their own.
    6. A rule for outputs that names `addition` puts one behind residual sums.
    7. An attention mask is no data: baddbmm(mask, A, B) with a quantized output becomes bmm(A, B) + mask, with the
       quantizer behind the contraction alone; a sum in front of a softmax is no residual sum (passes/ir/masks.py).
    """

    name: ClassVar[str] = "place-quantizers"
    rules: tuple[Rule, ...] = ()
    frame: Frame = WHOLE

    def __call__(self, module: GraphModule) -> int:
        """Returns the number of quantizers that were placed."""
        signs = Signs(module.graph)
        found = list(iterate_contractions(module.graph))
        outputs = sum(self.place_output(node, fact, signs) for node, fact in found)
        outputs += self.place_sums(module, signs)
        pairs = [(node, fact, one) for node, fact in iterate_contractions(module.graph) for one in fact.operands]
        return outputs + sum(self.place(node, fact, operand, signs) for node, fact, operand in pairs)

    def place_output(self, node: Node, fact: Contraction, signs: Signs) -> int:
        """Case 4: a quantizer behind a forward contraction, or behind the layer, for all readers."""
        masked = adds_mask(node)
        end = node if masked else layer_end(node)
        match = self._match_output(fact, node, end, signs)
        val = get_value(node)
        if match is None or not fact.layout or fact.output_rule is not None:
            return 0
        index, rule = match
        if rule.spec is None or val.numel() == 0 or not val.is_floating_point():
            return 0
        if masked:
            node = end = split_mask(node, fact)
            fact = get_contraction(node) or fact
        set_fact(node, dataclasses.replace(fact, output_rule=index))
        end = end if rule.behind is Behind.LAYER else node
        _quantize_for_all(end, rule.spec, end_layout(fact.layout, end), str(SiteName(fact.site, "output")))
        return 1

    def place_sums(self, module: GraphModule, signs: Signs) -> int:
        """Case 6: the same behind residual sums, if a rule names sums."""
        if not any(rule.operator == ADDITION for rule in self.rules):
            return 0
        names = Numbering()
        placed = 0
        for node in list(residual_sums(module.graph)):
            path = module_path(node)
            name = f"{path}/add" if path else "add"
            site = self.frame.name(name, names.count(name))
            if get_contraction(node) is None:
                inner = frozenset({Position.INNER})
                placed += self.place_output(node, Contraction(path, site, ADDITION, inner, (), sum_layout(node)), signs)
        return placed

    def _match_output(self, fact: Contraction, node: Node, end: Node, signs: Signs) -> tuple[int, Rule] | None:
        """Return the first rule for an output; the sign belongs to the tensor that the quantizer would read."""
        for index, rule in enumerate(self.rules):
            sign = signs.find(end if rule.behind is Behind.LAYER else node)
            if rule.matches(Role.OUTPUT, fact.operator, fact.module, fact.positions, Product.FORWARD, sign):
                return index, rule
        return None

    def place(self, node: Node, fact: Contraction, operand: Operand, signs: Signs) -> int:
        """Places one quantizer; 0 if the operand stays in float or has a quantizer already."""
        tensor = node.args[operand.arg]
        assert isinstance(tensor, Node)
        if find_dequantizer(tensor) is not None or operand.kept:
            return 0
        val = get_value(tensor)
        if not val.is_floating_point() or val.numel() == 0:
            record_operand(node, operand.arg, kept=f"nothing to quantize: {val.dtype}, {val.numel()} elements")
            return 0
        match = match_operand(self.rules, fact, operand, signs.find(tensor))
        if match is None:
            record_operand(node, operand.arg, kept="no rule of the recipe matches")
            return 0
        index, rule = match
        if rule.spec is None:
            record_operand(node, operand.arg, kept=f"rule {index + 1}: {rule}", asked=True, rule=index)
            return 0
        record_operand(node, operand.arg, rule=index)
        site = SiteName(fact.site, operand.name, str(rule.product or ""))
        floats = insert_quantizer(tensor, node, rule.spec, operand.layout, str(site))
        node.update_arg(operand.arg, floats)
        return 1


def match_operand(rules: Sequence[Rule], fact: Contraction, operand: Operand, sign: Sign) -> tuple[int, Rule] | None:
    """Return the first rule that matches one operand of a contraction, with the index."""
    return first_match(rules, operand.role, fact.operator, fact.module, fact.positions, fact.product, sign)


def _quantize_for_all(tensor: Node, spec: QuantSpec, layout: str, site: str) -> None:
    """Case 4: every reader but the gradient of relu gets the dequantized codes."""
    _split_views(tensor)
    for reader in list(tensor.users):
        if not _is_relu_gradient(reader):
            reader.replace_input_with(tensor, insert_quantizer(tensor, reader, spec, layout, site))


def _is_relu_gradient(reader: Node) -> bool:
    """Return True if a backward node asks only if relu was positive, itself or through a view."""
    if is_view(reader):
        return is_backward(reader) and all(map(_is_relu_gradient, reader.users))
    return reader.target in (aten.threshold_backward.default, aten.hardtanh_backward.default)


def _split_views(node: Node) -> None:
    """Case 4: a backward reader of a forward view of `node` gets that view anew, in the half of the reader."""
    for view in [user for user in node.users if is_view(user) and not is_backward(user)]:
        _split_views(view)
        for reader in [user for user in view.users if is_backward(user)]:
            own = insert_call(node.graph, view.target, (node, *view.args[1:]), dict(view.kwargs), before=reader)
            pin_to_backward(own)
            reader.replace_input_with(view, own)
