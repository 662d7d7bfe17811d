"""The debugger finds, names and mends planted faults, and the loss shows it; its rules are legal in every recipe."""

import re
import statistics

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import DebugError, Recipe, Role, Rule, parse_spec
from qcompiler.debugging.recording import Recording
from qcompiler.debugging.remedies import Remedy

pytestmark = pytest.mark.usefixtures("fresh")


def recipe(*rules, spec="int8:real:tensor:nearest:pass"):
    """Some rules in front of one spec for everything."""
    return Recipe(name="test", rules=(*rules, Rule(spec=parse_spec(spec))))


def data():
    """A teacher that two layers can learn."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, 16, generator=generator)
    return x, torch.tanh(x @ torch.randn(16, 8, generator=generator) / 2)


def student():
    """Three layers of inner width 32."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


class Tails(nn.Module):
    """One channel 400 times as large as all others."""

    def forward(self, x):
        return torch.cat([400 * x[:, :1], x[:, 1:]], 1)


def heavy():
    """The same function, but the second layer reads heavy tails. The column that undoes them does not train."""
    model = student()
    model[1] = nn.Sequential(nn.ReLU(), Tails())
    with torch.no_grad():
        model[2].weight[:, 0] /= 400
    rest = (torch.arange(32) > 0).float()
    model[2].weight.register_hook(lambda grad: grad * rest)
    return model


def fit(qmodel, steps, lr=1.0):
    """The mean loss of the last ten steps."""
    x, y = data()
    optimizer = torch.optim.SGD([p for n, p in qmodel.named_parameters() if not n.startswith("0")], lr=lr)
    losses = []
    for step in range(steps):
        rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
        optimizer.zero_grad()
        loss = (qmodel(x[rows]) - y[rows]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / len(losses[-10:])


def gradient_range():
    """The largest gradient in front of the second layer, at the start."""
    with qcompiler.debug(qcompiler.compile(student(), recipe(), backend="eager")) as d:
        fit(d.qmodel, 1)
    (span,) = d.recording.tallies["2/grad"].history
    return max(-span.low, span.high)


def too_small(largest):
    """A range that is 2⁶ too small: nearly everything is clipped."""
    return f"int8:real:tensor:nearest:pass:fixed({-largest / 64:g},{largest / 64:g})"


FAULTS = {
    "gradient range too small": (student, Role.GRADIENT, too_small, "2/grad", Remedy.RANGE),
    "dead": (
        student,
        Role.ACTIVATION,
        lambda _: "int8:real:tensor:nearest:pass:fixed(-1e6,1e6)",
        "2/input",
        Remedy.RANGE,
    ),
    "heavy tails": (heavy, Role.ACTIVATION, lambda _: "int8:real:tensor:nearest:pass", "2/input", Remedy.BITS),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.sample(1)
def test_a_planted_fault(name, eager):
    build, role, spec, site, remedy = FAULTS[name]
    fault = Rule(spec=parse_spec(spec(gradient_range())), role=role, module="2")
    qmodel, twin = eager(build(), recipe(fault)), eager(build(), recipe(fault))
    with qcompiler.debug(qmodel) as d:
        fit(qmodel, 2)
    assert d.recording.ranking()[0] == site
    proposal = d.propose()
    assert (proposal.site, proposal.remedy) == (site, remedy)
    assert proposal.harm_after <= proposal.target < proposal.harm
    mended = d.apply()
    assert {(rule.role, rule.module) for rule in mended.rules[: len(proposal.rules)]} == {(role, "2")}
    with qcompiler.debug(qmodel) as after:
        fit(qmodel, 2)
    assert after.recording.harm(site) < proposal.harm / 10
    assert after.propose(site) is None
    exact, faulty, repaired = fit(build(), 96), fit(twin, 96), fit(qmodel, 92)
    assert faulty > 1.5 * exact
    assert repaired < exact + 0.2 * (faulty - exact)


def test_nothing_stands_out(eager):
    with qcompiler.debug(eager(student(), recipe())) as d:
        fit(d.qmodel, 1)
    assert d.propose() is None
    worst, *others = (site.harm for site in d.report().sites)
    name, limit = d.report().sites[0].name, 10 * statistics.median(others)
    assert d.report().advice == (
        f"nothing stands out: the most harmful quantizer, {name}, has harm {worst:.3g}, not above {limit:.3g}, "
        "10 times the median harm of the other quantizers with 8 bits"
    )
    with pytest.raises(DebugError, match="nothing stands out: the most harmful quantizer"):
        d.apply()


@pytest.mark.parametrize(
    ("form", "rest", "words"),
    [
        ("int8:real:tensor:nearest:pass:fixed(-4,4)", "int8", "the other quantizers with 8 bits"),
        ("int5:real:tensor:nearest:pass", "int8", "all other quantizers"),
        ("int2:real:tensor:nearest:pass:fixed(-1e6,1e6)", "int2", ""),
    ],
)
def test_a_proposal_says_why(form, rest, words, eager):
    """The site, its harm, the limit with its meaning, the change, and the rules: a line each."""
    fault = Rule(spec=parse_spec(form), role=Role.WEIGHT, module="2")
    with qcompiler.debug(eager(student(), recipe(fault, spec=f"{rest}:real:tensor:nearest:pass"))) as d:
        fit(d.qmodel, 1)
    why, change, *rules = str(d.propose("2/weight")).splitlines()
    harms = {site.name: site.harm for site in d.report().sites}
    harm, usual = harms.pop("2/weight"), statistics.median(harms.values())
    assert (10 * usual < 0.5) == bool(words)
    limit = (
        f"{10 * usual:.3g}, 10 times the median harm of {words}" if words else "0.5: half of a contraction is lost then"
    )
    assert why == f"2/weight stands out: harm {harm:.3g} is above {limit}"
    assert re.fullmatch(r"proposal: .*, which leaves harm \S+; in front of all rules:", change)
    assert rules == [f"  {rule}" for rule in d.propose("2/weight").rules]


@pytest.mark.parametrize("named", ["nvfp4", "ultra-low-fp4", "in-hindsight-w8a8g8"])
@pytest.mark.sample(1)
def test_rules_of_every_kind_of_site(named, eager):
    """Whatever site a recipe makes, the rules of its proposal change this site, and the model trains."""
    with qcompiler.debug(eager(student(), named)) as d:
        fit(d.qmodel, 2)
    kinds = {site.rpartition("/")[2]: site for site in d.recording.ranking()}
    proposals = {site: d._propose(site) for site in kinds.values()}
    for site, proposal in proposals.items():
        changed = Recipe(name="changed", rules=(*proposal.rules, *d.qmodel.recipe.rules))
        qmodel = eager(student(), changed)
        fit(qmodel, 1)
        assert proposal.rules, site
        assert {*proposal.rules} & {*changed.unused(qmodel.plan().matched)} == set(), site
        specs = {found.spec for found in qmodel.plan().sites if found.name == site}
        assert specs <= {proposal.trials[-1][1].spec}, site


def test_shared_codes_are_mended_for_all_readers(eager):
    """Two layers read one quantizer; the proposal has a rule for each."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.left(x) + self.right(x)

    dead = Rule(spec=parse_spec("int8:real:tensor:nearest:pass:fixed(-1e6,1e6)"), role=Role.ACTIVATION)
    with qcompiler.debug(eager(Fork(), recipe(dead))) as d:
        d.qmodel(torch.randn(4, 8)).sin().sum().backward()
    assert {rule.module for rule in d.propose().rules} == {"left", "right"}


def test_one_after_the_other(eager):
    """Two faults: each apply() mends one; entered again, the debugger starts anew; applied twice, nothing changes."""
    faults = [Rule(spec=parse_spec("int8:real:tensor:nearest:pass:fixed(-1e6,1e6)"), module=name) for name in "24"]
    qmodel = eager(student(), recipe(*faults))
    d = qcompiler.debug(qmodel)
    for _ in range(8):
        with d:
            fit(qmodel, 1)
        assert d.recording.steps == 1
        proposal = d.propose()
        if proposal is None:
            break
        first = d.apply(proposal)
        assert d.apply(proposal) == first
    assert proposal is None
    fit(qmodel, 1)
    assert {str(site.spec.range) for site in qmodel.plan().sites} == {"current"}


@pytest.mark.parametrize(
    ("factor", "weight", "blamed"),
    [
        (torch.nan, 1.0, "the gradient that the loss gives for output 0, step 1"),
        (1.0, torch.inf, "parameter 4.weight, step 2"),
    ],
)
def test_float_that_is_not_finite_blames_no_quantizer(eager, factor, weight, blamed):
    """The loss is NaN; or a weight is infinite in step 2."""
    qmodel = eager(student(), recipe())
    with qcompiler.debug(qmodel) as d:
        for _ in range(2):
            (qmodel(data()[0][:32]).square().mean() * factor).backward()
            qmodel[4].weight.data.mul_(weight)
    assert d.recording.not_finite == blamed
    assert d.propose() is d.propose("2/input") is None
    assert d.report().advice == f"no quantizer is to blame: float is not finite either ({blamed})"
    with pytest.raises(DebugError, match="float is not finite either"):
        d.apply()


def test_what_a_quantizer_made_infinite_is_harm():
    """What comes after it, in float too, is its own doing; a mask of infinities is nobody's."""
    log, good, bad = Recording(), torch.ones(2), torch.tensor([1.0, torch.inf])
    log.stepped()
    log.given("buffer mask", bad)
    log.compared("0 forward", good, good)
    log.compared("2 forward", bad, good)
    log.given("the gradient that the loss gives for output 0", bad)
    log.compared("2 weight gradient", bad, bad)
    assert log.not_finite is None
    log.clear()
    log.compared("0 forward", bad, bad)
    assert log.not_finite == "the result of 0 forward, step 0"
