"""Models whose blocks compute as integers: losses and gradients of simulation, bit for bit or within the roundings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qcompiler
from qcompiler.passes.rules import Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.kernels.runs import RUNS
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.spec import parse_spec

FACTS = Facts(device="cpu", formats=(parse_format("int8"),) * 2, rows=64, length=64, columns=64, run=64)
REASON = RUNS.explain(FACTS)
pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.skipif(bool(REASON), reason=REASON)]

WIDE = "hyperblock-int8-wide"
#: half of the distance between 1 and the next float32
UNIT = 2.0**-24


def blocks(form, rule, edge):
    spec = parse_spec(f"{form}:{rule}:b{edge}c{edge}o{edge}i{edge}:nearest:pass")
    return Recipe(name="blocks", rules=(Rule(spec=spec),))


def run_layer(execution, recipe, x, out, grad, backend="eager"):
    """Output, gradient of the input, gradient of the weight; and the plan."""
    torch.manual_seed(0)
    layer, x = nn.Linear(x.shape[-1], out, bias=False), x.clone().requires_grad_()
    qmodel = qcompiler.compile(layer, recipe, backend=backend, execution=execution)
    y = qmodel(x)
    y.backward(grad)
    return (y.detach(), x.grad, layer.weight.grad), qmodel.plan()


def on_grid(*shape, seed):
    """Multiples of 1/8 up to 15/8, which 5 bits hold exactly in steps of 1/8 and, in blocks of smaller ones, below."""
    return torch.randint(-15, 16, shape, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.mark.parametrize(("edge", "backend"), [(32, "eager"), (64, "eager"), (128, "eager"), (64, "inductor")])
def test_bit_for_bit_where_float32_is_exact(edge, backend):
    """Weights are drawn from ±136^−½, so they are at most 15 steps of 2^−7 in each block. Every product is a multiple
    of 2^−10, or of 2^−6 in the weight gradient, and 150·15² of those are below 2^24."""
    x, grad = on_grid(150, 136, seed=0), on_grid(150, 140, seed=1)
    results = [run_layer(how, blocks("int5", "max", edge), x, 140, grad, backend) for how in ("simulate", "integer")]
    (simulated, _), (integer, plan) = results
    assert (plan.integer, plan.simulated) == (3, ())
    assert all(torch.equal(*pair) for pair in zip(simulated, integer, strict=True))


@given(
    st.integers(2, 150), st.integers(33, 200), st.integers(2, 150), st.sampled_from([32, 48, 64]), st.integers(0, 99)
)
@settings(derandomize=True, deadline=None, max_examples=12)
def test_every_shape_within_the_bound(rows, channels, out, edge, seed):
    """Real scales: both ways round each of n products' sum at most n + 3 times, with bounds of their magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(rows, channels, generator=generator), torch.randn(rows, out, generator=generator)
    recipe = blocks("int8", "real", edge)
    (simulated, _), (integer, plan) = (run_layer(how, recipe, x, out, grad) for how in ("simulate", "integer"))
    assert plan.integer + len(plan.simulated) == 3
    torch.manual_seed(0)
    weight = nn.Linear(channels, out, bias=False).weight.detach()
    # a code is at most half a step, 1/254 of the largest number of the block, above its number
    x, grad, weight = (tensor.double().abs() + tensor.abs().max() / 254 for tensor in (x, grad, weight))
    magnitudes = (x @ weight.t(), grad @ weight, grad.t() @ x)
    for one, other, magnitude, length in zip(simulated, integer, magnitudes, (channels, out, rows), strict=True):
        assert ((one.double() - other.double()).abs() <= 2 * (length + 3) * UNIT * magnitude).all()


def mlp():
    return nn.Sequential(nn.Linear(130, 100), nn.ReLU(), nn.Linear(100, 70), nn.GELU(), nn.Linear(70, 10))


def train(execution, recipe=WIDE):
    torch.manual_seed(0)
    model, results = mlp(), []
    qmodel = qcompiler.compile(model, recipe, backend="eager", execution=execution)
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = qmodel(torch.randn(150, 130)).square().mean()
        loss.backward()
        results += [loss.detach(), *(parameter.grad.clone() for parameter in qmodel.parameters())]
        optimizer.step()
    return results, qmodel.plan()


def test_two_steps_of_training():
    """A rounding apart; but a rounding can move a code, so what descends from many codes has the bound of one code."""
    simulated, _ = train("simulate")
    integer, plan = train("integer")
    assert (plan.integer, plan.simulated) == (8, ())
    assert all((one - other).norm() <= one.norm() / 127 for one, other in zip(simulated, integer, strict=True))


def test_small_blocks_are_simulated_with_the_reason():
    with pytest.raises(qcompiler.CompileError, match="a scale changes after every 4 elements of a sum; valid: 32"):
        train("integer", "hyperblock-int8")


def test_blocks_within_an_image_are_simulated_with_the_reason():
    model = nn.Sequential(nn.Conv2d(80, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    qmodel = qcompiler.compile(model, blocks("int8", "max", 64), backend="eager", execution="integer")
    qmodel(torch.randn(70, 80, 4, 4)).sum().backward()
    rows = {row.consumer: row.reason for row in qmodel.plan().simulated}
    assert rows["0 forward"] == "the scale of block b64c64o64i64 changes along the summed axis"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(bad):
    torch.manual_seed(0)
    qmodel = qcompiler.compile(mlp(), WIDE, backend="eager", execution="integer")
    x = torch.randn(150, 130)
    x[70, 100] = bad
    y = qmodel(x)
    assert torch.equal(y.isnan().any(1).nonzero().flatten(), torch.arange(64, 128))  # the samples of one block
    y.sum().backward()
    assert all(parameter.grad.isnan().any() for parameter in qmodel.parameters() if parameter.ndim == 2)


def test_evaluation_runs_on_integers_too():
    """There a block spans one sample, and runs of channels stay."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(9, 130)
    outputs = []
    for execution in ("simulate", "integer"):
        qmodel = qcompiler.compile(model, WIDE, backend="eager", execution=execution).eval()
        with torch.no_grad():
            outputs.append(qmodel(x))
    assert qmodel.plan(training=False).integer == 3
    assert (outputs[0] - outputs[1]).norm() <= outputs[0].norm() / 127
