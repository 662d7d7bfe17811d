"""Copies, hooks, other backends and recipes of a quantized module."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.passes.rules import Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

pytestmark = pytest.mark.usefixtures("fresh")


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
