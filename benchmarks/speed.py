"""Time of a training step against compiled float32, in both memory formats, in one run.

    python benchmarks/speed.py [--recipes hyperblock-int8] [--blocks 3] [--batch 128] [--rounds 9] [--formats NCHW]

Every contender takes its turn in every round; medians and ratios to the faster float are printed.
"""

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

import qcompiler
from qcompiler.demo.measure import measure_saved_bytes, one_step, paired_times
from qcompiler.demo.nets import ResNet

FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


def main() -> None:
    """Compiles every contender, then times them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["hyperblock-int8"])
    parser.add_argument("--blocks", type=int, default=3, help="3 is ResNet-20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    args = parser.parse_args()
    steps, saved = {}, {}
    y = torch.randint(10, (args.batch,))
    for format_name in args.formats:
        memory_format = FORMATS[format_name]
        x = torch.randn(args.batch, 3, 32, 32).to(memory_format=memory_format)
        for name in ["float", *args.recipes]:
            plain = ResNet(args.blocks).to(memory_format=memory_format)
            model = (
                torch.compile(plain, dynamic=False)
                if name == "float"
                else qcompiler.compile(plain, name, backend="inductor")
            )
            row, start = f"{name}, {format_name}", time.perf_counter()
            steps[row] = one_step(model, x, y)
            for _ in range(2):  # the first step of kept ranges is not the compiled one
                steps[row]()
            saved[row] = measure_saved_bytes(model, x)
            print(f"{row}: first step {time.perf_counter() - start:.0f} s, then compiled")
    times = paired_times(steps, args.rounds)
    best = min(seconds for row, seconds in times.items() if row.startswith("float"))
    table = Table("", "ms per step", "of the faster float", "MB saved for backward")
    for row, seconds in times.items():
        table.add_row(row, f"{1000 * seconds:.1f}", f"{seconds / best:.2f}×", f"{saved[row] / 1e6:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
