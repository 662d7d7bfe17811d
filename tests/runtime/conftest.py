"""Fixtures of the number layer: the oracle and the way from tensors to its arrays."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """tests/runtime/oracle.py."""
    return _load("oracle")


@pytest.fixture(scope="session")
def range_oracle() -> ModuleType:
    """tests/runtime/range_oracle.py."""
    return _load("range_oracle")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"runtime_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def array() -> Callable[[torch.Tensor], np.ndarray]:
    """tensor → numpy array of the same logical values, bfloat16 included."""

    def convert(x: torch.Tensor) -> np.ndarray:
        x = x.detach().contiguous()
        if x.dtype == torch.bfloat16:
            return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    return convert


@pytest.fixture(scope="session")
def tensor() -> Callable[[np.ndarray], torch.Tensor]:
    """numpy array → contiguous tensor of its own, bfloat16 included."""

    def convert(x: np.ndarray) -> torch.Tensor:
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(x.copy())

    return convert
