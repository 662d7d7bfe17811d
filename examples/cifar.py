"""CIFAR-10 from disk: the .npz archives of the benchmarks, or the folder that torchvision unpacks."""

import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1)
_STD = torch.tensor([0.2470, 0.2435, 0.2616]).reshape(1, 3, 1, 1)


def load(path: Path, part: str) -> tuple[Tensor, Tensor]:
    """(images, labels) of `part` ("train" or "test"): normalized float32 [n, 3, 32, 32], int64 [n].

    Args:
        path: `cifar10.npz` (JPEG) or `cifar10-small.npz` (planes of differences), or torchvision's folder
            `cifar-10-batches-py` or the one above it.

    Raises:
        FileNotFoundError: nothing of that kind at `path`; the message lists what is understood.
    """
    if path.suffix == ".npz" and path.exists():
        images, labels = _from_npz(np.load(path), part)
    else:
        folder = next((p for p in (path / "cifar-10-batches-py", path) if (p / "test_batch").exists()), None)
        if folder is None:
            raise FileNotFoundError(
                f"{path}: valid: cifar10.npz, cifar10-small.npz or torchvision's cifar-10-batches-py"
            )
        images, labels = _from_batches(folder, part)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return ((pixels - _MEAN) / _STD).contiguous(), torch.from_numpy(labels.astype(np.int64))


def _from_npz(archive: Any, part: str) -> tuple[np.ndarray, np.ndarray]:
    labels = archive[f"{part}_labels"]
    if f"{part}_delta" in archive:
        planes = np.cumsum(np.cumsum(archive[f"{part}_delta"], axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
        return np.stack([planes[:, 1] + planes[:, 0], planes[:, 0], planes[:, 2] + planes[:, 0]], -1), labels
    from PIL import Image

    header, data, ends = archive["header"].tobytes(), archive[f"{part}_jpeg"], archive[f"{part}_offsets"]
    files = (header + data[start:end].tobytes() for start, end in itertools.pairwise(ends))
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]), labels


def _from_batches(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    names = ["test_batch"] if part == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    batches = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.concatenate([batch["labels"] for batch in batches])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels and mirrored at random, zeros moving in: the usual CIFAR augmentation."""
    n = len(images)
    padded = torch.nn.functional.pad(images, [4] * 4)
    rows = torch.randint(9, (n, 1), generator=generator) + torch.arange(32)
    columns = torch.randint(9, (n, 1), generator=generator) + torch.arange(32)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    pick = torch.arange(n).reshape(n, 1, 1)
    return padded.permute(0, 2, 3, 1)[pick, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
