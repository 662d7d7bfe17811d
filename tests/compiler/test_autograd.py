"""Backward of a compiled model: whatever autograd allows on the model is right, or refused with an error."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qcompiler

pytestmark = pytest.mark.usefixtures("fresh")

RECIPES = ["identity", "hyperblock-int8"]
QUANTIZING = [name for name, recipe in qcompiler.RECIPES.items() if recipe.rules]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Copies of the gradients of the parameters, which are then reset."""
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def layer_net(models, function, **layers: nn.Module) -> nn.Module:
    """forward(x) = function(self, x) over `first` and `second`, linear layers of 4."""
    return models.Function(function, **{"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), **layers})


@pytest.mark.parametrize("recipe", RECIPES)
def test_backward_twice(models, eager, recipe):
    """The second backward rounds with the same random bits as the first."""
    model = models.mlp()
    loss = eager(model, recipe)(torch.randn(6, 12)).sin().sum()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert all(map(torch.equal, gradients(model), once))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("recipe", RECIPES)
def test_accumulation(models, eager, recipe):
    model = models.mlp()
    compiled = eager(model, recipe)
    batches = torch.randn(2, 6, 12)
    parts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        compiled(batches[seed]).sin().sum().backward()
        parts.append(gradients(model))
    for seed in (0, 1):
        torch.manual_seed(seed)
        compiled(batches[seed]).sin().sum().backward()
    assert all(map(torch.equal, gradients(model), [a + b for a, b in zip(*parts, strict=True)]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_forwards_before_backward(models, eager, recipe):
    """Each backward has its own saved tensors and random bits, in whatever order they run."""
    model = models.convolutions()
    compiled = eager(model, recipe)
    batches = torch.randn(2, 4, 3, 8, 8)

    def loss(index: int) -> torch.Tensor:
        torch.manual_seed(index)
        return compiled(batches[index]).sin().sum()

    expected = []
    for index in (0, 1):
        loss(index).backward()
        expected.append(gradients(model))
    first, second = loss(0), loss(1)
    second.backward()
    assert all(map(torch.equal, gradients(model), expected[1]))
    first.backward()
    assert all(map(torch.equal, gradients(model), expected[0]))


@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced"])
def test_gradients_of_any_strides(models, eager, kind):
    model = models.convolutions()[:3]
    x = torch.randn(4, 3, 8, 8)
    shape = model(x).shape
    gradient = {
        "transposed": lambda: torch.randn(shape[::-1]).permute(3, 2, 1, 0),
        "expanded": lambda: torch.randn(()).expand(shape),
        "sliced": lambda: torch.randn(*shape[:3], 2 * shape[3])[..., ::2],
    }[kind]()
    assert not gradient.is_contiguous()
    runs = []
    for call in (model, eager(model)):
        call(x).backward(gradient)
        runs.append(gradients(model))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_that_the_loss_does_not_use(models, eager, recipe):
    """No gradient, as in eager: zeros would let weight decay and momentum move the parameter."""
    model = layer_net(models, lambda self, x: (self.first(x), self.second(x)))
    x = torch.randn(3, 4, requires_grad=True)
    first, second = eager(model, recipe)(x)
    first.sum().backward(retain_graph=True)
    assert [p.grad is None for p in model.parameters()] == [False, False, True, True]
    assert x.grad is not None
    second.sum().backward()
    assert [p.grad is None for p in model.parameters()] == [False] * 4


def test_gradients_of_chosen_tensors(models, eager):
    model = models.mlp()
    x = torch.randn(6, 12, requires_grad=True)
    found = torch.autograd.grad(eager(model)(x).sin().sum(), [model[2].weight, x])
    expected = torch.autograd.grad(model(x).sin().sum(), [model[2].weight, x])
    assert all(map(torch.equal, found, expected))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_second_derivative_is_refused(models, eager, recipe):
    """A gradient penalty must not be dropped from the gradients of the parameters without a word."""
    model = models.mlp()
    x = torch.randn(6, 12, requires_grad=True)
    loss = eager(model, recipe)(x).sin().sum()
    with pytest.raises(RuntimeError, match=r"^create_graph=True: a quantized step has no second derivative; leave"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("recipe", QUANTIZING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_nan_out(models, eager, recipe, bad):
    """Where plain PyTorch gives no finite number, the quantized model gives none either: loss scaling must see it."""
    model = models.mlp()
    x = torch.randn(6, 12)
    x[0, 0] = bad
    runs = []
    for call in (model, eager(model, recipe)):
        given = x.clone().requires_grad_()
        y = call(given)
        y.square().sum().backward()
        runs.append([y, given.grad, *gradients(model)])
    for plain, quantized in zip(*runs, strict=True):
        assert not (quantized.isfinite() & ~plain.isfinite()).any()
    assert not runs[0][0].isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_in_the_gradient(models, eager, recipe):
    model = models.mlp()
    y = eager(model, recipe)(torch.randn(6, 12))
    y.backward(torch.full_like(y, float("nan")))
    assert all(g.isnan().any() for g in gradients(model))


@pytest.mark.parametrize("view", ["", "t", "flatten"])
def test_output_that_the_user_changes(models, eager, view):
    """Also where forward computed it as a view, which autograd would not let anybody change."""
    model = layer_net(models, lambda self, x: getattr(self.second(self.first(x)), view)() if view else self.second(x))
    x = torch.randn(6, 4)
    runs = []
    for call in (model, eager(model)):
        y = call(x)
        y += 1
        y.sin().sum().backward()
        runs.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert all(map(torch.equal, *runs))


def test_relu_in_place(models, eager):
    model = layer_net(models, lambda self, x: self.second(torch.relu_(self.first(x))))
    x = torch.randn(6, 4)
    runs = []
    for call in (model, eager(model)):
        call(x).sin().sum().backward()
        runs.append(gradients(model))
    assert all(map(torch.equal, *runs))


def test_outputs_that_share_memory(models, eager):
    """Views of one another and of the input, the input itself, a parameter: equal values, equal gradients."""

    def views(self, x):
        y = self.first(x)
        return y, y.t(), y[0], y, x, x.view(-1), self.first.weight

    model = layer_net(models, views)
    runs = []
    for call in (model, eager(model)):
        x = torch.arange(12.0).view(3, 4).requires_grad_()
        outputs = call(x)
        # without x itself: Dynamo returns it around the graph, so three gradients would be summed in another order
        torch.stack([(i + 1) * t.sin().sum() for i, t in enumerate(outputs) if i != 4]).sum().backward()
        runs.append([*outputs, x.grad, model.first.weight.grad, model.first.bias.grad])
        model.zero_grad()
        assert outputs[4] is x
    assert [*map(torch.equal, *runs)] == [True] * 10


def test_saved_tensor_that_is_an_output(models, eager):
    """exp saves its output for backward, and the user gets it too."""
    model = layer_net(models, lambda self, x: ((h := self.first(x).exp()), self.second(h)))
    x = torch.randn(6, 4)
    runs = []
    for call in (model, eager(model)):
        h, y = call(x)
        (h.sin().sum() + y.sin().sum()).backward()
        runs.append([h, y, *gradients(model)])
    assert all(map(torch.equal, *runs))
    h, y = eager(model)(x)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_parameter_changed_before_backward(models, eager):
    model = models.mlp()
    loss = eager(model)(torch.randn(6, 12)).sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_input_changed_by_the_model(models, eager):
    model = layer_net(models, lambda self, x: self.first(x.mul_(2)))
    runs = []
    for call in (model, eager(model)):
        x = torch.ones(3, 4)
        call(x).sum().backward()
        runs.append([x, model.first.weight.grad.clone()])
        model.zero_grad()
    assert all(map(torch.equal, *runs))
    assert torch.equal(runs[0][0], torch.full((3, 4), 2.0))


# Dynamo looks at the .grad of its inputs, here one that is no leaf, and hides the warning, but not from "error"
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_counters(models, eager):
    """A buffer and a Python number that forward changes; each is read anew at every call."""

    def count(self, x):
        self.seen += 1
        self.calls += 1
        return self.first(x) * self.seen * self.calls

    runs = []
    for wrap in (lambda model: model, eager):
        torch.manual_seed(0)
        model = layer_net(models, count)
        model.register_buffer("seen", torch.zeros(()))
        model.calls = 0
        call, x = wrap(model), torch.ones(2, 4)
        runs.append([*(call(x) for _ in range(4)), model.seen, torch.tensor(model.calls)])
    assert all(map(torch.equal, *runs))


@pytest.mark.sample(3)
@pytest.mark.parametrize("recipe", QUANTIZING)
def test_autocast(models, eager, recipe):
    model = models.convolutions()
    compiled = eager(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 3, 8, 8)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
        loss = (y.float() - 1).square().sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert y.dtype is torch.bfloat16
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_that_the_model_switches_off(models, eager, backward_inside):
    """Its casts are part of the graph: what it left in float32 must not be cast when the graph runs inside of it."""

    def forward(self, x):
        h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            return self.second(h.float())

    model = layer_net(models, forward)
    x = torch.randn(6, 4)
    runs = []
    for call in (model, eager(model)):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        # eager runs each gradient in the type of its operator, inside of autocast too
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside and call is not model):
            y.backward(torch.ones_like(y))
        runs.append([y, *gradients(model)])
    assert all(map(torch.equal, *runs))
    assert runs[0][0].dtype is torch.float32


class Checkpointed(nn.Module):
    """Two blocks, which the user may ask to compute again in backward."""

    def __init__(self, again: bool, drop: float) -> None:
        super().__init__()
        self.again = again
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(drop))
            for _ in range(2)
        )
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8", "hyperblock-int4", "channelwise-int8"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_checkpointing_by_the_user(eager, recipe, drop):
    """The same bits, dropout masks and random rounding included, from less memory."""
    runs, saved = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(again, drop)
        compiled, x = eager(model, recipe), torch.randn(4, 3, 32, 32)
        compiled(x).sin().sum().backward()
        runs.append([*gradients(model), *model.buffers()])
        saved.append(compiled.plan().saved_bytes)
    assert all(map(torch.equal, *runs))
    assert saved[1] < saved[0]


def test_checkpointing_of_the_compiled_model(models, eager):
    model = models.mlp()
    compiled = eager(model, "hyperblock-int8")
    x = torch.randn(6, 12)
    torch.manual_seed(0)
    compiled(x).sin().sum().backward()
    expected = gradients(model)
    torch.manual_seed(0)
    checkpoint(compiled, x, use_reentrant=False).sin().sum().backward()
    assert all(map(torch.equal, gradients(model), expected))


def test_hook_on_an_inner_tensor(models, eager):
    def hooked(self, x):
        h = self.first(x)
        h.register_hook(lambda gradient: gradient * 2)
        return self.second(h)

    model = layer_net(models, hooked)
    x = torch.randn(3, 4)
    runs = []
    for call in (model, eager(model)):
        call(x).sum().backward()
        runs.append(gradients(model))
    assert all(map(torch.equal, *runs))


def test_outputs_of_every_kind(models, eager):
    model = layer_net(
        models,
        lambda self, x: {
            "y": self.first(x),
            "none": None,
            "number": 3,
            "index": x.argmax(-1),
            "cut": self.first(x).detach(),
        },
    )
    outputs = eager(model)(torch.randn(3, 4))
    assert (outputs["none"], outputs["number"]) == (None, 3)
    assert {key: t.requires_grad for key, t in outputs.items() if isinstance(t, torch.Tensor)} == {
        "y": True,
        "index": False,
        "cut": False,
    }
    outputs["y"].sum().backward()
    assert model.first.weight.grad.count_nonzero()


def test_empty_batch(models, eager):
    model = models.mlp()
    compiled = eager(model, "hyperblock-int8")
    y = compiled(torch.randn(0, 12))
    y.sum().backward()
    assert y.shape == (0, 5)
    assert all(not g.any() for g in gradients(model))
    assert "0/input" in {kept.name for kept in compiled.plan().kept}
