"""One run on a GPU, at most 6 minutes with all compilation: checks, kernels, steps, memory, training.

    python benchmarks/gpu.py --out FOLDER [--device cuda] [--data PATH] [--minutes 6] [--tiny]

First comes what is promised bit for bit: kernels, quantizers and steps on the device against the CPU. Then the time of
single kernels, and of training steps against compiled bfloat16; memory; and ResNet-20 on CIFAR-10 (PATH as in
examples/cifar10.py; without it, on the digits of the demo). Each section has a budget of time, stops when it is over,
and says what is missing. FOLDER gets gpu.json and gpu.md, written anew after each section. `--device cpu --tiny` runs
everything small, for tests.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from gpu_checks import list_checks
from gpu_kernels import list_kernels
from gpu_measures import list_memories, list_speeds, list_trainings
from gpu_section import Row, Section, Setting, name_device, run_section
from rich.progress import Progress

SECTIONS: Final = (
    Section("checks", 75, list_checks),
    Section("kernels", 25, list_kernels),
    Section("speed", 110, list_speeds),
    Section("memory", 45, list_memories),
    Section("training", 85, list_trainings),
)
#: seconds for imports, the last report and the end of the process
_RESERVE: Final = 20


def run(setting: Setting, seconds: float, out: Path) -> dict[str, Any]:
    """Return the results of all sections; a section gets what those before it have left."""
    end = time.monotonic() + seconds
    results: dict[str, Any] = {"device": name_device(setting.device), "torch": torch.__version__, "sections": []}
    results["triton"] = _find_version("triton")
    share = seconds / sum(one.budget for one in SECTIONS)
    out.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        for place, section in enumerate(SECTIONS):
            later = share * sum(one.budget for one in SECTIONS[place + 1 :])
            results["sections"].append(run_section(section, setting, end - time.monotonic() - later, progress))
            (out / "gpu.json").write_text(json.dumps(results, indent=1))
            (out / "gpu.md").write_text(render(results))
    return results


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def render(results: dict[str, Any]) -> str:
    """Return the results as Markdown: a table for each section."""
    parts = [f"# {results['device']}, torch {results['torch']}, Triton {results['triton']}\n"]
    for section in results["sections"]:
        parts.append(f"## {section['section']}\n")
        parts += [f"{section['note']}\n"] * bool(section["note"])
        parts += [_write_table(_add_ratios(section["rows"]))] * bool(section["rows"])
    return "\n".join(parts)


def _add_ratios(rows: list[Row]) -> list[Row]:
    """Return the rows with the time of a step over that of bfloat16 of the same model."""
    base = {row["model"]: row["step, ms"] for row in rows if row.get("contender") == "bfloat16" and "model" in row}
    return [
        {**row, "× bfloat16": f"{row['step, ms'] / base[row['model']]:.2f}"} if row.get("model") in base else row
        for row in rows
    ]


def _write_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")).replace("|", "/") for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in (names, ["---"] * len(names), *cells))


def main() -> None:
    """Runs all sections; ends with 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device: got cuda, and torch finds no GPU; valid: --device cpu")
    results = run(Setting(args.device, args.tiny, args.data), 60 * args.minutes - _RESERVE, args.out)
    print(render(results))
    checks = results["sections"][0]["rows"]
    sys.exit(any(row.get("passed") is False or "error" in row for row in checks))


if __name__ == "__main__":
    main()
