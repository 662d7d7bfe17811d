"""Nothing trains in float without a word: what the plan lists, what it notes, and what `strict` refuses."""

import copy
import logging
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qcompiler
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec
from qcompiler.session import CAPTURES, NO_GRAPH

pytestmark = pytest.mark.usefixtures("fresh")

INT8 = parse_spec("int8:fit:b4c16o16i16:nearest:pass")
# after a graph break the input is no leaf; Dynamo looks at its .grad, and hides the warning, but not from "error"
non_leaf_input = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def recipe_of(*rules: Rule) -> Recipe:
    return Recipe(name="test", rules=rules)


def broken(models) -> nn.Module:
    """A model that Dynamo captures in two graphs, since Python needs a number between them."""

    def forward(self, x):
        h = self.first(x)
        h = h.relu() if h.sum().item() > -1e9 else h
        return self.second(h)

    return models.Function(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))


def test_sites(models, eager):
    model = models.mlp()
    compiled = eager(model, recipe_of(Rule(spec=INT8)))
    compiled(torch.randn(6, 12)).sum().backward()
    plan = compiled.plan()
    assert {site.name: (site.role, site.layout, site.shape) for site in plan.sites} == {
        "0/input": (Role.ACTIVATION, "bc", (6, 12)),
        "0/weight": (Role.WEIGHT, "oi", (20, 12)),
        "0/grad": (Role.GRADIENT, "bc", (6, 20)),
        "2/input": (Role.ACTIVATION, "bc", (6, 20)),
        "2/weight": (Role.WEIGHT, "oi", (5, 20)),
        "2/grad": (Role.GRADIENT, "bc", (6, 5)),
    }
    readers = {site.name: {*site.consumers} for site in plan.sites}
    assert readers["2/weight"] == {"2 forward", "2 input gradient"}
    assert readers["2/grad"] == {"2 input gradient", "2 weight gradient", "2 bias gradient"}
    assert {site.spec for site in plan.sites} == {INT8}
    assert (plan.kept, plan.notes, plan.placed) == ((), (), 10)
    assert 0 < plan.saved_code_bytes <= plan.saved_bytes


def test_the_bytes_are_those_that_autograd_keeps(models, eager):
    model = models.convolutions()
    compiled = eager(model, recipe_of(Rule(spec=INT8)))
    x = torch.randn(4, 3, 8, 8)
    y = compiled(x)
    own = {t.data_ptr() for t in [*model.parameters(), x]}
    saved = [t for t in y.grad_fn.saved_tensors if t.data_ptr() not in own]
    assert compiled.plan().saved_bytes == sum(t.numel() * t.element_size() for t in saved)


def test_plan_of_each_mode(models, eager):
    """The latest capture of each mode; blocks of eval span one sample."""
    compiled = eager(models.mlp(), recipe_of(Rule(spec=INT8)))
    compiled(torch.randn(6, 12))
    compiled(torch.randn(3, 12))
    with torch.no_grad():
        compiled.eval()(torch.randn(5, 12))
    assert {site.shape[0] for site in compiled.plan().sites if site.role is Role.ACTIVATION} == {3}
    evaluated = compiled.plan(training=False).sites
    assert [site.name for site in evaluated] == ["0/input", "0/weight", "2/input", "2/weight"]
    assert {site.spec.block.batch for site in evaluated} == {1}
    assert "tangent" in compiled.graph_text()
    assert "tangent" not in compiled.graph_text(training=False)


def test_kept_with_its_reason(models, eager):
    rules = (
        Rule(spec=None, module="2", role=Role.GRADIENT, reason="measured"),
        Rule(spec=INT8, module="0"),
        Rule(spec=INT8, role=Role.GRADIENT),
    )
    compiled = eager(models.mlp(), recipe_of(*rules))
    compiled(torch.randn(6, 12))
    reasons = {kept.name: kept.reason for kept in compiled.plan().kept}
    assert reasons == {
        "2/grad": "rule 1: gradient at 2 -> keep in float (measured)",
        "2/input": "no rule of the recipe matches",
        "2/weight": "no rule of the recipe matches",
    }
    assert {site.name for site in compiled.plan().sites} == {"0/input", "0/weight", "0/grad"}
    assert compiled.plan().notes == (f"rule matched nothing: {rules[2]}",)


def test_unused_rules(models, eager):
    typo = Rule(spec=INT8, module="layre1.*")
    compiled = eager(models.mlp(), recipe_of(typo, Rule(spec=INT8)))
    compiled(torch.randn(6, 12))
    assert compiled.plan().notes == (f"rule matched nothing: {typo}",)


def test_printed_plan(models, eager):
    model = models.CausalLanguageModel()
    compiled = eager(model, recipe_of(Rule(spec=INT8)))
    compiled(torch.randint(0, 32, (2, 5)))
    text = str(compiled.plan())
    assert "mlp.0/weight" in text
    assert "fused attention: its two products are inside one kernel" in text
    assert "before deduplication" in text


@non_leaf_input
@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8"])
def test_graph_break(models, eager, recipe):
    """Both graphs train, and the plan says that there are two."""
    model = broken(models)
    compiled = eager(model, recipe)
    x = torch.randn(6, 4)
    compiled(x).sin().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    notes = [note for note in compiled.plan().notes if "rule matched nothing" not in note]
    assert len(notes) == 1
    assert notes[0].startswith("graph break: Unsupported Tensor.item() call")
    model.zero_grad()
    model(x).sin().sum().backward()
    if recipe == "identity":
        assert all(torch.equal(g, p.grad) for g, p in zip(found, model.parameters(), strict=True))
    else:
        assert all(g.count_nonzero() for g in found)
        assert {site.name.partition("/")[0] for site in compiled.plan().sites} == {"first", "second"}


@non_leaf_input
def test_notes_belong_to_their_mode(models, eager):
    compiled = eager(broken(models))
    compiled(torch.randn(6, 4))
    with pytest.raises(qcompiler.CompileError, match=r"call the model once in eval\(\) mode"):
        compiled.plan(training=False)


@non_leaf_input
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_are_not_silent(models, eager, caplog, kind):
    """Dynamo gives up the function that calls one: that layer is in float, which is logged and in the plan."""
    model = models.Function(
        lambda self, x: self.head(self.rnn(x)[0]), rnn=getattr(nn, kind)(4, 4), head=nn.Linear(4, 2)
    )
    compiled, x = eager(model, "hyperblock-int8"), torch.randn(3, 2, 4)
    compiled(x).sum().backward()
    plan = compiled.plan()
    assert {site.name for site in plan.sites} == {"head/input", "head/weight", "head/grad"}
    assert {kept.consumer for kept in plan.kept} == {"rnn"}
    assert any("LSTM" in note for note in plan.notes)
    assert caplog.text.count("left in float: rnn: runs outside of the captured graphs") == 1
    compiled(x)
    assert caplog.text.count("left in float") == 1


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_model_in_float_is_not_silent(eager, caplog, kind):
    """Nothing of it is captured: a line for the first call, the second, the fourth …"""
    model = getattr(nn, kind)(4, 4)
    compiled, x = eager(model, "hyperblock-int8"), torch.randn(3, 2, 4)
    with caplog.at_level(logging.WARNING, logger="qcompiler"):
        for _ in range(3):
            assert torch.equal(compiled(x)[0], model(x)[0])
    logged = [record.message for record in caplog.records if record.name == "qcompiler"]
    assert logged == [f"{kind}: {NO_GRAPH}"] * 2
    assert compiled.plan().sites == ()
    assert compiled.plan().notes[-1] == NO_GRAPH
    assert {kept.consumer for kept in compiled.plan().kept} == {"(root)"}


class Lit(nn.Module):
    """A model that trains through a method of its own, of which its base class has a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())

    def loss(self, x):
        return self(x).square().mean()


class Trained(Lit):
    """Calls its base class, which calls the model."""

    def loss(self, x):
        return super().loss(x) + 0 * self(x).sum()


def test_methods_of_the_model_are_quantized_too(eager):
    torch.manual_seed(0)
    model, x = Trained(), torch.randn(8, 16)
    compiled = eager(model, "tensor-int4", strict=True)
    expected = compiled(x).square().mean()
    assert torch.equal(compiled.loss(x), expected)
    assert not torch.equal(model.loss(x), expected)  # the plain model stays plain
    assert "forward" not in model.__dict__
    compiled.loss(x).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(AttributeError, match="no attribute 'los'"):
        compiled.los(x)


def test_a_method_that_raises_leaves_the_model_as_it_was(eager):
    model = Trained()
    compiled = eager(model, "tensor-int4")
    with pytest.raises(RuntimeError, match=r"8, 15|8x15"):
        compiled.loss(torch.randn(8, 15))
    assert "forward" not in model.__dict__


def test_hooks_that_come_later_are_seen(models, eager):
    model, x, seen = models.mlp(), torch.randn(6, 12), []
    compiled = eager(model, "identity")
    compiled(x)
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(1))
    compiled(x)
    assert seen == [1]
    handle.remove()
    compiled(x)
    assert seen == [1]


@pytest.mark.parametrize("first", [False, True], ids=["between", "first"])
@pytest.mark.parametrize("context", ["vmap", "flop counter", "exception"])
def test_one_call_in_float_is_one_call(models, eager, caplog, context, first):
    """Dynamo gives a function up for good after such a call; here the next call is quantized again."""

    def forward(self, x):
        if x.shape[-1] != 4:
            raise ValueError("4 features are needed")
        return self.second(self.first(x).relu())

    model = models.Function(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    compiled, x = eager(model, "tensor-int4"), torch.randn(6, 4)
    quantized = eager(copy.deepcopy(model), "tensor-int4")(x)
    if not first:
        assert torch.equal(compiled(x), quantized)
    with caplog.at_level(logging.WARNING, logger="qcompiler"):
        if context == "vmap":
            torch.func.vmap(compiled)(x)
        elif context == "flop counter":
            with FlopCounterMode(display=False):
                compiled(x)
        else:
            with pytest.raises(ValueError, match="4 features"):
                compiled(torch.randn(6, 5))
    assert (NO_GRAPH in caplog.text) == (context != "exception")
    assert torch.equal(compiled(x), quantized)
    assert not torch.equal(quantized, model(x))


def test_dynamo_switched_off_is_not_silent(models, eager, caplog):
    compiled = eager(models.mlp(), "hyperblock-int8")
    with torch.compiler.set_stance("force_eager"), caplog.at_level(logging.WARNING, logger="qcompiler"):
        compiled(torch.randn(6, 12))
    assert NO_GRAPH in caplog.text


def test_too_many_signatures(models, eager, monkeypatch):
    """An error, where Dynamo alone would go on in float."""
    monkeypatch.setattr(sys.modules["qcompiler.session"], "CAPTURES", 3)  # qcompiler.compile itself is the function
    compiled = eager(models.mlp(), "hyperblock-int8")
    for size in (1, 2, 3):
        compiled(torch.randn(size, 12))
    with pytest.raises(qcompiler.CompileError, match=r"^more than 3 captures: each new shape, dtype or Python value"):
        compiled(torch.randn(4, 12))
    assert CAPTURES >= 32


def strict_error(eager, model: nn.Module, recipe: str | Recipe, *inputs: torch.Tensor) -> str:
    with pytest.raises(qcompiler.CompileError) as caught:
        eager(model, recipe, strict=True)(*inputs)
    return str(caught.value)


def test_strict_accepts_what_is_quantized_whole(models, eager):
    compiled = eager(models.resnet20(), recipe_of(Rule(spec=INT8)), strict=True)
    compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    assert compiled.plan().kept == ()


def test_strict_refuses_an_operand_in_float(models, eager):
    message = strict_error(eager, models.mlp(), recipe_of(Rule(spec=INT8, module="0")), torch.randn(6, 12))
    assert message.startswith("strict: left in float: 2/input in 2 forward: no rule of the recipe matches; ")


def test_strict_accepts_what_a_rule_keeps(models, eager):
    recipe = recipe_of(Rule(spec=None, module="0"), Rule(spec=INT8))
    compiled = eager(models.mlp(), recipe, strict=True)
    compiled(torch.randn(6, 12))
    assert {kept.name for kept in compiled.plan().kept} >= {"0/input", "0/weight"}
    assert all(kept.asked for kept in compiled.plan().kept)


def test_strict_accepts_identity(models, eager):
    eager(models.mlp(), "identity", strict=True)(torch.randn(6, 12))


def test_strict_refuses_a_block_that_is_legal_nowhere(models, eager):
    spec = parse_spec("int8:fit:each:nearest:pass")
    message = strict_error(eager, models.mlp(), recipe_of(Rule(spec=spec)), torch.randn(6, 12))
    assert "0/input in 0 forward: block each has edge 1 along the summed axis 'c', turned or not" in message


def test_strict_refuses_fused_attention(models, eager):
    ids = torch.randint(0, 32, (2, 5))
    message = strict_error(eager, models.CausalLanguageModel(), recipe_of(Rule(spec=INT8)), ids)
    assert "fused attention: its two products are inside one kernel" in message


def test_strict_refuses_a_graph_break(models, eager):
    model = models.Function(lambda self, x: self.layer(x) * x.sum().tolist(), layer=nn.Linear(4, 4))
    assert strict_error(eager, model, "hyperblock-int8", torch.randn(3, 4)).startswith("strict: graph break: ")
    assert strict_error(eager, broken(models), "hyperblock-int8", torch.randn(3, 4)).startswith("strict: graph break: ")


def test_strict_refuses_recurrent_layers(models, eager):
    message = strict_error(eager, nn.LSTM(4, 4), "hyperblock-int8", torch.randn(3, 2, 4))
    assert message.startswith("strict: graph break: ")  # torch 2.15 has other words for it than 2.13


def test_strict_refuses_no_graph(models, eager):
    with torch.compiler.set_stance("force_eager"):
        message = strict_error(eager, models.mlp(), "hyperblock-int8", torch.randn(6, 12))
    assert message.startswith("strict: left in float: aten.addmm.default in 0: runs outside of the captured graphs")


def test_failed_inductor_is_noted(models, monkeypatch, caplog):
    """backend=None runs eagerly then, and says so; backend="inductor" and strict raise."""

    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\non this machine")

    monkeypatch.setattr("qcompiler.compiler.torch_compat.compile_inductor", fail)
    model, x = models.mlp(), torch.randn(6, 12)
    compiled = qcompiler.compile(model, "hyperblock-int8")
    compiled(x).sum().backward()
    reason = "Inductor failed: RuntimeError: no compiler"
    assert compiled.plan().notes == tuple(f"{half} runs eagerly, {reason}" for half in ("forward", "backward"))
    assert reason in caplog.text
    assert model[0].weight.grad.count_nonzero()
    for options in ({"backend": "inductor"}, {"strict": True}):
        with pytest.raises(RuntimeError, match="no compiler"):
            qcompiler.compile(model, "hyperblock-int8", **options)(x)
