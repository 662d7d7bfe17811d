"""Masks and short codes are saved several to a byte."""

import pytest
import torch
from torch import nn

from qcompiler.passes.halves.halves import Halves
from qcompiler.passes.halves.pack_saved import PackSaved
from qcompiler.passes.ir.meta import get_value


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def masked(_, x):
    return torch.where(x > 0.25, x, 0.5 * x)


def test_golden_pack(in_front_of, settle_halves, text, golden, function):
    halves = in_front_of(PackSaved, "identity", function(masked), leaf(3, 4))
    before = text(halves)
    assert settle_halves(halves, PackSaved()) == 1
    golden(before=before, after=text(halves))


@pytest.mark.parametrize("shape", [(3, 8), (5, 3), (1, 1), (2, 3, 7)])
def test_a_mask_takes_a_bit_an_element(shape, in_front_of, settle_halves, function):
    halves = in_front_of(PackSaved, "identity", function(masked), leaf(*shape))
    settle_halves(halves, PackSaved())
    (saved,) = halves.saved
    count = torch.Size(shape).numel()
    assert get_value(saved).dtype is torch.uint8
    assert get_value(saved).numel() == -(-count // 8)


def test_does_not_fire_on_floats_and_given_masks(in_front_of, settle_halves, text, function):
    mask = torch.tensor([True, False, True, False])  # an input is alive anyway
    model = function(lambda _, x, m: torch.where(m, x, 0.5 * x).exp())
    halves = in_front_of(PackSaved, "identity", model, leaf(3, 4), mask)
    before = text(halves)
    assert settle_halves(halves, PackSaved()) == 0
    assert text(halves) == before
    assert {get_value(node).dtype for node in halves.saved} == {torch.bool, torch.float32}


def test_does_not_fire_on_codes_of_eight_bits_or_without_backward(in_front_of, settle_halves):
    halves = in_front_of(PackSaved, "tensor-int8", nn.Linear(4, 2), leaf(3, 4))
    assert settle_halves(halves, PackSaved()) == 0
    assert PackSaved()(Halves.of_forward(halves.forward, 1)) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -0.0, 0.25])
def test_special_inputs_give_the_same_bits(bad, changes_no_bit, function):
    x = torch.randn(5, 3)
    x[1, 2] = bad
    assert changes_no_bit(lambda: function(masked), "identity", [x.requires_grad_()], PackSaved) == 1


def test_an_empty_mask_gives_the_same_bits(changes_no_bit, function):
    assert changes_no_bit(lambda: function(masked), "identity", [leaf(0, 3)], PackSaved) == 1


def test_a_mask_that_two_operators_read_is_packed_once(changes_no_bit, function):
    def forward(_, x, y):
        mask = x > y
        return torch.where(mask, x.exp(), y) + torch.where(mask, y.tanh(), x)

    assert changes_no_bit(lambda: function(forward), "identity", [leaf(5, 3), leaf(5, 3)], PackSaved) == 1


def test_dropout_gives_the_same_bits(changes_no_bit):
    def build():
        return nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.4), nn.Linear(5, 3))

    assert changes_no_bit(build, "tensor-int4", [leaf(3, 7)], PackSaved) >= 1
