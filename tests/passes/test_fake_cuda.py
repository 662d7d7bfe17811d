"""Every pipeline over a graph of CUDA, without CUDA: quantizers, the kernels that are chosen, and reasons."""

import collections
import dataclasses

import pytest
import torch
from fake_cuda import CUDA, list_devices, move_to_cuda
from saving_models import Block
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qcompiler import recipes
from qcompiler.compiler import torch_compat
from qcompiler.compiler.pipelines import joint_pipeline, kernel_pipeline
from qcompiler.compiler.rewrite import split_halves
from qcompiler.passes.halves import call_kernels as call_kernels_module
from qcompiler.passes.halves.call_kernels import Tally
from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.lower_integer import Execution
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.edit import copy_graph
from qcompiler.passes.ir.inference import fake_mode
from qcompiler.passes.ir.meta import get_value, iterate_contractions
from qcompiler.passes.ir.quantizer import list_quantizers
from qcompiler.runtime import ops, references
from qcompiler.runtime.kernels import cuda, quantizers

FEW_ROWS = {f"the integer kernel of CUDA needs more than 16 rows, got {rows}" for rows in (8, 10)}
SHORT = {
    f"a scale changes after every {run} elements of a sum; valid: 32 or more, as in hyperblock-int8-wide"
    for run in (2, 4)
}
NEAREST = "a compiled loop rounds to nearest by a known scale as fast"


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Whether Triton is installed is not the question here."""
    for module in (cuda, quantizers):
        monkeypatch.setattr(module, "explain_triton", lambda: "")


@pytest.fixture
def quantized(joint):
    """quantized(name, recipe) → a captured graph on CUDA after the passes over joint graphs."""

    def make(name, recipe):
        if name == "block":
            captured = joint(Block(128, 4, nn.GELU("tanh")), torch.randn(2, 32, 128, requires_grad=True))
        else:
            first, second = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.Conv2d(32, 32, 3, 2, 1)
            layers = (first, nn.BatchNorm2d(32), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
            captured = joint(nn.Sequential(*layers), torch.randn(8, 16, 8, 8, requires_grad=True))
        moved = move_to_cuda(captured)
        joint_pipeline(recipes.get(recipe))(moved.module)
        return moved

    return make


@pytest.fixture
def timed(monkeypatch):
    """Kernels of quantizers are called as if a measurement had said that they are faster."""
    for name, weigh in (("BLOCKS", quantizers._always), ("KNOWN", quantizers._weigh_known)):
        rows = (dataclasses.replace(row, weigh=weigh) for row in getattr(call_kernels_module, name))
        monkeypatch.setattr(call_kernels_module, name, tuple(rows))


def lower(captured, recipe, execution=Execution.INTEGER):
    """The halves, how often each kernel multiplies, and the reasons of all other contractions of codes."""
    halves = split_halves(captured, rules=recipes.get(recipe).rules, execution=execution)
    pairs = [pair for half in halves.graphs for pair in iterate_contractions(half.graph)]
    kernels = collections.Counter(get_argument(n, "kernel") for n, _ in pairs if n.target is ops.MATMUL_CODES)
    return halves, kernels, {fact.simulated for _, fact in pairs if fact.simulated}


def call_kernels(halves):
    """The halves as Inductor gets them, and what was counted."""
    tally, called = Tally(), [copy_graph(half) for half in halves.graphs]
    for half in called:
        kernel_pipeline(tally)(Halves.of_forward(half, 0))
    return called, tally


@pytest.mark.parametrize(
    ("name", "recipe", "sites", "kernels", "reasons"),
    [
        ("net", "tensor-int8", 9, {"int-mm-cuda": 6}, FEW_ROWS),
        ("net", "in-hindsight-w8a8g8", 12, {"int-mm-cuda": 6}, FEW_ROWS),
        ("block", "tensor-int8", 12, {"int-mm-cuda": 12}, set()),
        ("block", "hyperblock-int8-wide", 12, {"triton-runs": 8, "int-mm-cuda": 4}, set()),
        ("block", "hyperblock-int8", 12, {}, SHORT),
    ],
)
def test_products_of_codes(name, recipe, sites, kernels, reasons, quantized):
    captured = quantized(name, recipe)
    assert len(list_quantizers(captured.module.graph)) == sites
    assert list_devices(captured.module) == {"cuda"}
    halves, found, why = lower(captured, recipe)
    assert (found, why) == (kernels, reasons)
    assert set.union(*map(list_devices, halves.graphs)) == {"cuda"}


def test_nothing_is_lowered_for_speed(quantized):
    """Nobody has timed integers there."""
    _, kernels, reasons = lower(quantized("block", "tensor-int8"), "tensor-int8", Execution.AUTO)
    assert not kernels
    assert reasons == {'integers were not timed on CUDA; valid: execution="integer"'}


@pytest.mark.parametrize(
    ("recipe", "calls", "reasons"),
    [
        ("hyperblock-int8", 16, {}),
        ("tensor-int8", 4, {NEAREST: 12}),  # one block is too large for a program; stochastic rounding is called
    ],
)
def test_quantizers(recipe, calls, reasons, quantized, timed):
    halves, _, _ = lower(quantized("block", recipe), recipe, Execution.SIMULATE)
    _, tally = call_kernels(halves)
    assert (tally.called, tally.reasons) == (calls, reasons)


def test_no_kernel_of_a_quantizer_is_called_before_a_measurement(quantized):
    halves, _, _ = lower(quantized("block", "hyperblock-int8"), "hyperblock-int8", Execution.SIMULATE)
    _, tally = call_kernels(halves)
    assert (tally.called, tally.reasons) == (0, {"kernels of quantizers were not timed on CUDA": 16})


@pytest.mark.parametrize("name", ["net", "block"])
def test_what_inductor_gets(name, quantized, timed):
    """References and decompositions make tensors on the device of their inputs."""
    halves, _, _ = lower(quantized(name, "hyperblock-int8"), "hyperblock-int8", Execution.SIMULATE)
    called, _ = call_kernels(halves)
    for half, graph in zip(halves.graphs, called, strict=True):
        inputs = [get_value(node) for node in half.graph.find_nodes(op="placeholder")]
        plain = torch_compat.retrace_graph(graph, inputs, fake_mode(half.graph))
        assert list_devices(plain) == {"cuda"}
        created = [one for node in plain.graph.nodes for one in (*node.args, *node.kwargs.values())]
        assert {one.type for one in created if isinstance(one, torch.device)} <= {"cuda"}
        assert plain.graph.find_nodes(op="call_function", target=ops.QUANTIZE_BLOCKS)


@pytest.mark.parametrize(
    ("spec", "quotients"),
    [("int8:real:b2c8:nearest:pass", 2), ("e2m1:two-level:c16:nearest:pass", 3), ("int8:max:b2c8:nearest:pass", 0)],
)
def test_scales_are_divided_by_tensors(spec, quotients):
    """Away from the CPU torch multiplies by the reciprocal of a number, which has other bits."""
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(8, 16, device=CUDA)
        graph = make_fx(lambda x: references.scale(x, spec, "bc"))(x).graph
    found = [node for node in graph.nodes if node.target is torch.ops.aten.div.Tensor]
    assert len(found) == quotients
    assert all(isinstance(node.args[1], torch.fx.Node) for node in found)
