"""Ranges from statistics: SAWB and the distribution-adaptive ones, by hand."""

import pytest
import torch

from qcompiler.runtime.numbers.blocks import TENSOR, Block, view_blocks
from qcompiler.runtime.numbers.formats import Kind
from qcompiler.runtime.ranges.estimator import Observed
from qcompiler.runtime.ranges.statistical import Adaptive, Sawb
from qcompiler.runtime.spec import parse_spec


def test_sawb_is_that_of_its_block() -> None:
    """A block has the same range alone and beside others, the last, smaller one too."""
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    spread = view_blocks((5,), "c", Block(channel=3))
    _, high = Sawb().ends(Observed(x, spread, Kind.SIGNED, 3), x)
    for part, found in zip((x[:3], x[3:]), high, strict=True):
        clip = 12.68 * part.square().mean().sqrt() - 12.8 * part.abs().mean()
        torch.testing.assert_close(found, torch.minimum(clip.abs(), part.abs().max()))


def test_sawb_needs_a_width_with_coefficients() -> None:
    assert str(parse_spec("uint4:real:tensor:nearest:pass:sawb")).endswith("sawb")
    with pytest.raises(ValueError, match=r"^sawb: got a format of 8 bits; valid: 2, 4, 5 bits$"):
        parse_spec("int8:real:tensor:nearest:pass:sawb")


def adaptive(x: torch.Tensor, state: float) -> tuple[float, float]:
    """(end in use, next state) of one block with rate ½ and the usual share of 0.3."""
    seen = Observed(x, view_blocks(tuple(x.shape), "c", TENSOR), Kind.SIGNED, 7)
    held = torch.tensor([[state]])
    low, high = Adaptive(0.5).ends(seen, held)
    assert torch.equal(low, -high)
    return high.item(), Adaptive(0.5).update(seen, held).item()


def test_adaptive_takes_the_maximum_of_a_gaussian_block() -> None:
    # ±1: the standard deviation is 1, and nothing lies beyond it; two of four beyond it count as Gaussian
    x = torch.tensor([-4.0, -0.1, 0.1, 4.0])  # std √8.005 = 2.83: a half lies beyond it
    assert adaptive(x, 100.0) == (4.0, 4.0)


def test_adaptive_moves_for_a_peaked_block() -> None:
    x = torch.tensor([0.0] * 19 + [8.0])  # one of twenty lies beyond one standard deviation
    assert adaptive(x, 2.0) == (5.0, 5.0)  # ½·2 + ½·8


def test_adaptive_starts_at_the_maximum() -> None:
    seen = Observed(torch.tensor([1.0, -3.0]), view_blocks((2,), "c", TENSOR), Kind.SIGNED, 7)
    assert Adaptive().first(seen).tolist() == [[3.0]]
