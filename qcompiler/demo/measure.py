"""The cost of a step: bytes that autograd keeps for backward, and time."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def measure_saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that the forward of `model` keeps for backward; parameters, buffers and `x` not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x] if _has_storage(t)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _has_storage(tensor) and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sum(kept.values())


def _has_storage(tensor: Tensor) -> bool:
    """Return False for a tensor that wraps others, as quantized weights of other libraries do."""
    return type(tensor) in (Tensor, nn.Parameter)


def one_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return the forward and backward pass of one batch, to be timed."""

    def run() -> None:
        F.cross_entropy(model(x), y).backward()

    return run


def paired_times(steps: dict[str, Callable[[], None]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each step; the steps take turns, so that a drift of the machine meets all steps."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
