"""Error of quantized gradients against float, layer by layer, for any number of recipes.

    python benchmarks/gradient_error.py --data PATH/cifar10-small.npz [--epochs 2] [RECIPE ...]

For each recipe: the median over layers of the normalized error ‖g_q − g‖² / ‖g‖² in decibels and of the cosine, of
the weight gradients of one batch of 128 images; at initialization and after some epochs in float.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar

import qcompiler
from qcompiler import recipes
from qcompiler.demo.nets import ResNet


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of every weight matrix and filter for one batch."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.ndim > 1 and p.grad is not None}


def errors(model: nn.Module, recipe: str, x: Tensor, y: Tensor, repeats: int) -> dict[str, tuple[float, float]]:
    """weight → (normalized error in dB, cosine), averaged over repeated stochastic rounding."""
    exact = gradients(copy.deepcopy(model), x, y)
    quantized = qcompiler.compile(copy.deepcopy(model), recipe, backend="eager")
    sums = {name: [0.0, 0.0] for name in exact}
    for _ in range(repeats):
        for name, grad in gradients(quantized, x, y).items():
            reference = exact[name]
            sums[name][0] += float((grad - reference).square().sum() / reference.square().sum()) / repeats
            sums[name][1] += float(F.cosine_similarity(grad.flatten(), reference.flatten(), dim=0)) / repeats
    return {name: (10 * torch.tensor(nmse).log10().item(), cosine) for name, (nmse, cosine) in sums.items()}


def pretrain(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Some epochs in float, so that gradients look as they do in training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    fast = torch.compile(model, dynamic=False)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(128)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(fast(images[index]), labels[index]).backward()
            optimizer.step()


def main() -> None:
    """Prints one table for each state of the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=[name for name in recipes.RECIPES if name != "identity"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", action="store_true", help="a row for each layer")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = cifar.load(args.data, "train")
    model = ResNet(blocks=1)
    for state in ("at initialization", f"after {args.epochs} epochs in float"):
        if state != "at initialization":
            pretrain(model, images, labels, args.epochs)
        table = Table("recipe", "layer", "error, dB", "cosine", title=f"Weight gradients {state}")
        for recipe in args.recipes:
            found = errors(model, recipe, images[:128], labels[:128], args.repeats)
            rows = torch.tensor(list(found.values()))
            table.add_row(recipe, "median", f"{rows[:, 0].median():.2f}", f"{rows[:, 1].median():.4f}")
            for name, (decibels, cosine) in found.items() if args.layers else ():
                table.add_row("", name, f"{decibels:.2f}", f"{cosine:.4f}")
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
