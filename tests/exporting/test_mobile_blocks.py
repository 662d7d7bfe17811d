"""Inverted bottlenecks: depthwise convolutions, squeeze and excitation, smooth activations, batch norms."""

import pytest
import torch
from torch import nn

import qcompiler


class Excite(nn.Module):
    """Scales each channel by a gate that looks at all of its pixels; its methods call the module `s`."""

    def __init__(s, channels, gate):  # noqa: N805
        super().__init__()
        s.reduce, s.expand, s.gate = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), gate

    def forward(s, x):  # noqa: N805
        return x * s.gate(s.expand(s.reduce(x.mean((2, 3), keepdim=True)).relu()))


class Residual(nn.Module):
    """Expand, filter by channel, excite, project, and add."""

    def __init__(self, activation, gate):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            activation,
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            activation,
            Excite(16, gate),
            nn.Conv2d(16, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )

    def forward(self, x):
        return x + self.body(x)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("activation", "gate", "recipe"),
    [
        (nn.SiLU(), nn.Sigmoid(), "hyperblock-int8"),
        (nn.SiLU(), nn.Sigmoid(), "lsq-w4a4"),
        (nn.Hardswish(), nn.Hardsigmoid(), "deploy-int8"),
        (nn.Hardswish(), nn.Hardsigmoid(), "hfp8"),
    ],
)
@pytest.mark.full
def test_an_inverted_bottleneck(activation, gate, recipe, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), Residual(activation, gate), nn.Flatten(), nn.Linear(72, 4))
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    for _ in range(2):
        qmodel(torch.randn(8, 3, 8, 8)).square().mean().backward()
    qcompiler.export_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(2, 3, 8, 8),))
    found = qcompiler.verify_onnx(qmodel, tmp_path / "m.onnx", (torch.randn(16, 3, 8, 8),))
    assert found.exact
    assert not found.merged
