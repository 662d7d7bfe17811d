"""Steps that are made of kept graphs: as if captured, in every bit, and captured anew as soon as anything differs."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import RECIPES, Recipe, Rule, recipes
from qcompiler.compiler import torch_compat
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.rules import Position

pytestmark = pytest.mark.usefixtures("fresh", "kept")


class Broken(nn.Module):
    """Two graphs, and a layer in both."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.last(self.first(x).relu())


class Blocks(nn.Module):
    """One function with two graphs, called twice: the names in a graph depend on the graphs before it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Broken() for _ in range(2))

    def forward(self, x):
        return sum(block(x) for block in self.blocks)


def train(model, case, recipe, steps=2, **options):
    """All that can be seen of two steps: outputs, gradients, ranges, the plan and the text of each stage."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    inputs = case.inputs()
    qmodel = qcompiler.compile(copy.deepcopy(model), recipe, **options)
    seen = []
    for _ in range(steps):
        loss = case.loss(qmodel(*inputs))
        loss.backward()
        seen.append(loss.detach())
    seen += [parameter.grad for parameter in qmodel.parameters()]
    for parameter in qmodel.parameters():
        parameter.grad = None
    qmodel.eval()
    with torch.no_grad():
        seen.append(case.loss(qmodel(*inputs)))
    qmodel.train()
    stages = [(stage.name, graph_text(stage.graph)) for stages in qmodel.stages() for stage in stages]
    return seen, *(str(qmodel.plan(training=mode)) for mode in (True, False)), stages, [*qmodel.state_dict()]


def refuse(*args):
    raise AssertionError("captured anew")


def count_captures(monkeypatch):
    captures, export = [], torch_compat.export_joint

    def count(*args):
        captures.append(1)
        return export(*args)

    monkeypatch.setattr(torch_compat, "export_joint", count)
    return captures


def assert_same(first, second):
    for a, b in zip(first[0], second[0], strict=True):
        assert a is b is None or torch.equal(a, b)
    assert first[1:] == second[1:]


@pytest.mark.sample(1)
def test_every_model_runs_from_kept_graphs(case, kept, monkeypatch):
    model = case.build()
    made = train(model, case, "hyperblock-int4", backend="eager")
    assert len(list(kept.iterdir())) == 4  # the capture and the halves, of training and of evaluation
    monkeypatch.setattr(torch_compat, "export_joint", refuse)
    assert_same(made, train(model, case, "hyperblock-int4", backend="eager"))


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("cnn", "in-hindsight-w8a8g8", {"execution": "auto"}),
        ("vit", "hyperblock-int8", {"save": "int4"}),
        ("dropout", "tensor-int8", {}),
        ("tied", "lsq-w4a4", {}),
    ],
)
@pytest.mark.sample(1)
def test_compiled_steps_run_from_kept_graphs(name, recipe, options, models, monkeypatch):
    case = models.CASES[name]
    model = case.build()
    made = train(model, case, recipe, backend="inductor", **options)
    for function in ("export_joint", "retrace_graph"):
        monkeypatch.setattr(torch_compat, function, refuse)
    assert_same(made, train(model, case, recipe, backend="inductor", **options))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("model", [Broken, Blocks])
@pytest.mark.sample(1)
def test_graphs_of_parts_are_kept(model, models, monkeypatch):
    case, recipe = dataclasses.replace(models.CASES["mlp"], inputs=lambda: (torch.randn(4, 6),)), placed()
    built = model()
    made = train(built, case, recipe, backend="eager")
    monkeypatch.setattr(torch_compat, "export_joint", refuse)
    assert_same(made, train(built, case, recipe, backend="eager"))


def placed():
    """The first and the last contraction of the whole model stay in float: what holds depends on the other graphs."""
    keep = tuple(Rule(spec=None, position=end) for end in (Position.FIRST, Position.LAST))
    return Recipe(name="placed", rules=(*keep, *RECIPES["hyperblock-int8"].rules))


def change_recipe(model, x):
    return model, x, {"recipe": "hyperblock-int8"}


def change_width(model, x):
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)), x, {}


def change_batch(model, x):
    return model, x[:3], {}


def change_strides(model, x):
    return model, x.t().contiguous().t(), {}


def change_type(model, x):
    return model.double(), x.double(), {}


def freeze_weight(model, x):
    model[0].weight.requires_grad_(False)
    return model, x, {}


def need_input_gradient(model, x):
    return model, x.requires_grad_(), {}


def change_layer(model, x):
    model[1] = nn.GELU()
    return model, x, {}


def change_number(model, x):
    model[1] = nn.LeakyReLU(0.1)
    return model, x, {}


def change_execution(model, x):
    return model, x, {"execution": "auto"}


def save_codes(model, x):
    return model, x, {"save": "int8"}


def share_memory(model, x):
    return model, model[0].weight.detach()[:4], {}


CHANGES = [
    *(change_recipe, change_width, change_batch, change_strides, change_type, freeze_weight, need_input_gradient),
    *(change_layer, change_number, change_execution, save_codes, share_memory),
]


@pytest.mark.parametrize("change", CHANGES)
def test_anything_that_differs_is_made_anew(change, kept):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    run_once(model, x)
    before = set(kept.iterdir())
    assert len(before) == 2
    run_once(model, x)
    assert set(kept.iterdir()) == before
    model, x, options = change(model, x)
    run_once(model, x, **options)
    assert (set(kept.iterdir()) > before) == (change is not share_memory)  # of shared memory nothing is kept


def run_once(model, x, recipe="hyperblock-int4", **options):
    torch._dynamo.reset()
    qcompiler.compile(model, recipe, backend="eager", **options)(x).sum().backward()


def test_switches_of_torch_are_part_of_a_key(kept, monkeypatch):
    captures = count_captures(monkeypatch)
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    run_once(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        run_once(model, x)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        run_once(model, x)
    assert len(captures) == 3
    run_once(model, x)
    assert len(captures) == 3


def test_a_strict_module_refuses_kept_floats_too(kept):
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    recipe = recipes.get("hyperblock-int8")
    rules = tuple(rule for rule in recipe.rules if rule.role is not qcompiler.Role.WEIGHT)
    assert len(rules) < len(recipe.rules)
    partial = Recipe(name="partial", rules=rules)
    run_once(model, x, partial)
    for _ in range(2):
        with pytest.raises(qcompiler.CompileError, match="strict: left in float"):
            run_once(model, x, partial, strict=True)


class Net(nn.Linear):
    """A model whose forward is its own."""

    def forward(self, x):
        return super().forward(x).relu()


def test_the_log_names_the_model_and_the_recipe(kept, caplog):
    line = Net.forward.__code__.co_firstlineno
    with caplog.at_level("INFO", logger="qcompiler"):
        run_once(Net(6, 3), torch.randn(4, 6))
        run_once(nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6))
    texts = [record.getMessage() for record in caplog.records if "made anew, and kept" in record.getMessage()]
    first, second, third, fourth = texts
    assert first.startswith(f"capture of forward of Net at {__file__}:{line}: made anew, and kept as {kept}/")
    assert second.startswith(f"halves for hyperblock-int4 of forward of Net at {__file__}:{line}: ")
    assert " of Sequential at " in third
    assert " of Sequential at " in fourth


def test_custom_gradients_are_captured_anew(kept, caplog):
    """The code of an autograd function is not part of the graph of Dynamo in every version of torch."""
    model, x = WithOperator(), torch.randn(4, 6)
    with caplog.at_level("INFO", logger="qcompiler"):
        run_once(model, x)
    assert not kept.exists()
    assert "not kept for the next process: operator cache_test.double.default, which is not torch's own" in caplog.text


@torch.library.custom_op("cache_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


double.register_fake(torch.empty_like)
double.register_autograd(lambda context, grad: 2 * grad)


class WithOperator(nn.Module):
    """A layer and an operator of the user, whose gradient is Python."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return double(self.layer(x))


SCRIPT = """
import sys, torch, qcompiler
from torch import nn
from qcompiler.compiler import torch_compat
if sys.argv[1] == "second":
    def refuse(*args): raise AssertionError("captured anew")
    torch_compat.export_joint = torch_compat.split_joint = refuse
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
    def forward(self, x):
        return self.b(self.a(x).relu())
qmodel = qcompiler.compile(Model(), "hyperblock-int4", backend="eager")
loss = qmodel(torch.randn(4, 6)).square().sum()
loss.backward()
print(loss.item().hex(), sum(p.grad.sum() for p in qmodel.parameters()).item().hex())
"""


def test_a_second_process_captures_nothing(tmp_path):
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "random"}
    printed = [
        subprocess.run([sys.executable, "-c", SCRIPT, which], env=variables, capture_output=True, text=True, check=True)
        for which in ("first", "second")
    ]
    assert printed[0].stdout == printed[1].stdout != ""
    assert len(list(Path(tmp_path, "qcompiler").iterdir())) == 2
