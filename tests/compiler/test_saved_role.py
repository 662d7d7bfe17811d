"""The role *saved*, from `compile(…, save=…)` and recipe files to gradients."""

import copy
import math
import pickle

import pytest
import torch
from saving_models import MODELS
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qcompiler
from qcompiler.compiler import lower
from qcompiler.demo.measure import measure_saved_bytes
from qcompiler.passes.rules import Role

#: probability that a right compiler fails one test of means: over all elements, by a union bound
RISK = 1e-6


@pytest.fixture(autouse=True)
def seeded(fresh):
    """Every test starts from seed 0 and an empty cache."""


def compiled(model, recipe="identity", save="int8", backend="eager"):
    return qcompiler.compile(model, recipe, backend=backend, save=save)


def run_once(name, recipe, save, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = MODELS[name]()
    qmodel = compiled(model, recipe, save, backend)
    output = qmodel(x)
    output.sum().backward()
    return output.detach(), [p.grad for p in model.parameters() if p.grad is not None]


#: the key of stochastic rounding is drawn in front of the masks of dropout with `save`, and behind them without
CALLS = [(name, "eager") for name in ("blocks", "conv-tanh", "conv-bn-silu", "conv-gn-gelu", "mlp", "gpt", "vit")]
CALLS += [("conv-bn-silu", "inductor"), ("mlp", "inductor")]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_outputs_are_those_without_save(name, backend):
    expected, _ = run_once(name, "hyperblock-int8", None, backend)
    for save in ("int8", "int4") if backend == "eager" else ("int4",):
        output, gradients = run_once(name, "hyperblock-int8", save, backend)
        assert torch.equal(output, expected)
        assert all(grad.isfinite().all() for grad in gradients)


def run_code(module):
    """Make a half run by its code, as compilers read it, and not node by node."""
    module.recompile()
    return lambda args: module(*args)


@pytest.mark.parametrize("name", ["gpt", "conv-bn-silu"])
def test_the_code_of_the_halves_computes_what_the_nodes_do(name, monkeypatch):
    """A saved tensor bore the name of another node: compiled gradients read that one."""
    expected, others = run_once(name, "hyperblock-int8", "int8", "eager")
    monkeypatch.setattr(lower, "make_runner", run_code)
    output, gradients = run_once(name, "hyperblock-int8", "int8", "eager")
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


ACTIVATIONS = {  # function → the length of the range of its derivative, widened so that zero is a code of 4 bits
    "gelu": (F.gelu, 1.304),
    "silu": (F.silu, 1.270),
    "tanh": (torch.tanh, 1.0),
    "sigmoid": (torch.sigmoid, 0.25),
    "hardswish": (F.hardswish, 2.046),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_functions_are_right_on_average(name, models):
    """Hoeffding: n means of a sum of numbers in runs of length G·step leave t with 2·exp(−2·n·t² / Σ(G·step)²)."""
    act, length = ACTIVATIONS[name]
    model = models.Function(lambda m, x: act(m.layer(x)), layer=nn.Linear(8, 32))
    x, grad, count = 2 * torch.randn(6, 8), torch.randn(6, 32), 400
    bias = model.layer.bias
    (expected,) = torch.autograd.grad(model(x), bias, grad)
    qmodel = compiled(model, save="int4")
    qmodel(x)
    draws = torch.stack([torch.autograd.grad(qmodel(x), bias, grad)[0] for _ in range(count)]).double()
    step = length / 15
    spread = grad.square().sum(0).sqrt() * step
    allowed = spread * math.sqrt(math.log(2 * len(bias) / RISK) / (2 * count)) + 1e-5  # and float32 itself
    assert ((draws.mean(0) - expected).abs() <= allowed).all()
    assert (draws.std(0) > 0).all()  # each draw rounds anew
    assert ((draws - expected).abs() <= grad.abs().sum(0) * step + 1e-5).all()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(32), nn.LayerNorm(32)], ids=["batch", "layer"])
def test_gradients_of_norms_have_a_bias_of_the_second_order(norm, models):
    """dγ = Σ G·x̂ is linear in x̂: right on average. dX holds x̂ twice: its bias is of the order of E[e²].

    With codes of x̂ + e for x̂ of variance 1 the bias of x̂·mean(G·x̂) is E[e²]·G / N; a deviation that is taken of codes
    anew grows by E[e²] / 2. Both hold |dX| · E[e²] at most, and E[e²] ≤ step² / 4 for the largest step of a block.
    """
    model = models.Function(lambda m, x: m.norm(m.layer(x)), layer=nn.Linear(8, 32), norm=norm)
    x, grad, count = torch.randn(64, 8), torch.randn(64, 32), 400
    y = model.layer(x).detach()
    normed = norm(y).detach()
    qmodel = compiled(model, save="int8")
    qmodel(x)
    wanted = (model.layer.weight, norm.weight)
    exact = torch.autograd.grad(model(x), wanted, grad)
    draws = [torch.autograd.grad(qmodel(x), wanted, grad) for _ in range(count)]
    step = 2.0 ** math.ceil(math.log2(y.abs().max().item() / 127)) / y.std(0 if "Batch" in type(norm).__name__ else 1)
    step = step.max().item()
    weights, gammas = (torch.stack(one).double() for one in zip(*draws, strict=True))
    spread = grad.square().sum(0).sqrt() * step
    noise = spread * math.sqrt(math.log(2 * 32 / RISK) / (2 * count))
    second = grad.abs().sum(0) * normed.abs().max() * step**2 / 4
    assert ((gammas.mean(0) - exact[1]).abs() <= noise + second + 1e-4).all()
    bias = (weights.mean(0) - exact[0]).norm() / exact[0].norm()
    error = (weights - exact[0]).norm(dim=(1, 2)).mean() / exact[0].norm()
    assert bias <= step**2 + 4 * error / math.sqrt(count)  # a mean of n draws is off by error / √n, root mean square


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(64),
        nn.LayerNorm(64),
    ],
    ids=["batch", "layer"],
)
def test_gradients_of_norms_do_not_shrink_in_four_bits(norm):
    """With mean and deviation in float the bias is E[e²]/N of the gradient: step ≤ 1/2 of a deviation, N = 64."""
    model, x, grad, count = nn.Sequential(nn.Linear(8, 64), norm), torch.randn(64, 8), torch.randn(64, 64), 400
    x.requires_grad_()
    (exact,) = torch.autograd.grad(model(x), x, grad)
    qmodel = compiled(model, save="int4")
    qmodel(x)
    draws = torch.stack([torch.autograd.grad(qmodel(x), x, grad)[0] for _ in range(count)]).double()
    gains = (draws * exact).sum((1, 2)) / exact.square().sum()
    assert abs(gains.mean().item() - 1) <= 0.25 / 4 / 64 * 2 + 5 * gains.std().item() / math.sqrt(count)


RECIPE = """
name: mine
rules:
  - {role: saved, module: '0', keep: true, reason: measured}
  - {role: saved, module: '2', format: int4, scale: fit, block: c32, rounding: stochastic, vjp: pass}
"""


def two_norms():
    return nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.LayerNorm(64))


def write(path, *lines):
    path.write_text("name: mine\nrules:\n" + "".join(f"  - {{role: saved, {line}}}\n" for line in lines))
    return path


def test_rules_of_a_recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    qmodel = compiled(two_norms(), path, save=None)
    qmodel(torch.randn(8, 4)).sum().backward()
    plan = qmodel.plan()
    saved = {site.name: site for site in plan.sites if site.role is Role.SAVED}
    assert [*saved] == ["2/saved"]
    assert saved["2/saved"].spec.format.bits == 4
    assert {kept.name: kept.reason for kept in plan.kept if "/saved" in kept.name}["0/saved"].endswith("measured")
    assert not [note for note in plan.notes if "rule" in note]


def test_a_rule_that_matches_nothing_is_in_the_notes(tmp_path):
    path = write(tmp_path / "mine.yaml", "module: nowhere, format: int8, rounding: stochastic")
    qmodel = compiled(two_norms(), path, save=None)
    qmodel(torch.randn(8, 4)).sum().backward()
    assert [note for note in qmodel.plan().notes if "nowhere" in note]


def test_own_rules_come_before_save(tmp_path):
    qmodel = compiled(two_norms(), write(tmp_path / "mine.yaml", "module: '0', keep: true"), save="int8")
    qmodel(torch.randn(8, 4)).sum().backward()
    assert "0/saved" not in [site.name for site in qmodel.plan().sites]
    assert "2/saved" in [site.name for site in qmodel.plan().sites]


@pytest.mark.parametrize("given", ["int3", "int16", "", "INT8", 8, True])
def test_wrong_words_are_refused(given):
    with pytest.raises(qcompiler.CompileError, match=rf"^compile: save: got {given!r}; valid: int8, int4 or None$"):
        compiled(two_norms(), save=given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("operator: linear, keep: true", r"operator: got 'linear' for the role saved; valid: module alone"),
        ("position: first, keep: true", r"position: got .*first.* for the role saved; valid: module alone"),
        ("product: forward, keep: true", r"product: got .*forward.* for the role saved; valid: module alone"),
        ("sign: signed, keep: true", r"sign: got .*signed.* for the role saved; valid: module alone"),
        ("rotate: '16', keep: true", r"rotate: got 16 for the role saved; valid: module alone"),
        ("format: int8, block: tensor, range: 'hindsight(0.9,0.01)'", r"range: got .* role saved; valid: current"),
        ("format: int8, vjp: clip", r"vjp: got 'clip' for the role saved; valid: pass"),
    ],
)
def test_wrong_rules_are_refused(line, message, tmp_path):
    with pytest.raises(qcompiler.RecipeError, match=message):
        compiled(two_norms(), write(tmp_path / "wrong.yaml", line), save=None)


def test_the_plan_lists_what_is_saved(models):
    model = models.Function(
        lambda m, x: F.log_softmax(m.last(F.gelu(m.norm(m.first(x)))), -1),
        first=nn.Linear(8, 64),
        norm=nn.BatchNorm1d(64),
        last=nn.Linear(64, 8),
    )
    qmodel = compiled(model, "tensor-int8")
    qmodel(torch.randn(16, 8)).sum().backward()
    plan, text = qmodel.plan(), str(qmodel.plan())
    saved = [site for site in plan.sites if site.role is Role.SAVED]
    assert saved
    assert all(site.is_forward and site.consumers and site.name.partition("#")[0].endswith("/saved") for site in saved)
    reasons = {kept.reason for kept in plan.kept if "/saved" in kept.name}
    assert reasons == {"saved in float: a statistic", "saved in float: backward takes its exponential"}
    for site in saved:
        assert f"{site.name} " in text
    for reason in reasons:
        assert reason in text


def test_without_save_the_plan_has_no_such_rows():
    qmodel = compiled(two_norms(), "tensor-int8", save=None)
    qmodel(torch.randn(16, 4)).sum().backward()
    assert "/saved" not in str(qmodel.plan())


class Checkpointed(nn.Module):
    """A block that the user checkpoints."""

    def __init__(self, *, on=True):
        super().__init__()
        self.first, self.norm, self.last, self.on = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 16), on

    def body(self, x):
        return self.last(F.gelu(self.norm(self.first(x))))

    def forward(self, x):
        if not self.on:
            return self.body(self.body(x))
        return checkpoint(self.body, checkpoint(self.body, x, use_reentrant=False), use_reentrant=False)


@pytest.mark.parametrize("save", [None, "int8", "int4"])
@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8"])
def test_checkpoints_of_the_user(recipe, save):
    model, x = Checkpointed(), torch.randn(32, 16)
    output = model(x)
    most = measure_saved_bytes(model, x)
    qmodel = compiled(model, recipe, save)
    assert measure_saved_bytes(qmodel, x) <= most
    qmodel(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert recipe != "identity" or torch.equal(qmodel(x), output)


@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8", "tensor-int4", "in-hindsight-w8a8g8"])
def test_checkpoints_change_no_bit(recipe):
    results, x = [], torch.randn(32, 16)
    for on in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Checkpointed(on=on)
        output = compiled(model, recipe, save=None)(x)
        output.sum().backward()
        results.append([output, *gradients(model)])
    assert all(map(torch.equal, *results))


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_backward_twice_gives_the_same_gradients():
    model = two_norms()
    loss = compiled(model, save="int4")(torch.randn(8, 4)).square().sum()
    first = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [*model.parameters()])
    assert all(map(torch.equal, first, second))


def test_gradients_accumulate():
    model, x = two_norms(), torch.randn(8, 4)
    qmodel = compiled(model, save="int4")
    qmodel(x)
    torch.manual_seed(1)
    singles = [torch.autograd.grad(qmodel(x * k).square().sum(), [*model.parameters()]) for k in (1, 2)]
    torch.manual_seed(1)
    for k in (1, 2):
        qmodel(x * k).square().sum().backward()
    assert all(torch.equal(grad, a + b) for grad, a, b in zip(gradients(model), *singles, strict=True))


def test_two_forwards_before_one_backward():
    model, x = two_norms(), torch.randn(8, 4)
    qmodel = compiled(model, save="int4")
    qmodel(x)
    torch.manual_seed(1)
    singles = [torch.autograd.grad(qmodel(x * k).square().sum(), [*model.parameters()]) for k in (1, 2)]
    torch.manual_seed(1)
    losses = [qmodel(x * k).square().sum() for k in (1, 2)]
    both = [torch.autograd.grad(loss, [*model.parameters()]) for loss in reversed(losses)]
    assert all(map(torch.equal, singles[0], both[1]))
    assert all(map(torch.equal, singles[1], both[0]))


def test_evaluation_mode_saves_codes_for_gradients():
    """Dropout and statistics are off where a model is tuned in evaluation mode; gradients are not."""
    model, x = two_norms(), torch.randn(8, 4)
    expected = model.eval()(x)
    qmodel = compiled(model).eval()
    assert torch.equal(qmodel(x), expected)
    assert "/saved" in str(qmodel.plan(training=False))
    with torch.no_grad():
        assert torch.equal(qmodel.train()(x), expected)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies_keep_save(twin):
    model, x = two_norms(), torch.randn(8, 4)
    qmodel = compiled(model, save="int4")
    qmodel(x).sum().backward()
    other = twin(qmodel)
    other(x).sum().backward()
    assert other.plan().sites == qmodel.plan().sites
    assert "2/saved" in [site.name for site in other.plan().sites]


def test_another_recipe_keeps_save():
    qmodel = compiled(two_norms(), save="int4").use("tensor-int8")
    qmodel(torch.randn(8, 4)).sum().backward()
    assert [site for site in qmodel.plan().sites if site.role is Role.SAVED]


@pytest.mark.parametrize("save", ["int8", "int4"])
def test_bfloat16_of_autocast(save):
    model, x = nn.Sequential(*two_norms(), nn.GELU(), nn.Linear(64, 4)), torch.randn(8, 4)
    results = []
    for word in (None, save):
        torch._dynamo.reset()
        qmodel = compiled(model, "tensor-int8", word)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(qmodel(x))
        results[-1].float().square().sum().backward()
    assert torch.equal(*results)
    assert all(grad.isfinite().all() for grad in gradients(model))


@pytest.mark.parametrize("save", [None, "int8"])
@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8"])
def test_a_weight_that_changes_before_backward_is_an_error(recipe, save):
    model, x = two_norms(), torch.randn(8, 4)
    loss = compiled(model, recipe, save)(x).square().sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(8, 4)
    x[3, 1] = bad
    for save in ("int8", "int4"):
        model = two_norms()
        compiled(model, save=save)(x).square().sum().backward()
        assert model[0].weight.grad.isnan().any()


def test_an_empty_batch():
    model = two_norms()
    output = compiled(model)(torch.randn(0, 4))
    output.sum().backward()
    assert output.shape == (0, 64)
    assert all((grad == 0).all() for grad in gradients(model))
