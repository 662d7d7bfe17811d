"""Which quantizers have a kernel, and the reason of every other."""

import dataclasses

import pytest
import torch

from qcompiler.runtime.kernels import quantizers
from qcompiler.runtime.kernels.quantizers import BLOCKS, FLOATS, KNOWN, MEASURED, QuantizerFacts, explain_quantizer
from qcompiler.runtime.spec import parse_spec

#: of a kernel on CUDA that could run
UNTIMED = "kernels of quantizers were not timed on CUDA"
#: of blocks of 12 channels, between which other channels lie
OUTSIDE = "a block of 98304 elements does not stay in the cache; valid: 65536, or blocks one after another"


def facts(spec, **changes):
    given = QuantizerFacts(
        device="cpu",
        dtype=torch.float32,
        spec=parse_spec(spec),
        layout="bcss",
        shape=(8, 16, 32, 32),
        stride=(16384, 1024, 32, 1),
    )
    return dataclasses.replace(given, **changes)


@pytest.mark.parametrize(
    "spec",
    [
        "int8:max:b2c8o4i4:nearest:pass",
        "int4:real:b1c*s*:stochastic:clip",
        "int8:max:tensor:nearest:pass",
        "int8:max:b*c*s*:nearest:pass",
        "int8:max:b4c*s*:nearest:pass",
    ],
)
def test_blocks(spec):
    assert explain_quantizer(BLOCKS, facts(spec)) == ""


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        ("int8:max:b*c12s*:nearest:pass", {}, OUTSIDE),
        ("uint8:max:b2c8:nearest:pass", {}, "kernels find the scales of signed integers, got uint8 and max"),
        ("int8:two-level:b2c8:nearest:pass", {}, "kernels find the scales of signed integers, got int8 and two-level"),
        ("int8:max:b2c8:nearest:pass:percentile(99)", {}, "the range percentile(99) is not that of the present block"),
        ("int16:max:b2c8:nearest:pass", {}, "kernels write integers of at most 8 bits, got int16"),
        ("int8:max:b2c8:nearest:pass", {"device": "mps"}, "no kernel of a quantizer runs on mps"),
        ("int8:max:b2c8:nearest:pass", {"dtype": torch.float16}, "kernels read float32 and bfloat16, got float16"),
        (
            "int8:max:b5c8:nearest:pass",
            {"layout": "bbc", "shape": (4, 3, 8), "stride": (8, 32, 1)},
            "dimensions of one axis of bbc lie apart in memory",
        ),
    ],
)
def test_blocks_that_have_no_kernel(spec, changes, reason):
    assert explain_quantizer(BLOCKS, facts(spec, **changes)) == reason


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        ("int8:max:b2c8o4i4:nearest:pass", {}, UNTIMED),
        ("int4:real:b1c4s32:stochastic:clip", {}, UNTIMED),
        (
            "int4:real:b1c8s32:stochastic:clip",
            {},
            "a block of 8192 elements does not fit into one program; valid: 4096",
        ),
        ("uint8:max:b2c8:nearest:pass", {}, "kernels find the scales of signed integers, got uint8 and max"),
        ("int16:max:b2c8:nearest:pass", {}, "kernels write integers of at most 8 bits, got int16"),
        ("int8:max:b2c8:nearest:pass", {"dtype": torch.bfloat16}, "kernels read float32, got bfloat16"),
        (
            "int8:max:b2c8:nearest:pass",
            {"shape": (2**19, 8, 32, 32), "stride": (8192, 1024, 32, 1)},
            "kernels count elements in 32 bits, got 4294967296",
        ),
        (
            "int8:max:b5c8:nearest:pass",
            {"layout": "bbc", "shape": (4, 3, 8), "stride": (8, 32, 1)},
            "dimensions of one axis of bbc lie apart in memory",
        ),
    ],
)
def test_blocks_on_cuda(spec, changes, reason, monkeypatch):
    monkeypatch.setattr(quantizers, "explain_triton", lambda: "")
    assert explain_quantizer(BLOCKS, facts(spec, device="cuda", **changes)) == reason


def test_known_scales_on_cuda(monkeypatch):
    monkeypatch.setattr(quantizers, "explain_triton", lambda: "")
    spec = "affine8:real:tensor:stochastic:pass:hindsight"
    assert explain_quantizer(KNOWN, facts(spec, device="cuda")) == UNTIMED
    assert explain_quantizer(FLOATS, facts(spec, device="cuda")) == "no kernel of a quantizer runs on cuda"
    monkeypatch.setattr(quantizers, "explain_triton", lambda: "Triton is not installed")
    for kernel in (BLOCKS, KNOWN):
        found = explain_quantizer(kernel, facts("int8:max:b2c8:stochastic:pass", device="cuda"))
        assert found == "Triton is not installed"


def test_known_scales():
    assert explain_quantizer(KNOWN, facts("affine8:real:tensor:stochastic:pass:hindsight")) == ""
    reason = "a compiled loop rounds to nearest by a known scale as fast"
    assert explain_quantizer(KNOWN, facts("affine8:real:tensor:nearest:pass:hindsight")) == reason


def test_scales_of_tensors_that_are_measured(monkeypatch):
    spec = "affine8:real:{}:nearest:pass:hindsight"
    assert explain_quantizer(MEASURED, facts(spec.format("tensor"))) == ""
    reason = "the kernel that measures takes one block for the tensor, got each"
    assert explain_quantizer(MEASURED, facts(spec.format("c1"))) == reason
    assert explain_quantizer(MEASURED, facts(spec.format("tensor"), device="cuda")) == (
        "no kernel of a quantizer runs on cuda"
    )


def test_floats():
    assert explain_quantizer(FLOATS, facts("int8:max:b2c8:nearest:pass")) == ""
    reason = "a compiled loop multiplies by one scale as fast"
    assert explain_quantizer(FLOATS, facts("affine8:real:tensor:nearest:pass:hindsight")) == reason


def test_a_machine_without_a_compiler(monkeypatch):
    monkeypatch.setattr(quantizers, "explain_compiler", lambda: "processor.cpp does not compile here")
    for kernel, block in ((BLOCKS, "b2c8"), (FLOATS, "b2c8"), (MEASURED, "tensor")):
        found = explain_quantizer(kernel, facts(f"int8:max:{block}:nearest:pass"))
        assert found == "processor.cpp does not compile here"
