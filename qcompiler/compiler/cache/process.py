"""What a capture depends on besides the graph: versions, the sources of this project, switches of torch."""

import functools
import hashlib
import platform
import sys
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

import torch

from qcompiler.compiler.cache import cache_compat

#: files that decide what a graph becomes
_SUFFIXES: Final = (".py", ".cpp", ".h")


def describe_process() -> str:
    """Return the versions and switches of this process as text."""
    return f"{_describe_installation()} {_describe_switches()}"


@functools.cache
def _describe_installation() -> str:
    versions = (torch.version.git_version, torch.version.debug, sys.version, platform.machine())
    return " ".join([*map(str, versions), _hash_sources(), torch.backends.cpu.get_cpu_capability()])


def _hash_sources() -> str:
    """Return a hash of this project's sources: an entry of another version, or from before a change, fits no more."""
    found = hashlib.sha256()
    for file in _list_sources(resources.files("qcompiler")):
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def _list_sources(folder: Traversable) -> list[Traversable]:
    files: list[Traversable] = []
    for entry in sorted(folder.iterdir(), key=lambda one: one.name):
        if entry.is_dir():
            files += _list_sources(entry)
        elif entry.name.endswith(_SUFFIXES):
            files.append(entry)
    return files


def _describe_switches() -> str:
    """Return every switch of torch that changes what is traced, or what is made of it."""
    switches = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_deterministic_debug_mode(),
        torch.backends.mkldnn.enabled,
        torch.backends.nnpack.is_available(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.opt_einsum.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    autocast = (cache_compat.list_precisions(), cache_compat.list_autocast(), torch.is_autocast_cache_enabled())
    return " ".join(map(str, (*autocast, *switches, cache_compat.describe_settings())))
