"""What Inductor makes of each named recipe is what eager computes, on sizes that no block divides."""

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import recipes


def step(recipe: str, backend: str) -> list[Tensor]:
    """The output, the gradient of the input and those of all parameters, of one step of three linear layers.

    40 = 24 + 16 and 72 = 2·32 + 8 features: the last block of a row is smaller than the others, at 24, 32 and 16 alike.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = ((40, 24), (24, 72), (72, 10))
    model = nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())))
    compiled = qcompiler.compile(model, recipe, backend=backend)
    x = torch.randn(9, 40, requires_grad=True)
    output = compiled(x)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in (x, *compiled.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [output.detach(), *gradients]


@pytest.mark.full  # Inductor takes 10 to 60 s for each
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_compiled_code_trains_as_eager(recipe: str) -> None:
    """Bitwise: products call the same kernels in both, and between them every operation is rounded by itself."""
    eager, compiled = step(recipe, "eager"), step(recipe, "inductor")
    assert eager[0].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))
