"""What backward computes again from dequantized codes starts from the saved codes, not from a saved float."""

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.spec import parse_spec


class Tokens(nn.Module):
    """A linear layer over tokens, and the tanh form of GELU written out: backward computes parts of it again."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 32)

    def forward(self, x):
        y = self.layer(x)
        return self.gelu(y)

    @staticmethod
    def gelu(y):
        return 0.5 * y * (1.0 + torch.tanh(0.8 * (y + 0.044715 * torch.pow(y, 3.0))))


class Through(torch.autograd.Function):
    """Codes and back; gradients pass."""

    @staticmethod
    def forward(ctx, y, text):
        scale = ops.SCALE(y, text, "bbc")
        point = ops.ZERO_POINT(y, scale, text, "bbc") if parse_spec(text).has_zero_point else None
        return ops.DEQUANTIZE(
            ops.QUANTIZE(y, scale, point, None, text, "bbc", "site"), scale, point, text, "bbc", y.dtype
        )

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize(
    ("text", "bits"), [("int8:real:tensor:nearest:pass", 8), ("affine4:real:tensor:nearest:pass", 4)]
)
def test_gradients_and_what_is_saved(text, bits):
    torch.manual_seed(0)
    model, x = Tokens(), torch.randn(4, 6, 8)
    expected = torch.autograd.grad(Tokens.gelu(Through.apply(model.layer(x), text)).sin().sum(), model.layer.weight)
    recipe = Recipe(name="one", rules=(Rule(role=Role.OUTPUT, spec=parse_spec(text)),))
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    qmodel(x).sin().sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, expected[0])
    codes = 4 * 6 * 32 * bits // 8
    assert codes < qmodel.plan().saved_code_bytes <= codes + 16  # with one scale and one zero point


def test_a_range_of_the_past_shows_what_is_not_finite():
    """The codes of a NaN are a number: backward learns of it by the checked scale."""
    text = "affine8:real:tensor:nearest:pass:hindsight(0.9,0.01)"
    model = Tokens()
    recipe = Recipe(name="one", rules=(Rule(role=Role.OUTPUT, spec=parse_spec(text)),))
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    x = torch.randn(4, 6, 8)
    qmodel(x).sum().backward()
    model.zero_grad()
    x[0, 0, 0] = torch.nan
    qmodel(x).sum().backward()
    assert model.layer.weight.grad.isnan().all()
