"""Learned ranges of a loaded or copied state: parameters before the first step, whose optimizer resumes as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qcompiler


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_learned_ranges_resume_with_their_optimizer(eager, how):
    """All optimizers are there before the first step, and that step gives the bits of the run that went on."""

    def net():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def optimizers(model):
        return [torch.optim.Adam(of, lr=1e-2) for of in (model.parameters(), model.quantizer_parameters())]

    def train(model, steps):
        for _ in range(steps):
            model(x).square().mean().backward()
            for optimizer in made[model]:
                optimizer.step()
                optimizer.zero_grad()

    x, model = torch.randn(4, 6), eager(net(), "lsq-w4a4")
    with pytest.raises(qcompiler.CompileError, match="nothing is captured yet"):
        model.quantizer_parameters()
    model(x)
    made = {model: optimizers(model)}
    train(model, 2)
    if how == "state_dict":
        other = eager(net(), "lsq-w4a4")
        other.load_state_dict(model.state_dict())
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    made[other] = optimizers(other)
    assert len(other.quantizer_parameters()) == len(model.quantizer_parameters()) == 4
    for own, theirs in zip(made[other], made[model], strict=True):
        own.load_state_dict(copy.deepcopy(theirs.state_dict()))
    before = other.quantizer_parameters()
    train(model, 2)
    train(other, 2)
    assert all(one is same for one, same in zip(before, other.quantizer_parameters(), strict=True))
    state = model.state_dict()
    assert [*state] == [*other.state_dict()]
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.usefixtures("fresh")
def test_a_learned_range_without_a_value_waits_in_a_copy_too(eager):
    model, x = eager(nn.Sequential(nn.Linear(4, 4)), "lsq-w4a4"), torch.randn(2, 4)
    model(torch.full_like(x, torch.nan))
    for asked in (False, True):
        other = copy.deepcopy(model)
        assert other.ranges()["0/input"].isnan()
        if asked:
            assert len(other.quantizer_parameters()) == 2
        assert other(x).isfinite().all()
        other.load_state_dict(model.state_dict())  # back into parameters that are there
        assert other(x).isfinite().all()
        assert other.ranges()["0/input"].isfinite()
