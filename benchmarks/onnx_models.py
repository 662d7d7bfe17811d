"""What the ONNX export of every recipe gives on every model: codes, outputs, kernels. Models are trained a few steps.

    python benchmarks/onnx_models.py rows.jsonl [--recipes a,b] [--models a,b] [--inputs 64]

One line of the file for each model and recipe; a second run adds what is missing, and prints the table of all.
Quantizers are those in the file, of those trained. `wrong` counts codes that differ where both read the same tensor
(the claim is 0), `flipped` is the share of codes that differ end to end. `plain` and `optimized` are the largest
differences of the outputs, onnxruntime's optimizations off and on, relative to the largest output; `spread` is what
float32 alone does to PyTorch. Flips are rare, and one moves an output a lot, so a sample of PyTorch's may hold none:
where a file differs by more than twice the spread, more `--inputs` are added, up to `--samples` times as many.
Without --models and --recipes: every recipe on every model; those of transformers where that package is installed.
"""

import argparse
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompiler
from qcompiler.demo.nets import ResNet


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
    """Two layers of width 64, attention written out: fused attention is left in float, and not always fused."""
    import transformers

    tiny = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    words: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=32, use_cache=False, **words)
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(max_position_embeddings=32, **tiny, **words))
    config = transformers.ViTConfig(image_size=32, patch_size=8, attn_implementation="eager", **tiny)
    return transformers.ViTForImageClassification(config)


def _images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def _tokens(batch: int) -> Tensor:
    return torch.randint(0, 64, (batch, 16))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "resnet8": (lambda: ResNet(1), _images),
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


def largest(found: list[qcompiler.VerifyReport]) -> dict[str, float]:
    """The largest differences of all samples."""
    return {key: max(getattr(one, key) for one in found) for key in ("plain", "optimized", "spread")}


def apart(one: dict[str, Any]) -> float:
    """How far the file is from PyTorch, in multiples of what PyTorch is from itself, or of float arithmetic."""
    return max(one["plain"], one["optimized"]) / max(one["spread"], 1e-6)


def row(name: str, recipe: str, path: Path, count: int, samples: int) -> dict[str, Any]:
    """What one model gives with one recipe; `refused` holds the reason where there is no file.

    `count` inputs, up to `samples` times as many.
    """
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
        found = [qcompiler.verify_onnx(qmodel, path, (inputs(count),))]
        while apart(largest(found)) > 2 and len(found) < samples:
            found.append(qcompiler.verify_onnx(qmodel, path, (inputs(count),)))
    except qcompiler.ExportError as error:
        return {"refused": str(error)}
    onnx.checker.check_model(str(path), full_check=True)
    return {
        "trained": report.trained,
        "exported": sum(report.exported.values()),
        "inputs": count * len(found),
        **{key: sum(getattr(site, key) for one in found for site in one.sites) for key in ("wrong", "flipped", "own")},
        "codes": sum(site.elements for one in found for site in one.sites),
        **largest(found),
        "kernels": dict(report.integer_kernels),
        "float": len(report.kept),
    }


def line(one: dict[str, Any]) -> str:
    """One row as a line of the table."""
    start = f"| {one['model']} | {one['recipe']} "
    if "refused" in one or "failed" in one:
        return start + f"| {'refused: ' + one['refused'] if 'refused' in one else 'FAILED: ' + one['failed']} |"
    kernels = ", ".join(f"{count} {kind}" for kind, count in one["kernels"].items()) or "none"
    return start + (
        f"| {one['exported']}/{one['trained']} | {one['inputs']} | {one['wrong']} "
        f"| {one['flipped'] / max(one['codes'], 1):.1e} | {one['own'] / max(one['codes'], 1):.1e} "
        f"| {one['plain']:.1e} | {one['optimized']:.1e} | {one['spread']:.1e} | {kernels} |"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """One line for each model: the sums, and the largest difference in multiples of the spread."""
    lines = ["| model | recipes | quantizers | codes | wrong | flipped | beyond 2× | largest |", "|---|" + "---|" * 7]
    for name in dict.fromkeys(one["model"] for one in rows):
        here = [one for one in rows if one["model"] == name and "codes" in one]
        total = {key: sum(one[key] for one in here) for key in ("exported", "trained", "codes", "wrong", "flipped")}
        times = [apart(one) for one in here]
        lines.append(
            f"| {name} | {len(here)} | {total['exported']}/{total['trained']} | {total['codes']:,} | {total['wrong']} "
            f"| {total['flipped'] / total['codes']:.1e} | {sum(one > 2 for one in times)} | {max(times):.2f}× |"
        )
    return "\n".join(lines)


def main() -> None:
    """Adds what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--models", type=lambda text: text.split(","), default=None)
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=None)
    parser.add_argument("--inputs", type=int, default=64, help="of one sample")
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    known = [name for name in MODELS if name not in ("gpt2", "bert", "vit") or importlib.util.find_spec("transformers")]
    wanted = [(name, recipe) for name in given.models or known for recipe in given.recipes or qcompiler.RECIPES]
    rows = [json.loads(text) for text in given.rows.read_text().splitlines()] if given.rows.exists() else []
    done = {(one["model"], one["recipe"]) for one in rows}
    with tempfile.TemporaryDirectory() as folder, given.rows.open("a") as file:
        for name, recipe in [pair for pair in wanted if pair not in done]:
            try:
                found = row(name, recipe, Path(folder) / "model.onnx", given.inputs, given.samples)
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {error}"[:500]}
            rows.append({"model": name, "recipe": recipe} | found)
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    print(
        "| model | recipe | quantizers | inputs | wrong | flipped | in PyTorch | plain | optimized | spread | kernels |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(line(one) for one in rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
