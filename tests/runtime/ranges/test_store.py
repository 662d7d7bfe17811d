"""RangeStore: what is read, when it is committed, what is merged; with an autograd engine made of lists."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.past import Hindsight, Running
from qcompiler.runtime.ranges.searched import Cosine
from qcompiler.runtime.ranges.store import PREFIX, Engine, RangeStore, StateSite

CPU = torch.device("cpu")


@dataclasses.dataclass
class Fake:
    """An engine: `task` is the number of the backward that runs; `end` runs what waits for its end."""

    task: int = -1
    waiting: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    def store(self) -> RangeStore:
        return RangeStore(Engine(lambda call: self.waiting.append(call), lambda: self.task))

    def start(self, task: int) -> None:
        self.task = task

    def end(self) -> None:
        waiting, self.waiting = self.waiting, []
        for call in waiting:
            call()
        self.task = -1

    def fail(self) -> None:
        self.waiting.clear()
        self.task = -1


def site(name: str = "x", estimator: Range | None = None, *shape: int) -> StateSite:
    return StateSite(name, estimator or Running(), shape or (2, 1), CPU)


def ends(high: float) -> torch.Tensor:
    return torch.tensor([[-high], [high]])


def highs(store: RangeStore) -> dict[str, float]:
    return {name: state[1].item() for name, state in store.states.items()}


@pytest.fixture
def engine() -> Fake:
    return Fake()


def commit(engine: Fake, store: RangeStore, task: int = 0, **tops: float) -> None:
    """One whole step over sites of these names."""
    sites = [site(name) for name in tops]
    moment = store.now(sites)
    engine.start(task)
    store.propose(sites, [ends(high) for high in tops.values()], moment)
    engine.end()


def test_states_are_committed_when_the_backward_has_ended(engine: Fake) -> None:
    store = engine.store()
    moment = store.now([site()])
    engine.start(0)
    store.propose([site()], [ends(3)], moment)
    assert store.states == {}
    assert store.read([site()])[0].isnan().all()
    engine.end()
    assert highs(store) == {"x": 3}
    assert torch.equal(store.read([site()])[0], ends(3))


def test_one_call_waits_for_each_backward_and_commits_forward_and_backward_sites(engine: Fake) -> None:
    store = engine.store()
    moments = [store.now([site(name)]) for name in "xg"]
    engine.start(0)
    store.propose([site("x")], [ends(3)], moments[0])
    store.propose([site("g")], [ends(5)], moments[1])
    assert len(engine.waiting) == 1
    engine.end()
    assert highs(store) == {"x": 3, "g": 5}


def test_two_proposals_of_one_backward_are_merged_and_count_once(engine: Fake) -> None:
    store = engine.store()
    commit(engine, store, x=9)
    moments = [store.now([site()]), store.now([site()])]
    engine.start(1)
    for moment, high in zip(moments, (2, 4), strict=True):
        store.propose([site()], [ends(high)], moment)
    engine.end()
    assert highs(store) == {"x": 4}
    assert store.state_dict()[f"{PREFIX}x#steps"] == 2


@pytest.mark.parametrize(("first", "second", "expected"), [(2, 4, 4), (4, 2, 4)])
def test_a_stale_proposal_is_merged_with_the_state(engine: Fake, first: int, second: int, expected: int) -> None:
    store = engine.store()
    commit(engine, store, x=9)
    moments = [store.now([site()]), store.now([site()])]  # two forwards, then two backwards
    for task, (moment, high) in enumerate(zip(moments, (first, second), strict=True)):
        engine.start(task)
        store.propose([site()], [ends(high)], moment)
        engine.end()
    assert highs(store) == {"x": expected}
    commit(engine, store, x=1)  # a fresh one replaces the state
    assert highs(store) == {"x": 1}


def test_what_a_failed_backward_proposed_is_dropped(engine: Fake) -> None:
    store = engine.store()
    commit(engine, store, x=9)
    moment = store.now([site()])
    engine.start(7)
    store.propose([site()], [ends(100)], moment)
    engine.fail()
    assert highs(store) == {"x": 9}
    moment = store.now([site()])
    engine.start(7)  # the engine may use a number again
    store.propose([site()], [ends(2)], moment)
    assert len(engine.waiting) == 1
    engine.end()
    assert highs(store) == {"x": 2}


def test_a_forward_inside_a_backward_drops_nothing(engine: Fake) -> None:
    """User checkpointing runs forward again while a backward has proposed already."""
    store = engine.store()
    moment = store.now([site()])
    engine.start(0)
    store.propose([site()], [ends(3)], moment)
    store.now([site("y")])
    engine.end()
    assert highs(store) == {"x": 3}


def test_the_first_step_seeks_its_ranges(engine: Fake) -> None:
    store = engine.store()
    assert store.is_first([site()])
    assert not store.is_first([])
    commit(engine, store, x=3)
    assert not store.is_first([site()])
    assert store.is_first([site(), site("y")])


@pytest.mark.parametrize("every", [1, 3])
def test_a_search_is_repeated_by_the_clock_of_its_site(engine: Fake, every: int) -> None:
    store = engine.store()
    searched = site("x", Cosine(every), 1, 1)
    seen = []
    for task in range(7):
        moment = store.now([searched])
        seen.append(moment.is_first)
        engine.start(task)
        store.propose([searched], [torch.ones(1, 1)], moment)
        engine.end()
    assert seen == [task % every == 0 for task in range(7)]


def test_a_state_of_nan_is_none(engine: Fake) -> None:
    """A first tensor that is not finite leaves NaN; the site starts once more."""
    store = engine.store()
    commit(engine, store, x=float("nan"), y=3)
    assert store.is_first([site("x")])
    assert not store.is_first([site("y")])
    copy = engine.store()
    copy.load_state_dict(store.state_dict())
    assert copy.is_first([site("x")])
    commit(engine, store, x=2)
    assert not store.is_first([site("x")])


def test_a_state_of_another_shape_starts_anew(engine: Fake) -> None:
    store = engine.store()
    commit(engine, store, x=3)
    other = site("x", Hindsight(), 3, 1)
    assert store.is_first([other])
    assert store.read([other])[0].isnan().all()
    moment = store.now([other])
    engine.start(1)
    store.propose([other], [torch.tensor([[-1.0], [1.0], [0.0]])], moment)
    engine.end()
    assert highs(store) == {"x": 1}


def test_a_checkpoint_holds_copies_and_the_clock(engine: Fake) -> None:
    store = engine.store()
    commit(engine, store, x=3)
    commit(engine, store, x=4, y=5)
    saved = store.state_dict()
    assert {key: value.tolist() for key, value in saved.items()} == {
        f"{PREFIX}x": [[-4], [4]],
        f"{PREFIX}y": [[-5], [5]],
        f"{PREFIX}x#steps": 2,
        f"{PREFIX}y#steps": 1,
    }
    other = engine.store()
    commit(engine, other, z=1)
    other.load_state_dict(saved)
    assert highs(other) == {"x": 4, "y": 5}
    saved[f"{PREFIX}x"].zero_()
    assert highs(store) == highs(other) == {"x": 4, "y": 5}
    assert other.state_dict()[f"{PREFIX}x#steps"] == 2


def test_loading_forgets_what_was_proposed(engine: Fake) -> None:
    store = engine.store()
    moment = store.now([site()])
    engine.start(0)
    store.propose([site()], [ends(3)], moment)
    store.load_state_dict({})
    engine.end()
    assert store.states == {}


def test_the_states_of_all_ranks_are_merged_in_their_order(engine: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks in one process: `all_gather` is handed what the other two would send."""
    store = engine.store()
    others = [[ends(7), ends(1)], [ends(2), ends(6)]]
    sent = []

    def all_gather(result: list[torch.Tensor], flat: torch.Tensor, group: object) -> None:
        if flat.numel() == 1:  # the names of the sites, of which all ranks have the same
            for part in result:
                part.copy_(flat)
            return
        sent.append(flat.clone())
        for part, given in zip(result, [flat, *(torch.cat([t.flatten() for t in o]) for o in others)], strict=True):
            part.copy_(given)

    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 3)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    commit(engine, store, x=3, y=5)
    assert highs(store) == {"x": 7, "y": 6}
    assert len(sent) == 1  # one message for all states
    assert sent[0].tolist() == [-3, 3, -5, 5]


def test_ranks_with_other_layers_are_refused(engine: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    store = engine.store()

    def all_gather(result: list[torch.Tensor], own: torch.Tensor, group: object) -> None:
        result[0].copy_(own)
        result[1].copy_(own + 1)

    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    with pytest.raises(
        RuntimeError, match=r"ranks \[1\] ran other layers in this backward than this one, which ran x, y;"
    ):
        commit(engine, store, x=3, y=5)
    assert store.states == {}
