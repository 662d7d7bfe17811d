"""What ranges of the past cost: a small residual network on Fashion-MNIST, each role in hindsight or not, paired seeds.

    python benchmarks/hindsight.py --data FOLDER [--seeds 3] [--epochs 3] [--guard 0.01] [--backend inductor] [RUN ...]

FOLDER holds the four files of Fashion-MNIST, `train-images-idx3-ubyte.gz` and so on. A run is `float`, the name of a
recipe, or the roles in hindsight, such as `gradient+output`; all other roles take current ranges then. Printed for each
seed: test accuracy, that of the same weights in float, the loss of the last 50 steps, how often the guard fired.
"""

import argparse
import gzip
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompiler
from qcompiler import recipes
from qcompiler.demo.nets import Block, measure_accuracy
from qcompiler.passes.rules import Role, Rule
from qcompiler.runtime.spec import parse_spec

MEAN, DEVIATION = 0.2860, 0.3530  # of the pixels of the training images
IMAGES, BATCH = 12_800, 128


def load(folder: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images, normalized, and their labels."""
    pixels, labels = (
        torch.frombuffer(
            bytearray(gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())[skip:]), dtype=torch.uint8
        )
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images = pixels.view(-1, 1, 28, 28)[:count].float() / 255
    return (images - MEAN) / DEVIATION, labels[:count].long()


def network() -> nn.Sequential:
    """12, 24 and 48 channels, two residual blocks."""
    stem = (nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    return nn.Sequential(
        *stem, Block(12, 24, 2), Block(24, 48, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    )


def recipe(run: str, guard: float) -> qcompiler.Recipe:
    """A named recipe, or that of In-Hindsight with some of its roles in hindsight."""
    if run in recipes.RECIPES:
        return recipes.get(run)
    past = {Role(role) for role in run.split("+")}
    rules = [Rule(role=Role.WEIGHT, spec=parse_spec("int8:real:tensor:nearest:pass"))]
    for role in (Role.ACTIVATION, Role.OUTPUT, Role.GRADIENT):
        rounding = "stochastic" if role is Role.GRADIENT else "nearest"
        estimator = f"hindsight(0.9,{guard:g})" if role in past else "current"
        rules.append(Rule(role=role, spec=parse_spec(f"affine8:real:tensor:{rounding}:pass:{estimator}")))
    return qcompiler.Recipe(name=run, rules=tuple(rules))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> float:
    """SGD with momentum and a cosine; the mean loss of the last 50 steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(images) // BATCH))
    order, losses = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[index]), labels[index])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    """One line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=["float", "current-w8a8g8", "in-hindsight-w8a8g8"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--guard", type=float, default=0.01)
    parser.add_argument("--backend", default="inductor")
    args = parser.parse_args()
    data, test = load(args.data, "train", IMAGES), load(args.data, "t10k", 10_000)
    for seed, run in itertools.product(range(args.seeds), args.runs):
        torch._dynamo.reset()  # Dynamo counts compilations of one forward: after 8 it would run in float
        torch.manual_seed(seed)
        plain = network()
        model = plain if run == "float" else qcompiler.compile(plain, recipe(run, args.guard), backend=args.backend)
        loss = train(model, *data, args.epochs, seed)
        states = model.ranges().values() if isinstance(model, qcompiler.QuantizedModule) else ()
        fired = sum(int(state[2].max()) for state in states if len(state) == 3)
        scores = f"test {measure_accuracy(model, *test):.2f} %, in float {measure_accuracy(plain, *test):.2f} %"
        print(f"seed {seed}, {run}: {scores}, loss {loss:.4f}, guard {fired}", flush=True)


if __name__ == "__main__":
    main()
