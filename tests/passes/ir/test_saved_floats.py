"""Which floats forward saves for operators without a contraction, and what rules say of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qcompiler import recipes
from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.compiler.rewrite import split_halves
from qcompiler.passes.halves.saved_table import SavedTable
from qcompiler.passes.ir.quantizer import write_quantizer
from qcompiler.passes.ir.saved_floats import find_codes, iterate_saved
from qcompiler.passes.ir.views import aten
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.saving import SAVINGS
from qcompiler.runtime.spec import parse_spec

SPEC8, SPEC4 = SAVINGS["int8"].spec, SAVINGS["int4"].spec


@pytest.fixture
def listed(joint):
    """listed(rules, model, *inputs) → the saved floats of the model in float."""

    def make(rules, model, *inputs):
        captured = joint(model, *inputs)
        joint_pipeline(recipes.get("identity"))(captured.module)
        table = SavedTable(split_halves(captured))
        return list(iterate_saved(table.inputs, rules))

    return make


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def blocks():
    parts = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    return nn.Sequential(*parts)


def test_names_and_reasons(listed):
    found = listed((SAVINGS["int8"],), blocks(), leaf(3, 4))
    assert len({one.site for one in found}) == len(found)
    free = [one.site.partition("#")[0] for one in found if not one.reason]
    assert free == ["0.0/saved", "0.1/saved", "1.0/saved"]  # what norms read, and what the second layer reads
    assert {one.reason for one in found} == {"", "a statistic"}


def test_the_first_rule_decides(listed):
    rules = (
        Rule(role=Role.SAVED, spec=None, module="0.*", reason="measured"),
        Rule(role=Role.SAVED, spec=SPEC4, module="1.0"),
        Rule(role=Role.SAVED, spec=None),
        SAVINGS["int8"],
    )
    found = {one.site: one for one in listed(rules, blocks(), leaf(3, 4)) if one.reason != "a statistic"}
    assert (found["0.0/saved"].rule, found["0.0/saved"].reason, found["0.0/saved"].spec) == (0, "measured", None)
    assert (found["1.0/saved"].rule, found["1.0/saved"].reason, found["1.0/saved"].spec) == (1, "", SPEC4)


def test_without_a_rule_the_reason_says_so(listed):
    found = listed((Rule(role=Role.SAVED, spec=SPEC8, module="nowhere"),), blocks(), leaf(3, 4))
    assert {one.reason for one in found} == {"no rule for it", "a statistic"}
    assert all(one.rule is None and one.spec is None for one in found)


def test_a_rule_that_keeps_without_a_reason(listed):
    found = listed((Rule(role=Role.SAVED, spec=None),), blocks(), leaf(3, 4))
    assert {one.reason for one in found} == {"a rule keeps it", "a statistic"}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: F.log_softmax(m.fc(x), -1), "backward takes its exponential"),
        (lambda m, x: checkpoint(torch.tanh, m.fc(x), use_reentrant=False).exp(), "checkpoint"),
        (lambda m, x: m.fc(x).sum().exp(), "one number"),
    ],
    ids=["logarithm", "checkpoint", "one number"],
)
def test_floats_that_stay(forward, reason, listed, function):
    found = listed((SAVINGS["int8"],), function(forward, fc=nn.Linear(4, 4)), leaf(3, 4))
    assert any(reason in one.reason for one in found)


@pytest.mark.parametrize(("shape", "layout"), [((6,), "c"), ((3, 4), "bc"), ((2, 3, 4), "bcc"), ((2, 3, 4, 5), "bccc")])
def test_layouts_are_samples_and_runs(shape, layout, listed, function):
    found = listed((SAVINGS["int8"],), function(lambda m, x: (x * 2).exp()), leaf(*shape))
    assert [one.layout for one in found] == [layout]


def test_codes_are_found_through_views_that_keep_the_order(joint):
    spec, short = parse_spec("int8:fit:tensor:nearest:pass"), parse_spec("int4:fit:tensor:nearest:pass")
    captured = joint(lambda x: x.exp().view(4, 3).t().sin(), leaf(3, 4))
    graph = captured.module.graph
    (exp,) = graph.find_nodes(op="call_function", target=aten.exp.default)
    view = next(iter(graph.find_nodes(op="call_function", target=aten.view.default)))
    turned = next(iter(graph.find_nodes(op="call_function", target=aten.t.default)))
    assert find_codes(exp, spec) is None
    written = write_quantizer(view, spec, "bc", "a/input")
    assert find_codes(exp, spec) == find_codes(view, spec) == written
    assert find_codes(exp, short) == written  # more bits than asked for
    assert find_codes(turned, spec) is None  # another order of the elements
    assert find_codes(exp, parse_spec("int16:fit:tensor:nearest:pass")) is None
