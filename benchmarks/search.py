"""The search against the uniform recipe at equal mean bits: error of gradients, and accuracy over paired seeds.

    python benchmarks/search.py --data FOLDER [--net resnet-20] [--batches 2] [--batch 32] [--epochs 1] [--out FOLDER]
    python benchmarks/search.py --data FOLDER --accuracy [--seeds 5] [--train-epochs 5]

FOLDER holds `cifar10-small.npz` and `cifar10.npz`. The uniform recipe has int4 in blocks of 16 everywhere, 4.5 bits an
element with the scales. The network is trained in float for some epochs, then searched on some batches; the error of
gradients is measured on other batches. The search goes on where it was stopped. With --accuracy both recipes are then
trained from scratch; a seed fixes initialization, order and augmentation. Finished runs are kept in the folder.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar
from accuracy import NETS, interval, run
from gradient_error import pretrain

import qcompiler
from qcompiler import Recipe, Role, Rule, parse_spec
from qcompiler.runtime.figures import to_decibels
from qcompiler.searching.sensitivity import gradient_error

BITS = 4.5
UNIFORM = Recipe(
    name="uniform",
    rules=(
        Rule(spec=parse_spec("int4:max:b2c8o4i4:stochastic:pass"), role=Role.GRADIENT),
        Rule(spec=parse_spec("int4:max:b2c8o4i4:nearest:pass")),
    ),
)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of every weight matrix and filter for one batch."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.ndim > 1 and p.grad is not None}


def errors(model: nn.Module, recipe: Recipe, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """For each batch the mean over weights of ‖g − g_float‖²/‖g_float‖²."""
    exact, quantized = copy.deepcopy(model), qcompiler.compile(copy.deepcopy(model), recipe, backend="eager")
    return [gradient_error(gradients(quantized, *batch), gradients(exact, *batch)) for batch in batches]


def find(args: argparse.Namespace, data: tuple[Tensor, Tensor]) -> Recipe:
    """Searches, prints the comparison on batches that the search has not seen, writes the recipe."""
    torch.manual_seed(0)
    model = NETS[args.net]()
    state = args.out / f"{args.net}-{args.epochs}.pt"
    if state.exists():  # the same weights to the bit, so that the search can go on
        model.load_state_dict(torch.load(state))
    else:
        pretrain(model, *data, args.epochs)
        qcompiler.save(model.state_dict(), state)
    images, labels = data
    batches = list(zip(images.split(args.batch), labels.split(args.batch), strict=True))
    start = time.perf_counter()
    file = args.out / f"search-{args.net}.json"
    found = qcompiler.search(model, batches[: args.batches], budget=BITS, recipe=UNIFORM, file=file)
    print(f"searched in {time.perf_counter() - start:.0f} s")
    found.to_file(args.out / f"search-{args.net}.yaml")
    table = Table("recipe", "error of gradients, dB", "on each batch", title=f"{args.net}, {BITS} bits")
    for name, recipe in (("uniform", UNIFORM), ("search", found)):
        each = errors(model, recipe, batches[args.batches : args.batches + args.judge])
        row = ", ".join(f"{to_decibels(error):.2f}" for error in each)
        table.add_row(name, f"{to_decibels(statistics.fmean(each)):.2f}", row)
    Console(width=110).print(table)
    return found


def compare(args: argparse.Namespace, found: Recipe, data: tuple[Tensor, Tensor]) -> None:
    """Trains with both recipes for every seed, and prints means and the paired difference."""
    test, file = cifar.load(args.data / "cifar10.npz", "test"), args.out / f"accuracy-{args.net}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    texts = {"uniform": UNIFORM.to_yaml(), "found": found.to_yaml()}  # another search is another recipe of that name
    kept = [row for row in rows if row["epochs"] == args.train_epochs and row["yaml"] == texts[row["recipe"]]]
    scores = {(row["recipe"], row["seed"]): row["per sample"] for row in kept}
    found.to_file(args.out / "found.yaml")
    UNIFORM.to_file(args.out / "uniform.yaml")
    for seed, name in itertools.product(range(args.seeds), ("uniform", "found")):
        if (name, seed) in scores:
            continue
        path = str(args.out / f"{name}.yaml")
        result = run(args.net, path, seed, args.train_epochs, data, test, one_edge=True)
        scores[name, seed] = result["per sample"]
        with file.open("a") as lines:
            row = {"recipe": name, "seed": seed, "epochs": args.train_epochs, **result, "yaml": texts[name]}
            lines.write(json.dumps(row) + "\n")
        print(f"{name}, seed {seed}: {result['per sample']:.2f} %")
    pairs = [(scores["uniform", seed], scores["found", seed]) for seed in range(args.seeds)]
    uniform, own = (list(side) for side in zip(*pairs, strict=True))
    print(f"uniform {interval(uniform)} %, search {interval(own)} %, {len(pairs)} seeds")
    print(f"difference {interval([b - a for a, b in pairs])} %")


def main() -> None:
    """Searches and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--net", choices=NETS, default="resnet-20")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--judge", type=int, default=4, help="batches to measure the error of gradients on")
    parser.add_argument("--epochs", type=int, default=1, help="in float, before the search")
    parser.add_argument("--out", type=Path, default=Path("search"))
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-epochs", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = cifar.load(args.data / "cifar10-small.npz", "train")
    found = find(args, data)
    if args.accuracy:
        compare(args, found, data)


if __name__ == "__main__":
    main()
