"""Memory formats: input, weights and the gradient of the output in every pairing give the numbers of plain PyTorch."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from group_norm_strides import AS_TRACED
from torch import Tensor, nn

import qcompiler

pytestmark = pytest.mark.usefixtures("fresh")


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.ndim > 1 else t


def transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t


def sliced(t: Tensor) -> Tensor:
    """Every second element of a tensor twice as wide."""
    return torch.stack([t, torch.zeros_like(t)], -1).flatten(-2)[..., ::2]


def expanded(t: Tensor) -> Tensor:
    """The first channel for all channels, at stride 0."""
    return t[:, :1].expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "channels last": channels_last,
    "transposed": transposed,
    "sliced": sliced,
    "expanded": expanded,
}
WEIGHTS = ("plain", "channels last", "sliced")
PAIRINGS = list(itertools.product(LAYOUTS, WEIGHTS, ("plain", "channels last", "sliced", "expanded")))
#: pairings for slower models: each layout of each tensor meets each layout of the input once
SOME = [("channels last", "plain", "plain"), ("plain", "channels last", "sliced"), ("expanded", "plain", "expanded")]


class Mixed(nn.Module):
    """A shortcut around a norm, a pool and an interpolation, with a permuted view as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.shortcut, self.layer_norm, self.linear = nn.Conv2d(4, 8, 1), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.silu(self.norm(self.first(x))), 2)
        y = F.relu(self.second(F.interpolate(y, scale_factor=2.0)) + self.shortcut(x))
        return self.linear(self.layer_norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        (2, 4, 6, 6),
    ),
    "mixed": (Mixed, (2, 4, 6, 6)),
    "1d": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv1d(4, 4, 1)), (2, 4, 8)),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(4, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv3d(4, 4, 1)),
        (2, 4, 4, 4, 4),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.InstanceNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 4, 1)),
        (2, 4, 6, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 2), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 4, 2)),
        (2, 4, 5, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)), (4, 3, 6)),
}


def train(
    name: str, pairing: tuple[str, str, str], recipe: str | None, backend: str = "eager"
) -> tuple[Tensor, list[Tensor]]:
    """One step of a model; returns its output, and the gradients of input and parameters. None: plain PyTorch."""
    of_input, of_weights, of_grad = (LAYOUTS[layout] for layout in pairing)
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build()
    for parameter in model.parameters():
        parameter.data = of_weights(parameter.data)
    x = of_input(torch.randn(shape)).detach().requires_grad_()
    call = model if recipe is None else qcompiler.compile(model, recipe, backend=backend)
    y = call(x)
    y.backward(of_grad(torch.randn(y.shape)))
    return y, [t.grad for t in (x, *model.parameters())]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the relative errors, in the norm of each tensor."""
    norms = [((a - b).norm().item(), b.norm().item()) for a, b in zip(found, expected, strict=True)]
    return max(difference / norm if norm else difference for difference, norm in norms)


def assert_as_plain(name: str, pairing: tuple[str, str, str], backend: str = "eager") -> None:
    """The identity recipe gives the numbers of plain PyTorch in the strides of plain PyTorch.

    Bit for bit, except for sums over a gradient that is copied into the strides that were traced: these add in another
    order, n ≤ 288 numbers with an error below √n half units in the last place, 17 · 2⁻²⁴ ≈ 1e-6. So do convolutions
    behind a group norm that torch traces with other strides than its kernel returns.
    """
    y, gradients = train(name, pairing, "identity", backend)
    plain, expected = train(name, pairing, None)
    assert y.stride() == plain.stride()
    assert backend != "eager" or (name == "mixed" and not AS_TRACED) or torch.equal(y, plain)
    assert error([y, *gradients], [plain, *expected]) <= 1e-6


@pytest.mark.parametrize("pairing", PAIRINGS, ids=" x ".join)
def test_identity_in_every_pairing(pairing):
    assert_as_plain("group norm", pairing)


@pytest.mark.parametrize("pairing", SOME, ids=" x ".join)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "group norm"])
def test_identity(name, pairing):
    assert_as_plain(name, pairing)


@pytest.mark.parametrize("pairing", [("channels last", "plain", "sliced"), ("sliced", "channels last", "plain")])
def test_inductor(pairing):
    assert_as_plain("group norm", pairing, "inductor")


@pytest.mark.sample(2)
@pytest.mark.parametrize("recipe", ["hyperblock-int8", "hyperblock-int4", "pact-w4a4", "in-hindsight-w8a8g8"])
@pytest.mark.parametrize("name", ["group norm", "mixed"])
def test_quantized_training_does_not_see_strides(name, recipe):
    """The same values in other strides are the same codes: only the order of sums differs, and a code beside a tie.

    A wrong stride under a norm gives gradients that have nothing in common, an error of √2.
    """
    y, expected = train(name, ("plain", "plain", "plain"), recipe)
    for layout in ("channels last", "sliced", "transposed"):
        z, gradients = train(name, (layout, "plain", "plain"), recipe)
        plain, _ = train(name, (layout, "plain", "plain"), None)
        assert z.stride() == plain.stride()
        assert error([z, *gradients], [y, *expected]) <= 0.02


def test_outputs_can_be_viewed_as_in_eager(eager):
    """A quantizer for outputs stands between the convolution and what the user gets."""
    x = channels_last(torch.randn(2, 4, 6, 6))
    model = nn.Conv2d(4, 4, 3)
    y, expected = eager(model, "current-w8a8g8")(x), model(x)
    assert y.stride() == expected.stride()
    assert y.permute(0, 2, 3, 1).view(-1, 4).shape == (32, 4)


def test_parameters_that_change_their_memory_format_are_captured_anew(eager):
    model = MODELS["group norm"][0]()
    compiled, x = eager(model), torch.randn(2, 4, 6, 6)
    compiled(x).sum().backward()
    model.to(memory_format=torch.channels_last)
    model.zero_grad()
    y = compiled(channels_last(x))
    y.sin().sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    plain = model(channels_last(x))
    plain.sin().sum().backward()
    assert torch.equal(y, plain)
    assert error(found, [parameter.grad for parameter in model.parameters()]) <= 1e-6
