"""Train ResNet-20 on CIFAR-10 through a recipe.

    python examples/cifar10.py --data PATH [--recipe hyperblock-int4] [--epochs 20]

PATH is `cifar10.npz`, `cifar10-small.npz`, or the folder that torchvision unpacks. `--recipe float` is plain PyTorch.
"""

import argparse
from pathlib import Path

import cifar
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import qcompiler
from qcompiler.demo.nets import ResNet, measure_accuracy


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int, loss_scale: float = 1) -> None:
    """SGD, momentum 0.9, weight decay 5e-4, one-cycle cosine, batch 128, shifts and mirroring; a progress bar.

    A loss scale other than 1 lifts gradients into the range of a narrow format; updates are divided by it again.
    """
    rate = 0.1
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, growth_interval=10**9, enabled=loss_scale != 1)
    steps = len(images) // 128
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.2)
    learned: torch.optim.Optimizer | None = None  # of learned ranges, which exist after the first forward
    generator = torch.Generator().manual_seed(seed)
    with Progress() as progress:
        task = progress.add_task("training", total=epochs * steps)
        for epoch in range(epochs):
            model.train()
            order = torch.randperm(len(images), generator=generator)[: steps * 128]
            for index in order.split(128):
                optimizer.zero_grad()
                batch = cifar.augment(images[index], generator).to(memory_format=torch.channels_last)
                loss = F.cross_entropy(model(batch), labels[index])
                if learned is None and isinstance(model, qcompiler.QuantizedModule) and model.quantizer_parameters():
                    learned = torch.optim.Adam(model.quantizer_parameters(), lr=1e-5)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                if learned is not None:
                    scaler.step(learned)
                    learned.zero_grad()
                scaler.update()
                schedule.step()
                progress.update(task, advance=1, description=f"epoch {epoch + 1}, loss {loss.item():.3f}")


def main() -> None:
    """Trains, then prints the test accuracy and the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", default="hyperblock-int4")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model: nn.Module = ResNet(blocks=3).to(memory_format=torch.channels_last)
    model = torch.compile(model, dynamic=False) if args.recipe == "float" else qcompiler.compile(model, args.recipe)
    train(model, *cifar.load(args.data, "train"), args.epochs, args.seed)
    if isinstance(model, qcompiler.QuantizedModule):
        print(model.plan())
    print(f"test accuracy: {measure_accuracy(model, *cifar.load(args.data, 'test')):.2f} %")


if __name__ == "__main__":
    main()
