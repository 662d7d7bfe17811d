"""The kernels in Triton without a GPU: their numbers in the interpreter, and the instructions that they become."""

import re
from pathlib import Path

import pytest
import torch
from own_process import run_tests

from qcompiler.runtime import coders
from qcompiler.runtime.kernels.quantize_blocks import Call, Results
from qcompiler.runtime.kernels.triton_support import explain_triton

pytestmark = pytest.mark.skipif(bool(explain_triton()), reason=explain_triton())
TESTS = Path(__file__).parents[1]
KEY = torch.zeros(2, dtype=torch.int32)


#: what a processor adds in parallel, or 2 s a case, says nothing of a GPU
CHOSEN = (
    "(test_coders and not measure and not learns and not packed) or "
    "(test_runs and triton and not threads and not longest)"
)


def test_in_the_interpreter():
    """In a process of its own: Triton decides when it is imported.

    numpy, which computes there, warns of infinities and of NaN.
    """
    files = [TESTS / "kernels" / "test_runs.py", TESTS / "test_coders.py"]
    run_tests(files, "-k", CHOSEN, "-W", "ignore::RuntimeWarning", least=35, TRITON_INTERPRET="1")


class Device:
    """A GPU that is not there."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # a number, by which Triton keeps what it has compiled

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=[80, 90])
def compiled(request, monkeypatch, tmp_path):
    """The list of instructions of every kernel that is called: called kernels are compiled, and not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    texts, run = [], JITFunction.run

    def compile_only(self, *given, warmup, **options):
        texts.append(run(self, *given, warmup=True, **options).asm["ptx"])

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Device(request.param), raising=False)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return texts


def sum_runs():
    from qcompiler.runtime.kernels import triton_runs

    codes, factors = torch.zeros(70, 100, dtype=torch.int8), torch.zeros(3, 4)
    triton_runs.sum_runs(codes, factors, 32, codes.t(), factors, 32, 32)


def quantize(spec, key, *, finds):
    x = torch.zeros(8, 16, 8, 8)
    codes, floats, scale = coders.fake_quantize_blocks(x, key, spec, "bcss", "site", True, True)
    call = Call(tuple(x.shape), x.stride(), spec, "bcss", "site", not finds)
    assert coders.find_kernel("cuda")(call, x, Results(scale, codes, floats), key, None, finds=finds) == ""


def test_sums_use_integer_instructions_and_round_every_product(compiled):
    sum_runs()
    (text,) = compiled
    assert re.search(r"mma\S*\.s32\.s8\.s8", text)
    assert "mul.rn.f32" in text
    assert "fma" not in text


def test_joined_roundings_would_be_seen(compiled, monkeypatch):
    """The same kernel without the option has `fma`."""
    from qcompiler.runtime.kernels import triton_runs

    monkeypatch.setattr(triton_runs, "EXACT", {})
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where nobody says so, 3.10 fuses no more
    sum_runs()
    assert "fma.rn.f32" in compiled[0]


@pytest.mark.parametrize("finds", [True, False])
@pytest.mark.parametrize(
    ("spec", "key"), [("int8:max:b2c8o4i4:nearest:pass", None), ("int4:real:b1c*s*:stochastic:pass", KEY)]
)
def test_quantizers_divide_exactly_and_keep_subnormals(spec, key, finds, compiled):
    quantize(spec, key, finds=finds)
    (text,) = compiled
    assert set(re.findall(r"div\.\w+\.f32", text)) == ({"div.rn.f32"} if ":real:" in spec else set())
    assert ".ftz" not in text
    assert "fma" not in text
