"""QuantPlan: the table of a graph."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qcompiler.compiler.pipelines import joint_pipeline
from qcompiler.compiler.plan import Kept, QuantPlan, Site
from qcompiler.passes.ir.site_name import get_role
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

HYPERBLOCK = "int8:fit:b2c2o2i2:nearest:pass"


def leaf(*shape):
    """A random tensor that needs a gradient."""
    return torch.randn(*shape, requires_grad=True)


@pytest.fixture
def planned(joint):
    """planned(rules, model, *inputs) → the plan of its graph after all passes."""

    def make(rules, model, *inputs):
        captured = joint(model, *inputs)
        joint_pipeline(Recipe(name="planned", rules=rules))(captured.module)
        return QuantPlan.of(captured.module)

    return make


@pytest.mark.parametrize("bits", [8, 4])
def test_sites(bits, planned, rules):
    spec = f"int{bits}:fit:b2c2o2i2:nearest:pass"
    plan = planned(rules(spec), nn.Sequential(nn.Linear(4, 3)), leaf(2, 4))
    rows = {site.name: (site.role, str(site.spec), site.layout, site.shape, {*site.consumers}) for site in plan.sites}
    assert rows == {
        "0/input": (Role.ACTIVATION, spec, "bc", (2, 4), {"0 forward", "0 weight gradient"}),
        "0/weight": (Role.WEIGHT, spec, "oi", (3, 4), {"0 forward", "0 input gradient"}),
        "0/grad": (Role.GRADIENT, spec, "bc", (2, 3), {"0 input gradient", "0 weight gradient", "0 bias gradient"}),
    }
    assert (plan.placed, plan.kept, plan.matched) == (6, (), {0})


def test_turned_sites_keep_their_role(planned, rules):
    plan = planned(rules("int8:fit:c2i2:nearest:pass"), nn.Conv1d(2, 3, 2), leaf(2, 2, 3))
    roles = {site.name: site.role for site in plan.sites}
    assert roles == {
        f"(root)/{name}{turned}": role
        for name, role in {"input": Role.ACTIVATION, "weight": Role.WEIGHT, "grad": Role.GRADIENT}.items()
        for turned in ("", ".turned")
    }


def test_products_of_activations_name_left_and_right(planned, rules, function):
    plan = planned(rules(HYPERBLOCK), function(lambda m, x, y: x @ y), leaf(2, 4), leaf(4, 2))
    assert {site.name.rpartition("/")[2]: {*site.consumers} for site in plan.sites} == {
        "left": {"(root)/matmul forward", "(root)/matmul right gradient"},
        "right": {"(root)/matmul forward", "(root)/matmul left gradient"},
        "grad": {"(root)/matmul left gradient", "(root)/matmul right gradient"},
    }


def test_what_stays_in_float_and_why(planned, function):
    def forward(m, x):
        x = m.fc(x)
        return F.scaled_dot_product_attention(x, x, x)

    keep = Rule(role=Role.WEIGHT, spec=None, reason="measured")
    illegal = Rule(role=Role.GRADIENT, spec=parse_spec("int8:fit:each:nearest:pass"))
    plan = planned((keep, illegal), function(forward, fc=nn.Linear(4, 4)), leaf(1, 1, 3, 4))
    each = "block each has edge 1 along the summed axis '{}', turned or not"
    fused = "fused attention: its two products are inside one kernel"
    attention = "aten._scaled_dot_product_flash_attention_for_cpu{}.default"
    assert {(kept.name, kept.consumer, kept.reason) for kept in plan.kept} == {
        ("fc/input", "fc forward", "no rule of the recipe matches"),
        ("fc/weight", "fc forward", f"rule 1: {keep}"),
        ("fc/grad", "fc input gradient", each.format("c")),
        ("fc/weight", "fc input gradient", f"rule 1: {keep}"),
        ("fc/grad", "fc weight gradient", each.format("b")),
        ("fc/input", "fc weight gradient", "no rule of the recipe matches"),
        (attention.format(""), "(root)", fused),
        (attention.format("_backward"), "(root)", fused),
    }
    assert (plan.sites, plan.placed, plan.matched) == ((), 0, {0, 1})


def test_a_rule_that_decides_nothing_is_not_matched(planned, rules):
    unused = Rule(module="nowhere", spec=None)
    assert planned((unused, *rules(HYPERBLOCK)), nn.Linear(4, 3), leaf(2, 4)).matched == {1}


def test_an_empty_graph_has_an_empty_plan(planned, rules):
    assert planned(rules(HYPERBLOCK), nn.ReLU(), leaf(2, 4)) == QuantPlan()


@pytest.mark.parametrize(
    ("form", "shape", "expected"),
    [
        ("int8", (3, 5), 15),
        ("int5", (3, 5), 15),
        ("int4", (3, 5), 8),
        ("int4", (2, 4), 4),
        ("int2", (3, 5), 4),
        ("int3", (8, 8), 32),
        ("int16", (8, 8), 128),
    ],
)
def test_bytes_of_codes(form, shape, expected):
    site = Site("x", Role.WEIGHT, parse_spec(f"{form}:fit:tensor:nearest:pass"), "oi", shape, (), True)
    assert site.code_bytes == expected


def test_print(planned, rules):
    plan = planned(rules(weight=HYPERBLOCK), nn.Sequential(nn.Linear(4, 3)), leaf(2, 4))
    text = str(plan.with_run(1234567, 89, ["rule matched nothing: x"]))
    assert "│ 0/weight  │ weight │ int8" in text
    assert "0 input gradient" in text
    assert "no rule of the recipe matches" in text
    assert "quantizers: 2 before deduplication, 1 after" in text
    assert "saved for backward: 1,234,567 bytes, of which codes and scales 89" in text
    assert text.endswith("note: rule matched nothing: x")
    text = str(plan.with_run(1, 1, [], in_kernels=3, in_loops={"they are fast": 2}))
    assert "compiled quantizers: 3 in kernels of their own; 2 in compiled loops: they are fast" in text
    assert "left in float" not in str(planned(rules(HYPERBLOCK), nn.Linear(4, 3), leaf(2, 4)))


def test_merge_adds_up():
    site = Site("x", Role.WEIGHT, parse_spec(HYPERBLOCK), "oi", (2, 2), ("x forward",), True)
    kept = Kept("y", "y forward", "why")
    first = QuantPlan(sites=(site,), placed=2, saved_bytes=10, saved_code_bytes=5, matched=frozenset({0}), notes=("a",))
    second = QuantPlan(sites=(site,), kept=(kept,), placed=3, saved_bytes=1, matched=frozenset({0, 2}), notes=("b",))
    first = dataclasses.replace(first, in_kernels=2, in_loops=(("z", 1),))
    second = dataclasses.replace(second, in_kernels=1, in_loops=(("z", 2), ("w", 1)))
    assert QuantPlan.merge([first, second], ["c"]) == QuantPlan(
        sites=(site, site),
        kept=(kept,),
        placed=5,
        saved_bytes=11,
        saved_code_bytes=5,
        matched=frozenset({0, 2}),
        notes=("a", "b", "c"),
        in_kernels=3,
        in_loops=(("z", 3), ("w", 1)),
    )


def test_roles_in_the_names_of_sites():
    """A rule that names a product, and a block that was turned, stand behind the operand."""
    roles = {"grad": Role.GRADIENT, "weight": Role.WEIGHT, "output": Role.OUTPUT, "left": Role.ACTIVATION}
    for text, role in roles.items():
        for tail in ("", ".turned", ".weight-gradient", ".input-gradient.turned", "#2", ".turned#3"):
            assert get_role(f"layer1.0.conv1/{text}{tail}") is role
