"""What ranks tell each other: one state, the mean of learned gradients, a word where they do not belong together."""

import numpy as np
import torch

from qcompiler.runtime.ranges.estimators import parse_range

F32 = np.float32
NAMES = ("(root)/input", "(root)/weight", "(root)/grad")


def top(x):
    return F32(x.detach().abs().max().item())


def check_learned(workers, *ranks):
    """One value on both ranks, the first one's, and the mean of the gradients that each rank has alone."""
    alone = [workers.learn(rank, lambda model: model) for rank in (0, 1)]
    assert not torch.equal(*(run[0]["(root)/input"] for run in alone))
    for step, (one, other) in enumerate(zip(*ranks, strict=True)):
        assert set(one) == set(other) == set(alone[0][0])
        for name, value in one.items():
            assert torch.equal(value, other[name])
            if "#gradient" not in name:
                assert torch.equal(value, alone[0][step][name])
    for name in ("(root)/input#gradient", "(root)/weight#gradient"):
        assert alone[0][0][name] != alone[1][0][name]
        assert torch.equal(ranks[0][0][name], (alone[0][0][name] + alone[1][0][name]) / 2)


def test_ranks_hold_one_state_the_wider_of_all(tmp_path, workers):
    """Two processes with DistributedDataParallel on inputs of their own: after each step the states are equal."""
    processes = [workers.start("ranks", tmp_path, rank) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for estimator in workers.ESTIMATORS[:2]:
        runs = [torch.load(tmp_path / f"{estimator}.{rank}", weights_only=True) for rank in (0, 1)]
        assert torch.equal(runs[0]["grad"], runs[1]["grad"])
        for one, other in zip(runs[0]["history"], runs[1]["history"], strict=True):
            assert not torch.equal(one.pop("x"), other.pop("x"))
            assert set(one) == set(other) == set(NAMES)
            assert all(torch.equal(one[name], other[name]) for name in NAMES)
    check_learned(workers, *(torch.load(tmp_path / f"learned.{rank}", weights_only=True) for rank in (0, 1)))
    # the moving average of the wider input, as numpy has it
    runs = [torch.load(tmp_path / f"hindsight(0.75,0.02).{rank}", weights_only=True)["history"] for rank in (0, 1)]
    state = None
    for one, other in zip(*runs, strict=True):
        tops = [top(step["x"]) for step in (one, other)]
        befores = tops if state is None else [state, state]
        # the guard of 0.02 fires where one of 30 elements was clipped, that is where the maximum lies outside
        afters = [t if t > b else F32(0.75) * b + F32(0.25) * t for t, b in zip(tops, befores, strict=True)]
        state = max(afters)
        assert one["(root)/input"][1].item() == state
    assert parse_range("hindsight(0.75,0.02)").guard < 1 / 30


def test_buckets_do_not_split_a_model(tmp_path, workers):
    """3.0 MB of weights, and the first bucket ends at 1 MB: first, last and the plan are those of the model."""
    assert workers.start("buckets", tmp_path).wait(timeout=120) == 0
    alone, parallel = torch.load(tmp_path / "buckets", weights_only=True)
    assert torch.equal(alone["outputs"], parallel["outputs"])
    assert torch.equal(alone["grad"], parallel["grad"])
    assert alone["sites"] == parallel["sites"]
    assert {name.partition("/")[0] for name in alone["sites"]} == {"0", "2", "4", "6"}
