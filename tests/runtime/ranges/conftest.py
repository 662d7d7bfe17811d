"""A layer whose ranges are those of the past."""

import pytest
from past_ranges import SPEC, recipe
from torch import nn


@pytest.fixture
def linear(eager):
    """linear(spec) → a compiled linear layer without bias; its sites are input, weight and grad."""
    return lambda spec=SPEC: eager(nn.Linear(4, 3, bias=False), recipe(spec))
