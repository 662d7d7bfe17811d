"""Train one small network through several recipes, print a table, and plot the curves.

    python examples/compare_formats.py [--recipes hyperblock-int8 mxfp4 …] [--epochs 8] [--plot formats.png]

The images are the handwritten digits of scikit-learn (`pip install 'qcompiler[demo]'`); nothing is downloaded. The plot
needs `pip install 'qcompiler[plot]'`. Without matplotlib the script prints the table only, and says so.
"""

import argparse
import copy
import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import qcompiler
from qcompiler.demo.digits import load_digits
from qcompiler.demo.measure import measure_saved_bytes
from qcompiler.demo.nets import ResNet, measure_accuracy

RECIPES = ("hyperblock-int8", "hyperblock-int4", "channelwise-int4", "tensor-int4", "mxfp8", "mxfp4")
BATCH = 64


@dataclasses.dataclass
class Run:
    """One trained network: its curves, and its row of the table."""

    name: str
    losses: list[float]
    accuracies: list[float]
    quantizers: int = 0
    in_float: int = 0
    saved: int = 0
    seconds: float = 0.0


def train(name: str, model: nn.Module, data: Sequence[Tensor], epochs: int) -> Run:
    """SGD with momentum and a cosine; the same order of batches for every recipe."""
    images, labels, test_images, test_labels = data
    steps, run, start = len(images) // BATCH, Run(name, [], []), time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator, learned = torch.Generator().manual_seed(1), None
    for _ in track(range(epochs), description=f"{name:>20}"):
        model.train()
        for index in torch.randperm(len(images), generator=generator)[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[index]), labels[index])
            learned = learned or optimizer_of_ranges(model)
            loss.backward()
            optimizer.step()
            learned.step()
            learned.zero_grad()
            schedule.step()
            run.losses.append(loss.item())
        run.accuracies.append(measure_accuracy(model, test_images, test_labels, batch=len(test_images)))
    model.train()
    run.saved, run.seconds = measure_saved_bytes(model, images[:BATCH]), time.perf_counter() - start
    if isinstance(model, qcompiler.QuantizedModule):
        plan = model.plan()
        run.quantizers, run.in_float = len(plan.sites), len(plan.kept)
    return run


def optimizer_of_ranges(model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam for the learned ranges of a recipe, which exist after the first forward; mostly there are none."""
    ranges = model.quantizer_parameters() if isinstance(model, qcompiler.QuantizedModule) else []
    return torch.optim.Adam([{"params": ranges}], lr=1e-5)


def print_table(runs: Sequence[Run]) -> None:
    """One row a recipe. One seed tells a recipe that fails from one that trains, no more."""
    print(f"{'recipe':>20}  test, %  last losses  quantizers  operands in float  saved, bytes  seconds")
    for run in runs:
        last = sum(run.losses[-10:]) / len(run.losses[-10:])
        row = f"{run.name:>20}  {run.accuracies[-1]:7.1f}  {last:11.4f}  {run.quantizers:10}"
        print(f"{row}  {run.in_float:17}  {run.saved:12,}  {run.seconds:7.1f}")


def plot(runs: Sequence[Run], path: Path) -> bool:
    """Write the curves of loss and of test accuracy; return False if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        means = torch.tensor(run.losses).unfold(0, min(10, len(run.losses)), 1).mean(1)
        left.plot(means.tolist(), label=run.name)
        right.plot(range(1, len(run.accuracies) + 1), run.accuracies, label=run.name)
    left.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    right.legend()
    figure.savefig(path, dpi=150)
    return True


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Train the network in float and through every recipe, from the same weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names, or paths of .yaml files")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--backend", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--plot", type=Path, default=Path("formats.png"))
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    data, base = load_digits(), ResNet(blocks=1, width=args.width, channels=1, stages=2)
    runs = [train("float", copy.deepcopy(base), data, args.epochs)]
    for recipe in args.recipes:
        torch.manual_seed(1)  # stochastic rounding draws from it
        model = qcompiler.compile(copy.deepcopy(base), recipe, backend=args.backend)
        runs.append(train(model.recipe.name, model, data, args.epochs))
    print_table(runs)
    print(f"curves: {args.plot}" if plot(runs, args.plot) else "no plot: pip install 'qcompiler[plot]'")
    return runs


if __name__ == "__main__":
    main()
