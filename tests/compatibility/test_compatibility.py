"""What the commit before the house was rebuilt wrote still loads, and gives the same: tests/compatibility/make.py."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import qcompiler

FOLDER = Path(__file__).parent
AFTER, EXPORTED, YAML, NAMES = (
    json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("after", "exported", "recipes", "names")
)

#: another processor adds the 36 products of the last layer in another order, if a recipe keeps that layer in float:
#: each of 36 sums is rounded by at most 2⁻²⁴ of Σ|x·w| < 1
MOVED = 36 * 2**-24

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(scope="module")
def made():
    """The script that wrote the folder."""
    spec = importlib.util.spec_from_file_location("qcompiler_tests_compatibility", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def number_nodes(text):
    """Take what may change out of the text of a graph: a node's number is its place among nodes of its name.

    Marks of pinned nodes go: the partitioner decides which codes are saved.
    """
    numbered, names = {}, Counter()

    def number_node(match):
        node, name = match.group(0, 1)
        if node not in numbered:
            names[name] += 1
            numbered[node] = f"%{name}_{names[name]}"
        return numbered[node]

    return re.sub(r"%([a-z_]\w*?)(?:_\d+)?\b", number_node, text.replace("! %", "  %"))


@pytest.mark.parametrize("recipe", AFTER)
def test_a_checkpoint_with_ranges_goes_on_as_it_would_have(recipe, made):
    then = AFTER[recipe]
    qmodel, optimizer = made.resume(recipe)
    saved = torch.load(FOLDER / f"{recipe}.pt")
    qmodel.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        assert torch.allclose(qmodel.eval()(made.batch(9)[0]), torch.tensor(then["evaluated"]), rtol=0, atol=MOVED)
    qmodel.train()
    # a loss moves by at most twice what its logits move by
    assert made.train(qmodel, optimizer, range(3, 6)) == pytest.approx(then["losses"], rel=0, abs=2 * MOVED)
    assert list(qmodel.state_dict()) == then["keys"]
    plan = qmodel.plan()
    assert [[site.name, str(site.spec), list(site.consumers)] for site in plan.sites] == then["sites"]
    assert plan.placed == then["placed"]
    assert 0 < plan.saved_bytes < then["saved"][0]  # codes of weights are no longer saved
    assert number_nodes(qmodel.graph_text()) == number_nodes(then["graph"])


@pytest.mark.parametrize("recipe", EXPORTED)
def test_exported_files_have_the_same_nodes(recipe, made, tmp_path):
    qmodel, optimizer = made.resume(recipe)
    made.train(qmodel, optimizer, range(2))
    qcompiler.export_onnx(qmodel.eval(), tmp_path / "model.onnx", (made.batch(9)[0],))
    assert json.loads(json.dumps(made.nodes(tmp_path / "model.onnx"))) == EXPORTED[recipe]


@pytest.mark.parametrize("name", YAML)
def test_recipe_files_mean_the_same(name):
    assert qcompiler.Recipe.from_yaml(YAML[name]) == qcompiler.RECIPES[name]
    assert qcompiler.RECIPES[name].to_yaml() == YAML[name]


def test_public_names_and_their_parameters(made):
    now = made.signatures()
    # new parameters may follow, each with a default
    assert [name for name, old in NAMES["signatures"].items() if not now.get(name, "").startswith(old)] == []


def test_the_command_line(made):
    now = made.commands()
    missing = {name: {*options} - {*now.get(name, ())} for name, options in NAMES["commands"].items()}
    assert not any(missing.values())
