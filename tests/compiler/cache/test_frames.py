"""Questions of passes about the place of a graph, asked again."""

import pytest

from qcompiler.compiler.cache.frames import FrameRecord
from qcompiler.passes.ir.frame import WHOLE, Frame


def test_the_same_answers_hold():
    record = FrameRecord()
    frame = record.watch(WHOLE)
    assert frame.claim("a") == 1
    assert frame.positions(["a", "b"]) == WHOLE.positions(["a", "b"])
    assert record.holds(WHOLE)


@pytest.mark.parametrize(
    "other",
    [
        Frame(lambda layer: 2, WHOLE.positions),
        Frame(WHOLE.claim, lambda paths: WHOLE.positions([*paths, "more"])[:-1]),
    ],
)
def test_other_answers_do_not(other):
    record = FrameRecord()
    frame = record.watch(WHOLE)
    frame.claim("a")
    frame.positions(["a", "b"])
    assert not record.holds(other)


def test_every_claim_is_made_again_in_the_same_order():
    """A claim decides about later ones, so a wrong answer ends no questions."""
    record, asked = FrameRecord(), []
    frame = record.watch(WHOLE)
    for layer in ("b", "a", "b"):
        frame.claim(layer)
    record.holds(Frame(lambda layer: asked.append(layer) or 2, WHOLE.positions))
    assert asked == ["b", "a"]


def test_nothing_asked_holds_everywhere():
    assert FrameRecord().holds(Frame(lambda layer: 7))
