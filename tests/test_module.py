"""A compiled model in place of the model: the same state, the same modes, the same calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompiler
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.numbers.rounding import Rounding
from qcompiler.runtime.spec import parse_spec

pytestmark = pytest.mark.usefixtures("fresh")


#: recipes that quantize every layer by the present tensor and round forward to nearest
QUANTIZING = [
    name
    for name, recipe in qcompiler.RECIPES.items()
    if recipe.rules and not recipe.has_state and all(rule.spec for rule in recipe.rules)
    if all(rule.spec.rounding is Rounding.NEAREST for rule in recipe.rules if rule.role is not Role.GRADIENT)
]


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


def test_state_is_shared(eager):
    model = batch_norm_net()
    compiled = eager(model, "hyperblock-int8")
    for view in ("named_parameters", "named_buffers"):
        own, shared = dict(getattr(model, view)()), dict(getattr(compiled, view)())
        assert own
        assert {k: t.data_ptr() for k, t in shared.items()} == {k: t.data_ptr() for k, t in own.items()}
    assert [*compiled.state_dict()] == [*model.state_dict()]
    assert all(t.data_ptr() == model.state_dict()[k].data_ptr() for k, t in compiled.state_dict().items())


def test_load_state_dict(eager):
    compiled, other = eager(batch_norm_net()), batch_norm_net()
    x = torch.randn(2, 3, 6, 6)
    compiled(x)
    assert compiled.load_state_dict(other.state_dict()) == ([], [])
    assert torch.equal(compiled(x), other(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        compiled.load_state_dict({})


def test_inside_another_module(models, eager):
    """`state_dict`, `parameters`, `train`, `load_state_dict` of an outer module reach the model, without a prefix."""
    plain = nn.Sequential(models.mlp(), nn.Linear(5, 2))
    outer = nn.Sequential(eager(plain[0], "hyperblock-int8"), plain[1])
    assert [*outer.state_dict()] == [*plain.state_dict()]
    assert [name for name, _ in outer.named_parameters()] == [name for name, _ in plain.named_parameters()]
    outer.load_state_dict({key: torch.zeros_like(t) for key, t in plain.state_dict().items()})
    outer.eval()
    assert not plain[0].training
    assert outer(torch.randn(6, 12)).count_nonzero() == 0


def test_modules(models, eager):
    model = models.Tied()
    compiled = eager(model)
    assert isinstance(compiled, nn.Module)
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in model.named_modules()]
    assert [*compiled.children()] == [*model.children()]
    assert compiled.get_submodule("first") is model.first
    assert repr(compiled).startswith("QuantizedModule(\n  recipe='identity'\n  (first): Linear(")


def test_attributes(models, eager):
    model = models.Function(lambda self, x: self.layer(x) * self.factor, layer=nn.Linear(4, 4))
    model.factor = 2.0
    compiled = eager(model)
    x = torch.randn(3, 4)
    assert compiled.factor == 2
    before = compiled(x).detach()
    compiled.factor = 6.0
    assert model.factor == 6
    torch.testing.assert_close(compiled(x), 3 * before, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    compiled.layer = nn.Linear(4, 4, bias=False)
    assert model.layer is compiled.layer
    assert torch.equal(compiled(x), model(x))
    with pytest.raises(AttributeError, match="'Function' object has no attribute 'nothing'"):
        _ = compiled.nothing


def test_methods_that_convert(models, eager):
    model = models.mlp()
    assert eager(model).double()(torch.randn(6, 12).double()).dtype is torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_train_and_eval(models, eager):
    model = models.dropout()
    compiled = eager(model, "hyperblock-int8")
    x = torch.randn(4, 3, 6, 6)
    assert compiled.training
    assert compiled.eval() is compiled
    assert [compiled.training, model.training, model[1].training] == [False] * 3
    assert torch.equal(compiled(x), compiled(x))
    assert compiled.train() is compiled
    assert model[5].training
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    assert not compiled.training
    compiled.training = True
    assert model.training


def test_no_grad_in_train_mode(eager):
    model, twin = batch_norm_net(), batch_norm_net()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        output, expected = eager(model)(x), twin(x)
    assert torch.equal(output, expected)
    assert not output.requires_grad
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("recipe", ["hyperblock-int8", "hyperblock-int4"])
def test_training_reduces_the_loss(eager, recipe):
    """Ten classes of points around ten centers."""
    centers = 2 * torch.randn(10, 16)
    labels = torch.arange(10).repeat(8)
    points = centers[labels] + 0.3 * torch.randn(80, 16)
    model = eager(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)), recipe)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        assert (model.eval()(points).argmax(1) == labels).all()


def test_each_signature_has_its_own_graph(models, eager):
    """Whatever was captured before, the result is that of a fresh compile."""
    model = models.convolutions()
    used = eager(model, "hyperblock-int8")
    for shape in [(4, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 10, 6), (3, 3, 8, 8)]:
        x = torch.randn(shape)
        for needs_grad in (False, True):
            results = []
            for call in (used, eager(model, "hyperblock-int8")):
                model.zero_grad()
                given = x.clone().requires_grad_(needs_grad)
                torch.manual_seed(0)
                y = call(given)
                y.sum().backward()
                results.append([y, *(p.grad for p in model.parameters()), *([given.grad] if needs_grad else [])])
            assert all(map(torch.equal, *results))


def test_python_values_are_part_of_the_signature(models, eager):
    model = models.Function(
        lambda self, x, *, scale, layers: self.layer(x) * scale if layers else x, layer=nn.Linear(4, 4)
    )
    compiled = eager(model)
    x = torch.randn(3, 4)
    for scale, layers in [(1.5, 1), (2.5, 1), (2.5, 0), (1.5, 1)]:
        assert torch.equal(compiled(x, scale=scale, layers=layers), model(x, scale=scale, layers=layers))


def test_a_parameter_that_stops_training(models, eager):
    model = models.mlp()
    compiled = eager(model, "hyperblock-int8")
    x = torch.randn(6, 12)
    compiled(x).sum().backward()
    model.zero_grad()
    model[0].requires_grad_(False)
    compiled(x).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]


@pytest.mark.sample(8)
@pytest.mark.parametrize("recipe", QUANTIZING)
@pytest.mark.parametrize("kind", ["linear", "convolution", "matmul"])
def test_a_sample_in_eval_does_not_see_its_batch_mates(models, eager, recipe, kind):
    """The mates are 2¹⁴ times larger: any scale shared with them would round the first sample to nothing.

    The kernels of different batch sizes sum K products in different orders. Each sum is off by at most
    (K − 1)·2⁻²⁴·Σ|x||w| ≤ K²·2⁻²⁴·max|x|·max|w|, and quantizing does not quite double a maximum.
    """
    layer = {
        "linear": nn.Linear(32, 8, bias=False),
        "convolution": nn.Conv2d(4, 8, 3, bias=False),
        "matmul": models.Function(lambda self, x: x @ x.transpose(-2, -1)),
    }[kind]
    shape = (4, 4, 6, 6) if kind == "convolution" else (4, 3, 32)
    compiled = eager(layer, recipe).eval()
    x = torch.randn(shape)
    x[1:] *= 2.0**14
    with torch.no_grad():
        together, alone = compiled(x)[0], compiled(x[:1])[0]
    weight = next(layer.parameters(), x[:1])
    terms = 36 if kind == "convolution" else 32
    bound = 2 * terms**2 * 2.0**-24 * (2 * x[0].abs().max()) * (2 * weight.abs().max())
    assert (together - alone).abs().max() <= bound
    assert alone.abs().max() > 10 * bound
    assert compiled.plan(training=False).sites


@pytest.mark.parametrize("recipe", ["in-hindsight-w8a8g8", "running-w8a8g8", "flexpoint16", "fp8-delayed", "lsq-w4a4"])
def test_ranges_of_the_past_do_not_see_batch_mates_either(eager, recipe):
    torch.manual_seed(0)
    compiled = eager(nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)), recipe)
    x = torch.randn(4, 8)
    compiled(x).sum().backward()
    before = compiled.ranges()
    compiled.eval()
    with torch.no_grad():
        alone = compiled(x[:1])[0]
        x[1:] *= 2.0**14
        together = compiled(x)[0]
    # sums of 8 terms below 2^3 in another order: 8·2^3·2^−24 a layer; no code flips for these numbers
    assert (together - alone).abs().max() <= 1e-5
    assert alone.abs().max() > 1e-3
    assert all(torch.equal(state, compiled.ranges()[name]) for name, state in before.items())
    assert compiled.plan(training=False).kept == ()


def test_batch_mates_do_share_a_scale_in_training(eager):
    """The twin of the test above: it would find a scale that is shared."""
    spec = parse_spec("int8:fit:b4c*i*o*:nearest:pass")
    compiled = eager(nn.Linear(32, 8, bias=False), Recipe(name="shared", rules=(Rule(spec=spec),)))
    x = torch.randn(4, 32)
    x[1:] *= 2.0**14
    assert compiled(x)[0].count_nonzero() == 0
    assert compiled.eval()(x)[0].count_nonzero() == 8


def test_seed_repeats_a_run(models, eager):
    """Gradients round stochastically; the random bits come from torch's generator."""
    model = models.convolutions()
    runs = []
    for seed in (1, 1, 2):
        compiled = eager(model, "hyperblock-int4")
        torch.manual_seed(seed)
        model.zero_grad()
        for _ in range(2):
            compiled(torch.ones(4, 3, 8, 8)).sin().sum().backward()
        runs.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_steps_round_with_new_bits(models, eager):
    model = models.mlp()
    compiled = eager(model, "hyperblock-int4")
    x = torch.randn(6, 12)
    seen = []
    for _ in range(2):
        model.zero_grad()
        compiled(x).sin().sum().backward()
        seen.append(model[0].weight.grad.clone())
    assert not torch.equal(*seen)
