"""The debugger: it changes nothing, its figures equal float64, and it takes whatever is trained inside of it."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from watched_steps import recipe, train

import qcompiler
from qcompiler import DebugError, Recipe

pytestmark = pytest.mark.usefixtures("fresh")


class Checkpointed(nn.Module):
    """A region with dropout and products that is computed again in backward."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def inside(self, x):
        return nn.functional.dropout(self.second(x).relu(), 0.3)

    def forward(self, x):
        return self.head(checkpoint(self.inside, self.first(x), use_reentrant=False))


class Broken(nn.Module):
    """Two graphs with Python between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


def batchnorm():
    """Statistics that each forward writes, and dropout; the middle of three convolutions is no end."""
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.4), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*parts, nn.Conv2d(8, 4, 3))


def perceptron():
    """Three layers whose widths Hadamard matrices of 16 divide."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))


UNDISTURBED = {
    "batch norm": (batchnorm, (4, 3, 8, 8), "hyperblock-int4"),
    "hindsight": (batchnorm, (4, 3, 8, 8), "in-hindsight-w8a8g8"),
    "learned": (batchnorm, (4, 3, 8, 8), "int4-large-gradients"),
    "checkpoint": (Checkpointed, (6, 12), "hyperblock-int4"),
    "graph break": (Broken, (6, 12), "luq"),
    "rotated": (perceptron, (32, 16), "nvfp4"),
}


@pytest.mark.sample(2)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", UNDISTURBED)
def test_it_changes_no_bit(name, eager):
    """Steps 1, watched 2 and 3, and 4: losses, weights, buffers, ranges, gradients, the generator."""
    build, shape, named = UNDISTURBED[name]
    model, inputs = build(), [torch.randn(shape) for _ in range(2)]
    results = []
    for watched in (False, True):
        torch.manual_seed(1)
        qmodel = eager(copy.deepcopy(model), named)
        found = train(qmodel, inputs, 1)
        debugger = qcompiler.debug(qmodel)
        if watched:
            with debugger:
                found += train(qmodel, inputs, 2)
            assert debugger.recording.tallies
            assert debugger.recording.layers
        else:
            found += train(qmodel, inputs, 2)
        results.append(found + train(qmodel, inputs, 1))
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_off_it_costs_nothing(eager):
    """The same functions run before and after, and nothing is captured again."""
    qmodel, x = eager(nn.Linear(8, 4), "hyperblock-int8"), torch.randn(4, 8)
    qmodel(x).sum().backward()
    modes = qmodel._session._modes
    plan, captured = str(qmodel.plan()), counters["stats"]["unique_graphs"]
    with qcompiler.debug(qmodel) as d:
        qmodel(x).sum().backward()
        assert counters["stats"]["unique_graphs"] == captured + 1
    runs = modes[True][0].runs
    qmodel(x).sum().backward()
    assert qmodel._session._modes is modes
    assert modes[True][0].runs == runs + 1
    assert counters["stats"]["unique_graphs"] == captured + 1
    assert (d.recording.steps, str(qmodel.plan())) == (1, plan)
    with qcompiler.debug(qmodel) as again:  # nor where it is entered again
        qmodel(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == captured + 1
    assert again.recording.layers.keys() == d.recording.layers.keys()


def test_its_tensors_go_with_it(eager):
    """What is captured stays for the next time, what was recorded does not. A backward behind it is as ever."""
    qmodel, x = eager(nn.Linear(8, 4), "hyperblock-int8"), torch.randn(4, 8)
    with qcompiler.debug(qmodel) as d:
        qmodel(x).sum().backward()
        late = qmodel(x).sum()
    late.backward()
    assert len(d.recording.tallies["(root)/grad"].history) == 1
    gone = weakref.ref(d.recording.held["(root)/input"].x)
    del d, late
    gc.collect()
    assert gone() is None


def test_inductor_is_left_as_it_is():
    """Watched, a compiled model gives the figures of an eager one; afterwards the same compiled step runs."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    reports = []
    for backend in ("inductor", "eager"):
        qmodel = qcompiler.compile(copy.deepcopy(model), recipe(), backend=backend)
        before = qmodel(x).detach()
        with qcompiler.debug(qmodel) as d:
            qmodel(x).sum().backward()
        captured = counters["stats"]["unique_graphs"]
        assert torch.equal(qmodel(x), before)
        assert counters["stats"]["unique_graphs"] == captured
        reports.append(d.report().to_json())
    assert reports[0] == reports[1]


def rounded(x, levels=127):
    """x on the symmetric grid of its own range, in float64."""
    step = np.abs(x).max() / levels
    return np.rint(x / step) * step


def loss_of(lost, exact):
    """‖error‖²/‖exact‖²."""
    return (lost**2).sum() / (exact**2).sum()


def worst(lost, exact, label):
    """The same, or its mean over channels: the last axis, of weight gradients the first too."""
    axes = (0, 1) if "weight" in label else (0,)
    pairs = [((lost**2).sum(axis), (exact**2).sum(axis)) for axis in axes]
    shares = [np.minimum(np.divide(e, p, out=np.zeros_like(e), where=e > 0), 1).mean() for e, p in pairs]
    return max(loss_of(lost, exact), *shares)


def test_figures_equal_float64(eager):
    """Two layers by hand in numpy: every product in float and quantized, and each operand's share in the loss."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)), torch.randn(6, 12)
    tangent = torch.randn(6, 5)
    with qcompiler.debug(eager(model, recipe())) as d:
        d.qmodel(x).backward(tangent)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in model.parameters())
    a, g = x.double().numpy(), tangent.double().numpy()

    def run(q):
        """name → (result, its operands in float) of every product; `q` is what operands go through."""
        hidden = q(a) @ q(w1).T + b1
        relu = np.maximum(hidden, 0)
        grad = (q(g) @ q(w2)) * (hidden > 0)
        return {
            "0 forward": (hidden, {"input": a, "weight": w1.T}),
            "2 forward": (q(relu) @ q(w2).T + b2, {"input": relu, "weight": w2.T}),
            "2 input gradient": (q(g) @ q(w2), {"grad": g, "weight": w2}),
            "2 weight gradient": (q(g).T @ q(relu), {"grad": g.T, "input": relu}),
            "0 weight gradient": (q(grad).T @ q(a), {"grad": grad.T, "input": a}),
        }

    own, exact = run(rounded), run(lambda tensor: tensor)
    assert d.recording.layers.keys() == own.keys()
    harm = dict.fromkeys(d.recording.tallies, 0.0)
    for label, (result, operands) in own.items():
        reference, found = exact[label][0], d.recording.layers[label]
        cosine = (result * reference).sum() / np.sqrt((result**2).sum() * (reference**2).sum())
        assert found.cosine == pytest.approx(cosine, abs=1e-6)
        # results differ from float64 by some 1e-7 of themselves, which is 1e-5 of an error of 1 %
        assert found.error == pytest.approx(loss_of(result - reference, reference), rel=1e-3)
        left, right = operands.values()
        for name, lost in zip(operands, ((rounded(left) - left) @ right, left @ (rounded(right) - right)), strict=True):
            harm[f"{label.partition(' ')[0]}/{name}"] += worst(lost, left @ right, label)
    for site, expected in harm.items():
        assert d.recording.harm(site) == pytest.approx(expected, rel=1e-3), site
    grads = {"0.weight": "0 weight gradient", "2.weight": "2 weight gradient"}
    assert {name: d.recording.gradients[name] for name in grads} == pytest.approx(
        {name: d.recording.layers[label] for name, label in grads.items()}
    )


def test_the_shadow_is_plain_training(eager):
    """Dropout, batch norm and all: a recipe that keeps everything in float agrees to the bit with its shadow."""
    model = batchnorm()
    with qcompiler.debug(eager(model, Recipe(name="float", rules=()))) as d:
        for _ in range(2):
            d.qmodel(torch.randn(4, 3, 8, 8)).sin().sum().backward()
    assert {found.error for found in d.recording.layers.values()} == {0}
    assert {found.error for found in d.recording.gradients.values()} == {0}
    assert len(d.recording.layers) == 8  # no input gradient of the first layer
    with pytest.raises(DebugError, match="places no quantizer"):
        d.report()


def test_what_if_is_what_the_compiler_does(eager):
    """The harm of a spec that was only tried equals that of the model compiled with it, blocks turned and all."""
    model, x = nn.Linear(24, 16), torch.randn(8, 24)
    tangent = torch.randn(8, 16)
    x.requires_grad_(True)
    with qcompiler.debug(eager(copy.deepcopy(model), recipe())) as d:
        d.qmodel(x).backward(tangent)
    for text in (
        "int4:max:b2c8o4i4:nearest:pass",
        "int4:real:c16i16:nearest:pass",
        "e2m1:two-level:c16i16:nearest:pass",
    ):
        with qcompiler.debug(eager(copy.deepcopy(model), recipe(spec=text))) as other:
            other.qmodel(x).backward(tangent)
        for site in ("(root)/input", "(root)/weight", "(root)/grad"):
            turned = [name for name in other.recording.tallies if name in (site, f"{site}.turned")]
            harm = sum(other.recording.harm(name) for name in turned)
            assert d.what_if(site, text).harm == pytest.approx(harm, rel=1e-9)
            assert (
                d.what_if(site, text).tally.sqnr == other.recording.tallies.get(site, d.what_if(site, text).tally).sqnr
            )
    assert d.what_if("(root)/input", None).harm == 0


def test_several_forwards_before_one_backward(eager):
    """Each forward meets its own shadow."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    x = torch.randn(4, 6)
    with qcompiler.debug(eager(model, recipe())) as d:
        first = d.qmodel(x).sum()
        second = d.qmodel(2 * x).sum()
        (first + second).backward(retain_graph=True)
        (first + second).backward()
    assert d.recording.steps == 2
    assert len(d.recording.tallies["0/grad"].history) == 2
    assert all(found.error < 1e-3 for found in d.recording.layers.values())
