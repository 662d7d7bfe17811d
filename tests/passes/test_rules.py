"""Rules: matching, order, the report line, and the errors."""

import dataclasses
import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.passes.rules import OPERATORS, Position, Product, Role, Rule, Sign, did_you_mean, first_match
from qcompiler.runtime.numbers.formats import IntFormat
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.spec import QuantSpec, parse_spec

INT8 = QuantSpec(format=IntFormat(8))
INT4 = QuantSpec(format=IntFormat(4), rounding=Rounding.STOCHASTIC)
INNER = frozenset({Position.INNER})
ONLY = frozenset({Position.FIRST, Position.LAST})


@pytest.mark.parametrize("role", Role)
def test_rule_without_conditions_matches_every_operand(role):
    # outputs and saved floats are no operands: only a rule that names the role speaks of them
    is_operand = role not in (Role.OUTPUT, Role.SAVED)
    modules, places = ["", "head", "layer1.0.conv1"], [INNER, ONLY, frozenset({Position.FIRST})]
    for place in itertools.product(OPERATORS, modules, places, Product):
        assert Rule(spec=INT8).matches(role, *place) is is_operand, place


@pytest.mark.parametrize("sign", Sign)
def test_sign_matches_only_itself(sign):
    rule = Rule(spec=INT8, sign=sign)
    known = [other for other in Sign if rule.matches(Role.ACTIVATION, "linear", "", INNER, sign=other)]
    assert known == [sign]


@pytest.mark.parametrize("product", Product)
def test_product_matches_only_itself(product):
    rule = Rule(spec=INT8, product=product)
    assert [other for other in Product if rule.matches(Role.GRADIENT, "linear", "", INNER, other)] == [product]


@pytest.mark.parametrize("role", Role)
def test_role_matches_only_itself(role):
    assert [other for other in Role if Rule(spec=INT8, role=role).matches(other, "linear", "", INNER)] == [role]


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_matches_only_itself(operator):
    rule = Rule(spec=INT8, operator=operator)
    assert [other for other in OPERATORS if rule.matches(Role.WEIGHT, other, "", INNER)] == [operator]


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("layer1.*", "layer1.0.conv1", True),  # a star also runs over dots
        ("layer1.*", "layer1", False),
        ("layer1", "layer1", True),
        ("layer1", "layer1.0.conv1", False),  # a parent's name is not a pattern for what is inside it
        ("layer1.*", "layer10.0.conv1", False),
        ("*.conv1", "layer1.0.conv1", True),
        ("layer?.0.conv[12]", "layer3.0.conv2", True),
        ("layer?.0.conv[!12]", "layer3.0.conv2", False),
        ("Layer1.*", "layer1.0.conv1", False),
        ("", "", True),
        ("", "head", False),
    ],
)
def test_module_is_a_shell_pattern_for_the_whole_path(pattern, module, expected):
    assert Rule(spec=INT8, module=pattern).matches(Role.WEIGHT, "linear", module, INNER) is expected


@pytest.mark.parametrize("position", Position)
@pytest.mark.parametrize("positions", [INNER, ONLY, frozenset({Position.FIRST}), frozenset({Position.LAST})])
def test_position_matches_any_of_the_contraction(position, positions):
    rule = Rule(spec=INT8, position=position)
    assert rule.matches(Role.WEIGHT, "linear", "fc", positions) is (position in positions)


def test_conditions_are_joined_by_and():
    forward, backward = Product.FORWARD, Product.INPUT_GRADIENT
    full = Rule(spec=INT8, role=Role.WEIGHT, operator="linear", module="fc*", position=Position.LAST, product=forward)
    last = frozenset({Position.LAST})
    operand = {"role": Role.WEIGHT, "operator": "linear", "module": "fc1", "positions": last, "product": forward}
    assert full.matches(**operand)
    misses = {"role": Role.GRADIENT, "operator": "matmul", "module": "conv1", "positions": INNER, "product": backward}
    for name, value in misses.items():
        assert not full.matches(**(operand | {name: value})), name


def test_first_match_decides():
    rules = [
        Rule(spec=None, module="head"),
        Rule(spec=INT4, role=Role.GRADIENT),
        Rule(spec=INT8, role=Role.GRADIENT),
        Rule(spec=INT8, role=Role.WEIGHT),
    ]
    assert first_match(rules, Role.GRADIENT, "linear", "head", INNER) == (0, rules[0])
    assert first_match(rules, Role.GRADIENT, "linear", "fc", INNER) == (1, rules[1])
    assert first_match(rules, Role.WEIGHT, "linear", "fc", INNER) == (3, rules[3])
    assert first_match(rules, Role.ACTIVATION, "linear", "fc", INNER) is None
    assert first_match([], Role.WEIGHT, "linear", "fc", INNER) is None


SPECS, OPERAND_ROLES = st.sampled_from([None, INT8, INT4]), [role for role in Role if role is not Role.SAVED]
SAVED_RULES = st.builds(Rule, spec=SPECS, role=st.just(Role.SAVED), module=st.sampled_from(["*", "a*", "a.b", ""]))
RULES = SAVED_RULES | st.builds(
    Rule,
    spec=SPECS,
    role=st.none() | st.sampled_from(OPERAND_ROLES),
    operator=st.sampled_from([*OPERATORS, "*"]),
    module=st.sampled_from(["*", "a*", "a.b", ""]),
    position=st.none() | st.sampled_from(Position),
)


@settings(derandomize=True, deadline=None)
@given(
    st.lists(RULES, max_size=5),
    st.sampled_from(Role),
    st.sampled_from(OPERATORS),
    st.sampled_from(["", "a", "a.b", "b"]),
    st.sampled_from([INNER, ONLY, frozenset({Position.FIRST})]),
)
def test_first_match_is_the_first_of_all_matches(rules, role, operator, module, positions):
    hits = [(i, rule) for i, rule in enumerate(rules) if rule.matches(role, operator, module, positions)]
    assert first_match(rules, role, operator, module, positions) == (hits[0] if hits else None)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(spec=None), "everything -> keep in float"),
        (Rule(spec=INT8), "everything -> int8:fit:each:nearest:pass"),
        (Rule(spec=None, role=Role.ACTIVATION), "activation -> keep in float"),
        (Rule(spec=None, operator="matmul", reason="softmax input"), "matmul -> keep in float (softmax input)"),
        (Rule(spec=None, position=Position.LAST), "last contraction -> keep in float"),
        (Rule(spec=None, module="head"), "everything at head -> keep in float"),
        (Rule(spec=None, module=""), "everything at '' -> keep in float"),
        (
            Rule(spec=INT4, role=Role.GRADIENT, operator="convolution", module="layer1.*"),
            "gradient of convolution at layer1.* -> int4:fit:each:stochastic:pass",
        ),
        (
            Rule(spec=INT8, role=Role.WEIGHT, operator="linear", position=Position.FIRST, reason="sensitive"),
            "weight of first linear -> int8:fit:each:nearest:pass (sensitive)",
        ),
    ],
)
def test_report_line(rule, expected):
    assert str(rule) == expected


@settings(derandomize=True, deadline=None)
@given(RULES)
def test_report_line_ends_with_the_spec(rule):
    action = str(rule).partition(" -> ")[2]
    assert rule.spec == (None if action == "keep in float" else parse_spec(action))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spec": "int4"}, r"^spec: got 'int4' \(str\); valid: a QuantSpec or None$"),
        ({"role": "weight"}, r"^role: got 'weight' \(str\); valid: a Role or None$"),
        ({"position": 0}, r"^position: got 0 \(int\); valid: a Position or None$"),
        ({"operator": None}, r"^operator: got None \(NoneType\); valid: a str$"),
        ({"module": None}, r"^module: got None \(NoneType\); valid: a str$"),
        ({"reason": 3}, r"^reason: got 3 \(int\); valid: a str$"),
        (
            {"operator": "conv2d"},
            r"^operator: got 'conv2d'; valid: convolution, linear, matmul, \*; did you mean 'convolution'\?$",
        ),
        ({"operator": "xyz"}, r"^operator: got 'xyz'; valid: convolution, linear, matmul, \*$"),
        ({"operator": ""}, r"^operator: got ''; valid: convolution, linear, matmul, \*$"),
    ],
)
def test_invalid_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Rule(**({"spec": None} | fields))


def test_spec_must_be_given():
    with pytest.raises(TypeError, match="'spec'"):
        Rule()


def test_rule_is_a_frozen_hashable_value():
    rule = Rule(spec=INT8, role=Role.WEIGHT)
    assert {rule, Rule(spec=INT8, role=Role.WEIGHT)} == {rule}
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.role = None


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("liner", "; did you mean 'linear'?"),
        ("conv", "; did you mean 'convolution'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_did_you_mean(word, expected):
    assert did_you_mean(word, OPERATORS) == expected


def test_module_has_one_identity():
    assert "passes" not in sys.modules
