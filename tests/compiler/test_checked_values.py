"""Models that check their own values, as F.one_hot does, train as in eager and still fail where they should."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qcompiler

pytestmark = pytest.mark.usefixtures("fresh")


def gate(self, x):
    """Keep the largest of four outputs, if all are small."""
    x = self.layer(x)
    torch._assert_async((x.abs() < 100).all(), "an output is too large")
    return x * F.one_hot(x.argmax(-1), num_classes=4)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("recipe", ["identity", "hyperblock-int8"])
def test_a_check_is_kept(models, backend, recipe):
    model, x = models.Function(gate, layer=nn.Linear(8, 4)), torch.randn(16, 8)
    expected = model(x)
    compiled = qcompiler.compile(model, recipe, backend=backend)
    result = compiled(x)
    result.square().sum().backward()
    if recipe == "identity":
        torch.testing.assert_close(result, expected)
    assert model.layer.weight.grad.count_nonzero()
    assert (result.count_nonzero(-1) == 1).all()
    with pytest.raises(RuntimeError, match="an output is too large"):
        compiled(10_000 * x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="an output is too large"):
        compiled.eval()(10_000 * x)
