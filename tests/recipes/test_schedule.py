"""Schedules: which recipe when, what a change costs, and that a run resumes in the middle of one."""

import copy
import math
import re
import sys

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import Recipe, RecipeError, Schedule
from qcompiler.recipes import RECIPES
from qcompiler.recipes.schedule import ACCURACY_BOOSTER, NVFP4_THEN_FLOAT, SCHEDULES

pytestmark = pytest.mark.usefixtures("fresh")


def names(schedule, steps):
    """The recipe of each step, by name."""
    return [schedule.at(step, steps).name for step in range(steps)]


@pytest.mark.parametrize(
    ("stages", "steps", "expected"),
    [
        (((0, "hbfp4"),), 2, ["hbfp4"] * 2),
        (((0, "hbfp4"), (-1, "hbfp6")), 3, ["hbfp4", "hbfp4", "hbfp6"]),
        (((0, "hbfp4"), (-1, "hbfp6")), 1, ["hbfp6"]),
        (((0, "hbfp4"), (-5, "hbfp6")), 2, ["hbfp6"] * 2),
        (((0, "hbfp4"), (0.5, "hbfp6"), (0.75, "hbfp8")), 4, ["hbfp4", "hbfp4", "hbfp6", "hbfp8"]),
        (((0.0, "hbfp4"), (0.5, "hbfp6")), 3, ["hbfp4", "hbfp4", "hbfp6"]),
        (((0, "hbfp4"), (2, "hbfp6")), 4, ["hbfp4", "hbfp4", "hbfp6", "hbfp6"]),
        (((0, "hbfp4"), (9, "hbfp6")), 2, ["hbfp4"] * 2),
        (((0, "hbfp4"), (1, "hbfp6"), (2, "hbfp4")), 3, ["hbfp4", "hbfp6", "hbfp4"]),
    ],
)
def test_at(stages, steps, expected):
    assert names(Schedule(stages), steps) == expected


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_a_share_begins_where_it_says(steps):
    """0.07·100 is above 7 in binary, 0.29·100 below 29."""
    for percent in range(1, 100):
        schedule = Schedule(((0, "hbfp4"), (percent / 100, "hbfp6")))
        first = -(-percent * steps // 100)
        assert names(schedule, steps).count("hbfp4") == first


def test_the_named_ones():
    assert list(SCHEDULES.values()) == [ACCURACY_BOOSTER, NVFP4_THEN_FLOAT]
    assert all(SCHEDULES[schedule.name] is schedule for schedule in SCHEDULES.values())
    assert names(ACCURACY_BOOSTER, 4) == ["hbfp4"] * 3 + ["hbfp6"]
    assert names(NVFP4_THEN_FLOAT, 100) == ["nvfp4"] * 82 + ["identity"] * 18
    bits = {str(rule.position): {r.spec.format.bits for r in RECIPES["hbfp4"].rules if r.position is rule.position}
            for rule in RECIPES["hbfp4"].rules}  # fmt: skip
    assert bits == {"first": {6}, "last": {6}, "None": {4}}
    assert {rule.spec.format.bits for rule in RECIPES["hbfp6"].rules} == {6}


def test_it_is_a_value(tmp_path):
    mine = Recipe(name="mine", rules=())
    mine.to_file(tmp_path / "mine.yaml")
    by_value, by_file = (Schedule(((0, recipe),)) for recipe in (mine, tmp_path / "mine.yaml"))
    assert by_value == by_file
    (tmp_path / "mine.yaml").unlink()
    assert by_file.at(0, 1) == mine  # read once
    assert hash(Schedule(((0, "hbfp4"),))) == hash(Schedule(((0, RECIPES["hbfp4"]),)))
    assert copy.deepcopy(by_value) == by_value


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "schedule: stages: got (); valid: a tuple of (start, recipe), the first one from 0"),
        ([(0, "hbfp4")], "schedule: stages: got [(0, 'hbfp4')]; valid: a tuple"),
        (((1, "hbfp4"),), "schedule: stages: got ((1, 'hbfp4'),); valid: a tuple of (start, recipe), the first"),
        (((0, "hbfp4", 1),), "schedule: stages: got"),
        ("hbfp4", "schedule: stages: got 'hbfp4'"),
        (((0, "hbfp4"), (1.5, "hbfp6")), "schedule: start: got 1.5; valid: a whole number of steps, or a float from"),
        (((0, "hbfp4"), (-0.1, "hbfp6")), "schedule: start: got -0.1"),
        (((0, "hbfp4"), (float("nan"), "hbfp6")), "schedule: start: got nan"),
        (((0, "hbfp4"), (True, "hbfp6")), "schedule: start: got True"),
        (((0, "hbfp4"), ("1", "hbfp6")), "schedule: start: got '1'"),
        (((0, "hbfp5"),), "recipe: got 'hbfp5'; valid: a name"),
    ],
)
def test_refused(stages, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        Schedule(stages)


@pytest.mark.parametrize(("step", "steps"), [(-1, 3), (3, 3), (0, 0)])
def test_steps_outside(step, steps):
    with pytest.raises(ValueError, match=rf"^schedule: got step {step} of {steps}; valid: 0 to {steps - 1}, counted"):
        ACCURACY_BOOSTER.at(step, steps)


class Run:
    """A training by a schedule, whose checkpoint is what a user would save."""

    def __init__(self, schedule, steps):
        torch.manual_seed(0)
        layers = (nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.schedule, self.steps = schedule, steps
        self.model = qcompiler.compile(nn.Sequential(*layers), schedule.at(0, steps), backend="eager", strict=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def train(self, first, last):
        for step in range(first, last):
            self.model.use(self.schedule.at(step, self.steps))
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 8)).square().mean().backward()
            self.optimizer.step()
        return self

    def save(self, path):
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(states | {"random": torch.get_rng_state()}, path)

    def load(self, path):
        states = torch.load(path)
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        torch.set_rng_state(states["random"])
        return self


THREE = Schedule(((0, "in-hindsight-w8a8g8"), (2, "hyperblock-int4"), (4, "in-hindsight-w8a8g8"), (5, "int4-dsgc")))


@pytest.fixture(scope="module")
def straight():
    """What a run of six steps ends with."""
    return Run(THREE, 6).train(0, 6).model.state_dict()


@pytest.mark.parametrize("cut", [1, 2, 5])
@pytest.mark.sample(1)
def test_resume_in_the_middle(straight, cut, tmp_path):
    """Saved in front of, at and behind changes; ranges of another recipe wait in the checkpoint too."""
    Run(THREE, 6).train(0, cut).save(tmp_path / "run.pt")
    resumed = Run(THREE, 6).load(tmp_path / "run.pt").train(cut, 6).model.state_dict()
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_one_capture_a_change(monkeypatch):
    captured = []

    def capture(*args):
        captured.append(args)
        return plain(*args)

    module = sys.modules["qcompiler.compiler.graph_compiler"]
    plain = module.capture
    monkeypatch.setattr(module, "capture", capture)
    back_and_forth = Schedule(tuple((step, ("hbfp4", "hbfp6")[step % 2]) for step in range(6)))
    run = Run(back_and_forth, 6).train(0, 1)
    assert len(captured) == 1
    run.train(1, 6)
    assert len(captured) == 2
    assert {site.spec.format.bits for site in run.model.plan().sites} == {6}


def test_the_last_epoch_is_what_that_recipe_computes():
    """Behind a change the graph is that of the new recipe, on the weights that the old one left."""
    run = Run(ACCURACY_BOOSTER, 3).train(0, 2)
    x = torch.randn(4, 8)
    alone = qcompiler.compile(copy.deepcopy(run.model._model), "hbfp6", backend="eager")
    run.model.use(ACCURACY_BOOSTER.at(2, 3))
    assert torch.equal(run.model(x), alone(x))
    assert not torch.equal(run.model(x), run.model.use("hbfp4")(x))


def with_bits(name, bits):
    """A recipe with other widths, under another name."""
    text = RECIPES[name].to_yaml()
    return Recipe.from_yaml(text.replace("int4", f"int{bits}").replace(f"name: {name}", "name: other"))


@pytest.mark.parametrize(
    ("first", "second", "site"),
    [
        ("int4-dsgc", RECIPES["int4-large-gradients"], "2/grad"),  # a clip is no γ
        ("lsq-w4a4", with_bits("lsq-w4a4", 8), "2/weight"),  # a step of 4 bits is no step of 8
    ],
)
def test_ranges_of_another_meaning_start_anew(first, second, site, tmp_path):
    """Both have one number a site, so the shape does not tell them apart: neither in `use` nor in a checkpoint."""
    run = Run(Schedule(((0, first), (1, second))), 2).train(0, 1)
    run.save(tmp_path / "run.pt")
    fresh, loaded = (qcompiler.compile(copy.deepcopy(run.model._model), second, backend="eager") for _ in range(2))
    loaded.load_state_dict(torch.load(tmp_path / "run.pt")["model"])
    x, ranges = torch.randn(4, 8), []
    for model in (fresh, loaded, run.model.use(second)):
        torch.manual_seed(1)
        model(x).square().mean().backward()
        ranges.append(model.ranges()[site])
    assert torch.equal(ranges[0], ranges[1])
    assert torch.equal(ranges[0], ranges[2])


def test_learned_ranges_keep_their_parameters():
    """An end of the range means the same in all widths; a step starts anew, in the parameter that optimizers hold."""
    for name, stays in (("int4-large-gradients", True), ("lsq-w4a4", False)):
        run = Run(Schedule(((0, name), (1, with_bits(name, 8)))), 2).train(0, 1)
        before, held = run.model.ranges(), {id(parameter) for parameter in run.model.quantizer_parameters()}
        run.train(1, 2)
        assert {id(parameter) for parameter in run.model.quantizer_parameters()} == held
        assert torch.equal(run.model.ranges()["2/weight"], before["2/weight"]) is stays


@pytest.mark.parametrize(
    ("deviation", "rate"),
    [(0.0, 1.0), (0.01, math.exp(-0.2)), (0.1, math.exp(-2)), (0.2, 0.1), (2.0, 0.1), (math.nan, 1.0)],
)
def test_deviation_rate(deviation, rate):
    """It would be below a tenth from ln(10)/20 = 0.115 on; NaN: nothing has been searched yet."""
    assert qcompiler.deviation_rate(deviation) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("deviation", [-1e-3, 2.1, math.inf])
def test_deviation_rate_refuses(deviation):
    with pytest.raises(ValueError, match=r"^deviation_rate: deviation: got .*; valid: 0 to 2, one minus a cosine$"):
        qcompiler.deviation_rate(deviation)


def test_the_deviation_is_that_of_the_quantized_gradient():
    """What a range `cosine` keeps is 1 − cos(g, ĝ) of the gradient rounded to nearest, in float64 below."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    qmodel = qcompiler.compile(model, "ui8", backend="eager")
    given = torch.randn(5, 4)
    qmodel(torch.randn(5, 8)).backward(given)
    clip, deviation = qmodel.ranges()["2/grad"].flatten().double()
    g = given.double()
    rounded = (g / (clip / 127)).round().clamp(-127, 127) * (clip / 127)
    expected = 1 - (g * rounded).sum() / (g.norm() * rounded.norm())
    # three sums of 20 products in float32
    assert abs(deviation - expected) <= 3 * 20 * 2.0**-24
