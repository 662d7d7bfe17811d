"""The pause of the garbage collector: it ends, whatever happens, and no garbage is lost."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.collector import paused_collector


@pytest.fixture(autouse=True)
def _collector_on() -> Iterator[None]:
    """The collector is on in every test of this file."""
    gc.enable()
    yield
    gc.enable()


class Circle:
    """Garbage that only the collector can find."""

    def __init__(self) -> None:
        self.self = self


def test_no_collection_inside():
    found: list[str] = []
    gc.callbacks.append(lambda phase, info: found.append(phase))
    try:
        with paused_collector():
            kept = [Circle() for _ in range(3 * gc.get_threshold()[0])]
            inside = [*found]
    finally:
        gc.callbacks.pop()
    assert inside == []
    assert len(kept) == 3 * gc.get_threshold()[0]


def test_on_again():
    with paused_collector():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_on_again_after_an_error():
    with pytest.raises(KeyError), paused_collector():
        raise KeyError
    assert gc.isenabled()


def test_nested_pauses_end_with_the_outer_one():
    with paused_collector():
        with paused_collector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_program_without_collector_stays_without():
    gc.disable()
    with paused_collector():
        pass
    assert not gc.isenabled()


def test_garbage_of_the_pause_is_found_later():
    with paused_collector():
        seen = weakref.ref(Circle())
    assert seen() is not None
    gc.collect()
    assert seen() is None


def test_a_compile_leaves_the_collector_on():
    model = qcompiler.compile(nn.Linear(4, 4), "hyperblock-int8", backend="eager")
    model(torch.randn(4, 4)).sum().backward()
    assert gc.isenabled()
