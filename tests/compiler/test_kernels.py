"""Compiled steps call kernels for quantizers; results, plan, graph and saved bytes are those of the eager step."""

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import recipes
from qcompiler.compiler import graph_compiler
from qcompiler.runtime.kernels import repeat

pytestmark = pytest.mark.usefixtures("fresh")


def train(recipe, backend):
    """Return the model after two steps, and the results and gradients of both."""
    torch.manual_seed(0)
    sizes = ((40, 24), (24, 72), (72, 10))  # without biases, whose gradients compiled code sums in another order
    model = nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(*size, bias=False), nn.ReLU())))
    compiled = qcompiler.compile(model, recipe, backend=backend)
    x, results = torch.randn(9, 40, requires_grad=True), []
    for _ in range(2):
        output = compiled(x)
        output.square().sum().backward()
        results += [output.detach(), *(p.grad.clone() for p in (x, *compiled.parameters()))]
    return compiled, results


@pytest.mark.parametrize(
    ("recipe", "calls"), [("hyperblock-int8", 12), ("hyperblock-int4", 12), ("in-hindsight-w8a8g8", 15)]
)
def test_compiled_steps_are_the_eager_ones(recipe, calls):
    eager, expected = train(recipe, "eager")
    torch._dynamo.reset()
    compiled, found = train(recipe, "inductor")
    assert all(map(torch.equal, found, expected))
    assert compiled.graph_text() == eager.graph_text()
    plan, other = compiled.plan(), eager.plan()
    assert (plan.sites, plan.saved_bytes, plan.saved_code_bytes) == (
        other.sites,
        other.saved_bytes,
        other.saved_code_bytes,
    )
    assert (other.in_kernels, other.in_loops) == (0, ())
    assert plan.in_kernels == calls
    assert f"compiled quantizers: {calls} in kernels of their own" in str(plan)
    assert "compiled quantizers" not in str(other)


LINEAR, CONVOLUTION = nn.Linear(32, 32), nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("model", "backend", "execution", "names"),
    [
        (LINEAR, None, "simulate", ("quantize_whole",)),
        (LINEAR, "inductor", "auto", ("quantize_whole",)),
        (LINEAR, "eager", "auto", None),
        (CONVOLUTION, "eager", "simulate", None),
        (CONVOLUTION, "eager", "integer", ("convolve", "convolve_gradient")),
        (CONVOLUTION, None, "auto", ("quantize_whole", "convolve", "convolve_gradient")),
        (nn.Conv2d(3, 4, 3, device="meta"), None, "auto", None),
        (nn.ReLU(), None, "auto", None),
    ],
)
def test_libraries_are_compiled_while_the_model_is_traced(model, backend, execution, names, monkeypatch):
    started = []
    monkeypatch.setattr(graph_compiler, "start_loading", lambda *given, **options: started.append((given, options)))
    compiler = graph_compiler.GraphCompiler(recipes.get("tensor-int8"), backend, execution=execution)
    with compiler.calling(model, (), {}):
        options = {"inductor": backend != "eager", "then": repeat.load}
        assert started == ([] if names is None else [(names, options)])


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("tensor-int8", ("quantize_whole", "multiply_whole")),
        ("hyperblock-int8", ("quantize_blocks",)),
        ("hyperblock-int8-wide", ("quantize_blocks", "multiply_runs")),
        ("in-hindsight-w8a8g8", ("quantize_whole", "multiply_whole")),
        ("int4-large-hindsight", ("quantize_blocks", "quantize_whole", "multiply_whole")),
    ],
)
def test_libraries_follow_the_recipe(recipe, names, monkeypatch):
    """Of linear layers: long blocks have runs, sums with one scale are scaled whole, and small codes are packed."""
    started = []
    monkeypatch.setattr(graph_compiler, "start_loading", lambda *given, **_: started.append(given))
    compiler = graph_compiler.GraphCompiler(recipes.get(recipe), "inductor", execution="auto")
    with compiler.calling(LINEAR, (), {}):
        assert started == [names]
