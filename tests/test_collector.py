"""The pause of the garbage collector: it ends, whatever happens, and no garbage is lost."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import collector
from qcompiler.collector import paused_collector

#: before the test run leaves it out
PASS_OVER = collector._pass_over


@pytest.fixture(autouse=True)
def _collector_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The collector is on in every test of this file, and nothing is out of its way."""
    monkeypatch.setattr(collector, "_pass_over", PASS_OVER)
    gc.enable()
    gc.unfreeze()
    yield
    gc.enable()
    gc.freeze()


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


def test_many_new_objects_are_not_walked_through(monkeypatch):
    monkeypatch.setattr(collector, "MANY", 1000)
    found: list[int] = []
    gc.callbacks.append(lambda phase, info: found.append(info["generation"]))
    try:
        with paused_collector():
            kept = [Circle() for _ in range(5000)]
        more = Circle()
    finally:
        gc.callbacks.pop()
    assert found == []
    lost = weakref.ref(kept.pop())
    gc.collect()
    assert lost() is None
    assert more.self is more


def test_what_the_program_keeps_frozen_stays_frozen(monkeypatch):
    monkeypatch.setattr(collector, "MANY", 1000)
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with paused_collector():
            kept = [Circle() for _ in range(5000)]
        # other threads, such as that of a parallel test run, may free a few; the 5000 would count if they were frozen
        assert 0 <= frozen - gc.get_freeze_count() < 100 < frozen
        assert len(kept) == 5000
    finally:
        gc.unfreeze()
