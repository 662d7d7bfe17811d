"""Training steps of six models: ours against every rival in float, and the peers that are installed.

    python benchmarks/steps.py [--models ResNet-20 …] [--contenders float tensor-int8 …] [--threads 1] [--rounds 9]
                               [--batch N] [--width 1.0] [--depth 1.0] [--results FILE] [--again] [--pages]

Every contender is a process of its own, started three times with one cache folder, empty at first: compiled cold, then
for memory, then warm. The last stays: all of these take turns, one step each a round, so that a drift of the machine
meets all. The results file gets a row for each, and rows that are there already are not measured again without
`--again`.
`--pages` writes the tables of README.md and docs/measurements.md anew from the results.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from step_contenders import CONTENDERS
from step_models import MODELS
from step_table import render, render_summary, replace_rows, write_into

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "steps.json"

#: for glibc: tensors go back to the system, so that the high-water mark is that of one step
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
#: memory stays with the process. Otherwise the pages of a step are fetched anew or not, as luck has it: for
#: one and the same contender 0.235 or 0.287 s
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Worker:
    """A contender in its own process."""

    def __init__(self, task: dict[str, Any], cache: str) -> None:
        # Inductor keeps the header that it compiles once beside the caches of all programs, in the folder of the system
        own = {"TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}
        own |= _RETURN_MEMORY if task.get("part") == "memory" else _KEEP_MEMORY
        command = [sys.executable, "-W", "ignore", str(HERE / "step_worker.py"), json.dumps(task)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command, text=True, env=os.environ | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def read(self) -> Any:
        """Return what the process prints next.

        Raises:
            RuntimeError: the process ended; with the last line of its errors.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            reason = (self._errors.read().strip().splitlines() or ["it ended without a word"])[-1]
            self.close()
            raise RuntimeError(reason)
        return json.loads(line)

    def step(self) -> float:
        """Return the seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self.read())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def measure_machine(threads: int) -> dict[str, Any]:
    """Return operations a second in float32 and int8, and bytes a second of a copy: what a floor is made of."""
    torch.set_num_threads(threads)
    a, codes = torch.randn(1024, 1024), torch.randint(-128, 127, (1024, 1024), dtype=torch.int8)
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    name = next((line for line in _list_lines("/proc/cpuinfo") if line.startswith("model name")), "processor: unknown")
    return {
        "processor": name.partition(":")[2].strip(),
        "torch": torch.__version__,
        "float": 2 * 1024**3 / _find_least(lambda: a @ a),
        "int8": 2 * 1024**3 / _find_least(lambda: torch._int_mm(codes, codes)),
        "copy": 8 * source.numel() / _find_least(lambda: target.copy_(source)),
    }


def _list_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _find_least(call: Any) -> float:
    return min(timeit.repeat(call, number=1, repeat=9))


def start_worker(task: dict[str, Any]) -> tuple[Worker | None, dict[str, Any]]:
    """Return a running contender and its row; without a worker if it failed."""
    row: dict[str, Any] = dict(task)
    with tempfile.TemporaryDirectory() as cache:
        try:
            for part in ("cold", "memory"):
                worker = Worker(task | {"part": part}, cache)
                row |= worker.read()
                worker.close()
            warm = Worker(task, cache)
            row |= warm.read()
        except RuntimeError as error:
            return None, row | {"error": str(error)}
    return warm, row | {"seconds": []}


def measure_model(tasks: list[dict[str, Any]], rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Return the rows of all contenders on one model, whose steps took turns."""
    bar = progress.add_task(tasks[0]["model"], total=len(tasks) + rounds)
    started = []
    for task in tasks:
        progress.update(bar, description=f"{task['model']}: {task['contender']}")
        started.append(start_worker(task))
        progress.advance(bar)
    for _ in range(rounds):
        for worker, row in started:
            if worker is not None:
                row["seconds"].append(worker.step())
        progress.advance(bar)
    for worker, _ in started:
        if worker is not None:
            worker.close()
    return [row for _, row in started]


def main() -> None:
    """Measures what is missing, writes the results, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--contenders", nargs="*", default=[one.name for one in CONTENDERS])
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--batch", type=int, default=0, help="0 is the usual one of each model")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--depth", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure rows again that are there already")
    parser.add_argument("--pages", action="store_true", help="write the tables into README.md and the docs")
    args = parser.parse_args()
    unknown = set(args.contenders) - {one.name for one in CONTENDERS}
    if unknown:
        parser.error(f"contender: got {', '.join(sorted(unknown))}; valid: {'; '.join(one.name for one in CONTENDERS)}")
    results = json.loads(args.results.read_text()) if args.results.exists() else {"machine": {}, "rows": []}
    with Progress() as progress:
        for model, threads in itertools.product(args.models, args.threads):
            shape = {"threads": threads, "batch": args.batch, "width": args.width, "depth": args.depth}
            tasks = _list_tasks(model, args.contenders, shape, [] if args.again else results["rows"])
            results["machine"][str(threads)] = results["machine"].get(str(threads)) or measure_machine(threads)
            if tasks:
                rows = measure_model(tasks, args.rounds, progress)
                results["rows"] = replace_rows(results["rows"], rows, [one.name for one in CONTENDERS])
                args.results.write_text(json.dumps(results, indent=1))
    print(render(results))
    if args.pages:
        write_into(HERE.parent / "README.md", render_summary(results))
        write_into(HERE.parent / "docs" / "measurements.md", render(results))


def _list_tasks(
    model: str, names: list[str], shape: dict[str, Any], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return what is to be measured: nothing if all rows are there, else all of a model, since they take turns."""
    given = [one for one in CONTENDERS if one.name in names and (MODELS[model].has_orders or not one.channels_last)]
    tasks = [{"model": model, "contender": one.name, **shape} for one in given]
    done = [{name: row[name] for name in tasks[0]} for row in rows] if tasks else []
    return [] if all(task in done for task in tasks) else tasks


if __name__ == "__main__":
    main()
