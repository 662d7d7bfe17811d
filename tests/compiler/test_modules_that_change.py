"""Users change their modules while they train: the next step sees it, bitwise as in plain PyTorch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    # torch's own, while Dynamo looks at inputs that a hook or a frozen layer made
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

STEPS = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).flatten(1))


def norm_in_eval(step: int, model: Any) -> None:
    model.norm.train(step % 2 == 0)


def other_dropout(step: int, model: Any) -> None:
    model.drop.p = (0.3, 0.5, 0.0, 0.1, 1.0)[step]


def other_epsilon(step: int, model: Any) -> None:
    model.norm.eps = (1e-5, 1e-3, 0.1, 0.2, 1e-5)[step]


def without_statistics(step: int, model: Any) -> None:
    model.norm.track_running_stats = step < 3


def frozen_for_a_step(step: int, model: Any) -> None:
    model.conv.requires_grad_(step != 2)


def another_layer(step: int, model: Any) -> None:
    if step == 2:
        torch.manual_seed(9)
        model.head = nn.Linear(8 * 16, 5)


def weight_norm_that_goes(step: int, model: Any) -> None:
    if step == 1:
        parametrizations.weight_norm(model.head)
    if step == 3:
        parametrize.remove_parametrizations(model.head, "weight")


def written_weights(step: int, model: Any) -> None:
    if step == 1:
        with torch.no_grad():
            model.head.weight.mul_(2)
    if step == 2:
        model.head.weight.data = model.head.weight.data.clone() * 0.5
    if step == 3:
        model.norm.reset_running_stats()


def hooks(step: int, model: Any) -> None:
    if step == 1:
        model.head.register_forward_hook(lambda module, args, out: out * 2)
    if step == 2:
        model.conv.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    if step == 3:
        model.head.weight.register_hook(lambda grad: grad * 3)


def pruned(step: int, model: Any) -> None:
    if step == 2:
        prune.l1_unstructured(model.head, "weight", 0.5)


CHANGES = (
    norm_in_eval,
    other_dropout,
    other_epsilon,
    without_statistics,
    frozen_for_a_step,
    another_layer,
    weight_norm_that_goes,
    written_weights,
    hooks,
    pruned,
)


def train(model: nn.Module, owner: nn.Module, change: Callable[[int, Any], None]) -> list[Tensor | None]:
    """Every output, and what the module holds after all steps."""
    images = torch.linspace(-1, 1, STEPS * 4 * 3 * 16).mul(37).sin().reshape(STEPS, 4, 3, 4, 4)
    found: list[Tensor | None] = []
    for step in range(STEPS):
        change(step, model)
        torch.manual_seed(step)
        sgd = torch.optim.SGD(owner.parameters(), lr=0.01)
        sgd.zero_grad()
        out = model(images[step])
        out.square().sum().backward()
        sgd.step()
        found.append(out.detach())
    parameters = list(owner.parameters())
    return [*found, *(p.detach() for p in parameters), *(p.grad for p in parameters), *owner.buffers()]


@pytest.mark.sample(2)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_as_in_eager(eager, change):
    plain = Net()
    twin = copy.deepcopy(plain)
    expected, found = train(plain, plain, change), train(eager(twin), twin, change)
    assert len(expected) == len(found)
    for right, value in zip(expected, found, strict=True):
        assert (right is None and value is None) or torch.equal(right, value)
