"""torch.distributed.checkpoint saves and loads kept ranges, and a run resumes exactly."""

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    # torch.distributed.checkpoint, of itself, where there is one process
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

X, Y = torch.linspace(-1, 1, 48).reshape(8, 6).sin(), torch.arange(8) % 4


class Named(nn.Module):
    """Names that start with an underscore, and that have several parts."""

    def __init__(self) -> None:
        super().__init__()
        self._first = nn.Linear(6, 6)
        self.rest = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self._first(x).relu())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
    """Two steps from a seed, which stochastic rounding reads."""
    torch.manual_seed(seed)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(eager, recipe: str) -> tuple[Any, torch.optim.Optimizer]:
    """A new model and its optimizer, a step old so that both have their states."""
    model = eager(Named(), recipe)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    return model, optimizer


@pytest.mark.parametrize("recipe", ["in-hindsight-w8a8g8", "lsq-w4a4"])
def test_a_run_resumes(eager, recipe, tmp_path):
    model, optimizer = build(eager, recipe)
    states, moments = get_state_dict(model, optimizer)
    assert states.keys() == model.state_dict().keys()
    dcp.save({"model": states, "optimizer": moments}, checkpoint_id=tmp_path)
    straight = train(model, optimizer, 2)

    resumed, its_optimizer = build(eager, recipe)
    train(resumed, its_optimizer, 3)
    states, moments = get_state_dict(resumed, its_optimizer)
    dcp.load({"model": states, "optimizer": moments}, checkpoint_id=tmp_path)
    set_state_dict(resumed, its_optimizer, model_state_dict=states, optim_state_dict=moments)
    assert train(resumed, its_optimizer, 2) == straight
    assert model.ranges().keys() == resumed.ranges().keys()
    for name, state in model.ranges().items():
        assert torch.equal(state, resumed.ranges()[name])


def test_a_part_of_another_model(eager):
    model = nn.Sequential(eager(Named(), "in-hindsight-w8a8g8"), nn.Linear(4, 4))
    F.cross_entropy(model(X), Y).backward()
    assert get_model_state_dict(model).keys() == model.state_dict().keys()
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        model[0].other  # noqa: B018
