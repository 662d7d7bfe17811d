"""A compiled model in place of the model: the same state, the same modes, the same calls."""

import copy
import io
import pickle

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


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(models, eager, how):
    model = models.mlp()
    compiled = eager(model, "hyperblock-int8")
    x = torch.randn(6, 12)
    expected = compiled(x)
    if how == "deepcopy":
        other = copy.deepcopy(compiled)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(compiled))
    else:
        file = io.BytesIO()
        torch.save(compiled, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert isinstance(other, qcompiler.QuantizedModule)
    assert (other.recipe, other._session.backend) == (compiled.recipe, compiled._session.backend)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(compiled(x), expected)
    assert other(x).count_nonzero() == 0


def test_hooks(models, eager):
    model = models.mlp()
    compiled = eager(model)
    x = torch.randn(6, 12)
    expected = model(x)
    seen = []
    compiled.get_submodule("0").register_forward_pre_hook(lambda module, args: seen.append(module))
    inner = model[2].register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(compiled(x), 2 * expected)
    assert seen == [model[0]]
    outer = compiled.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(compiled(x), 4 * expected)
    outer.remove()
    inner.remove()
    assert torch.equal(compiled(x), expected)
    assert compiled.plan().notes == ()


def test_functional_call(models, eager):
    model = models.mlp()
    compiled = eager(model)
    x = torch.randn(6, 12)
    twice = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    assert torch.equal(
        torch.func.functional_call(compiled, twice, (x,)), torch.func.functional_call(model, twice, (x,))
    )


def test_backend_of_torch_compile(models):
    model = models.mlp()
    options = {"recipe": "identity", "backend": "eager"}
    compiled = torch.compile(model, backend="qcompiler", options=options)
    x = torch.randn(6, 12)
    y = compiled(x)
    assert torch.equal(y, model(x))
    assert type(y.grad_fn).__name__ == "_RunBackward"
    y.sum().backward()
    assert model[0].weight.grad.count_nonzero()


def test_backend_of_torch_compile_quantizes(models, eager):
    model = models.mlp()
    x = torch.randn(6, 12)
    options = {"recipe": "hyperblock-int4", "backend": "eager"}
    compiled = torch.compile(model, backend="qcompiler", options=options)
    assert torch.equal(compiled(x), eager(model, "hyperblock-int4")(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), eager(model, "hyperblock-int4").eval()(x))


def test_inductor_equals_eager():
    """Sums of codes times a power of two are exact in float32, in whatever order, so the bits are equal."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    x = torch.randn(6, 8)
    spec = parse_spec("int4:fit:tensor:nearest:pass")
    runs = []
    for backend in ("eager", "inductor"):
        compiled = qcompiler.compile(model, Recipe(name="exact", rules=(Rule(spec=spec),)), backend=backend)
        model.zero_grad()
        y = compiled(x)
        gradient = torch.arange(24.0).view(6, 4)
        y.backward(gradient, retain_graph=True)
        runs.append([y, *(p.grad.clone() for p in model.parameters())])
        # backward is compiled for the strides of its first call; others must not be read as those
        y.backward(gradient.t().contiguous().t())
        assert [torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), runs[-1][1:], strict=True)] == [True] * 2
        assert compiled.plan().notes == ()
    assert all(map(torch.equal, *runs))


def test_another_recipe_is_captured_once_and_ranges_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    qmodel = qcompiler.compile(model, "in-hindsight-w8a8g8", backend="eager")
    qmodel(x).sum().backward()
    before = qmodel.ranges()
    compilers = []
    for name in ("hyperblock-int4", "in-hindsight-w8a8g8", "hyperblock-int4"):
        assert qmodel.use(name) is qmodel
        compilers.append(qmodel._session.get_compiler(True))
        with torch.no_grad():
            fresh = qcompiler.compile(copy.deepcopy(model), name, backend="eager")
            fresh._session.store.load_state_dict(qmodel._session.store.state_dict())
            assert torch.equal(qmodel(x), fresh(x))
        assert qmodel.recipe.name == name
    assert compilers[0] is compilers[2]
    assert len(compilers[0].captures) == 1
    assert before.keys() == qmodel.ranges().keys()
    assert all(torch.equal(state, qmodel.ranges()[name]) for name, state in before.items())
    with pytest.raises(qcompiler.RecipeError, match="did you mean"):
        qmodel.use("hyperblok-int4")


def test_a_container_is_indexed_and_walked_as_its_model(models, eager):
    model = models.mlp()
    compiled = eager(model, "hyperblock-int8")
    assert compiled[0] is model[0]
    assert compiled[-1:][0] is model[-1]
    assert (len(compiled), [*compiled]) == (len(model), [*model])
    assert bool(eager(nn.Linear(2, 2), "hyperblock-int8"))
    assert isinstance(copy.deepcopy(compiled), qcompiler.QuantizedModule)


def test_graph_text_before_the_first_call(models, eager):
    with pytest.raises(qcompiler.CompileError, match=r"^graph_text: nothing is captured yet; call the model once in t"):
        eager(models.mlp(), "hyperblock-int8").graph_text()
