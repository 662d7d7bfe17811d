"""What is recorded of an operator in Python, and what keeps it from being repeated."""

import ctypes

import pytest
import torch

from qcompiler.runtime.kernels import recorder
from qcompiler.runtime.kernels.recorder import Place, call_kernel, record


class Inner(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int64), ("address", ctypes.c_void_p))


class Outer(ctypes.Structure):
    _fields_ = (("first", ctypes.c_void_p), ("inner", Inner * 2), ("last", ctypes.c_int8), ("other", ctypes.c_void_p))


def ignore(*given):
    """A function of a library."""


def run_kernel(x):
    """One call with memory of its own, which returns a result in another order."""
    memory, made = x.new_empty(3, dtype=torch.uint8), x.new_empty(2, 4)
    inner = Inner(7, memory.data_ptr())
    call_kernel(ignore, Outer(x[1].data_ptr(), (inner, Inner(8, None)), 9, made.data_ptr()), 5)
    call_kernel(ignore, ctypes.c_void_p(made.data_ptr() + 4), ctypes.c_void_p(None))
    return made.t()


def test_addresses_become_tensors():
    x = torch.zeros(4, 2)
    result, found = record(lambda: run_kernel(x), [x])
    assert [(made.tensor.shape, made.first, made.last) for made in found.made] == [((3,), 0, 0), ((4, 2), -1, -1)]
    assert found.made[1].tensor is result
    assert found.results == [1]
    (first, (structure, number)), (second, arguments) = found.calls
    assert first is second is ignore
    assert structure.places == [Place(0, 0, 8), Place(16, 1, 0), Place(Outer.other.offset, 2, 0)]
    assert len(structure.value) == ctypes.sizeof(Outer)
    assert (number.value, number.places) == (5, [])
    assert [(one.value, one.places) for one in arguments] == [(0, [Place(-1, 2, 4)]), (0, [])]


def test_memory_lives_as_long_as_calls_use_it():
    def run(x):
        first, second, _, made = (x.new_empty(8) for _ in range(4))
        for tensor in (first, second, first, made):
            call_kernel(ignore, ctypes.c_void_p(tensor.data_ptr()))
        torch.empty_like(x, device="meta")
        return [made]

    x = torch.zeros(2)
    _, found = record(lambda: run(x), [x])
    assert [made[1:] for made in found.made] == [(0, 2), (1, 1), (-2, -2), (-1, -1)]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: x.new_empty(4).copy_(x), "torch computes aten.copy_.default"),
        (lambda x: x.new_empty(4).fill_(x.sum().item()), "torch computes aten.sum.default, aten._local_scalar_dense"),
        (lambda x: x, "a result is no memory of its own"),
        (lambda x: x.new_empty(4)[:2], "a result is no memory of its own"),
        (lambda x: x.new_empty(0), "0 tensors hold one address"),
        (lambda x: [made := x.new_empty(4), made.view(2, 2)], "two results are one memory"),
        (lambda x: [x.new_empty(4), call_kernel(ignore, ctypes.c_void_p(8))][0], "0 tensors hold one address"),
        (lambda x: [x.new_empty(4), call_kernel(ignore, ctypes.c_void_p(x.data_ptr() + 16))][0], "0 tensors hold one"),
    ],
)
def test_what_cannot_be_repeated(run, reason):
    x = torch.randn(4)
    result, found = record(lambda: run(x), [x])
    assert found.startswith(reason)
    assert isinstance(result, torch.Tensor | list)


def test_overlapping_arguments_cannot_be_told_apart():
    x = torch.randn(8)

    def run():
        call_kernel(ignore, ctypes.c_void_p(x[4:].data_ptr()))
        return x.new_empty(1)

    assert record(run, [x[:5], x[4:]])[1] == "2 tensors hold one address"
    assert not isinstance(record(run, [x[:4], x[4:]])[1], str)


def test_an_error_ends_the_recording():
    def run():
        raise KeyError("x")

    with pytest.raises(KeyError):
        record(run, [])
    assert recorder._STATE.recorder is None


def test_an_operator_within_an_operator():
    """The inner one may be repeated, the outer one is not; and the recorder of the outer one listens on."""
    codes = torch.zeros(4, 2, dtype=torch.int8)

    def run():
        for _ in range(4):
            packed = torch.ops.qcompiler.pack_codes.default(codes, 4)
        call_kernel(ignore, 1)
        assert recorder._STATE.recorder.calls[-1] == (ignore, (1,))
        return packed

    assert record(run, [codes])[1] == "torch computes qcompiler.pack_codes.default"
