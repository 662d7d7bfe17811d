"""Small models for the bytes that forward saves: blocks of a transformer, convolutions, residual nets."""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from qcompiler.demo.measure import measure_saved_bytes
from qcompiler.demo.nets import ResNet


class Block(nn.Module):
    """Attention and two linear layers, each behind a layer norm."""

    def __init__(self, width: int, heads: int, act: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads, self.act = nn.LayerNorm(width), nn.LayerNorm(width), heads, act
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Tokens, positions, blocks, logits."""

    def __init__(self, width: int = 64, words: int = 300, depth: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width, 4, nn.GELU("tanh")) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Vit(nn.Module):
    """Patches, a class token, positions, blocks, a head."""

    def __init__(self, width: int = 96, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token, self.places = (nn.Parameter(torch.zeros(1, n, width)) for n in (1, 65))
        self.blocks = nn.Sequential(*(Block(width, 3, nn.GELU()) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Residual(nn.Module):
    """forward(x) = act(body(x) + short(x))."""

    def __init__(self, body: nn.Module, short: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body, self.short, self.act = body, short, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.short(x))


def norm_conv(
    inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1, act: Any = None
) -> list[nn.Module]:
    """Return a convolution, its batch norm, and an activation function if there is one."""
    conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outer), *([act()] if act else [])]


def basic_block(inner: int, outer: int, stride: int) -> nn.Module:
    """Return the residual block of ResNet-18."""
    body = nn.Sequential(*norm_conv(inner, outer, 3, stride, act=nn.ReLU), *norm_conv(outer, outer, 3))
    same = stride == 1 and inner == outer
    return Residual(body, nn.Identity() if same else nn.Sequential(*norm_conv(inner, outer, 1, stride)), nn.ReLU())


def mobile_block(inner: int, outer: int, stride: int) -> nn.Module:
    """Return the inverted residual block of MobileNet."""
    wide = 6 * inner
    layers = (
        *norm_conv(inner, wide, 1, act=nn.ReLU6),
        *norm_conv(wide, wide, 3, stride, wide, act=nn.ReLU6),
        *norm_conv(wide, outer, 1),
    )
    body = nn.Sequential(*layers)
    return Residual(body, nn.Identity(), nn.Identity()) if stride == 1 and inner == outer else body


def resnet18() -> nn.Module:
    """Return ResNet-18."""
    stem = (*norm_conv(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1))
    plan = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
    plan += ((256, 512, 2), (512, 512, 1))
    return nn.Sequential(
        *stem, *(basic_block(*sizes) for sizes in plan), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    )


def mobile() -> nn.Module:
    """Return a stem and four inverted residual blocks."""
    plan = ((8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(*norm_conv(3, 8, 3, 2, act=nn.ReLU6), *(mobile_block(*sizes) for sizes in plan), *head)


def stack(count: int, *kinds: Callable[[], nn.Module]) -> nn.Module:
    """Return the same layers again and again."""
    return nn.Sequential(*(kind() for _ in range(count) for kind in kinds))


def conv16() -> nn.Module:
    """Return a convolution that keeps 16 channels."""
    return nn.Conv2d(16, 16, 3, padding=1)


def perceptron(*more: nn.Module) -> nn.Module:
    """Return two linear layers with layers between them."""
    return nn.Sequential(nn.Linear(128, 256), *more, nn.Linear(256, 128))


#: name → the model and an input
MODELS: Final[dict[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    "blocks": lambda: (nn.Sequential(*(Block(128, 4, nn.GELU()) for _ in range(2))), torch.randn(4, 64, 128)),
    "conv-tanh": lambda: (stack(6, conv16, nn.Tanh), torch.randn(4, 16, 16, 16)),
    "conv-bn-silu": lambda: (stack(4, conv16, lambda: nn.BatchNorm2d(16), nn.SiLU), torch.randn(4, 16, 16, 16)),
    "conv-gn-gelu": lambda: (stack(4, conv16, lambda: nn.GroupNorm(4, 16), nn.GELU), torch.randn(4, 16, 16, 16)),
    "mlp": lambda: (perceptron(nn.ReLU()), torch.randn(64, 128)),
    "mlp-dropout": lambda: (perceptron(nn.GELU(), nn.Dropout(0.1)), torch.randn(64, 128)),
    "resnet18": lambda: (resnet18(), torch.randn(2, 3, 64, 64)),
    "resnet20": lambda: (ResNet(3), torch.randn(4, 3, 32, 32)),
    "gpt": lambda: (Gpt(), torch.randint(300, (2, 64))),
    "vit": lambda: (Vit(), torch.randn(2, 3, 64, 64)),
    "mobile": lambda: (mobile(), torch.randn(2, 3, 32, 32)),
}


def measure_float(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that torch.compile saves for the model in float, by its own partitioner."""
    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph),
        bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    bytes_saved = measure_saved_bytes(torch.compile(model, backend=backend, dynamic=False), x)
    torch._dynamo.reset()
    return bytes_saved
