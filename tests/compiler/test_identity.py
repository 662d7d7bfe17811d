"""The identity recipe changes no bit: what differs from plain PyTorch here is a bug of the compiler, not rounding."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler

pytestmark = pytest.mark.usefixtures("fresh")


def make(case: Any, *, needs_grad: bool = True) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and the inputs of a case; called twice it makes equal twins."""
    torch.manual_seed(0)
    model, inputs = case.build(), case.inputs()
    return model, tuple(x.requires_grad_(needs_grad and x.is_floating_point()) for x in inputs)


def leaves(outputs: Any) -> list[Tensor]:
    """The tensors in the outputs of a model."""
    return [*outputs.values()] if isinstance(outputs, dict) else [*outputs] if isinstance(outputs, tuple) else [outputs]


def train(call: Callable[..., Any], model: nn.Module, inputs: tuple[Tensor, ...], loss: Any, steps: int) -> list[Any]:
    """Steps of SGD through `call`; all outputs, gradients and buffers, in one order."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    for step in range(steps):
        torch.manual_seed(step)
        model.zero_grad()
        for x in inputs:
            x.grad = None
        outputs = call(*inputs)
        loss(outputs).backward()
        seen += [*leaves(outputs), *(t.grad for t in (*inputs, *model.parameters())), *model.buffers()]
        seen = [t.detach().clone() if isinstance(t, Tensor) else t for t in seen]
        optimizer.step()
    return seen


def same(left: list[Any], right: list[Any]) -> list[int]:
    """Where the two lists differ: None against a tensor, dtype, shape or any bit (−0 is not 0)."""
    assert len(left) == len(right)
    return [i for i, (x, y) in enumerate(zip(left, right, strict=True)) if not _equal(x, y)]


def _equal(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    bits = [
        t.detach().contiguous().view(torch.uint8) if t.ndim else t.detach().reshape(1).view(torch.uint8) for t in (x, y)
    ]
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(*bits)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_two_steps(case, eager, mode):
    model, inputs = make(case)
    twin, twin_inputs = make(case)
    model.train(mode)
    compiled = eager(twin).train(mode)
    expected = train(model, model, inputs, case.loss, steps=2)
    assert same(train(compiled, twin, twin_inputs, case.loss, steps=2), expected) == []
    assert any(t is not None and t.count_nonzero() for t in expected)
    assert same([*twin.state_dict().values()], [*model.state_dict().values()]) == []


def test_no_grad(case, eager):
    model, inputs = make(case, needs_grad=False)
    compiled = eager(copy.deepcopy(model).eval())
    model.eval()
    with torch.no_grad():
        expected, outputs = leaves(model(*inputs)), leaves(compiled(*inputs))
    assert same(outputs, expected) == []
    assert not any(t.requires_grad for t in outputs)


def test_gradients_of_inputs_that_need_none(models, eager):
    for name in ("cnn", "two-inputs"):
        case = models.CASES[name]
        model, inputs = make(case, needs_grad=False)
        twin, _ = make(case, needs_grad=False)
        inputs[-1].requires_grad_(name == "two-inputs")
        twin_inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        expected = train(model, model, inputs, case.loss, steps=1)
        assert same(train(eager(twin), twin, twin_inputs, case.loss, steps=1), expected) == []


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("dict-outputs", {"unused.weight", "unused.bias"}),
        ("unused-parameter", {"extra", "spare.weight", "spare.bias"}),
        ("frozen", {"0.weight", "0.bias"}),
    ],
)
def test_what_the_loss_does_not_reach_has_no_gradient(models, eager, name, missing):
    model, inputs = make(models.CASES[name])
    models.CASES[name].loss(eager(model)(*inputs)).backward()
    assert {key for key, parameter in model.named_parameters() if parameter.grad is None} == missing


def test_running_statistics_move_once_a_step(models, eager):
    model, inputs = make(models.CASES["resnet20"])
    compiled = eager(model)
    for _ in range(3):
        models.total(compiled(*inputs)).backward()
    assert [b.item() for name, b in model.named_buffers() if name.endswith("num_batches_tracked")] == [3] * 19


def test_memory_format(models, eager):
    case = models.CASES["cnn"]
    runs = []
    for wrap in (lambda model: model, eager):
        model, inputs = make(case, needs_grad=False)
        model.to(memory_format=torch.channels_last)
        inputs = tuple(x.to(memory_format=torch.channels_last).requires_grad_() for x in inputs)
        runs.append(train(wrap(model), model, inputs, case.loss, steps=1))
    assert same(*runs) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(models, eager, dtype):
    case = models.CASES["cnn"]
    runs = []
    for wrap in (lambda model: model, eager):
        model, inputs = make(case, needs_grad=False)
        inputs = tuple(x.to(dtype).requires_grad_() for x in inputs)
        runs.append(train(wrap(model.to(dtype)), model, inputs, case.loss, steps=2))
    assert same(*runs) == []
    assert runs[0][0].dtype is dtype


def test_autocast(models, eager):
    case = models.CASES["cnn"]
    runs = []
    for wrap in (lambda model: model, eager):
        model, inputs = make(case)
        call = torch.autocast("cpu", torch.bfloat16)(wrap(model).__call__)
        runs.append(train(call, model, inputs, case.loss, steps=2))
    assert same(*runs) == []
    assert runs[0][0].dtype is torch.bfloat16


def test_inductor(models):
    """Compiled code keeps within four times PyTorch's own spread, on one small model; on all of them with --full."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    assert_inductor_is_close(models.Case(lambda: copy.deepcopy(model), models.images(2, 3, 6, 6)))


@pytest.mark.full
def test_inductor_on_every_model(case):
    assert_inductor_is_close(case)


def assert_inductor_is_close(case: Any) -> None:
    """The identity recipe under Inductor is as near to float64 as PyTorch itself, eager or compiled.

    Every order of summation draws other rounding errors (and in a deep network a few signs at relu). The largest
    relative error of plain PyTorch, eager and torch.compile, over outputs, gradients and buffers measures such draws;
    four times that bounds the largest of a third sample, plus four units in the last place.
    """
    (exact, xs), (plain, ys), (fast, vs), (model, zs) = (make(case) for _ in range(4))
    exact = exact.double()
    doubles = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in xs)
    truth = train(exact, exact, doubles, case.loss, steps=1)
    draws = train(plain, plain, ys, case.loss, steps=1)
    with torch._inductor.config.patch(fallback_random=True):  # dropout masks as in eager
        draws += train(torch.compile(fast, dynamic=False), fast, vs, case.loss, steps=1)
    compiled = qcompiler.compile(model, "identity", backend="inductor")
    found = train(compiled, model, zs, case.loss, steps=1)
    spread = max(distance(value, true) for value, true in zip(draws, truth * 2, strict=True))
    bound = 4 * spread + 4 * torch.finfo(torch.float32).eps
    assert max(distance(value, true) for value, true in zip(found, truth, strict=True)) <= bound
    assert compiled.plan().notes == ()


def distance(value: Tensor | None, truth: Tensor | None) -> float:
    """max |value − truth| / max |truth|; infinite where only one of them is there."""
    if value is None or truth is None:
        return 0.0 if value is truth else float("inf")
    if not truth.numel():
        return 0.0
    largest = truth.double().abs().max().item()
    return (value.double() - truth.double()).abs().max().item() / (largest or 1.0)
