"""What the ONNX export of every recipe gives on every model: codes, outputs, kernels. Models are trained a few steps.

    python benchmarks/onnx_models.py [--recipes a,b] [--models a,b]

`wrong` counts codes that differ where both read the same tensor (the claim is 0), `flipped` the share of codes that
differ end to end. Outputs are compared with the spread of PyTorch between float32 and float64 on the same model. Models
of transformers, small and untrained before, take part where that package is installed.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompiler

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.nets import ResNet


class Inverted(nn.Module):
    """The block of MobileNetV2: 1×1 up, depthwise 3×3, 1×1 down, relu6, a sum where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        wide = inputs * expand
        self.same = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.same else y


def mobilenet() -> nn.Module:
    """MobileNetV2 in small, for 32×32 images."""
    blocks = [Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 40, 2), Inverted(40, 40, 1)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))


class UNet(nn.Module):
    """Two levels down and up, joined by their skips, transposed convolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = self._double(3, width)
        self.second = self._double(width, 2 * width)
        self.bottom = self._double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2 = self._double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join1 = self._double(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Module:
        layers = [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(outputs, outputs, 3, 1, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x)
        two = self.second(F.max_pool2d(one, 2))
        low = self.bottom(F.max_pool2d(two, 2))
        two = self.join2(torch.cat([two, self.up2(low)], 1))
        return self.head(self.join1(torch.cat([one, self.up1(two)], 1)))


class Encoder(nn.Module):
    """Self-attention written out, so that its products are quantized too, and an MLP; twice."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(2):
            q, k, v = self.qkv[layer](self.norms[2 * layer](x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
            mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + self.out[layer](mixed.transpose(1, 2).flatten(2))
            x = x + self.mlp[layer](self.norms[2 * layer + 1](x))
        return self.head(x.mean(1))


def _transformer(name: str) -> nn.Module:
    import transformers

    tiny = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=32, use_cache=False)
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=64, max_position_embeddings=32, **tiny))
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **tiny))


def _images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def _tokens(batch: int) -> Tensor:
    return torch.randint(0, 64, (batch, 16))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "resnet20": (lambda: ResNet(3), _images),
    "mobilenet": (mobilenet, _images),
    "unet": (UNet, _images),
    "encoder": (Encoder, lambda batch: torch.randn(batch, 16, 32)),
    "gpt2": (lambda: _transformer("gpt2"), _tokens),
    "bert": (lambda: _transformer("bert"), _tokens),
    "vit": (lambda: _transformer("vit"), _images),
}


def loss(outputs: Any) -> Tensor:
    """A number that depends on every tensor that a model returns."""
    if isinstance(outputs, Tensor):
        return outputs.square().mean()
    return torch.stack([one.square().mean() for one in outputs.values() if isinstance(one, Tensor)]).sum()


def row(name: str, recipe: str, path: Path) -> str:
    """One line of the table."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    qmodel = qcompiler.compile(build(), recipe, backend="eager")
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
    for _ in range(3):
        loss(qmodel(inputs(4))).backward()
        optimizer.step()
        optimizer.zero_grad()
    try:
        report = qcompiler.export_onnx(qmodel, path, (inputs(4),))
        found = qcompiler.verify_onnx(qmodel, path, (inputs(8),))
    except (qcompiler.ExportError, qcompiler.CompileError) as error:
        return f"| {name} | {recipe} | {error} |"
    codes = sum(site.elements for site in found.sites)
    flipped = sum(site.flipped for site in found.sites) / max(codes, 1)
    kernels = ", ".join(f"{count} {kind}" for kind, count in report.integer_kernels.items()) or "none"
    return (
        f"| {name} | {recipe} | {sum(report.exported.values())}/{report.trained} | {sum(s.wrong for s in found.sites)} "
        f"| {flipped:.2e} | {found.plain:.1e} | {found.optimized:.1e} | {found.spread:.1e} | {kernels} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in MODELS if name not in ("gpt2", "bert", "vit") or importlib.util.find_spec("transformers")]
    parser.add_argument("--models", default=",".join(known))
    parser.add_argument("--recipes", default=",".join(qcompiler.RECIPES))
    given = parser.parse_args()
    print("| model | recipe | quantizers | wrong | flipped | plain | optimized | spread | integer kernels |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models.split(","):
            for recipe in given.recipes.split(","):
                print(row(name, recipe, Path(folder) / "model.onnx"), flush=True)


if __name__ == "__main__":
    main()
