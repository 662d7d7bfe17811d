"""Names of sites: written, read back and numbered in one place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.passes.ir.site_name import Numbering, SiteName, get_role, number_name
from qcompiler.passes.rules import Product, Role

OPERANDS = ["input", "weight", "left", "right", "grad", "output"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("conv1/input", SiteName("conv1", "input")),
        ("a/matmul#2/left.turned", SiteName("a/matmul#2", "left", turned=True)),
        ("l.0@2/grad.weight-gradient.turned#3", SiteName("l.0@2", "grad", "weight-gradient", True, 3)),
        ("block/add/output", SiteName("block/add", "output")),
    ],
)
def test_text_and_parts(text, name):
    assert str(name) == text
    assert SiteName.parse(text) == name


@given(
    st.text("abc.019_@#/", min_size=1, max_size=12),
    st.sampled_from(OPERANDS),
    st.sampled_from(["", *map(str, Product)]),
    st.booleans(),
    st.integers(1, 30),
)
def test_round_trip(contraction, operand, product, turned, index):
    name = SiteName(contraction, operand, product, turned, index)
    assert SiteName.parse(str(name)) == name


def test_turn_keeps_the_rest():
    assert str(SiteName.parse("a/grad.input-gradient#2").turn()) == "a/grad.input-gradient.turned#2"


@pytest.mark.parametrize(
    ("operand", "role"),
    [
        *((name, Role.ACTIVATION) for name in ("input", "left", "right")),
        ("weight", Role.WEIGHT),
        ("grad", Role.GRADIENT),
        ("output", Role.OUTPUT),
    ],
)
def test_role(operand, role):
    assert get_role(f"x/{operand}.turned#2") is role


def test_numbering():
    numbering = Numbering()
    assert [numbering.number(name) for name in "aaba"] == ["a", "a#2", "b", "a#3"]
    assert number_name("a", 1) == "a"
