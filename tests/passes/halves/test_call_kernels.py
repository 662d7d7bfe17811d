"""Kernels of our own in place of scale, quantize and dequantize."""

import operator

import pytest
import torch
from torch import nn

from qcompiler import recipes
from qcompiler.passes.halves import call_kernels
from qcompiler.passes.halves.call_kernels import CallKernels
from qcompiler.passes.halves.stack_ranges import StackRanges
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.recipes.saving import add_saving
from qcompiler.runtime import ops
from qcompiler.runtime.kernels import quantizers

PLAIN = (ops.SCALE, ops.QUANTIZE, ops.DEQUANTIZE)


@pytest.fixture(autouse=True)
def quick_loops(monkeypatch):
    """Golden graphs are those of a processor with AVX-512, wherever the tests run."""
    monkeypatch.setattr(call_kernels, "has_quick_loops", lambda: True)


def leaf():
    return torch.randn(4, 8, requires_grad=True)


def network():
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))


def count(halves, targets):
    return sum(node.target in targets for half in halves.graphs for node in half.graph.nodes)


def test_golden_kernels(compiled_halves, settle_compiled, text, golden):
    halves = compiled_halves("hyperblock-int8", nn.Linear(8, 4, bias=False), leaf())
    before = text(halves)
    assert settle_compiled(halves, CallKernels()) > 0
    assert count(halves, PLAIN) == 0
    golden(before=before, after=text(halves))


def test_codes_of_bfloat16_are_packed(compiled_halves, run_halves, same_bits):
    halves = [saved_in_4_bits(compiled_halves, 4, torch.bfloat16) for _ in range(2)]
    assert CallKernels()(halves[1]) > 0
    assert count_at_once(halves[1]) == count(halves[1], (ops.PACK_CODES,)) == 1
    assert same_bits(*map(run_halves, halves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["hyperblock-int8", "hyperblock-int4", "tensor-int8", "channelwise-int4"])
def test_no_bit_changes(recipe, dtype, compiled_halves, run_halves, same_bits):
    x = leaf().detach().to(dtype).requires_grad_()
    halves = [compiled_halves(recipe, network().to(dtype), x) for _ in range(2)]
    step = CallKernels()
    assert step(halves[1]) > 0
    assert step.tally.called > 0
    assert not step.tally.reasons
    assert count(halves[1], PLAIN) < count(halves[0], PLAIN)
    assert same_bits(*map(run_halves, halves))


def test_float16_stays_a_loop(compiled_halves, text):
    x = leaf().detach().half().requires_grad_()
    halves, step = compiled_halves("hyperblock-int8", network().half(), x), CallKernels()
    before = text(halves)
    assert step(halves) == 0
    assert text(halves) == before
    assert set(step.tally.reasons) == {"kernels read float32 and bfloat16, got float16"}


def saved_in_4_bits(compiled_halves, samples, dtype=torch.float32):
    """The halves of a model that saves codes of 4 bits and a mask."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.5)).to(dtype)
    recipe = add_saving(recipes.get("hyperblock-int4"), "int4")
    return compiled_halves(recipe, model, torch.randn(samples, 8, dtype=dtype, requires_grad=True))


def count_at_once(halves):
    calls = halves.forward.graph.find_nodes(op="call_function", target=ops.QUANTIZE_BLOCKS)
    return sum(get_argument(call, "parts") == 2 for call in calls)


def test_codes_are_packed_at_once(compiled_halves, run_halves, same_bits):
    """A mask, which a loop makes and reads, is packed by loops."""
    halves = [saved_in_4_bits(compiled_halves, 4) for _ in range(2)]
    assert CallKernels()(halves[1]) > 0
    assert count_at_once(halves[1]) == count(halves[0], (ops.PACK,)) - 1 > 0
    assert count(halves[1], (ops.PACK,)) == count(halves[1], (ops.UNPACK,)) == 1
    assert count(halves[1], (ops.PACK_CODES, ops.UNPACK_CODES)) == 0
    floats = halves[1].backward.graph.find_nodes(op="call_function", target=ops.DEQUANTIZE_BLOCKS)
    assert sum(bool(get_argument(call, "shape")) for call in floats) == count(halves[0], (ops.UNPACK,)) - 1
    assert same_bits(*map(run_halves, halves))


def test_codes_are_packed_by_a_second_call(compiled_halves, run_halves, same_bits):
    """Of 3 samples none shares bytes with another whole one: channels do, which lie apart."""
    halves = [saved_in_4_bits(compiled_halves, 3) for _ in range(2)]
    assert CallKernels()(halves[1]) > 0
    assert count_at_once(halves[1]) == 0
    assert count(halves[1], (ops.PACK_CODES,)) == count(halves[0], (ops.PACK,)) - 1 > 0
    assert count(halves[1], (ops.UNPACK_CODES,)) == count(halves[0], (ops.UNPACK,)) - 1 > 0
    assert same_bits(*map(run_halves, halves))


def test_codes_that_are_read_too_are_packed_by_a_second_call(compiled_halves):
    halves = saved_in_4_bits(compiled_halves, 4)
    graph = halves.forward.graph
    for node in graph.find_nodes(op="call_function", target=ops.PACK):
        with graph.inserting_before(node):
            graph.call_function(torch.ops.aten.neg.default, (get_argument(node, "codes"),))
    packed = count(halves, (ops.PACK,))
    CallKernels()(halves)
    assert count_at_once(halves) == 0
    assert count(halves, (ops.PACK_CODES,)) == packed - 1 > 0


def measured(compiled_halves, model, x):
    """The halves for a compiler, with ranges side by side, before and after the pass."""
    halves = [compiled_halves("in-hindsight-w8a8g8", model, x) for _ in range(2)]
    for one in halves:
        StackRanges()(one)
    CallKernels()(halves[1])
    return halves


def test_golden_ranges_that_learn(compiled_halves, settle_compiled, text, golden):
    halves = compiled_halves("in-hindsight-w8a8g8", nn.Linear(8, 4, bias=False), leaf())
    StackRanges()(halves)
    before = text(halves)
    assert settle_compiled(halves, CallKernels()) > 0
    assert count(halves, (ops.MEASURE, ops.CHECKED)) == 0
    golden(before=before, after=text(halves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_a_range_changes(dtype, compiled_halves, run_halves, same_bits):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(dtype)
    halves = measured(compiled_halves, model, torch.randn(2, 4, 9, 9, dtype=dtype, requires_grad=True))
    assert count(halves[1], (ops.QUANTIZE_MEASURED,)) == count(halves[0], (ops.MEASURE,)) > 0
    assert same_bits(*map(run_halves, halves))


@pytest.mark.parametrize("has_quick_loops", [True, False])
def test_loops_take_floats_in_and_calls_get_them(has_quick_loops, compiled_halves, monkeypatch):
    """The norm reads codes; a convolution, which no loop computes, reads floats that the kernel has written.

    Where loops are slow, the norm reads floats too, and codes are for backward alone.
    """
    monkeypatch.setattr(call_kernels, "has_quick_loops", lambda: has_quick_loops)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    _, halves = measured(compiled_halves, model, torch.randn(2, 4, 9, 9, requires_grad=True))
    wanted = {
        get_argument(call, "site"): (get_argument(call, "codes"), get_argument(call, "floats"))
        for call in halves.forward.graph.find_nodes(op="call_function", target=ops.QUANTIZE_MEASURED)
    }
    assert wanted == {
        "0/input": (True, True),
        "0/output": (True, not has_quick_loops),
        "3/input": (True, True),
        "3/output": (has_quick_loops, not has_quick_loops),
    }


def test_codes_that_nothing_reads_are_not_written(compiled_halves):
    halves = compiled_halves("hyperblock-int8", network(), leaf())
    CallKernels()(halves)
    calls = list(halves.backward.graph.find_nodes(op="call_function", target=ops.QUANTIZE_BLOCKS))
    assert {(get_argument(call, "codes"), get_argument(call, "floats")) for call in calls} == {(False, True)}
    for call in calls:
        assert all(user.target is operator.getitem for user in call.users)


def test_does_not_fire_on_floats(compiled_halves, text):
    halves = compiled_halves("identity", network(), leaf())
    before = text(halves)
    assert CallKernels()(halves) == 0
    assert text(halves) == before


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("mxfp8", "kernels write integers of at most 8 bits"),
        ("current-w8a8g8", "a compiled loop rounds to nearest by a known scale as fast"),
    ],
)
def test_what_stays_a_loop_is_counted(recipe, reason, compiled_halves):
    step = CallKernels()
    step(compiled_halves(recipe, network(), leaf()))
    assert any(text.startswith(reason) for text in step.tally.reasons)


@pytest.mark.parametrize(("recipe", "stays"), [("in-hindsight-w8a8g8", True), ("hyperblock-int8", False)])
def test_a_loop_takes_the_floats_of_one_scale_in(recipe, stays, compiled_halves):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    halves = compiled_halves(recipe, model, leaf())
    CallKernels()(halves)
    left = [
        node
        for node in halves.backward.graph.find_nodes(op="call_function", target=ops.DEQUANTIZE)
        if get_argument(node, "codes").op == "placeholder"
    ]
    assert bool(left) is stays


def test_without_a_compiler_nothing_changes(compiled_halves, text, monkeypatch):
    monkeypatch.setattr(quantizers, "explain_compiler", lambda: "no compiler")
    halves, step = compiled_halves("hyperblock-int8", network(), leaf()), CallKernels()
    before = text(halves)
    assert step(halves) == 0
    assert text(halves) == before
    assert set(step.tally.reasons) == {"no compiler"}
