"""Errors, interrupts and memory of operators that repeat their calls: nothing may be lost on the way through C++."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch

from qcompiler.runtime import coders
from qcompiler.runtime.kernels import packing, repeat
from qcompiler.runtime.kernels import quantize_blocks as kernel
from qcompiler.runtime.kernels.loader import explain_vectors

SPEC = "int8:max:tensor:nearest:pass"
#: torch 2.15 makes a RuntimeError of what C++ says of an argument
WRONG_ARGUMENT = (ValueError, RuntimeError)
needs_vectors = pytest.mark.skipif(explain_vectors() != "", reason=explain_vectors())


@pytest.fixture(autouse=True)
def started():
    """Nothing is recorded yet."""
    assert repeat.start() == ""
    repeat.forget()
    yield
    repeat.forget()


def call(name, *arguments):
    """The results of an operator as a list."""
    results = getattr(torch.ops.qcompiler, name).default(*arguments)
    return results if isinstance(results, list) else [results]


def give_unpacked():
    return torch.randint(-7, 8, (4, 6), dtype=torch.int8), 4


def give_blocks():
    return torch.randn(4, 8, 6, 6), None, "int8:max:b2c4:nearest:pass", "bcss", "site", True, True, 1


def give_forward():
    a, b = (torch.zeros(shape, dtype=torch.int8) for shape in ((2, 8, 6, 5), (4, 8, 3, 3)))
    sides = a, torch.rand(1), None, b, torch.rand(1), None, None
    windows = [-1, -1], [6, 5], [1, 1], [1, 1]
    return *sides, SPEC, SPEC, 2, 4, "convolve", torch.float32, *windows, True


def test_what_torch_does_not_take_is_said(monkeypatch, caplog):
    monkeypatch.setattr(repeat, "load", lambda: mock.Mock(add_operator=lambda *given: 1))
    repeat.start.cache_clear()
    try:
        assert repeat.start() == "torch takes no operator multiply_whole in C++"
    finally:
        repeat.start.cache_clear()
    assert [row.getMessage() for row in caplog.records] == [
        "multiply_whole stays in Python, and is slower: torch takes no operator in C++"
    ]


@needs_vectors
def test_wrong_arguments_are_named():
    for _ in range(3):
        with pytest.raises(WRONG_ARGUMENT, match=r"^kernel: got 'no kernel'; valid: convolve, convolve-gradient$"):
            call("convolve_codes", *(give_forward()[:11]), "no kernel", *give_forward()[12:])
    assert repeat.count_recordings() == 0


@pytest.mark.parametrize(("name", "give"), [("pack_codes", give_unpacked), ("quantize_blocks", give_blocks)])
def test_other_errors_name_the_operator(name, give, monkeypatch):
    def fail(*given, **options):
        raise LookupError("no such thing")

    for place, function in ((packing, "pack"), (kernel, "quantize")):
        monkeypatch.setattr(place, function, fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=f"^{name}: LookupError: no such thing$"):
            call(name, *give())
    assert repeat.count_recordings() == 0


@pytest.mark.parametrize("text", ["", "\0", "\ud800"])
def test_errors_without_words_are_errors(text, monkeypatch):
    def fail(*given):
        raise ValueError(text)

    monkeypatch.setattr(packing, "pack", fail)
    for _ in range(3):
        with pytest.raises(WRONG_ARGUMENT, match=r"^\??$"):
            call("pack_codes", *give_unpacked())


@pytest.mark.parametrize("place", range(1, 9))
def test_an_interrupted_recording_starts_again(place, monkeypatch):
    """At any word of it: half a recording would call kernels without addresses."""
    tell, said = repeat._call, []

    def tell_or_stop(name, *given):
        said.append(name)
        if len(said) == place:
            raise KeyboardInterrupt
        return tell(name, *given)

    call("pack_codes", *give_unpacked())
    monkeypatch.setattr(repeat, "_call", tell_or_stop)
    with contextlib.suppress(KeyboardInterrupt):
        call("pack_codes", *give_unpacked())
    monkeypatch.undo()
    for _ in range(3):
        codes, bits = give_unpacked()
        assert torch.equal(*call("pack_codes", codes, bits), coders.pack_codes(codes, bits))
    assert said.count("start_recording") == 2
    assert repeat.count_recordings() == 1


@pytest.mark.parametrize("calls", [0, 1])
def test_interrupts_are_raised_behind_the_operator(calls, monkeypatch):
    """Ctrl-C cannot pass through C++; neither the interrupt nor the recording is lost."""
    pack, interrupts = packing.pack, [True]

    def pack_later(*given):
        if interrupts:
            interrupts.pop()
            raise KeyboardInterrupt
        return pack(*given)

    for _ in range(calls):
        call("pack_codes", *give_unpacked())
    monkeypatch.setattr(packing, "pack", pack_later)
    with pytest.raises(KeyboardInterrupt):
        call("pack_codes", *give_unpacked())
    assert not interrupts
    codes, bits = give_unpacked()
    call("pack_codes", codes, bits)
    assert torch.equal(*call("pack_codes", codes, bits), coders.pack_codes(codes, bits))
    assert repeat.count_recordings() == 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_texts_are_freed():
    """200 texts of 50 kB: torch 2.13 keeps each that is passed on."""
    x, *others = give_blocks()
    text = "é" * 25_000

    def read_pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    for times in (20, 200):
        before = read_pages()
        for _ in range(times):
            with pytest.raises(WRONG_ARGUMENT, match=r"^spec: got 'éé"):
                call("quantize_blocks", x, None, text, *others[2:])
    assert (read_pages() - before) * 4096 < 3e6


@pytest.mark.parametrize("name", ["convolve", "no kernel"])
@needs_vectors
def test_arguments_are_freed(name):
    """Whether a call is repeated, runs in Python or fails."""
    array = numpy.zeros((2, 8, 6, 5), numpy.int8)
    before = sys.getrefcount(array)
    for _ in range(5):
        a, arguments = torch.from_numpy(array), give_forward()
        try:
            call("convolve_codes", a, *arguments[1:11], name, *arguments[12:])
        except WRONG_ARGUMENT:
            assert name == "no kernel"
        del a
    assert sys.getrefcount(array) == before
