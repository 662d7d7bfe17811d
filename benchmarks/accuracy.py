"""Accuracy of recipes against float: paired seeds, mean and 95 % interval.

    python benchmarks/accuracy.py --data FOLDER [--net resnet-8] [--seeds 5] [--epochs 5] [--one-edge] [--results FILE]
                                  [RECIPE ...]

FOLDER holds `cifar10-small.npz` (10,000 images to train on) and `cifar10.npz` (its 10,000 test images to judge by).
Every finished run is appended to the results file, and a run that is there already is not repeated: stop and start at
will. A seed fixes initialization, order and augmentation, so that recipes are compared in pairs with float.
`RECIPE+int8` and `RECIPE+int4` are the recipe with `save="int8"` and `save="int4"`, `RECIPE+auto` with
`execution="auto"`.
`--one-edge` leaves out the evaluation with the blocks of training, which is a compilation of its own.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar
from cifar10 import train

import qcompiler
from qcompiler import recipes
from qcompiler.compiler.graph_compiler import GraphCompiler
from qcompiler.demo.nets import VGG, ResNet, measure_accuracy

NETS = {"resnet-8": lambda: ResNet(blocks=1), "resnet-20": lambda: ResNet(blocks=3), "vgg": VGG}
RECIPES = ("hyperblock-int8", "hyperblock-int4", "channelwise-int4", "tensor-int4")
#: recipes whose gradients have scale 1 need it, as in their papers
LOSS_SCALES = {"fp8-2018": 1024.0, "hfp8": 1024.0}
#: two-sided 95 % quantile of Student's t by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def run(
    net: str,
    recipe: str,
    seed: int,
    epochs: int,
    data: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    one_edge: bool,
) -> dict[str, float | None]:
    """Trains one network; {"per sample": percent right with batch edge 1, "training blocks": with that of training}."""
    torch._dynamo.reset()  # Dynamo counts compilations of one forward: after 8 it would run in float
    torch.manual_seed(seed)
    plain = NETS[net]().to(memory_format=torch.channels_last)
    if recipe == "float":
        train(torch.compile(plain, dynamic=False), *data, epochs, seed)
        score = measure_accuracy(plain, *test)
        return {"per sample": score, "training blocks": score}
    name, _, option = recipe.partition("+")
    given = {"execution": option} if option == "auto" else {"save": option or None}
    model = qcompiler.compile(plain, name, **given)
    train(model, *data, epochs, seed, LOSS_SCALES.get(recipe, 1))
    score = measure_accuracy(model, *test)
    if model.recipe.has_state:  # ranges of the past do not depend on the batch
        return {"per sample": score, "training blocks": score}
    if one_edge:
        return {"per sample": score, "training blocks": None}
    return {"per sample": score, "training blocks": measure_accuracy(batch_blocks(plain, name), *test)}


def batch_blocks(plain: nn.Module, recipe: str) -> nn.Module:
    """The same network in eval mode with the blocks of training, which span several samples."""
    backend = GraphCompiler(recipes.get(recipe))
    return torch.compile(plain, backend=backend, dynamic=False)  # type: ignore[return-value]


def interval(values: list[float]) -> str:
    """Mean and half width of the 95 % interval, by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def key(row: dict[str, object]) -> tuple[object, ...]:
    """What names a run; rows without a net are of ResNet-8, which was the only one."""
    return row.get("net", "resnet-8"), row["recipe"], row["seed"], row["epochs"]


def report(results: list[dict[str, object]], net: str, epochs: int) -> Table:
    """One row a recipe: accuracies, and the paired difference from float."""
    title = f"{net}, {epochs} epochs"
    table = Table("recipe", "seeds", "batch edge 1, %", "training edge, %", "difference from float", title=title)
    scores = {(r["recipe"], r["seed"]): r for r in results if key(r) == (net, r["recipe"], r["seed"], epochs)}
    for recipe in dict.fromkeys(name for name, _ in scores):
        seeds = sorted(seed for name, seed in scores if name == recipe)
        single = [float(scores[recipe, s]["per sample"]) for s in seeds]
        block = [float(edge) for s in seeds if (edge := scores[recipe, s]["training blocks"]) is not None]
        paired = [
            a - float(scores["float", s]["per sample"])
            for a, s in zip(single, seeds, strict=True)
            if ("float", s) in scores
        ]
        difference = interval(paired) if recipe != "float" and paired else ""
        table.add_row(str(recipe), str(len(seeds)), interval(single), interval(block) if block else "", difference)
    return table


def main() -> None:
    """Runs what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["float", *RECIPES])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--net", choices=NETS, default="resnet-8")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--one-edge", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("accuracy.jsonl"))
    args = parser.parse_args()
    results = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {key(r) for r in results}
    data, test = cifar.load(args.data / "cifar10-small.npz", "train"), cifar.load(args.data / "cifar10.npz", "test")
    for seed, recipe in itertools.product(range(args.seeds), args.recipes):
        row: dict[str, object] = {"net": args.net, "recipe": recipe, "seed": seed, "epochs": args.epochs}
        if key(row) in done:
            continue
        print(f"{args.net}, {recipe}, seed {seed}")
        row |= run(args.net, recipe, seed, args.epochs, data, test, one_edge=args.one_edge)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        results.append(row)
        Console(width=110).print(report(results, args.net, args.epochs))
    Console(width=110).print(report(results, args.net, args.epochs))


if __name__ == "__main__":
    main()
