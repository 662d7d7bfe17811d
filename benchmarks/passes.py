"""Seconds of processor time of our work on one captured graph, pass by pass, for growing networks.

    python benchmarks/passes.py [--network blocks|convolutions] [--nodes 1000 10000 20000] [--recipe hyperblock-int8]

Nodes are the nodes of the joint graph as captured. The last column is the time of a node in the largest graph by the
time of a node in the smallest one: 1 is linear growth. The work of torch (Dynamo, AOTAutograd, and the partitioner
that `partition` calls) and the first forward, node by node, stand below the sum.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qcompiler
from qcompiler.compiler import torch_compat
from qcompiler.compiler.cache import cache_compat, files
from qcompiler.compiler.graph_compiler import GraphCompiler
from qcompiler.passes.base import Pipeline

SUM, REST, WRITING = "ours, all together", "capture, plan, copies", "kept for the next process"
TORCH = ("AOTAutograd", "torch's partitioner")
OTHERS = (*TORCH, "Dynamo and the first forward")


class Block(nn.Module):
    """A transformer block of 16 channels and 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.mixed, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then two layers, each beside the identity."""
        parts = self.mixed(self.norms[0](x)).split(16, -1)
        q, k, v = (part.view(2, 8, 2, 8).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 8, 16)
        x = x + self.out(mixed)
        return x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))


def make_convolution() -> nn.Module:
    """Return a convolution with batch norm and relu."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


#: name → a layer, an input, and the nodes that a layer adds to the joint graph
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "blocks": (Block, (2, 8, 16), 120),
    "convolutions": (make_convolution, (2, 8, 6, 6), 25),
}


class Clock:
    """Seconds of each part; a part that runs inside of another one is taken off the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.nodes = 0
        self._inner = 0.0

    def around(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same, and adds its seconds to a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self._inner, start = self._inner, 0.0, time.process_time()
            try:
                return run(*args, **kwargs)
            finally:
                whole = time.process_time() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
                self._inner = before + whole

        return timed

    def export(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return the capture by AOTAutograd, timed, which counts the nodes."""
        timed = self.around(TORCH[0], run)

        def count(*args: Any) -> Any:
            found = timed(*args)
            self.nodes = len(found[0].graph.nodes)
            return found

        return count

    def passes(self, run: Callable[..., None]) -> Callable[..., None]:
        """Return `Pipeline.__call__` that times every pass with the check after it."""

        def call(pipeline: Pipeline[Any], subject: Any, observe: Any = None) -> None:
            steps = [Timed(step.name, self.around(step.name, step)) for step in pipeline.passes]
            run(Pipeline(tuple(steps), self.around("checks after passes", pipeline.verify)), subject, observe)

        return call


class Timed:
    """A pass that is timed."""

    def __init__(self, name: str, run: Callable[[Any], int]) -> None:
        self.name, self._run = name, run

    def __call__(self, subject: Any) -> int:
        """Run the pass."""
        return self._run(subject)


def measure(network: str, layers: int, recipe: str) -> Clock:
    """Compile a network of so many layers, and run its first forward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, shape, _ = NETWORKS[network]
    model, clock = nn.Sequential(*(make() for _ in range(layers))), Clock()
    qmodel = qcompiler.compile(model, recipe, backend="eager")
    with (
        tempfile.TemporaryDirectory() as folder,  # empty: nothing is found in it
        mock.patch.object(cache_compat, "find_cache", return_value=Path(folder)),
        mock.patch.object(files, "_write", clock.around(WRITING, files._write)),
        mock.patch.object(torch_compat, "export_joint", clock.export(torch_compat.export_joint)),
        mock.patch.object(torch_compat, "split_joint", clock.around(TORCH[1], torch_compat.split_joint)),
        mock.patch.object(Pipeline, "__call__", clock.passes(Pipeline.__call__)),
        mock.patch.object(GraphCompiler, "__call__", clock.around(REST, GraphCompiler.__call__)),
    ):
        clock.around(OTHERS[2], qmodel)(torch.randn(shape))
    return clock


def count_layers(network: str, nodes: int) -> int:
    """Return the number of layers whose joint graph has about so many nodes."""
    return max(1, round(nodes / NETWORKS[network][2]))


def main() -> None:
    """Measures every size, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="blocks")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1000, 2000, 5000, 10000, 20000])
    parser.add_argument("--recipe", default="hyperblock-int8")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(args.network, 1, args.recipe)  # imports, and tables that torch fills once
    clocks = [measure(args.network, count_layers(args.network, nodes), args.recipe) for nodes in args.nodes]
    Console(width=120).print(make_table(clocks))


def make_table(clocks: Sequence[Clock]) -> Table:
    """Return a row for every part, with the sum of ours before what is not ours."""
    table = Table("seconds", *(f"{clock.nodes:,} nodes" for clock in clocks), "growth")
    parts = [name for name in clocks[-1].seconds if name not in OTHERS]
    for name in sorted(parts, key=lambda name: -clocks[-1].seconds[name]):
        table.add_row(*make_row(name, clocks, [name]))
    table.add_section()
    table.add_row(*make_row(SUM, clocks, parts))
    table.add_section()
    for name in OTHERS:
        table.add_row(*make_row(name, clocks, [name]))
    return table


def make_row(title: str, clocks: Sequence[Clock], parts: Sequence[str]) -> list[str]:
    """Return the seconds of some parts together, and how the time of a node grows."""
    seconds = [sum(clock.seconds.get(name, 0.0) for name in parts) for clock in clocks]
    each = [value / clock.nodes for value, clock in zip(seconds, clocks, strict=True)]
    growth = f"{each[-1] / each[0]:.2f}" if each[0] else ""
    return [title, *(f"{value:.2f}" for value in seconds), growth]


if __name__ == "__main__":
    main()
