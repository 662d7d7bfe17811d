"""Models, recipes and loops that the debugger watches."""

import torch
from torch import nn

from qcompiler import Recipe, Rule, parse_spec


def recipe(*rules, spec="int8:real:tensor:nearest:pass"):
    """Some rules in front of one spec for everything."""
    return Recipe(name="test", rules=(*rules, Rule(spec=parse_spec(spec))))


def train(qmodel, inputs, steps=3):
    """Some steps of SGD with momentum; two micro-batches a step. Everything that a step can change."""
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in inputs[step % len(inputs)].chunk(2):
            loss = qmodel(part).sin().sum()
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    grads = {f"{name}.grad": p.grad for name, p in qmodel.named_parameters()}
    return [*losses, *qmodel.state_dict().values(), *grads.values(), torch.get_rng_state()]


def student():
    """Three layers of inner width 32."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def fit(qmodel, steps):
    """Some steps that change nothing."""
    for _ in range(steps):
        qmodel(torch.randn(32, 16)).square().mean().backward()
