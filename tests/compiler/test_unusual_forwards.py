"""What a forward may do besides computing: draw from NumPy, start threads, make nested tensors, ask for gradients."""

import concurrent.futures
import threading

import numpy as np
import pytest
import torch
from torch import nn

import qcompiler

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning"),
]


def network(models, forward) -> nn.Module:
    return models.Function(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 4))


def line_of(forward) -> str:
    return f"{__file__}:{forward.__code__.co_firstlineno + 1}"


def test_numpy_draws_its_own_numbers(models, eager):
    def forward(self, x):
        return self.b(self.a(x) * torch.from_numpy(np.random.rand(8)).float())

    model, x, results = network(models, forward), torch.randn(3, 8), []
    compiled = eager(model)
    for call in (model, compiled, compiled):
        np.random.seed(0)
        results.append(call(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert any("numpy.random" in note for note in compiled.plan().notes)
    with pytest.raises(qcompiler.CompileError, match=r"strict: graph break: .*numpy.random"):
        eager(model, "hyperblock-int8", strict=True)(x)


@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8"])
def test_a_model_on_the_meta_device(models, eager, recipe):
    """Shapes without numbers: autocast knows no such device."""
    with torch.device("meta"):
        model, x = network(models, lambda self, x: self.b(self.a(x).relu())), torch.randn(3, 8)
    y = eager(model, recipe)(x)
    y.sum().backward()
    assert (y.device.type, y.shape, model.a.weight.grad.shape) == ("meta", (3, 4), (8, 8))
    with pytest.raises(
        qcompiler.CompileError, match=r"keeps ranges, .* got tensors on the meta device; valid: another"
    ):
        eager(model, "in-hindsight-w8a8g8")(x)


def nested(self, x):
    n = torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)
    return self.b(self.a(n)).values()


def test_nested_tensors_are_left_in_float(models, eager, caplog):
    model, x = network(models, nested), torch.randn(6, 8)
    compiled = eager(model, "hyperblock-int8")
    assert torch.equal(compiled(x), model(x))
    note = f"a graph with nested tensors is left in float: nested_tensor at {line_of(nested)}"
    assert note in compiled.plan().notes
    assert note in caplog.text
    assert {kept.consumer for kept in compiled.plan().kept} == {"a", "b"}
    with pytest.raises(qcompiler.CompileError, match="strict: a graph with nested tensors is left in float"):
        eager(model, "hyperblock-int8", strict=True)(x)


def masked(self, x):
    h = self.a(x)[x.sum(1) > 0]
    return self.b(h)


def listed(self, x):
    return torch.stack([(self.a if flag else self.b)(r) for flag, r in zip((x.sum(1) > 0).tolist(), x, strict=True)])


def cut(self, x):
    return self.b(x[: int(x.argmax().item()) % 2 + 1])


def scaled(self, x):
    return self.b(x * x.max().item())


@pytest.mark.parametrize("forward", [masked, listed, cut, scaled])
def test_strict_names_the_line_of_what_depends_on_data(models, eager, forward):
    with pytest.raises(qcompiler.CompileError, match=r"^strict: graph break: ") as caught:
        eager(network(models, forward), "hyperblock-int8", strict=True)(torch.randn(6, 8))
    assert line_of(forward) in str(caught.value)


def marked(self, x):
    return self.b(self.a(x))


def test_a_free_size_is_named(models, eager):
    x = torch.randn(6, 8)
    torch._dynamo.mark_dynamic(x, 0)
    with pytest.raises(
        qcompiler.CaptureError, match=r"a size of a tensor is no number: L\['inputs'\].*without mark_dynamic"
    ):
        eager(network(models, marked), "hyperblock-int8")(x)


POOL = concurrent.futures.ThreadPoolExecutor(1)


def in_thread(function, x):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(x)))
    thread.start()
    thread.join()
    return results[0]


def in_new_pool(function, x):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function, x).result()


def in_old_pool(function, x):
    return POOL.submit(function, x).result()


@pytest.mark.parametrize("run", [in_thread, in_new_pool, in_old_pool])
def test_a_layer_in_a_thread_is_in_the_plan(models, eager, caplog, run):
    in_old_pool(abs, 1)  # its thread is there before the model
    before = threading.Thread.start
    compiled = eager(network(models, lambda self, x: run(self.b, self.a(x))), "hyperblock-int8")
    compiled(torch.randn(3, 8)).sum().backward()
    (kept,) = compiled.plan().kept
    assert kept.consumer == "b"
    assert kept.reason.startswith("runs outside of the captured graphs")
    assert "left in float: b" in caplog.text
    assert {site.name.partition("/")[0] for site in compiled.plan().sites} == {"a"}
    assert threading.Thread.start is before


def test_gradients_inside_of_forward(models, eager):
    """The notes are about the model: Dynamo does not look into the steps that run there."""

    def forward(self, x):
        y = self.a(x.detach().requires_grad_()).square().sum()
        return self.b(x) + torch.autograd.grad(y, self.a.weight)[0].sum()

    model, x = network(models, forward), torch.randn(3, 8)
    compiled = eager(model)
    assert torch.equal(compiled(x), model(x))
    notes = compiled.plan().notes
    assert any("torch.autograd.grad" in note for note in notes)
    assert not any(word in note for note in notes for word in ("autocast", "GraphModule", "Interpreter"))
