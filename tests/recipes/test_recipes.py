"""The named recipes: what they decide for each operand, how they are looked up, and that every one of them trains."""

import copy
import importlib
import itertools
import re
from pkgutil import iter_modules

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompiler import recipes
from qcompiler.errors import CompileError
from qcompiler.passes.rules import ADDITION, OPERATORS, Position, Product, Role, Sign, first_match
from qcompiler.recipes import RECIPES, get
from qcompiler.recipes.block_floating import HYPERBLOCK_INT4, IDENTITY
from qcompiler.recipes.recipe import Recipe, RecipeError
from qcompiler.runtime.numbers.blocks import TENSOR, Block
from qcompiler.runtime.ranges.store import PREFIX
from qcompiler.runtime.spec import Scale

HYPERBLOCK = Block(batch=2, channel=8, out=4, in_=4)
WIDE_HYPERBLOCK = Block(batch=64, channel=64, space=0, out=64, in_=64)
CHANNELWISE = Block(channel=16, in_=16)

#: name → (bits in the first and the last contraction, bits in between, block)
TABLE = {
    "hyperblock-int8": (8, 8, HYPERBLOCK),
    "hyperblock-int8-wide": (8, 8, WIDE_HYPERBLOCK),
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
    assert IDENTITY.rules == ()


def test_names():
    assert [*RECIPES][:8] == ["identity", *TABLE]
    assert [recipe.name for recipe in RECIPES.values()] == [*RECIPES]


def test_every_constant_is_listed():
    """A constant that no list names is a recipe that nobody finds."""
    modules = [importlib.import_module(f"{recipes.__name__}.{found.name}") for found in iter_modules(recipes.__path__)]
    values = [value for module in modules for value in vars(module).values() if isinstance(value, Recipe)]
    assert sorted({id(value): value.name for value in values}.values()) == sorted(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"identity"}))
def test_source_cites_a_paper(name):
    source = RECIPES[name].source
    assert re.search(r"\b20(1[5-9]|2\d)\b", source)
    assert re.search(r"[\w.]: \w", source)


#: the products that can read each role
PRODUCTS = {
    Role.WEIGHT: [Product.FORWARD, Product.INPUT_GRADIENT],
    Role.ACTIVATION: [Product.FORWARD, Product.WEIGHT_GRADIENT],
    Role.GRADIENT: [Product.INPUT_GRADIENT, Product.WEIGHT_GRADIENT],
    Role.OUTPUT: [Product.FORWARD],
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_rule_can_match(name):
    rules = RECIPES[name].rules
    operands = [(role, product) for role, products in PRODUCTS.items() for product in products]
    hits = [
        first_match(rules, role, operator, "fc", positions, product, sign)
        for (role, product), positions, sign, operator in itertools.product(
            operands, POSITIONS, Sign, ("linear", "convolution", ADDITION)
        )
    ]
    assert RECIPES[name].unused({hit[0] for hit in hits if hit}) == []


@pytest.mark.parametrize("name", RECIPES)
def test_yaml_round_trip(name):
    assert Recipe.from_yaml(RECIPES[name].to_yaml()) == RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_eval_needs_no_batch_mates(name):
    """Every block spans one sample; a kept range does not depend on the batch, so its block stays."""
    for trained, rule in zip(RECIPES[name].rules, RECIPES[name].for_eval().rules, strict=True):
        if rule.spec is None or rule.spec.range.has_state:
            assert rule == trained
        else:
            assert rule.spec.block.batch == rule.spec.block.group == 1


class Net(nn.Sequential):
    """Two convolutions and a linear layer: first, inner and last product, behind an input that can be negative."""

    def __init__(self):
        layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
        super().__init__(*layers)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.sample(3)
def test_every_recipe_trains(name, eager):
    """Three strict steps; then the plan, evaluation, and back to the checkpoint after a fourth."""
    model = eager(Net(), name, strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, labels = torch.randn(8, 3, 6, 6), torch.randint(5, (8,))

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    for _ in range(3):
        step()
    check_plan(name, model.plan())

    model.eval()
    out = seeded(model, x)
    assert out.isfinite().all()
    if all(rule.spec is None or rule.spec.scale is not Scale.TWO_LEVEL for rule in RECIPES[name].rules):
        mates = torch.cat([x[:1], 100 * x[1:]])  # the unit of two-level scales is that of the batch: docs/numbers.md
        assert torch.equal(seeded(model, mates)[0], out[0])

    states = copy.deepcopy(model.state_dict())
    assert any(key.startswith(PREFIX) for key in states) == RECIPES[name].has_state
    model.train()
    step()
    model.eval()
    assert not torch.equal(seeded(model, x), out)
    model.load_state_dict(states)
    assert torch.equal(seeded(model, x), out)


def check_plan(name, plan):
    """Every operand is either quantized or kept, sites have names of their own, and specs are those of the rules."""
    rules = RECIPES[name].rules
    assert len({site.name for site in plan.sites}) == len(plan.sites) <= plan.placed
    assert bool(plan.sites) == bool(rules)
    matched = {rules[index] for index in plan.matched}
    assert all((site.role is Role.GRADIENT) == ("/grad" in site.name) for site in plan.sites)
    assert {(site.spec.format, site.spec.range) for site in plan.sites} == {
        (rule.spec.format, rule.spec.range) for rule in matched if rule.spec is not None
    }
    assert all(kept.reason for kept in plan.kept)


def seeded(model, x):
    """The output, with the same random bits each time."""
    torch.manual_seed(1)
    return model(x).detach()


@pytest.mark.usefixtures("fresh")
def test_learned_ranges_wait_for_a_finite_tensor(eager):
    model = eager(Net(), "lsq-w4a4")
    x = torch.randn(2, 3, 6, 6)
    model(torch.full_like(x, torch.nan))
    assert model.ranges()["0/input"].isnan()
    assert model(x).isfinite().all()
    assert model.ranges()["0/input"].isfinite()


@pytest.mark.usefixtures("fresh")
def test_no_learned_ranges_in_a_model_without_their_operands(eager):
    """PACT learns the clip of relu; this model has none."""
    model = eager(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), "pact-w4a4")
    with pytest.raises(CompileError, match="nothing is captured yet"):
        model.quantizer_parameters()
    model(torch.randn(2, 4))
    assert model.quantizer_parameters() == []


@pytest.mark.parametrize("name", RECIPES)
def test_get_by_name(name):
    assert get(name) is RECIPES[name]


def test_get_passes_a_recipe_through():
    recipe = Recipe(name="mine", rules=())
    assert get(recipe) is recipe


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_get_reads_a_file(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    HYPERBLOCK_INT4.to_file(path)
    assert get(str(path)) == HYPERBLOCK_INT4


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
            r"^recipe: got 'hyperblok-int4'; valid: a name that `qcompiler recipes` lists, or the path of a "
            r"\.yaml file; did you mean 'hyperblock-int4'\?$",
        ),
        ("zzz", r"^recipe: got 'zzz'; valid: a name that .* lists, or the path of a \.yaml file$"),
        ("", r"^recipe: got ''; valid: a name"),
        (None, r"^recipe: got None \(NoneType\); valid: a name, a path, or a Recipe$"),
    ],
)
def test_get_unknown(name, message):
    with pytest.raises(RecipeError, match=message):
        get(name)
