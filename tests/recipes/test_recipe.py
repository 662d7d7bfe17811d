"""Recipe: the value, its YAML form and its files. The errors are in test_recipe_errors.py."""

import dataclasses
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.passes.rules import OPERATORS, Position, Product, Role, Rule, Sign
from qcompiler.recipes.recipe import _RULE_KEYS, _SPEC, Recipe
from qcompiler.runtime.numbers.blocks import TENSOR, Block
from qcompiler.runtime.numbers.formats import BITS, IntFormat, Kind, parse_format
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.ranges.estimators import ESTIMATORS, parse_range
from qcompiler.runtime.ranges.statistical import Sawb
from qcompiler.runtime.spec import QuantSpec, Scale, Vjp

INT8 = QuantSpec(format=IntFormat(8), block=Block(batch=4, channel=16))
LEARNED = QuantSpec(
    format=IntFormat(4, Kind.UNSIGNED), scale=Scale.REAL, block=TENSOR, vjp=Vjp.CLIP, range=parse_range("lsq")
)
EXAMPLE = Recipe(
    name="example",
    source="A. Author: A Title, 2020",
    rules=(
        Rule(spec=None, module="*.head", reason="few values: nothing to gain"),
        Rule(
            spec=QuantSpec(
                format=IntFormat(4, Kind.UNSIGNED),
                scale=Scale.MAX,
                block=Block(batch=0, channel=16),
                rounding=Rounding.STOCHASTIC,
                vjp=Vjp.CLIP,
            ),
            role=Role.GRADIENT,
            operator="convolution",
            position=Position.FIRST,
        ),
        Rule(spec=LEARNED, role=Role.ACTIVATION, sign=Sign.NONNEGATIVE, product=Product.FORWARD),
        Rule(spec=INT8),
    ),
)
EXAMPLE_YAML = """\
name: example
source: 'A. Author: A Title, 2020'
rules:
- {module: '*.head', reason: 'few values: nothing to gain', keep: true}
- {role: gradient, operator: convolution, position: first, format: uint4, scale: max, block: b*c16, rounding: stochastic, vjp: clip}
- {role: activation, product: forward, sign: nonnegative, format: uint4, scale: real, block: tensor, rounding: nearest, vjp: clip, range: lsq}
- {format: int8, scale: fit, block: b4c16, rounding: nearest, vjp: pass}
"""  # noqa: E501

FORMATS = st.builds(IntFormat, st.sampled_from(BITS), st.sampled_from(Kind))
EDGES = st.integers(0, 64)
BLOCKS = st.just(TENSOR) | st.builds(Block, batch=EDGES, channel=EDGES, space=EDGES, out=EDGES, in_=EDGES, group=EDGES)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    form = draw(FORMATS | st.sampled_from(["e4m3", "e5m2inf", "e4m3b11", "e3m0r4x2"]).map(parse_format))
    rules = [Scale.MAX, Scale.FIT, Scale.ONE, Scale.TWO_LEVEL]  # what goes with every format without a zero point
    scale = Scale.REAL if form.kind is Kind.AFFINE else draw(st.sampled_from(rules))
    rounding, vjp = draw(st.sampled_from(Rounding)), draw(st.sampled_from(Vjp))
    # learned ranges and sawb go with few specs and roles; an example has one of them
    estimator = draw(st.sampled_from([kind() for kind in ESTIMATORS if not kind.is_learned and kind is not Sawb]))
    block = TENSOR if estimator.has_state else draw(BLOCKS)  # kept ranges need blocks that the next batch has too
    return QuantSpec(format=form, scale=scale, block=block, rounding=rounding, vjp=vjp, range=estimator)


#: text of every kind, and the words that YAML reads as something else unless they are quoted
YAML_WORDS = "null|~|true|no|on|3|0x1F|1e3|2020-01-01|=|<<|*|&a|- a|a: b|# a|\n | a |'|%|@|!x|{a}|[|,"
TEXTS = st.text(max_size=20) | st.sampled_from(YAML_WORDS.split("|"))
#: the role output takes no clip mask
RULES = st.builds(
    Rule,
    spec=st.none() | specs(),
    role=st.none() | st.sampled_from([Role.WEIGHT, Role.ACTIVATION, Role.GRADIENT]),
    operator=st.sampled_from([*OPERATORS, "*"]),
    module=TEXTS,
    position=st.none() | st.sampled_from(Position),
    product=st.none() | st.sampled_from(Product),
    sign=st.none() | st.sampled_from(Sign),
    rotate=st.sampled_from([0, 1, 2, 16]),
    reason=TEXTS,
)
RECIPES = st.builds(
    Recipe,
    name=TEXTS.filter(bool),
    rules=st.lists(RULES, max_size=4).map(tuple),
    source=TEXTS,
    integer_biases=st.booleans(),
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(RECIPES)
def test_yaml_round_trip(recipe):
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_golden_yaml():
    assert EXAMPLE.to_yaml() == EXAMPLE_YAML
    assert Recipe.from_yaml(EXAMPLE_YAML) == EXAMPLE


def test_empty_rules_and_no_source():
    recipe = Recipe(name="identity", rules=())
    assert recipe.to_yaml() == "name: identity\nrules: []\n"
    assert Recipe.from_yaml("{name: identity, rules: []}") == recipe


def test_every_spec_field_has_a_key():
    assert list(_SPEC) == [field.name for field in dataclasses.fields(QuantSpec)]
    assert {field.name for field in dataclasses.fields(Rule)} - {"spec"} == set(_RULE_KEYS) - set(_SPEC) - {"keep"}


def test_only_the_format_is_required():
    (rule,) = Recipe.from_yaml("{name: x, rules: [{format: affine8, scale: real}]}").rules
    assert rule == Rule(spec=QuantSpec(format=IntFormat(8, Kind.AFFINE), scale=Scale.REAL))


def test_anchors_and_merges_with_overrides():
    text = "name: x\nrules:\n- &a {format: int8, role: weight}\n- &b {<<: *a, role: gradient}\n- {<<: *b, format: int4}"
    int8, int4 = (QuantSpec(format=IntFormat(bits)) for bits in (8, 4))
    assert Recipe.from_yaml(text).rules == (
        Rule(spec=int8, role=Role.WEIGHT),
        Rule(spec=int8, role=Role.GRADIENT),
        Rule(spec=int4, role=Role.GRADIENT),
    )


def test_for_eval_changes_only_the_batch_edge():
    (keep, gradient, learned, other) = EXAMPLE.for_eval().rules
    assert (keep, learned) == (EXAMPLE.rules[0], EXAMPLE.rules[2])  # a range of the past has no batch mates
    assert gradient == dataclasses.replace(EXAMPLE.rules[1], spec=EXAMPLE.rules[1].spec.with_block(Block(channel=16)))
    assert other == Rule(spec=INT8.with_block(Block(channel=16)))
    assert dataclasses.replace(EXAMPLE.for_eval(), rules=EXAMPLE.rules) == EXAMPLE


@settings(derandomize=True, deadline=None)
@given(RECIPES)
def test_for_eval_is_per_sample_and_idempotent(recipe):
    evaluated = recipe.for_eval()
    for before, after in zip(recipe.rules, evaluated.rules, strict=True):
        stateless = before.spec is not None and not before.spec.range.has_state
        spec = before.spec.with_block(before.spec.block.per_sample()) if stateless else before.spec
        assert after == dataclasses.replace(before, spec=spec)
    assert evaluated.for_eval() is evaluated


def test_for_eval_of_per_sample_blocks_is_the_recipe_itself():
    recipe = Recipe(name="x", rules=(Rule(spec=None), Rule(spec=INT8.with_block(Block(channel=16)))))
    assert recipe.for_eval() is recipe


def test_unused():
    first, second, third, fourth = EXAMPLE.rules
    assert EXAMPLE.unused(set()) == [first, second, third, fourth]
    assert EXAMPLE.unused({1, 3}) == [first, third]
    assert EXAMPLE.unused({0, 1, 2, 3}) == []


def test_recipe_is_a_frozen_hashable_value():
    assert {EXAMPLE, Recipe.from_yaml(EXAMPLE_YAML)} == {EXAMPLE}
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXAMPLE.name = "y"


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_file_round_trip(tmp_path, kind):
    path = tmp_path / "recipe.yaml"
    recipe = dataclasses.replace(EXAMPLE, source="Köster\u2028𝟛\r\n")
    recipe.to_file(kind(path))
    assert Recipe.from_file(kind(path)) == recipe
    assert list(tmp_path.iterdir()) == [path]


def test_to_file_replaces(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("old")
    EXAMPLE.to_file(path)
    assert path.read_text(encoding="utf-8") == EXAMPLE_YAML
    assert list(tmp_path.iterdir()) == [path]


def test_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("old")
    drafts = []

    def fail(source, target):
        drafts.append(source.read_text(encoding="utf-8"))
        assert target == path
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        EXAMPLE.to_file(path)
    assert drafts == [EXAMPLE_YAML]  # whole before the replacement
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_to_file_without_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        EXAMPLE.to_file(tmp_path / "none" / "recipe.yaml")
