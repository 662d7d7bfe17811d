"""Ranges of a copy that averages the weights of another model (EMA, SWA)."""

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qcompiler.runtime.ranges.store import RangeStore


class Following:
    """The ranges of a copy follow the ranges of the source, once the weights of the copy have changed by other hands.

    A copy that keeps the weights it was copied with keeps the ranges too. A copy that trains, or loads a checkpoint,
    has ranges of its own.
    """

    def __init__(self, source: RangeStore, own: RangeStore, weights: Iterable[Tensor]) -> None:
        self._source = weakref.ref(source)
        self._commits = own.commits
        self._versions, self._sample = _list_versions(weights := [*weights]), _sample_weights(weights)
        self._has_changed = False
        self._taken = source.commits

    def refresh(self, own: RangeStore, weights: Iterable[Tensor]) -> bool:
        """Take the ranges of the source over, if the weights have changed; False: there is nothing more to follow."""
        source, weights = self._source(), [*weights]
        if source is None or own.commits != self._commits:
            return False
        if source.commits != self._taken and self._have_changed(weights):
            own.load_state_dict(source.state_dict())
            self._taken = source.commits
        return True

    def _have_changed(self, weights: Sequence[Tensor]) -> bool:
        if not self._has_changed:
            # `tensor.data.mul_(…)` changes values and no version
            same = _list_versions(weights) == self._versions and torch.equal(_sample_weights(weights), self._sample)
            self._has_changed = not same
        return self._has_changed


def _list_versions(weights: Iterable[Tensor]) -> list[int]:
    return [0 if weight.is_inference() else weight._version for weight in weights]


def _sample_weights(weights: Iterable[Tensor]) -> Tensor:
    """Return one number of every weight; the bits count, so that a NaN equals itself."""
    firsts = [weight.detach().reshape(-1)[:1].float().cpu() for weight in weights if weight.numel()]
    return torch.cat(firsts).view(torch.int32) if firsts else torch.zeros(0, dtype=torch.int32)
