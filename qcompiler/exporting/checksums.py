"""The origin of a file: a checksum of every parameter and buffer, which tells another module from the same."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def compute_checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of the bytes of a tensor, its shape and type not included."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def compute_checksums(model: nn.Module) -> dict[str, int]:
    """Return name → checksum of each parameter and buffer."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: compute_checksum(tensor) for name, tensor in held}


def list_changed(model: nn.Module, exported: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names with other bytes than the checksums say, and the names that only one of the two has."""
    found = compute_checksums(model)
    names = dict.fromkeys([*exported, *found])
    return tuple(name for name in names if found.get(name) != exported.get(name))
