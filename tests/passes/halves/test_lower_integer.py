"""Products of codes are computed on the codes."""

import pytest
import torch
from torch import nn
from uniform_recipes import uniform

from qcompiler.passes.halves.halves import finish_halves
from qcompiler.passes.halves.lower_integer import Execution, LowerInteger
from qcompiler.passes.ir.arguments import get_argument
from qcompiler.passes.ir.meta import iterate_contractions
from qcompiler.passes.ir.quantizer import list_dequantizers
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.kernels import cpu, whole
from qcompiler.runtime.kernels.kernel import Facts
from qcompiler.runtime.kernels.runs import RUNS
from qcompiler.runtime.numbers.formats import parse_format
from qcompiler.runtime.spec import parse_spec

PRODUCT = ops.MATMUL_CODES
WIDE = Facts(device="cpu", formats=(parse_format("int8"),) * 2, rows=64, length=64, columns=64, run=32)
needs_runs = pytest.mark.skipif(bool(RUNS.explain(WIDE)), reason=RUNS.explain(WIDE))
LOWER = LowerInteger(Execution.INTEGER)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def reasons(halves):
    return [fact.simulated for half in halves.graphs for _, fact in iterate_contractions(half.graph) if fact.simulated]


def count_lowered(halves):
    return sum(len(half.graph.find_nodes(op="call_function", target=ops.MATMUL_CODES)) for half in halves.graphs)


@pytest.mark.parametrize("recipe", ["tensor-int8", "tensor-int4", "in-hindsight-w8a8g8", "lsq-w4a4"])
def test_all_three_products_of_a_layer(recipe, in_front_of, settle_halves):
    halves = in_front_of(LowerInteger, recipe, nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), leaf(8, 4))
    products = 6 if recipe != "lsq-w4a4" else 2  # whose gradients stay in float
    assert settle_halves(halves, LOWER) == count_lowered(halves) == products
    assert reasons(halves) == []
    finish_halves(halves)


BLOCKS = {32: "b32c32o32i32", 64: "b64c64o64i64"}


def run_spec(block):
    return f"int8:max:{block}:nearest:pass"


def read_runs(halves):
    """(edges, runs) of the products, of the left and of the right matrix; forward first."""
    nodes = [node for half in halves.graphs for node in half.graph.find_nodes(op="call_function", target=PRODUCT)]
    return [tuple(get_argument(node, name) for name in ("a_edge", "b_edge", "a_run", "b_run")) for node in nodes]


@needs_runs
@pytest.mark.parametrize("edge", BLOCKS)
def test_blocks_along_every_axis(edge, in_front_of, settle_halves):
    """[70, 100] × [100, 72]: every product sums over several blocks, and the last ones are smaller."""
    model = nn.Sequential(nn.Linear(100, 72), nn.ReLU())
    halves = in_front_of(LowerInteger, uniform(run_spec(BLOCKS[edge])), model, leaf(70, 100))
    assert settle_halves(halves, LOWER) == count_lowered(halves) == 3
    assert reasons(halves) == []
    assert read_runs(halves) == [(edge, edge, edge, edge)] * 3
    finish_halves(halves)


@needs_runs
def test_a_tensor_with_one_scale_beside_blocks(in_front_of, settle_halves):
    """The weight changes within sums over channels, and the weight gradient has no weight."""
    recipe = uniform("int8:max:tensor:nearest:pass", weight=run_spec("o48i32"))
    halves = in_front_of(LowerInteger, recipe, nn.Linear(100, 72), leaf(70, 100))
    assert settle_halves(halves, LOWER) == 3
    assert sorted(read_runs(halves)) == [(70, 32, 0, 48), (70, 48, 0, 32), (72, 100, 0, 0)]


@needs_runs
def test_runs_of_several_lengths_have_the_common_one(in_front_of, settle_halves):
    """32 and 64 meet in 32; 48 and 32 in 16, which is too short."""
    recipe = uniform(run_spec("b32c64o32i32"), weight=run_spec("o48i32"))
    halves = in_front_of(LowerInteger, recipe, nn.Linear(100, 100), leaf(70, 100))
    assert settle_halves(halves, LOWER) == 2
    assert reasons(halves) == [
        "a scale changes after every 16 elements of a sum; valid: 32 or more, as in hyperblock-int8-wide"
    ]


def test_zero_points_change_within_no_sum(in_front_of, settle_halves, text):
    recipe = uniform("affine8:real:b32c32o32i32:nearest:pass")
    halves = in_front_of(LowerInteger, recipe, nn.Linear(100, 72), leaf(70, 100))
    before = text(halves)
    assert settle_halves(halves, LOWER) == 0
    assert text(halves) == before
    assert reasons(halves) == ["the kernel of sums with several scales takes signed integers, got affine8"] * 3


def test_batches_whose_scales_change_within_sums(in_front_of, settle_halves):
    """There is no kernel: each matrix of a batch has a grid of its own."""
    halves = in_front_of(LowerInteger, uniform(run_spec("b2c2")), Batches(False), leaf(3, 4, 4))
    assert settle_halves(halves, LOWER) == 0
    assert set(reasons(halves)) == {"the scale of block b2c2 changes along the summed axis"}


def test_golden_integer(in_front_of, settle_halves, text, golden):
    halves = in_front_of(LowerInteger, "in-hindsight-w8a8g8", nn.Linear(4, 2), leaf(3, 4))
    before = text(halves)
    settle_halves(halves, LOWER)
    golden(before=before, after=text(halves))


def test_halves_share_no_new_name(in_front_of, settle_halves):
    """What both halves have is taken for computed again."""
    halves = in_front_of(LowerInteger, "in-hindsight-w8a8g8", nn.Linear(4, 2), leaf(3, 4))
    settle_halves(halves, LOWER)
    forward, backward = (
        {node.name for node in half.graph.nodes if node.op == "call_function"} for half in halves.graphs
    )
    assert forward & backward == {"scale_8", "quantize_8"}  # of the weight, which quantize-again has copied


def test_does_not_fire_in_simulation(in_front_of, settle_halves, text):
    halves = in_front_of(LowerInteger, "tensor-int8", nn.Linear(4, 2), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, LowerInteger()) == 0
    assert text(halves) == before
    assert reasons(halves) == []


@pytest.mark.parametrize(
    ("recipe", "model", "x", "reason"),
    [
        (uniform("int8:fit:b2o2c2i2:nearest:pass"), nn.Linear(4, 4), leaf(4, 4), "changes after every 2 elements"),
        (uniform("int16:fit:tensor:nearest:pass"), nn.Linear(4, 2), leaf(3, 4), "int16 is no integer of at most 8"),
        (uniform("e4m3:fit:tensor:nearest:pass"), nn.Linear(4, 2), leaf(3, 4), "e4m3 is no integer of at most 8 bits"),
        ("tensor-int8", nn.Linear(4, 2, dtype=torch.float64), leaf(3, 4).double(), "the result is float64"),
    ],
)
def test_what_stays_has_its_reason(recipe, model, x, reason, in_front_of, settle_halves, text):
    halves = in_front_of(LowerInteger, recipe, model, x.detach().requires_grad_())
    before = text(halves)
    assert settle_halves(halves, LOWER) == 0
    assert text(halves) == before
    assert len(reasons(halves)) == 3
    assert reason in reasons(halves)[0]


@pytest.mark.parametrize("missing", ["no compiler", ""])
def test_one_row_needs_our_kernel(missing, in_front_of, settle_halves, monkeypatch):
    """As for a batch of one sample."""
    monkeypatch.setattr(whole, "explain_vectors", lambda: missing)
    halves = in_front_of(LowerInteger, "tensor-int8", nn.Linear(4, 2), leaf(1, 4))
    assert settle_halves(halves, LOWER) == (0 if missing else 3)
    assert ("needs two elements along every axis" in "".join(reasons(halves))) is bool(missing)


@pytest.mark.usefixtures("wide_vectors")
@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("no compiler", "float is faster on this processor"),
        ("", "float is as fast for 262144 products; valid: 524288 or more"),
    ],
)
def test_auto_on_a_processor_for_which_torch_has_no_kernel(missing, reason, in_front_of, settle_halves, monkeypatch):
    """Our own kernels would multiply larger matrices, where they run."""
    monkeypatch.setattr(cpu, "is_fast", lambda: False)
    monkeypatch.setattr(whole, "explain_vectors", lambda: missing)
    halves = in_front_of(LowerInteger, "tensor-int8", nn.Linear(64, 64), leaf(64, 64))
    assert settle_halves(halves, LowerInteger(Execution.AUTO)) == 0
    assert all(found.startswith(reason) for found in reasons(halves))
    assert settle_halves(halves, LOWER) == 3


@pytest.mark.usefixtures("fast_integers")
def test_auto_leaves_small_products(in_front_of, settle_halves):
    """32·64·64 products are enough, 32·64·63 are not; the gradients of a layer have as many as its output."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 63))
    halves = in_front_of(LowerInteger, "tensor-int8", model, leaf(32, 64))
    assert settle_halves(halves, LowerInteger(Execution.AUTO)) == 3
    assert reasons(halves) == ["float is as fast for 129024 products; valid: 131072 or more"] * 3


def test_operands_in_float_are_no_products_of_codes(in_front_of, settle_halves):
    recipe = Recipe(name="weights", rules=(Rule(role=Role.WEIGHT, spec=parse_spec("int8:fit:tensor:nearest:pass")),))
    halves = in_front_of(LowerInteger, recipe, nn.Linear(4, 2), leaf(3, 4))
    assert settle_halves(halves, LOWER) == 0
    assert reasons(halves) == []


def test_scaled_sums_stay(in_front_of, settle_halves):
    class Scaled(nn.Linear):
        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight.t(), beta=2)

    halves = in_front_of(LowerInteger, "tensor-int8", Scaled(4, 2), leaf(3, 4))
    assert settle_halves(halves, LOWER) == 2
    assert reasons(halves) == ["the product is scaled by a number of its own"]


class Twice(nn.Module):
    """A tensor that a product reads as codes, and other operators as floats: the output is quantized for both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x)
        return self.second(y), y


class Batches(nn.Module):
    """Products of batches, as those of attention; the third has a sum of its own in front."""

    def __init__(self, scaled):
        super().__init__()
        self.scaled, self.weight = scaled, nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        y = x @ self.weight
        return torch.baddbmm(y, x, y.transpose(1, 2), alpha=2 if self.scaled else 1)


@pytest.mark.parametrize(("scaled", "count"), [(False, 6), (True, 5)])
def test_products_of_batches(scaled, count, in_front_of, settle_halves):
    halves = in_front_of(LowerInteger, "tensor-int8", Batches(scaled), leaf(3, 4, 4))
    assert settle_halves(halves, LOWER) == count == count_lowered(halves)
    assert reasons(halves) == ["the product is scaled by a number of its own"] * scaled
    finish_halves(halves)


def test_one_scale_a_row_of_a_batch(in_front_of, settle_halves):
    """A scale for each token of each head is legal forward; the gradient of the other operand sums over tokens."""
    recipe = uniform("int8:fit:tensor:nearest:pass", activation="int8:fit:c*:nearest:pass")
    halves = in_front_of(LowerInteger, recipe, Batches(False), leaf(3, 4, 4))
    settle_halves(halves, LOWER)
    edges = [node.args[9:11] for node in halves.forward.graph.find_nodes(op="call_function", target=ops.MATMUL_CODES)]
    assert edges[0] == (1, 12)


def test_a_dequantizer_with_other_readers_stays(in_front_of, settle_halves):
    recipe = uniform("int8:fit:tensor:nearest:pass", output="int8:fit:tensor:nearest:pass")
    halves = in_front_of(LowerInteger, recipe, Twice(), leaf(3, 4))
    assert settle_halves(halves, LOWER) == 6
    readers = list_dequantizers(halves.forward.graph)
    assert readers
    assert all(reader.floats.users for reader in readers)


def test_what_is_not_finite_is_shown_by_the_scale(in_front_of, settle_halves):
    """`in-hindsight` shows it by the dequantizer, which is gone; the check that backward saves serves forward too."""
    halves = in_front_of(LowerInteger, "in-hindsight-w8a8g8", nn.Linear(4, 2), leaf(3, 4))
    checks = [len(half.graph.find_nodes(op="call_function", target=ops.CHECKED)) for half in halves.graphs]
    settle_halves(halves, LOWER)
    after = [len(half.graph.find_nodes(op="call_function", target=ops.CHECKED)) for half in halves.graphs]
    assert (checks, after) == ([1, 0], [1, 1])
    for half in halves.graphs:
        for node in half.graph.find_nodes(op="call_function", target=ops.MATMUL_CODES):
            assert "hindsight" not in str(node.args[7]) or node.args[1].name.endswith("checked")
