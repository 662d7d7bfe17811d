"""A section of benchmarks/gpu.py: tasks that are measured one after the other until the time is over."""

import contextlib
import dataclasses
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how large everything is measured."""

    #: cpu or cuda
    device: str
    #: a form for tests: small, and run node by node
    tiny: bool = False
    #: of CIFAR-10; None: the digits of the demo
    data: Path | None = None

    @property
    def backend(self) -> str:
        """Of models that are timed."""
        return "eager" if self.tiny else "inductor"

    def move(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device; images with channels last."""
        images = {"memory_format": torch.channels_last} if tensor.ndim == 4 else {}
        return tensor.to(self.device, **images)

    def wait(self) -> None:
        """Waits until the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class Task:
    """One row."""

    name: str
    measure: Callable[[Setting], Row]


@dataclasses.dataclass(frozen=True)
class Section:
    """Tasks, the important ones first."""

    name: str
    #: seconds; what a section leaves goes to those behind
    budget: float
    list_tasks: Callable[[Setting], list[Task]]


class OutOfTime(BaseException):
    """The time is over. No error: nothing that catches errors may swallow it."""


@contextlib.contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block when the seconds are over."""

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(section: Section, setting: Setting, seconds: float, progress: Progress) -> Row:
    """Return the rows of a section, and a note if its time was over before all tasks were done."""
    tasks, rows, end = section.list_tasks(setting), [], time.monotonic() + seconds
    bar = progress.add_task(section.name, total=len(tasks))
    for task in tasks:
        progress.update(bar, description=f"{section.name}: {task.name}")
        row = _run_task(task, setting, end - time.monotonic())
        if row is None:
            break
        rows.append(row)
        progress.advance(bar)
    missing = [task.name for task in tasks[len(rows) :]]
    note = f"stopped after {seconds:.0f} s; not measured: {', '.join(missing)}" if missing else ""
    return {"section": section.name, "note": note, "rows": rows}


def _run_task(task: Task, setting: Setting, seconds: float) -> Row | None:
    """Return the row of a task, with the error if it failed; None if the time is over."""
    torch._dynamo.reset()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    if seconds <= 0:
        return None
    start = time.monotonic()
    try:
        with limit_time(seconds):
            row = task.measure(setting)
    except OutOfTime:
        return None
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        row = {"error": f"{type(error).__name__}: {text}"[:300]}
    return {"name": task.name, **row, "took": round(time.monotonic() - start, 1)}


def name_device(device: str) -> str:
    """Return the name of the processor or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "processor: unknown"
