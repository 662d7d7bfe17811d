"""Speed, memory and training of benchmarks/gpu.py."""

import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from gpu_section import Row, Setting, Task
from step_models import Subject, make_subject
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar

import qcompiler
from qcompiler.demo.digits import load_digits
from qcompiler.demo.measure import measure_saved_bytes
from qcompiler.demo.nets import ResNet, measure_accuracy

_BATCH: Final = 128
_EPOCHS: Final = 3
#: steps before the clock starts: compiled by then
_WARM: Final = 10
#: of a model in its tiny form. ResNet-20 keeps 8 channels: with fewer, and the channels last in memory, backward of
#: a 1×1 convolution with stride 2 writes beyond its memory in oneDNN of torch 2.13, on processors with AVX2 alone
_TINY_WIDTH: Final = 0.5


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to train a model: a recipe, or floats."""

    name: str
    recipe: str = ""
    execution: str = "simulate"
    save: str = ""
    bfloat16: bool = False

    def build(self, model: nn.Module, setting: Setting) -> nn.Module:
        """Return the module to train."""
        if self.recipe:
            save = {"save": self.save} if self.save else {}
            given = {"backend": setting.backend, "execution": self.execution}
            return qcompiler.compile(model, self.recipe, **given, **save)
        return model if setting.tiny else torch.compile(model, dynamic=False)  # type: ignore[return-value]

    def cast(self, setting: Setting) -> contextlib.AbstractContextManager[object]:
        """Return the context in which forward runs."""
        return torch.autocast(setting.device, torch.bfloat16, enabled=self.bfloat16)


BFLOAT16: Final = Contender("bfloat16", bfloat16=True)
FLOAT32: Final = Contender("float32")
_SPEED: Final = (
    BFLOAT16,
    Contender("hyperblock-int8", "hyperblock-int8"),
    Contender("tensor-int8, integer", "tensor-int8", "integer"),
    Contender("hyperblock-int8-wide, integer", "hyperblock-int8-wide", "integer"),
    Contender("hyperblock-int4", "hyperblock-int4"),
    FLOAT32,
)
_MEMORY: Final = (
    FLOAT32,
    Contender("hyperblock-int8, save int8", "hyperblock-int8", save="int8"),
    Contender("hyperblock-int4, save int4", "hyperblock-int4", save="int4"),
)
_TRAINED: Final = (
    BFLOAT16,
    Contender("hyperblock-int8", "hyperblock-int8"),
    Contender("hyperblock-int4", "hyperblock-int4"),
    FLOAT32,
)
#: model → a batch that is large enough for a GPU
_MODELS: Final = {"MLP 1024-4096-1024": 4096, "ResNet-20": 512, "GPT-2, 4 blocks": 32, "ViT-Tiny, 64×64": 128}


def list_speeds(setting: Setting) -> list[Task]:
    """Return a task for each model and contender."""
    models = list(_MODELS)[: 1 if setting.tiny else None]
    return [
        Task(f"{model}: {one.name}", functools.partial(_measure_step, model, one))
        for model in models
        for one in _SPEED[: 2 if setting.tiny else None]
    ]


def list_memories(setting: Setting) -> list[Task]:
    """Return a task for each contender on ResNet-20."""
    return [Task(f"ResNet-20: {one.name}", functools.partial(_measure_step, "ResNet-20", one)) for one in _MEMORY]


def list_trainings(setting: Setting) -> list[Task]:
    """Return a task for each contender."""
    chosen = _TRAINED[: 2 if setting.tiny else None]
    return [Task(one.name, functools.partial(_train, one)) for one in chosen]


def _make_subject(name: str, setting: Setting) -> Subject:
    made = make_subject(name, 4, width=_TINY_WIDTH) if setting.tiny else make_subject(name, _MODELS[name])
    return Subject(made.model.to(setting.device), setting.move(made.x), made.y.to(setting.device), made.loss)


def _measure_step(name: str, contender: Contender, setting: Setting) -> Row:
    """Return time and memory of a step: forward, loss, backward."""
    subject = _make_subject(name, setting)
    model = contender.build(subject.model, setting)

    def step() -> float:
        setting.wait()
        start = time.perf_counter()
        with contender.cast(setting):
            loss = subject.compute_loss(model)
        loss.backward()
        setting.wait()
        return time.perf_counter() - start

    first = step()
    step(), step()
    row = {"model": name, "contender": contender.name, "first step, s": round(first, 2)}
    row["step, ms"] = round(1000 * statistics.median(step() for _ in range(2 if setting.tiny else 15)), 3)
    row["peak, MB"] = _measure_peak(step, setting)
    with contender.cast(setting):
        row["saved, MB"] = round(measure_saved_bytes(model, subject.x) / 1e6, 3)
    if isinstance(model, qcompiler.QuantizedModule):
        plan = model.plan()
        row |= {"quantizers": len(plan.sites), "in kernels": plan.in_kernels, "integer": plan.integer}
    return row


def _measure_peak(step: Callable[[], float], setting: Setting) -> float | str:
    """Return the megabytes that a step needs at most beyond those held before."""
    if setting.device != "cuda":
        return "not measured"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def _load_data(setting: Setting) -> tuple[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the name of the data, training images and labels, test images and labels."""
    if setting.data is None:
        return "digits of 8×8 pixels (no --data)", load_digits()
    test = setting.data.with_name("cifar10.npz") if setting.data.name == "cifar10-small.npz" else setting.data
    return "CIFAR-10", (*cifar.load(setting.data, "train"), *cifar.load(test, "test"))


def _train(contender: Contender, setting: Setting) -> Row:
    """Return accuracy and speed of ResNet-20: SGD with momentum, one cycle, batch 128."""
    name, data = _load_data(setting)
    images, labels, *test = (setting.move(one) for one in data)
    torch.manual_seed(0)
    plain = ResNet(blocks=1 if setting.tiny else 3, channels=images.shape[1]).to(setting.device)
    model = contender.build(plain.to(memory_format=torch.channels_last), setting)  # type: ignore[call-overload]
    steps = 4 if setting.tiny else _EPOCHS * (len(images) // _BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.2)
    warm = min(_WARM, steps - 1)
    generator, loss, start = torch.Generator().manual_seed(0), torch.zeros(()), time.perf_counter()
    for step in range(steps):
        if step == warm:
            setting.wait()
            start = time.perf_counter()
        index = torch.randint(len(images), (_BATCH,), generator=generator).to(setting.device)
        batch = images[index] if setting.data is None else cifar.augment(images[index], generator)
        optimizer.zero_grad()
        with contender.cast(setting):
            loss = F.cross_entropy(model(setting.move(batch)), labels[index])
        loss.backward()
        optimizer.step()
        schedule.step()
    setting.wait()
    speed = _BATCH * (steps - warm) / (time.perf_counter() - start)
    row = {"data": name, "contender": contender.name, "steps": steps, "last loss": round(float(loss.detach()), 4)}
    with contender.cast(setting):
        accuracy = measure_accuracy(model, *test, batch=len(test[0]) if setting.data is None else 500)
    return {**row, "images a second": round(speed), "test accuracy, %": round(accuracy, 2)}
