"""Train a small residual network on handwritten digits, in float and with 4-bit hyperblocks, side by side.

    python examples/digits.py [--recipe hyperblock-int4] [--epochs 12] [--backend inductor]

The digits are the 1,797 real images of 8×8 pixels that scikit-learn ships. Nothing is downloaded.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from measure import one_step, paired_times, saved_bytes
from nets import ResNet, accuracy
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import qcompiler


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels): 1,408 and 389 images as float32 [n, 1, 8, 8] in 0 … 1."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(data.images, dtype=torch.float32) / 16).unsqueeze(1)[order]
    labels = torch.tensor(data.target)[order]
    return images[:1408], labels[:1408], images[1408:], labels[1408:]


def train(name: str, model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 64) -> None:
    """SGD with momentum and a cosine schedule; the loop knows nothing of quantization."""
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in track(range(steps), description=f"{name:>16}"):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images), generator=generator).split(batch)
        index = order[step % (len(images) // batch)]
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    """Trains both networks and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="hyperblock-int4")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--backend", choices=["eager", "inductor"], default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    plain = ResNet(blocks=1, channels=1, stages=2)
    quantized = qcompiler.compile(copy.deepcopy(plain), args.recipe, backend=args.backend)
    print("The first step of the quantized network compiles it: that takes most of the time here.")
    for name, model in (("float", plain), (args.recipe, quantized)):
        train(name, model, images, labels, args.epochs)
    table = Table("", "float", args.recipe)
    scores = [accuracy(model, test_images, test_labels, batch=389) for model in (plain, quantized)]
    table.add_row("test accuracy, %", *(f"{score:.1f}" for score in scores))
    x, y = images[:64], labels[:64]
    plain.train(), quantized.train()
    plan = quantized.plan()
    table.add_row("quantizers before deduplication", "-", str(plan.placed))
    table.add_row("quantizers after", "-", str(len(plan.sites)))
    table.add_row("bytes saved for backward", *(f"{saved_bytes(model, x):,}" for model in (plain, quantized)))
    times = paired_times({name: one_step(m, x, y) for name, m in (("float", plain), ("quantized", quantized))})
    table.add_row("time per step, ms", *(f"{1000 * seconds:.1f}" for seconds in times.values()))
    Console().print(table)
    for note in plan.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    main()
