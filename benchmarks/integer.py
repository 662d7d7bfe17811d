"""Time of a training step of an MLP or a ResNet: integers against simulation and compiled floats, in one run.

    python benchmarks/integer.py [--recipes tensor-int8] [--width 1024] [--hidden 4096] [--batch 512] [--rounds 9]
    python benchmarks/integer.py --blocks 3 --width 16 --size 32 --batch 128 [--channels-last]

A step is forward, loss and backward. Every contender takes its turn in every round; medians and ratios are printed.
"""

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qcompiler
from qcompiler.demo.measure import one_step, paired_times
from qcompiler.demo.nets import ResNet


def main() -> None:
    """Compiles every contender, then times them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["tensor-int8"])
    parser.add_argument("--executions", nargs="*", default=["simulate", "integer"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=0, help="of a stage of a ResNet; 0: the MLP")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    x, y = torch.randn(_list_extents(args)), torch.randint(10, (args.batch,))
    order = torch.channels_last if args.channels_last else torch.preserve_format
    steps = {}
    for row in ["float32", "bfloat16", *(f"{recipe}, {how}" for recipe in args.recipes for how in args.executions)]:
        plain = _make_model(args).to(memory_format=order)
        model = _compile_model(plain, row)
        start = time.perf_counter()
        given = x.bfloat16() if row == "bfloat16" else x
        steps[row] = one_step(model, given.contiguous(memory_format=order) if args.channels_last else given, y)
        for _ in range(2):  # the first step of kept ranges is not the compiled one
            steps[row]()
        print(f"{row}: first steps {time.perf_counter() - start:.0f} s", flush=True)
    times = paired_times(steps, args.rounds)
    table = Table("", "ms per step", "of float32", "of the faster float")
    fastest = min(times["float32"], times["bfloat16"])
    for row, seconds in times.items():
        table.add_row(row, f"{1000 * seconds:.1f}", f"{seconds / times['float32']:.2f}×", f"{seconds / fastest:.2f}×")
    Console().print(table)


def _list_extents(args: argparse.Namespace) -> tuple[int, ...]:
    return (args.batch, 3, args.size, args.size) if args.blocks else (args.batch, args.width)


def _make_model(args: argparse.Namespace) -> nn.Module:
    if args.blocks:
        return ResNet(args.blocks, width=args.width, stages=args.stages)
    return nn.Sequential(nn.Linear(args.width, args.hidden), nn.ReLU(), nn.Linear(args.hidden, args.width))


def _compile_model(model: nn.Module, row: str) -> nn.Module:
    if row in ("float32", "bfloat16"):
        return torch.compile(model.to(getattr(torch, row)), dynamic=False)  # type: ignore[return-value]
    recipe, _, execution = row.partition(", ")
    return qcompiler.compile(model, recipe, backend="inductor", execution=execution)


if __name__ == "__main__":
    main()
