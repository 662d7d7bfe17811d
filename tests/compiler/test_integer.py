"""Whole models on integers: the losses and gradients of simulation, bit for bit or within the roundings."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.module import get_session
from qcompiler.passes.rules import Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

pytestmark = pytest.mark.usefixtures("fresh")

#: half of the distance between 1 and the next float32
UNIT = 2.0**-24


class Block(nn.Module):
    """A transformer block on tokens: norm, attention of two heads, norm, MLP."""

    def __init__(self, width=16):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (width // 2) ** -0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norms[1](x))


def mlp():
    return nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 20), nn.Tanh(), nn.Linear(20, 7))


def wide_mlp():
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))


def without_biases(make):
    """Simulation adds a bias within the sum, so only without biases both are equal bit for bit."""
    model = make()
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.bias = None
    return model


MODELS = {"mlp": (mlp, (16, 12)), "block": (Block, (2, 8, 16))}
BACKENDS = [("eager", "mlp"), ("eager", "block"), ("inductor", "block")]


def train(make, shape, recipe, execution, backend, steps=2):
    """(losses, gradients of each step, plan)."""
    torch.manual_seed(0)
    model, results = make(), []
    qmodel = qcompiler.compile(model, recipe, backend=backend, execution=execution)
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = qmodel(torch.randn(shape, requires_grad=True)).square().mean()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in qmodel.parameters())])
        optimizer.step()
    return results, qmodel.plan()


def train_both(make, shape, recipe, backend, steps=2):
    """The results of simulation and of integers, side by side, and the plan of the latter."""
    (simulated, _), (integer, plan) = (
        train(make, shape, recipe, execution, backend, steps) for execution in ("simulate", "integer")
    )
    return [pair for one, other in zip(simulated, integer, strict=True) for pair in zip(one, other, strict=True)], plan


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
@pytest.mark.sample(1)
def test_powers_of_two_bit_for_bit(backend, name):
    """No sum is longer than 64·127² < 2²⁴, so both ways give every number of two steps exactly alike."""
    make, shape = MODELS[name]
    pairs, plan = train_both(lambda: without_biases(make), shape, "tensor-int8", backend)
    assert plan.integer == {"mlp": 9, "block": 18}[name]
    assert all(torch.equal(simulated, integer) for simulated, integer in pairs)


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
@pytest.mark.sample(1)
def test_real_scales_and_zero_points(backend, name):
    """A rounding apart; but a rounding can move a code, so what descends from many codes has the bound of one code."""
    pairs, plan = train_both(*MODELS[name], "in-hindsight-w8a8g8", backend, steps=1)
    assert plan.integer == {"mlp": 9, "block": 18}[name]
    assert all((simulated - integer).norm() <= simulated.norm() / 127 for simulated, integer in pairs)


def test_zero_points_of_four_bits():
    """Of the right operand too, an activation that backward unpacks: the gradient of a weight was wrong by 0.23.

    Long enough for the kernel of whole sums.
    """
    recipe = Recipe(name="four", rules=(Rule(spec=parse_spec("affine4:real:tensor:nearest:pass")),))
    pairs, plan = train_both(wide_mlp, (64, 128), recipe, "eager", steps=1)
    assert plan.integer == 6
    assert all((simulated - integer).norm() <= simulated.norm() / 15 for simulated, integer in pairs)


def test_the_bound_of_one_product():
    """Both add 64 products: (64 + 3) roundings of the sum of magnitudes, whatever the order."""
    x, outputs = torch.randn(9, 64), {}
    recipe = Recipe(name="real", rules=(Rule(spec=parse_spec("affine8:real:tensor:nearest:pass")),))
    for execution in ("simulate", "integer"):
        torch.manual_seed(0)
        layer = nn.Linear(64, 8)
        qmodel = qcompiler.compile(layer, recipe, backend="eager", execution=execution)
        outputs[execution] = qmodel(x).detach()
    magnitude = (x.abs() + x.abs().max() / 127) @ (layer.weight.abs() + layer.weight.abs().max() / 127).t()
    bound = (64 + 8) * UNIT * (magnitude + layer.bias.abs())
    assert not torch.equal(*outputs.values())
    assert ((outputs["simulate"] - outputs["integer"]).abs() <= bound).all()


@pytest.mark.parametrize("recipe", ["tensor-int8", "in-hindsight-w8a8g8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(recipe, bad):
    torch.manual_seed(0)
    model = mlp()
    qmodel = qcompiler.compile(model, recipe, backend="eager", execution="integer")
    qmodel(torch.randn(16, 12)).sum().backward()
    x = torch.randn(16, 12)
    x[0, 0] = bad
    loss = qmodel(x).sum()
    assert loss.isnan()
    model.zero_grad()
    loss.backward()
    assert all(parameter.grad.isnan().any() for parameter in model.parameters() if parameter.ndim == 2)


def test_eval_runs_on_integers_too():
    """There every sample has a scale of its own: one a row."""
    torch.manual_seed(0)
    model, x, qmodels = without_biases(mlp), torch.randn(9, 12), []
    for execution in ("simulate", "integer"):
        qmodels.append(qcompiler.compile(model, "tensor-int8", backend="eager", execution=execution).eval())
    with torch.no_grad():
        outputs = [qmodel(x) for qmodel in qmodels]
    assert qmodels[1].plan(training=False).integer == 3
    assert torch.equal(*outputs)


def test_the_plan_lists_what_is_simulated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(8, 4))
    qmodel = qcompiler.compile(model, "tensor-int8", backend="eager", execution="integer")
    qmodel(torch.randn(3, 2, 4, 4)).sum().backward()
    plan = qmodel.plan()
    assert (plan.integer, [row.consumer for row in plan.simulated]) == (3, ["0 forward", "0 weight gradient"])
    assert "contractions of codes: 3 as integers, 2 simulated in float" in str(plan)
    assert "no kernel computes convolutions of 2 groups on codes" in str(plan).replace("\n", " ")
    assert "matmul_codes" in "".join(str(stage.graph) for stage in qmodel.stages()[0])
    contractions = [data for _, data in qmodel.to_networkx().nodes(data=True) if data["kind"] == "contraction"]
    assert [data["name"] for data in contractions if data["op"] == "qcompiler.matmul_codes"] == [
        "2 forward",
        "2 input gradient",
        "2 weight gradient",
    ]
    assert plan.kept == ()


def test_simulation_lists_nothing():
    qmodel = qcompiler.compile(mlp(), "tensor-int8", backend="eager")
    qmodel(torch.randn(9, 12)).sum().backward()
    assert (qmodel.plan().integer, qmodel.plan().simulated) == (0, ())
    assert "contractions of codes" not in str(qmodel.plan())


def test_nothing_can_be_an_integer():
    qmodel = qcompiler.compile(nn.Conv2d(2, 2, 3, groups=2), "tensor-int8", backend="eager", execution="integer")
    text = r"no contraction can be computed as integers: \(root\) forward, \(root\) weight gradient: no kernel computes"
    with pytest.raises(qcompiler.CompileError, match=text):
        qmodel(torch.randn(3, 2, 4, 4))
    qmodel = qcompiler.compile(nn.Conv2d(2, 2, 3, groups=2), "tensor-int8", backend="eager", execution="auto")
    qmodel(torch.randn(3, 2, 4, 4)).sum().backward()
    assert qmodel.plan().integer == 0


def test_a_reason_stands_once():
    layers = [nn.Conv2d(4, 4, 3, padding=1, groups=2) for _ in range(3)]
    qmodel = qcompiler.compile(nn.Sequential(*layers), "tensor-int8", backend="eager", execution="integer")
    text = r"integers: 0 forward, 1 forward, 2 forward and \d more: (no kernel computes [^;]+); [^;]*valid: execution"
    with pytest.raises(qcompiler.CompileError, match=text) as error:
        qmodel(torch.randn(3, 4, 4, 4))
    reasons = str(error.value).count("no kernel computes")
    assert reasons == 1


def test_without_rules_nothing_is_asked():
    qmodel = qcompiler.compile(mlp(), "identity", backend="eager", execution="integer")
    qmodel(torch.randn(9, 12)).sum().backward()
    assert qmodel.plan().simulated == ()


def test_wrong_values_are_named():
    text = "execution: got 'int'; valid: simulate, auto, integer"
    with pytest.raises(qcompiler.CompileError, match=text):
        qcompiler.compile(mlp(), execution="int")
    with pytest.raises(Exception, match="execution: got None"):
        torch.compile(mlp(), backend="qcompiler", options={"execution": None})(torch.randn(9, 12))


def test_copies_keep_the_execution():
    qmodel = qcompiler.compile(mlp(), "tensor-int8", backend="eager", execution="integer")
    for twin in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert get_session("test", twin).execution == "integer"


def test_as_a_backend_of_torch_compile():
    torch.manual_seed(0)
    model = mlp()
    options = {"recipe": "tensor-int8", "backend": "eager"}
    compiled = torch.compile(model, backend="qcompiler", options={**options, "execution": "integer"})
    x = torch.randn(9, 12)
    found = compiled(x)
    torch._dynamo.reset()
    simulated = torch.compile(model, backend="qcompiler", options=options)(x)
    # a bias is added behind the sum, or within it: one rounding of 33 products each
    assert (found - simulated).abs().max() <= simulated.abs().max() / 127
