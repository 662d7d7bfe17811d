"""Error of the large gradients: the sharper figure behind int4-large-gradients, one tensor at a time.

    python benchmarks/large_gradients.py --data PATH/cifar10-small.npz [--steps 40] [RECIPE ...]

The gradients of every convolution's output of ResNet-8, in float, after an epoch, are the same for all recipes; each
gradient quantizer sees them step by step. Printed for the last step, the median over layers: the normalized error
‖ĝ − g‖² / ‖g‖² in decibels over the thousandth of largest magnitude and over all, and the fraction that is clipped.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from gradient_error import pretrain
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar

from qcompiler import recipes
from qcompiler.demo.nets import ResNet
from qcompiler.passes.rules import Role
from qcompiler.runtime import ops
from qcompiler.runtime.numbers.blocks import view_blocks
from qcompiler.runtime.spec import parse_spec

RECIPES = ("int4-minmax", "int4-dsgc", "int4-large-gradients", "int4-large-hindsight", "tensor-int4", "hyperblock-int4")
LARGE = 1000  # one of so many counts as large: α of the paper is 0.001


def record(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, list[Tensor]]:
    """Convolution → the gradient of its output in each step of training in float."""
    found: dict[str, list[Tensor]] = {name: [] for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, grads in found.items():
        model.get_submodule(name).register_full_backward_hook(partial(_keep, grads))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for index in torch.randperm(len(images))[: 128 * steps].split(128):
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
    return found


def _keep(grads: list[Tensor], module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
    grads.append(outputs[0].clone())


def quantized(grads: list[Tensor], text: str) -> Tensor:
    """The last gradient as it comes out of the quantizer that has seen those before it."""
    spec, layout, state = parse_spec(text), "bcss", None
    for step, x in enumerate(grads):
        scale = ops.SCALE(x, text, layout)
        if spec.range.has_state:
            first = state is None or bool(spec.range.refresh and step % spec.range.refresh == 0)
            if state is None:
                counts = view_blocks(tuple(x.shape), layout, spec.block).counts
                state = torch.full(spec.range.state_shape(counts), torch.nan)
            scale = ops.SCALE(x, text, layout, state, first)
            state = ops.UPDATE(x, state, text, layout, first)
        codes = ops.QUANTIZE(x, scale, None, ops.DRAW_KEY(x.device), text, layout, "site")
    return ops.DEQUANTIZE(codes, scale, None, text, layout, torch.float32)


def figures(grads: list[Tensor], text: str) -> tuple[float, float]:
    """(error of the large gradients, error of all), both in decibels."""
    x, found = grads[-1], quantized(grads, text)
    large = x.abs() >= x.abs().flatten().kthvalue(x.numel() - x.numel() // LARGE).values
    ratios = [((found - x)[part].square().sum() / x[part].square().sum()) for part in (large, torch.ones_like(large))]
    return tuple(10 * ratio.log10().item() for ratio in ratios)  # type: ignore[return-value]


def main() -> None:
    """Prints one row a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = cifar.load(args.data, "train")
    model = ResNet(blocks=1)
    pretrain(model, images, labels, 1)
    grads = record(model, images, labels, args.steps)
    table = Table("recipe", "gradients", "large, dB", "worst layer", "all, dB", "worst layer")
    for name in args.recipes:
        rules = recipes.get(name).rules
        text = next(str(r.spec) for r in rules if r.role is Role.GRADIENT and r.position is None and r.spec)
        rows = torch.tensor([figures(layer, text) for layer in grads.values()])
        cells = (f"{value:.1f}" for column in rows.T for value in (column.median(), column.max()))
        table.add_row(name, text, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
