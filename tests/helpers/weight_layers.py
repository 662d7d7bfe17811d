"""The kinds of layers that have a weight, as parameters of a test."""

import pytest
from torch import nn


def each_weight_layer():
    """Return the mark that gives a test `model` and `shape`, the shape of an input; the layers are new ones."""
    return pytest.mark.parametrize(
        ("model", "shape"),
        [
            (nn.Linear(4, 3, bias=False), (2, 4)),
            (nn.Linear(4, 3, bias=False), (2, 5, 4)),
            (nn.Conv2d(4, 6, 2, groups=2, bias=False), (2, 4, 3, 3)),
            (nn.ConvTranspose2d(4, 6, 2, bias=False), (2, 4, 3, 3)),
        ],
        ids=["linear", "tokens", "convolution", "transposed convolution"],
    )
