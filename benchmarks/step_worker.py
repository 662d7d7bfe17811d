"""One contender on one model in a process of its own: benchmarks/steps.py starts it, and asks for step after step.

    python benchmarks/step_worker.py '{"model": "ResNet-20", "contender": "float"}'

With the part "cold" the worker measures the first steps, with "memory" memory, prints one line of JSON and ends.
Otherwise the worker trains some steps and prints such a line; then each line of input runs one step, and prints its
seconds.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_contenders import CONTENDERS, Contender
from step_models import Subject, make_subject
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qcompiler
from qcompiler.demo.measure import measure_saved_bytes

#: steps until everything is compiled: ranges of the past start with a step that is not
FIRST = 2
#: steps of SGD after which the loss is read
STEPS = 10


def _cast(contender: Contender) -> torch.autocast:
    """Return the context in which a contender runs forward."""
    return torch.autocast("cpu", torch.bfloat16, enabled=contender.bfloat16)


def _make_step(contender: Contender, subject: Subject, model: nn.Module) -> Callable[[], float]:
    def run() -> float:
        with _cast(contender):
            loss = subject.compute_loss(model)
        loss.backward()
        return float(loss.detach())

    return run


def _measure_peak(step: Callable[[], float]) -> int:
    """Return the bytes that a step needs at most beyond those held before; -1: this system does not tell."""
    gc.collect()
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return -1
    clear.write_text("5")  # sets the high-water mark back
    before = _read_kilobytes(status, "VmRSS")
    step()
    return 1024 * (_read_kilobytes(status, "VmHWM") - before)


def _measure_memory(
    contender: Contender, subject: Subject, model: nn.Module, step: Callable[[], float]
) -> dict[str, int]:
    with _cast(contender):
        saved = measure_saved_bytes(model, subject.x)
    return {"saved": saved, "peak": min(_measure_peak(step) for _ in range(3))}


def _read_kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


def _count_operations(subject: Subject) -> int:
    """Return the additions and multiplications of all contractions of a step."""
    with FlopCounterMode(display=False) as counter:
        subject.compute_loss(subject.model).backward()
    subject.model.zero_grad()
    return counter.get_total_flops()


def _train(contender: Contender, subject: Subject, model: nn.Module, step: Callable[[], float]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(step())
        optimizer.step()
    return losses


def main() -> None:
    """Compiles, measures, then runs a step for every line of input."""
    task: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(task.get("threads", 1))
    contender = next(one for one in CONTENDERS if one.name == task["contender"])
    subject = make_subject(task["model"], task.get("batch", 0), task.get("width", 1), task.get("depth", 1))
    operations = _count_operations(subject)
    if contender.channels_last:
        subject.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        subject = Subject(subject.model, subject.x.to(memory_format=torch.channels_last), subject.y, subject.loss)
    model = contender.build(subject)
    step = _make_step(contender, subject, model)
    start = time.perf_counter()
    for _ in range(FIRST):
        step()
    first = time.perf_counter() - start
    if task.get("part"):
        memory = _measure_memory(contender, subject, model, step) if task["part"] == "memory" else {"cold": first}
        print(json.dumps(memory), flush=True)
        return
    losses = _train(contender, subject, model, step)
    quantizers = len(model.plan().sites) if isinstance(model, qcompiler.QuantizedModule) else 0
    found = {"warm": first, "loss": losses[-1], "losses": losses, "quantizers": quantizers, "operations": operations}
    print(json.dumps(found), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
