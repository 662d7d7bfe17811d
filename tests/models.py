"""The models of the end-to-end tests: small, each with one trait that compilers get wrong.

Every input and every parameter is drawn from torch's generator: `torch.manual_seed` before `build` and `inputs` makes
equal twins.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def total(outputs: Any) -> Tensor:
    """A loss whose gradient differs from element to element: Σ sin(y) over every tensor."""
    leaves = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else [outputs]
    return torch.stack([leaf.float().sin().sum() for leaf in leaves]).sum()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, inputs of it, and the loss that trains it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loss: Callable[[Any], Tensor] = total


def images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """A batch of normal numbers."""
    return lambda: (torch.randn(*shape),)


def tokens(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """A batch of token ids below 32."""
    return lambda: (torch.randint(0, 32, shape),)


def mlp() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))


def convolutions(dims: int = 2, *, transposed: bool = False, groups: int = 1, width: int = 8) -> nn.Module:
    """Two convolutions of one kind, the second with a stride, and a linear head."""
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    conv = getattr(nn, name)
    pool = getattr(nn, f"AdaptiveAvgPool{dims}d")
    return nn.Sequential(
        conv(groups if groups > 1 else 3, width, 3, padding=1, groups=groups),
        nn.ReLU(),
        conv(width, width, 3, stride=2, padding=1, groups=groups, bias=False),
        nn.ReLU(),
        pool(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


def resnet20(width: int = 8) -> nn.Module:
    """The ResNet-20 of CIFAR: batch norm, three stages of three residual blocks."""
    blocks: list[nn.Module] = []
    channels = width
    for out, first_stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        for stride in (first_stride, 1, 1):
            blocks.append(_Residual(channels, out, stride))
            channels = out
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class VisionTransformer(nn.Module):
    """Patches by a convolution, a class token, positions, encoder layers with dropout."""

    def __init__(self, dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 5, dim))
        layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class CausalLanguageModel(nn.Module):
    """GPT in small: fused causal attention, the output projection tied to the embedding."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(32, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(self.norm2(x)))


class Function(nn.Module):
    """forward(…) = function(self, …), over the given parts."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.function(self, *inputs, **options)


class DictOutputs(nn.Module):
    """Two named outputs over one trunk; the loss of its case reads the first only."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.used, self.unused = nn.Linear(12, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x).relu()
        return {"used": self.used(x), "unused": self.unused(x)}


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).relu()).relu())


class UnusedParameter(nn.Module):
    """A parameter and a layer that forward never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(12, 4), nn.Linear(12, 4)
        self.extra = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def frozen() -> nn.Module:
    """A CNN whose first convolution does not train."""
    model = convolutions()
    model[0].requires_grad_(False)
    return model


def dropout() -> nn.Module:
    """Dropout of elements and of channels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Dropout2d(0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.Dropout(0.5),
        nn.Linear(16, 4),
    )


class TwoInputs(nn.Module):
    """Two inputs that meet in a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x) @ self.right(y).transpose(-2, -1)


CASES: Final[dict[str, Case]] = {
    "mlp": Case(mlp, images(6, 12)),
    "cnn": Case(convolutions, images(4, 3, 8, 8)),
    "grouped": Case(lambda: convolutions(groups=2), images(4, 2, 8, 8)),
    "depthwise": Case(lambda: convolutions(groups=8), images(4, 8, 8, 8)),
    "transposed": Case(lambda: convolutions(transposed=True), images(4, 3, 6, 6)),
    "transposed-grouped": Case(lambda: convolutions(transposed=True, groups=2), images(4, 2, 6, 6)),
    "conv1d": Case(lambda: convolutions(1), images(4, 3, 12)),
    "conv3d": Case(lambda: convolutions(3), images(2, 3, 4, 6, 6)),
    "resnet20": Case(resnet20, images(4, 3, 16, 16)),
    "vit": Case(VisionTransformer, images(3, 3, 8, 8)),
    "gpt": Case(CausalLanguageModel, tokens(3, 7)),
    "dropout": Case(dropout, images(4, 3, 6, 6)),
    "dict-outputs": Case(DictOutputs, images(6, 12), loss=lambda outputs: total(outputs["used"])),
    "tied": Case(Tied, images(6, 12)),
    "twice": Case(Twice, images(6, 12)),
    "frozen": Case(frozen, images(4, 3, 8, 8)),
    "unused-parameter": Case(UnusedParameter, images(6, 12)),
    "two-inputs": Case(TwoInputs, lambda: (torch.randn(2, 5, 12), torch.randn(2, 7, 12))),
}
