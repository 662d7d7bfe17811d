"""Results of batch norms that can be computed again."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.draw_in_forward import DrawInForward
from qcompiler.passes.halves.join_norms import JoinNorms
from qcompiler.passes.halves.split_norms import SplitNorms
from qcompiler.passes.ir.meta import get_value
from qcompiler.runtime import ops


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def layers(**options):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, **options), nn.SiLU(), nn.Conv2d(4, 2, 2))


def test_golden_split_norms(in_front_of, settle_halves, text, golden):
    halves = in_front_of(SplitNorms, "identity", nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, SplitNorms()) == 1
    golden(before=before, after=text(halves))


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()).eval(), torch.float32),  # no statistics of the batch
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.SiLU()), torch.float32),  # another operator
        (nn.Sequential(nn.RMSNorm(4), nn.SiLU()), torch.float32),  # torch writes it as other operators
        (nn.Sequential(nn.BatchNorm1d(4).bfloat16(), nn.SiLU()), torch.bfloat16),  # statistics have another type
    ],
    ids=["evaluation", "untracked", "rms norm", "bfloat16"],
)
def test_does_not_fire(model, dtype, in_front_of, settle_halves, text):
    halves = in_front_of(SplitNorms, "identity", model, leaf(3, 4, dtype=dtype))
    before = text(halves)
    assert settle_halves(halves, SplitNorms()) == 0
    assert text(halves) == before


def test_does_not_fire_on_halves(in_front_of):
    halves = in_front_of(DrawInForward, "identity", nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()), leaf(3, 4))
    assert SplitNorms()(halves) == 0


def test_the_result_is_not_saved(in_front_of):
    halves = in_front_of(DrawInForward, "identity", layers(), leaf(3, 2, 6, 6))
    assert len(list(halves.backward.graph.find_nodes(op="call_function", target=ops.NORM_AGAIN))) == 1
    wide = [node.name for node in halves.saved if get_value(node).shape == (3, 4, 4, 4)]
    assert wide == ["convolution", "silu"]  # what the norm reads, and what the second convolution reads


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": 0.3}, {"eps": 0.1}])
def test_no_bit_changes(options, changes_no_bit):
    x = leaf(3, 2, 6, 6)
    assert changes_no_bit(lambda: layers(**options), "tensor-int8", [x], SplitNorms, JoinNorms) == 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -0.0, 1e30, 1e-40])
@pytest.mark.sample(2)
def test_special_inputs_give_the_same_bits(bad, changes_no_bit):
    x = torch.randn(3, 2, 6, 6)
    x[1, 0, 2, 3] = bad
    assert changes_no_bit(layers, "identity", [x.requires_grad_()], SplitNorms, JoinNorms) == 2


def test_layouts_and_double_numbers_give_the_same_bits(changes_no_bit):
    x = torch.randn(3, 2, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    assert changes_no_bit(layers, "identity", [x], SplitNorms, JoinNorms) == 2
    x = leaf(3, 2, 6, 6, dtype=torch.float64)
    assert changes_no_bit(lambda: layers().double(), "identity", [x], SplitNorms, JoinNorms) == 2


def test_a_norm_that_several_read_is_split_once(changes_no_bit, function):
    def forward(model, x):
        y = model.norm(model.conv(x))
        return torch.nn.functional.silu(y) + y.tanh() * y.relu()

    def build():
        return function(forward, conv=nn.Conv2d(2, 4, 3), norm=nn.BatchNorm2d(4))

    assert changes_no_bit(build, "tensor-int8", [leaf(3, 2, 6, 6)], SplitNorms, JoinNorms) == 2
