"""Regions that the user checkpoints save codes, not floats."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qcompiler.passes.halves.recompute_floats import RecomputeFloats
from qcompiler.passes.ir.meta import is_backward, is_recomputed
from qcompiler.passes.ir.quantizer import list_dequantizers


class Checkpointed(nn.Module):
    def __init__(self, on=True):
        super().__init__()
        self.first, self.last, self.on = nn.Linear(4, 8), nn.Linear(8, 2), on

    def body(self, x):
        return self.last(torch.tanh(self.first(x)))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def test_golden_recompute(in_front_of, settle_halves, text, golden):
    halves = in_front_of(RecomputeFloats, "hyperblock-int8", Checkpointed(), leaf())
    before = text(halves)
    assert settle_halves(halves, RecomputeFloats()) == 6
    assert text(halves) == before  # the tags do not show in a text, the nodes below do
    floats = [one.floats for one in list_dequantizers(halves.joint.graph) if not is_backward(one.floats)]
    golden(recomputed="".join(f"{node.name}: {is_recomputed(node)}\n" for node in floats))


def test_does_not_fire_without_checkpoints(in_front_of, settle_halves):
    halves = in_front_of(RecomputeFloats, "hyperblock-int8", Checkpointed(on=False), leaf())
    assert settle_halves(halves, RecomputeFloats()) == 0


def test_does_not_fire_on_halves(in_front_of):
    from qcompiler.passes.halves.draw_in_forward import DrawInForward

    halves = in_front_of(DrawInForward, "hyperblock-int8", Checkpointed(), leaf())
    assert RecomputeFloats()(halves) == 0
