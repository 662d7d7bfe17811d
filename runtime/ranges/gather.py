"""The exchange of kept ranges between the ranks of a distributed training."""

import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """Count the ranks of a process group (default: the group of all ranks); one rank if nothing is distributed."""

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self._group = group

    @property
    def count(self) -> int:
        """How many ranks there are, at least 1."""
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the tensors of every rank under the same names, in the order of ranks. Each rank has to call it.

        Raises:
            RuntimeError: the ranks call with different names, so the tensors do not belong together.
        """
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
        self._check(list(tensors), flat.device)
        sizes = [tensor.numel() for tensor in tensors.values()]
        return [
            {name: part.reshape(tensors[name].shape) for name, part in zip(tensors, whole.split(sizes), strict=True)}
            for whole in self._all(flat)
        ]

    def _all(self, own: Tensor) -> list[Tensor]:
        received = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(received, own, group=self._group)
        return received

    def _check(self, names: Sequence[str], device: torch.device) -> None:
        own = torch.tensor([zlib.crc32("\n".join(names).encode())], device=device)
        different = [rank for rank, other in enumerate(self._all(own)) if not torch.equal(other, own)]
        if different:
            raise RuntimeError(
                f"ranges: ranks {different} ran other layers in this backward than this one, which ran "
                f"{', '.join(names)}; ranges that are merged over ranks need the same layers on all of them"
            )
