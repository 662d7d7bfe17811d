"""Everything of a process that changes what is traced, or what is made of it."""

import contextlib
import subprocess
import sys

import pytest
import torch

from qcompiler.compiler.cache import process
from qcompiler.compiler.cache.process import describe_process


@contextlib.contextmanager
def default_type():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "switch",
    [
        torch.no_grad,
        torch.inference_mode,
        default_type,
        deterministic,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        lambda: torch._inductor.config.patch(fallback_random=True),
        lambda: torch._functorch.config.patch(activation_memory_budget=0.5),
    ],
)
def test_a_switch_of_torch_is_seen(switch):
    before = describe_process()
    with switch():
        assert describe_process() != before
    assert describe_process() == before


SCRIPT = """
import os, torch
from qcompiler.compiler.cache import cache_compat
from qcompiler.compiler.cache.process import describe_process
texts = [describe_process()]
torch.set_float32_matmul_precision("high")
texts.append(describe_process())
torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # with it, torch.get_float32_matmul_precision() raises
texts.append(describe_process())
assert len(set(texts)) == 3
before = cache_compat.find_overridden()
library = torch.library.Library("aten", "IMPL")
library.impl("hardtanh", lambda x, a=-1, b=1: 2 * x, "Autograd")
print(before, cache_compat.find_overridden(), cache_compat.describe_settings())
"""


@pytest.mark.full
def test_settings_that_last_for_a_process(tmp_path):
    """Precisions in both ways, and an operator of torch that Python replaces; the working directory is no setting."""
    printed = {
        subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, capture_output=True, text=True, check=True).stdout
        for folder in (tmp_path, tmp_path.parent)
    }
    assert len(printed) == 1
    assert printed.pop().startswith("None aten/hardtanh/Autograd ")


def test_types_of_autocast_differ():
    texts = set()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            texts.add(describe_process())
    assert len(texts) == 2


def test_a_changed_source_is_seen(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "kernels" / "b.cpp").write_text("int x;")
    monkeypatch.setattr(process.resources, "files", lambda package: tmp_path)
    found = [process._hash_sources()]
    (tmp_path / "a.py").write_text("x = 2")
    found.append(process._hash_sources())
    (tmp_path / "kernels" / "b.cpp").write_text("int y;")
    found.append(process._hash_sources())
    (tmp_path / "kernels" / "b.cpp").rename(tmp_path / "kernels" / "c.cpp")
    found.append(process._hash_sources())
    assert len(set(found)) == 4
    (tmp_path / "notes.txt").write_text("nothing")
    assert process._hash_sources() == found[-1]


def test_all_three_packages_are_read():
    names = {file.name for file in process._list_sources(process.resources.files("qcompiler"))}
    assert {"module.py", "place_quantizers.py", "quantize_blocks.cpp", "vectors.h", "step.py"} <= names


def test_versions_are_seen(monkeypatch):
    before = describe_process()
    process._describe_installation.cache_clear()
    monkeypatch.setattr(torch.version, "git_version", "0" * 40)
    assert describe_process() != before
    process._describe_installation.cache_clear()
