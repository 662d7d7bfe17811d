"""Operators of backward that read only a shape."""

import pytest
import torch
from torch import nn

from qcompiler.passes.ir.stand_in import is_stand_in
from qcompiler.passes.ir.text import graph_text
from qcompiler.passes.joint.forget_values import ForgetValues


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


POOLS = [
    (nn.MaxPool2d(2), (2, 3, 6, 6)),
    (nn.MaxPool3d(2), (2, 3, 4, 4, 4)),
    (nn.AdaptiveMaxPool2d(2), (2, 3, 5, 6)),
    (nn.AdaptiveMaxPool3d(2), (2, 3, 4, 5, 4)),
    (nn.AvgPool2d(2), (2, 3, 6, 6)),
    (nn.AvgPool3d(2), (2, 3, 4, 4, 4)),
    (nn.AdaptiveAvgPool2d(2), (2, 3, 5, 6)),
    (nn.AdaptiveAvgPool3d(2), (2, 3, 4, 5, 4)),
    (nn.MaxPool1d(2), (2, 3, 6)),
]


def test_golden_forget(joint, settle, golden):
    captured = joint(nn.MaxPool2d(2), leaf(1, 2, 4, 4))
    before = graph_text(captured.module)
    assert settle(captured, ForgetValues()) == 1
    golden(before=before, after=graph_text(captured.module))


@pytest.mark.parametrize(("pool", "shape"), POOLS, ids=[type(pool).__name__ for pool, _ in POOLS])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf, -0.0])
def test_values_do_not_change(pool, shape, bad, joint, settle, run_graph, same_bits):
    x = torch.randn(shape)
    if bad is not None:
        x.view(-1)[5] = bad
    captured = joint(nn.Sequential(nn.Tanh(), pool), x.requires_grad_())
    outputs = run_graph(captured)
    assert settle(captured, ForgetValues()) == 1
    assert len([node for node in captured.module.graph.nodes if is_stand_in(node)]) == 1
    assert same_bits(run_graph(captured), outputs)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_strides_do_not_change(format, joint, settle, run_graph, same_bits):  # noqa: A002
    x = torch.randn(2, 3, 6, 6).to(memory_format=format).requires_grad_()
    captured = joint(nn.Sequential(nn.Tanh(), nn.MaxPool2d(2)), x)
    outputs = run_graph(captured)
    assert settle(captured, ForgetValues()) == 1
    after = run_graph(captured)
    assert same_bits(after, outputs)
    assert [one.stride() for one in after if one is not None] == [one.stride() for one in outputs if one is not None]


@pytest.mark.parametrize(
    "model", [nn.Softmax(-1), nn.LPPool2d(2, 2), nn.Upsample(scale_factor=2)], ids=["softmax", "power", "upsample"]
)
def test_does_not_fire(model, joint, settle):
    captured = joint(nn.Sequential(nn.Tanh(), model), leaf(2, 3, 6, 6))
    before = graph_text(captured.module)
    fired = isinstance(model, nn.LPPool2d)  # a mean of powers: its average pool alone
    assert settle(captured, ForgetValues()) == fired
    assert fired or graph_text(captured.module) == before


def test_does_not_fire_without_backward(joint, settle):
    captured = joint(nn.MaxPool2d(2), torch.randn(1, 2, 4, 4))
    assert settle(captured, ForgetValues()) == 0


def test_an_empty_batch(joint, settle, run_graph, same_bits):
    captured = joint(nn.Sequential(nn.Tanh(), nn.MaxPool2d(2)), leaf(0, 3, 6, 6))
    outputs = run_graph(captured)
    assert settle(captured, ForgetValues()) == 1
    assert same_bits(run_graph(captured), outputs)
