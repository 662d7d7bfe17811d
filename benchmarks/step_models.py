"""The models that benchmarks/steps.py times: name → a model, a batch and a loss."""

import dataclasses
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.demo.nets import ResNet


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and the inputs and labels of one step."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def compute_loss(self, model: nn.Module) -> Tensor:
        """Return the loss of this batch, of the model or of what was made of the model."""
        return self.loss(model(self.x), self.y)


class Inverted(nn.Module):
    """The block of MobileNetV2 (Sandler et al. 2018): widen, one filter a channel, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        hidden = inputs * widening
        self.is_residual = stride == 1 and inputs == outputs
        widen = (nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()) if widening > 1 else ()
        each = (nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        narrow = (nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.layers = nn.Sequential(*widen, *each, *narrow)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, outputs, h / stride, w / stride]."""
        result: Tensor = self.layers(x)
        return x + result if self.is_residual else result


class Attention(nn.Module):
    """A block of a transformer: norm, attention, norm, two layers with GELU."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] → the same."""
        parts = self.inputs(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.narrow(F.gelu(self.wide(self.norm2(x)), approximate="tanh"))
        return result


class GPT(nn.Module):
    """GPT-2 of a few blocks, untied."""

    def __init__(self, tokens: int, width: int, depth: int, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Attention(width, width // 64, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Token numbers [n, tokens] → logits [n, words, tokens]."""
        embedded = self.words(x) + self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(embedded))).transpose(1, 2)


class ViT(nn.Module):
    """ViT-Tiny (Touvron et al. 2021: width 192, 3 heads) for images of 64×64 in pieces of 8×8."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.pieces, self.places = nn.Conv2d(3, width, 8, 8), nn.Parameter(torch.zeros(64, width))
        self.blocks = nn.Sequential(*(Attention(width, width // 64, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 64, 64] → logits [n, 10]."""
        tokens = self.pieces(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def _make_resnet20(batch: int, width: float, depth: float) -> Subject:
    model = ResNet(round(3 * depth), width=round(16 * width))
    return Subject(model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))


def _make_resnet18(batch: int, width: float, depth: float) -> Subject:
    model = ResNet(round(2 * depth), width=round(64 * width), stages=4)
    return Subject(model, torch.randn(batch, 3, 64, 64), torch.randint(10, (batch,)))


def _make_mobilenet(batch: int, width: float, depth: float) -> Subject:
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    inputs = round(32 * width)
    layers: list[nn.Module] = [nn.Conv2d(3, inputs, 3, 2, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6()]
    for widening, channels, repeats, stride in stages:
        for number in range(round(repeats * depth)):
            layers.append(Inverted(inputs, round(channels * width), stride if number == 0 else 1, widening))
            inputs = round(channels * width)
    layers += [nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 10))
    return Subject(model, torch.randn(batch, 3, 64, 64), torch.randint(10, (batch,)))


def _make_mlp(batch: int, width: float, depth: float) -> Subject:
    wide, hidden = round(1024 * width), round(4096 * width)
    layers = [
        layer for _ in range(round(depth)) for layer in (nn.Linear(wide, hidden), nn.ReLU(), nn.Linear(hidden, wide))
    ]
    return Subject(nn.Sequential(*layers), torch.randn(batch, wide), torch.randn(batch, wide), F.mse_loss)


def _make_gpt(batch: int, width: float, depth: float) -> Subject:
    tokens, words = 128, 4096
    model = GPT(tokens, 64 * round(4 * width), round(4 * depth), words)
    return Subject(model, torch.randint(words, (batch, tokens)), torch.randint(words, (batch, tokens)))


def _make_vit(batch: int, width: float, depth: float) -> Subject:
    model = ViT(64 * round(3 * width), round(12 * depth))
    return Subject(model, torch.randn(batch, 3, 64, 64), torch.randint(10, (batch,)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a subject is made, its usual batch, and whether memory order is a choice: images through convolutions."""

    make: Callable[[int, float, float], Subject]
    batch: int
    has_orders: bool = False


MODELS: Final = {
    "ResNet-20": Entry(_make_resnet20, 128, has_orders=True),
    "ResNet-18, 64×64": Entry(_make_resnet18, 16, has_orders=True),
    "MobileNetV2, 64×64": Entry(_make_mobilenet, 32, has_orders=True),
    "MLP 1024-4096-1024": Entry(_make_mlp, 512),
    "GPT-2, 4 blocks": Entry(_make_gpt, 8),
    "ViT-Tiny, 64×64": Entry(_make_vit, 32),
}


def make_subject(name: str, batch: int = 0, width: float = 1.0, depth: float = 1.0) -> Subject:
    """Return a subject with the same numbers each time; `width` and `depth` are factors, batch 0 is the usual one."""
    torch.manual_seed(0)
    entry = MODELS[name]
    return entry.make(batch or entry.batch, width, depth)
