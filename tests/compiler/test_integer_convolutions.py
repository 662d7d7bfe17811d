"""Convolutions on integers: the losses and gradients of simulation, bit for bit or within the roundings."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import qcompiler
from qcompiler.demo.nets import ResNet
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.kernels import convolutions, table
from qcompiler.runtime.spec import parse_spec

pytestmark = pytest.mark.usefixtures("fresh")
#: half of the distance between 1 and the next float32
UNIT = 2.0**-24
#: why the kernels that read images do not run on this processor; empty: they do
REASON = next((one for one in (convolutions.load_forward(), convolutions.load_gradient()) if isinstance(one, str)), "")
FEW = settings(
    derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def uniform(**roles):
    """A spec for each role."""
    named = tuple(Rule(role=Role(role), spec=parse_spec(f"{spec}:tensor:nearest:pass")) for role, spec in roles.items())
    return Recipe(name="uniform", rules=named)


def train(make, x, recipe, execution, backend="eager", steps=1):
    """(output, gradients of each step, plan)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, results = make(), []
    qmodel = qcompiler.compile(model, recipe, backend=backend, execution=execution)
    for _ in range(steps):
        given = x.clone().requires_grad_()
        model.zero_grad()
        y = qmodel(given)
        y.square().mean().backward()
        results += [y.detach(), given.grad, *(parameter.grad for parameter in model.parameters())]
    return results, qmodel.plan()


def train_both(*args, **kwargs):
    """(result of simulation, result of integers) side by side, and the plan of the latter."""
    (simulated, _), (integer, plan) = (
        train(*args[:3], execution, *args[3:], **kwargs) for execution in ("simulate", "integer")
    )
    return list(zip(simulated, integer, strict=True)), plan


def largest_error(pairs):
    return max(((one - other).norm() / one.norm()).item() for one, other in pairs)


@given(
    st.lists(
        st.tuples(*(st.integers(*ends) for ends in ((1, 4), (1, 3), (0, 4), (1, 2), (1, 6)))), min_size=1, max_size=2
    ),
    st.tuples(st.integers(2, 3), st.integers(2, 5), st.integers(2, 5)),
    st.sampled_from(("int8:max", "uint8:max")),
    st.booleans(),
    st.integers(0, 2**31),
)
@FEW
def test_any_geometry_bit_for_bit(dims, sizes, form, channels_last, seed):
    """Powers of two, and no sum longer than 3·14²·127·255 < 2²⁴: integers and floats give the same bits."""
    taps, stride, padding, dilation, rest = zip(*dims, strict=True)
    batch, inputs, outputs = sizes
    space = [max(1, d * (k - 1) + 1 - 2 * p) + r for k, p, d, r in zip(taps, padding, dilation, rest, strict=True)]
    torch.manual_seed(seed)
    x = torch.randn(batch, inputs, *space)
    order = torch.channels_last if channels_last and len(dims) == 2 else torch.contiguous_format
    layer = (nn.Conv1d, nn.Conv2d)[len(dims) - 1]

    def make():
        return layer(inputs, outputs, taps, stride, padding, dilation, bias=False).to(memory_format=order)

    recipe = uniform(weight="int8:max", activation=form, gradient="int8:max")
    pairs, plan = train_both(make, x.abs() if form.startswith("uint") else x, recipe)
    assert plan.integer == (2 if any(s > 1 < d for s, d in zip(stride, dilation, strict=True)) else 3)
    assert all(torch.equal(simulated, integer) for simulated, integer in pairs)


@pytest.mark.parametrize("form", ["affine8:real", "affine4:real"])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_zero_points_at_the_border(form, stride, padding):
    """Every sum has at most 54 products: (54 + 4) roundings of the sum of magnitudes, in both ways."""
    x = torch.randn(4, 6, 8, 7) + 0.7
    make = lambda: nn.Conv2d(6, 5, 3, stride, padding, bias=False)  # noqa: E731
    pairs, plan = train_both(make, x, uniform(weight="int8:real", activation=form, gradient=form))
    assert plan.integer == 3
    # the output decides the gradient, so a rounding there can move a code of the gradient by one: only y has the bound
    y, integer = pairs[0]
    assert (y - integer).abs().max() > 0
    torch.manual_seed(0)
    magnitudes = nn.functional.conv2d(x.abs() + x.abs().max() / 15, make().weight.abs() * 1.1, None, stride, padding)
    assert ((y - integer).abs() <= 2 * (54 + 4) * UNIT * magnitudes).all()
    assert largest_error(pairs) <= 1 / 15


def resnet():
    return ResNet(1, width=8)


class Inverted(nn.Module):
    """A block of MobileNet v2: wide, each channel by itself, narrow, and the input added."""

    def __init__(self):
        super().__init__()
        sizes = ((8, 24, 1, 1), (24, 24, 3, 24), (24, 8, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2, groups=g, bias=False) for i, o, k, g in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)

    def forward(self, x):
        y = nn.functional.relu6(self.norms[0](self.convs[0](x)))
        y = nn.functional.relu6(self.norms[1](self.convs[1](y)))
        return x + self.norms[2](self.convs[2](y))


def plain():
    """Without norms: Inductor sums those in another order if it fuses them with something else."""
    convs = (nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU())
    return nn.Sequential(*convs, nn.Conv2d(4, 2, 1, 2, bias=False))


MODELS = {
    "resnet": (resnet, (2, 3, 16, 16), 30),
    "mobile": (Inverted, (2, 8, 6, 6), 6),
    "plain": (plain, (2, 3, 9, 8), 9),
}


@pytest.mark.parametrize(("backend", "name"), [("eager", "resnet"), ("eager", "mobile"), ("inductor", "plain")])
def test_whole_models_bit_for_bit(backend, name):
    """Sums of codes stay below 2²⁴ and scales are powers of two, but for norms, which are floats in both."""
    make, shape, products = MODELS[name]
    pairs, plan = train_both(make, torch.randn(shape), "tensor-int8", backend, steps=2)
    assert plan.integer == products
    assert all(torch.equal(simulated, integer) for simulated, integer in pairs)


def run_layer(execution, make, x, grad):
    """Output, gradient of the input, gradient of the weight, for a given gradient of the output; and the plan."""
    torch.manual_seed(0)
    layer, x = make(), x.clone().requires_grad_()
    qmodel = qcompiler.compile(layer, "hyperblock-int8-wide", backend="eager", execution=execution)
    y = qmodel(x)
    torch.manual_seed(1)  # of the rounding of the gradient
    y.backward(grad)
    return (y.detach(), x.grad, layer.weight.grad), qmodel.plan()


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(5, 40, 50), (70, 80, 66)])
def test_wide_blocks(batch, inputs, outputs, stride):
    """With one run each no sum exceeds 9·50·127² < 2²⁴, and scales are powers of two: the same bits. With two runs both
    ways round each of n products' sum at most n + 3 times, with bounds of their magnitudes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, inputs, 6, 5, generator=generator)
    make = lambda: nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)  # noqa: E731
    grad = torch.randn(make()(x).shape, generator=generator)
    (simulated, _), (integer, plan) = (run_layer(how, make, x, grad) for how in ("simulate", "integer"))
    assert (plan.integer, plan.simulated) == (3, ())
    if inputs <= 64:
        assert all(torch.equal(*pair) for pair in zip(simulated, integer, strict=True))
    torch.manual_seed(0)
    weight = make().weight.detach()
    # a code is at most one step, 1/127 of twice the largest number of the block, above its number
    x, grad, weight = (tensor.double().abs() + tensor.abs().max() / 63 for tensor in (x, grad, weight))
    forward = nn.functional.conv2d(x, weight, None, stride, 1)
    of_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, 1)
    of_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad, stride, 1)
    lengths = 9 * inputs, 9 * outputs, grad.numel() // outputs
    for one, other, magnitude, n in zip(simulated, integer, (forward, of_x, of_weight), lengths, strict=True):
        assert ((one.double() - other.double()).abs() <= 2 * (n + 3) * UNIT * magnitude).all()


@pytest.mark.parametrize("name", MODELS)
def test_patches_give_the_same_bits(name, monkeypatch):
    """As on a processor without the instructions."""
    make, shape, products = MODELS[name]
    found, plan = train(make, x := torch.randn(shape), "in-hindsight-w8a8g8", "integer")
    monkeypatch.setattr(table, "CONVOLUTIONS", ())
    by_patches, other = train(make, x, "in-hindsight-w8a8g8", "integer")
    assert plan.integer == other.integer == products
    assert all(torch.equal(*pair) for pair in zip(found, by_patches, strict=True))


def test_groups_stay_with_their_reason():
    _, plan = train(Inverted, torch.randn(2, 8, 6, 6), "tensor-int8", "integer")
    assert {(row.consumer, row.reason) for row in plan.simulated} == {
        (f"convs.1 {product}", "no kernel computes convolutions of 24 groups on codes")
        for product in ("forward", "input gradient", "weight gradient")
    }


@pytest.mark.parametrize("name", ["resnet", "mobile"])
@pytest.mark.sample(1)
def test_real_scales_and_zero_points(name):
    """A rounding can move codes, and those move others: by one code, or as far as another order of float sums does."""
    make, shape, products = MODELS[name]
    x = torch.randn(shape)
    pairs, plan = train_both(make, x, "in-hindsight-w8a8g8")
    assert plan.integer == products
    other = train(lambda: make().to(memory_format=torch.channels_last), x, "in-hindsight-w8a8g8", "simulate")[0]
    reordered = [(simulated, turned) for (simulated, _), turned in zip(pairs, other, strict=True)]
    assert 0 < largest_error(pairs) <= max(1 / 127, 2 * largest_error(reordered))


@pytest.mark.parametrize("recipe", ["tensor-int8", "in-hindsight-w8a8g8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(recipe, bad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    qmodel = qcompiler.compile(model, recipe, backend="eager", execution="integer")
    qmodel(torch.randn(2, 3, 8, 8)).sum().backward()
    x = torch.randn(2, 3, 8, 8)
    x[0, 0, 0, 0] = bad
    model.zero_grad()
    loss = qmodel(x).sum()
    assert loss.isnan()
    loss.backward()
    assert all(parameter.grad.isnan().any() for parameter in model.parameters() if parameter.ndim == 4)


def test_evaluation_has_a_scale_for_each_sample():
    torch.manual_seed(0)
    model, x, outputs = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU()), torch.randn(3, 3, 5, 5), []
    for execution in ("simulate", "integer"):
        qmodel = qcompiler.compile(model, "tensor-int8", backend="eager", execution=execution).eval()
        with torch.no_grad():
            outputs.append(qmodel(x * torch.tensor([1, 8, 64]).reshape(3, 1, 1, 1)))
    assert qmodel.plan(training=False).integer == 1
    assert torch.equal(*outputs)
