"""Training in processes of its own, for tests of checkpoints and of several ranks; not a test.

`python workers.py resume FOLDER` trains on from the checkpoints in a folder; `python workers.py ranks FOLDER RANK` is
one of two ranks, which meet through a file in it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import qcompiler
from qcompiler.passes.rules import Role, Rule
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime.spec import parse_spec

#: one estimator of each kind of state: by block with a guard, a history, one factor for the site
ESTIMATORS = ("hindsight(0.75,0.02)", "large(0.1,0.01,0.9)", "history(4,1,1)")
#: the runs that are resumed; Inductor's kernels come from the same cache in the new process
RUNS = (*((estimator, "eager") for estimator in ESTIMATORS), (ESTIMATORS[0], "inductor"))


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    """This file in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=environment)


def recipe(estimator: str) -> Recipe:
    """Ranges of the past for every role; gradients round stochastically."""
    rounding = {Role.WEIGHT: "nearest", Role.ACTIVATION: "nearest", Role.GRADIENT: "stochastic"}
    specs = {role: parse_spec(f"int4:fit:tensor:{how}:clip:{estimator}") for role, how in rounding.items()}
    return Recipe(name=estimator, rules=tuple(Rule(role=role, spec=spec) for role, spec in specs.items()))


def learned() -> Recipe:
    """A learned range for weights and activations; gradients stay in float."""
    spec = parse_spec("int4:real:tensor:nearest:clip:learned(3)")
    return Recipe(name="learned", rules=tuple(Rule(role=role, spec=spec) for role in (Role.WEIGHT, Role.ACTIVATION)))


def build(estimator: str, backend: str) -> tuple[qcompiler.QuantizedModule, torch.optim.Optimizer]:
    """A small model with dropout, which reads the random state, and an optimizer with a state of its own."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    compiled = qcompiler.compile(model, recipe(estimator), backend=backend)
    return compiled, torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The loss of each step, on data that depend on the number of the step alone."""
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x, labels = 1.1**step * torch.randn(5, 6, generator=draw), torch.randint(0, 3, (5,), generator=draw)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a training script keeps."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}


def resume(folder: Path) -> None:
    """10 … 19 after the checkpoint of each run; losses and the checkpoint after them go to `….done`."""
    for estimator, backend in RUNS:
        torch._dynamo.reset()
        torch.manual_seed(1234)  # another start than the run before
        model, optimizer = build(estimator, backend)
        saved = torch.load(folder / f"{estimator}.{backend}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        losses = train(model, optimizer, range(10, 20))
        qcompiler.save({"losses": losses, **checkpoint(model, optimizer)}, folder / f"{estimator}.{backend}.done")


def ranks(folder: Path, rank: int) -> None:
    """Three steps of a linear layer in DistributedDataParallel, each rank on inputs of its own; keeps every state."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for estimator in ESTIMATORS[:2]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = qcompiler.compile(nn.Linear(6, 4, bias=False), recipe(estimator), backend="eager")
        parallel = nn.parallel.DistributedDataParallel(model)
        history = []
        for step in range(3):
            draw = torch.Generator().manual_seed(10 * step + rank)
            x = (1 + rank) * torch.randn(5, 6, generator=draw)
            parallel(x).square().sum().backward()
            history.append({"x": x, **model.ranges()})
        torch.save({"history": history, "grad": model.weight.grad}, folder / f"{estimator}.{rank}")
    torch.save(learn(rank, nn.parallel.DistributedDataParallel), folder / f"learned.{rank}")
    dist.barrier()
    # without destructors: after `destroy_process_group` those of DistributedDataParallel waited for ever in one run of
    # four on one core (torch 2.13, gloo), with everything saved
    os._exit(0)


def buckets(folder: Path) -> None:
    """A model above the first bucket of DistributedDataParallel, alone and in it: outputs, gradients and sites."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    found = []
    for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
        torch._dynamo.reset()
        torch.manual_seed(0)
        layers = [nn.Linear(32, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU()]
        model = qcompiler.compile(nn.Sequential(*layers, nn.Linear(600, 4)), "hyperblock-int4", backend="eager")
        outputs = wrap(model)(torch.randn(8, 32))
        outputs.sum().backward()
        sites = [site.name for site in model.plan().sites]
        found.append({"outputs": outputs.detach(), "grad": model[0].weight.grad, "sites": sites})
    torch.save(found, folder / "buckets")
    os._exit(0)  # see above


def learn(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> list[dict[str, Tensor]]:
    """The learned ranges and their gradients after each of two backwards, which accumulate, on inputs of a rank."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = qcompiler.compile(nn.Linear(6, 4, bias=False), learned(), backend="eager")
    wrapped = wrap(model)
    history = []
    for step in range(2):
        x = (1 + rank) * torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        wrapped(x.requires_grad_()).square().sum().backward()
        gradients = {
            f"{name}#gradient": p.grad.clone()
            for name, p in zip(model.ranges(), model.quantizer_parameters(), strict=True)
        }
        history.append(model.ranges() | gradients)
    return history


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "resume":
        resume(Path(sys.argv[2]))
    elif sys.argv[1] == "buckets":
        buckets(Path(sys.argv[2]))
    else:
        ranks(Path(sys.argv[2]), int(sys.argv[3]))
