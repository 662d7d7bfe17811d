"""The named recipes: what they decide for each operand, and how they are looked up."""

import pytest

from qcompiler import recipes
from qcompiler.passes.rules import OPERATORS, Position, Role, first_match
from qcompiler.recipe import Recipe, RecipeError
from qcompiler.recipes import RECIPES, get
from qcompiler.runtime.blocks import TENSOR, Block

HYPERBLOCK = Block(batch=2, channel=8, out=4, in_=4)
CHANNELWISE = Block(channel=16, in_=16)

#: name → (bits in the first and the last contraction, bits in between, block)
TABLE = {
    "hyperblock-int8": (8, 8, HYPERBLOCK),
    "hyperblock-int4": (8, 4, HYPERBLOCK),
    "channelwise-int8": (8, 8, CHANNELWISE),
    "channelwise-int4": (8, 4, CHANNELWISE),
    "tensor-int8": (8, 8, TENSOR),
    "tensor-int4": (8, 4, TENSOR),
}
POSITIONS = [
    frozenset({Position.FIRST}),
    frozenset({Position.INNER}),
    frozenset({Position.LAST}),
    frozenset({Position.FIRST, Position.LAST}),
]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("role", [Role.WEIGHT, Role.ACTIVATION, Role.GRADIENT])
def test_every_operand_gets_the_spec_of_the_table(name, operator, positions, role):
    end_bits, inner_bits, block = TABLE[name]
    bits = inner_bits if Position.INNER in positions else end_bits
    rounding = "stochastic" if role is Role.GRADIENT else "nearest"
    _, rule = first_match(RECIPES[name].rules, role, operator, "layer1.0.conv1", positions)
    assert str(rule.spec) == f"int{bits}:max:{block}:{rounding}:pass"


def test_identity_has_no_rules():
    assert recipes.IDENTITY.rules == ()


def test_names():
    assert [*RECIPES] == ["identity", *TABLE]
    assert [recipe.name for recipe in RECIPES.values()] == [*RECIPES]


def test_every_constant_is_listed():
    constants = [value for value in vars(recipes).values() if isinstance(value, Recipe)]
    assert constants == [*RECIPES.values()]


@pytest.mark.parametrize("name", TABLE)
def test_source_cites_a_paper(name):
    source = RECIPES[name].source
    assert "20" in source
    assert ":" in source


@pytest.mark.parametrize("name", RECIPES)
def test_every_rule_can_match(name):
    rules = RECIPES[name].rules
    operands = [(role, positions) for role in Role for positions in POSITIONS]
    hits = [first_match(rules, role, "linear", "fc", positions) for role, positions in operands]
    assert RECIPES[name].unused({hit[0] for hit in hits if hit}) == []


@pytest.mark.parametrize("name", RECIPES)
def test_yaml_round_trip(name):
    assert Recipe.from_yaml(RECIPES[name].to_yaml()) == RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_eval_needs_no_batch_mates(name):
    for rule in RECIPES[name].for_eval().rules:
        assert rule.spec.block.batch == rule.spec.block.group == 1


@pytest.mark.parametrize("name", RECIPES)
def test_get_by_name(name):
    assert get(name) is RECIPES[name]


def test_get_passes_a_recipe_through():
    recipe = Recipe(name="mine", rules=())
    assert get(recipe) is recipe


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_get_reads_a_file(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    recipes.HYPERBLOCK_INT4.to_file(path)
    assert get(str(path)) == recipes.HYPERBLOCK_INT4


def test_get_of_a_bad_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rules: []")
    with pytest.raises(RecipeError, match=r"mine\.yaml: key 'name' is missing"):
        get(str(path))


def test_get_of_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        get("none.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "hyperblok-int4",
            r"^recipe: got 'hyperblok-int4'; valid: identity, hyperblock-int8, .*, tensor-int4, or the path of a "
            r"\.yaml file; did you mean 'hyperblock-int4'\?$",
        ),
        ("zzz", r"^recipe: got 'zzz'; valid: identity, .*, or the path of a \.yaml file$"),
        ("", r"^recipe: got ''; valid: identity"),
        (None, r"^recipe: got None \(NoneType\); valid: a name, a path, or a Recipe$"),
    ],
)
def test_get_unknown(name, message):
    with pytest.raises(RecipeError, match=message):
        get(name)
