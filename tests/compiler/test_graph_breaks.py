"""A model that Dynamo captures in parts: names, ranges, first and last, and the plan are those of the model."""

import copy

import pytest
import torch
from torch import nn

import qcompiler

# Dynamo looks at the .grad of its inputs, here tensors between two graphs, and hides the warning, but not from "error"
pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Blocks(nn.Module):
    """Blocks of one class, each behind a branch that Dynamo cannot trace; the outer function is plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = nn.functional.linear(self.stem(x), self.stem.weight)
        results = []
        for k, block in enumerate(self.blocks):
            if x.norm() > 0:
                results.append(block(x * 100**k))
        return results


class Straight(nn.Module):
    """Three layers; a print behind one of them, or behind none."""

    def __init__(self, where: int) -> None:
        super().__init__()
        self.where = where
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.one(x).sin()
        if self.where == 1:
            print("here")
        x = self.two(x).sin()
        if self.where == 2:
            print("here")
        x = self.three(x).sin()
        if self.where == 3:
            print("here")
        return x


class Twice(nn.Module):
    """One layer in front of a print and behind it, for tensors of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        print("here")
        return self.layer(100 * x)


def twins(build, *args):
    torch.manual_seed(0)
    model = build(*args)
    return model, copy.deepcopy(model)


def test_blocks_of_one_class_have_names_and_ranges_of_their_own(eager):
    compiled = eager(Blocks(), "in-hindsight-w8a8g8")
    for _ in range(3):
        sum((y / 100**k).sin().sum() for k, y in enumerate(compiled(torch.randn(16, 8)))).backward()
    largest = [compiled.ranges()[f"blocks.{k}.up/input"][1].item() for k in range(3)]
    assert largest[1] == pytest.approx(100 * largest[0], rel=1e-5)
    assert largest[2] == pytest.approx(100 * largest[1], rel=1e-5)
    names = {site.name for site in compiled.plan().sites}
    assert {f"blocks.{k}.{part}/weight" for k in range(3) for part in ("up", "down")} <= names


def test_rules_by_module_reach_each_block(eager):
    spec = qcompiler.parse_spec("int8:fit:tensor:nearest:pass")
    rules = (qcompiler.Rule(spec=None, module="blocks.1.*"), qcompiler.Rule(spec=spec))
    compiled = eager(Blocks(), qcompiler.Recipe(name="test", rules=rules))
    sum(y.sum() for y in compiled(torch.randn(4, 8))).backward()
    layers = {site.name.partition("/")[0] for site in compiled.plan().sites}
    assert layers == {"stem", *(f"blocks.{k}.{part}" for k in (0, 2) for part in ("up", "down"))}


def test_what_runs_outside_of_the_graphs_is_in_the_plan(eager, caplog):
    """Dynamo gives up the outer function. The layer that it calls is captured, its own contraction is not."""
    compiled = eager(Blocks(), "hyperblock-int8")
    compiled(torch.randn(4, 8))
    (kept,) = [kept for kept in compiled.plan().kept if not kept.asked]
    assert (kept.name, kept.consumer) == ("aten.mm.default", "stem")
    assert kept.reason.startswith(f"runs outside of the captured graphs, at {__file__}:")
    assert "left in float: stem" in caplog.text
    assert "stem/weight" in {site.name for site in compiled.plan().sites}


def test_a_layer_on_both_sides_has_two_ranges(eager, capsys):
    compiled = eager(Twice(), "in-hindsight-w8a8g8")
    for _ in range(2):
        compiled(torch.randn(16, 8)).sin().sum().backward()
    ranges = compiled.ranges()
    assert ranges["layer@2/input"][1] > 10 * ranges["layer/input"][1]
    assert {"layer", "layer@2"} == {site.name.partition("/")[0] for site in compiled.plan().sites}


def test_names_are_those_of_training_in_evaluation(eager, capsys):
    compiled = eager(Twice(), "in-hindsight-w8a8g8")
    x = torch.randn(16, 8)
    compiled(x).sum().backward()
    with torch.no_grad():
        compiled.eval()(x)
    evaluated = {site.name for site in compiled.plan(training=False).sites}
    assert evaluated == {site.name for site in compiled.plan().sites if site.is_forward}


@pytest.mark.sample(2)
@pytest.mark.parametrize("recipe", ["hyperblock-int4", "nvfp4"])
@pytest.mark.parametrize("where", [1, 2, 3])
def test_first_and_last_are_those_of_the_model(eager, capsys, recipe, where):
    """Bitwise: these recipes treat the ends apart, and round forward to nearest."""
    whole, broken = twins(Straight, where)
    whole.where = -1
    x = torch.randn(16, 8)
    assert torch.equal(eager(broken, recipe)(x), eager(whole, recipe)(x))
    assert capsys.readouterr().out == "here\n"  # the forward that finds the ends is silent


def test_a_model_that_cannot_be_copied_says_so(eager, capsys):
    model = Straight(1)
    model.lock = (part for part in "a generator has no copy")
    compiled = eager(model, "hyperblock-int4")
    compiled(torch.randn(4, 8))
    assert any("first and last are those of each graph, not of the model" in note for note in compiled.plan().notes)


def test_finding_the_ends_changes_nothing(eager, capsys):
    """A buffer, an attribute, a hook and the random numbers are those of one call."""

    class Counting(Straight):
        def __init__(self) -> None:
            super().__init__(1)
            self.norm, self.calls = nn.BatchNorm1d(8), 0

        def forward(self, x):
            self.calls += 1
            return super().forward(nn.functional.dropout(self.norm(x)))

    whole, broken = twins(Counting)
    whole.where = -1
    seen = []
    broken.one.register_forward_hook(lambda *_: seen.append(1))
    results, x = [], torch.randn(16, 8)
    for model in (whole, broken):
        torch.manual_seed(1)
        results.append(eager(model, "hyperblock-int4")(x))
    assert torch.equal(*results)
    assert (broken.calls, seen, int(broken.norm.num_batches_tracked)) == (1, [1], 1)


def test_buffers_written_in_a_graph_without_outputs(models, eager):
    def forward(self, x):
        y = self.layer(x)
        largest = float(y.abs().max())
        with torch.no_grad():
            self.statistics[0] += 1
            self.statistics[1] = largest
        return y

    model = models.Function(forward, layer=nn.Linear(4, 4))
    model.register_buffer("statistics", torch.zeros(2))
    compiled = eager(model)
    for _ in range(3):
        y = compiled(torch.randn(4, 4))
    assert model.statistics.tolist() == [3.0, y.abs().max().item()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_sequential(models, eager, reentrant):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint_sequential(self.layers, 2, x, use_reentrant=reentrant)

    layers = nn.Sequential(*(part for _ in range(5) for part in (nn.Linear(8, 8), nn.Tanh())))
    model, x = models.Function(forward, layers=layers), torch.randn(8, 8)
    compiled = eager(copy.deepcopy(model), "hyperblock-int8", strict=True)
    plain = eager(copy.deepcopy(layers), "hyperblock-int8", strict=True)
    assert torch.equal(compiled(x), plain(x))
    identity = eager(model)
    identity(x).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    layers(x).sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, model.parameters(), strict=True))


class Stopped(nn.Module):
    """A break that the user asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.one(x)
        torch._dynamo.graph_break()
        return self.two(x.relu())


class StoppedTwice(nn.Module):
    """Breaks inside of a comprehension, which Dynamo counts as calls that it cannot trace too."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Stopped() for _ in range(2))

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def test_every_model_is_told_of_its_break(eager):
    """Dynamo counts one reason in two tables; the larger count of one hid what the other one added."""
    for model in (StoppedTwice(), Stopped(), StoppedTwice(), Stopped()):
        torch._dynamo.reset()
        qmodel = eager(model, "hyperblock-int8")
        qmodel(torch.randn(4, 8)).sum().backward()
        assert any("torch._dynamo.graph_break" in note for note in qmodel.plan().notes)
