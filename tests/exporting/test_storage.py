"""How blocks and codes lie in a file."""

import numpy as np
import pytest

from qcompiler.exporting.blocks import Edges, find_edges, spread_scale
from qcompiler.exporting.storage import get_storage_type
from qcompiler.runtime.numbers.blocks import parse_block
from qcompiler.runtime.numbers.formats import parse_format


def test_edges_by_dimension():
    edges = find_edges((None, 12, 4, 4), "bcss", parse_block("c8"))
    assert edges == Edges((1, 8, 1, 1), (None, 12, 4, 4))
    assert (edges.split, edges.counts) == ((1,), (None, 2, 4, 4))
    assert find_edges((3, 5), "bc", parse_block("c8")).edges == (1, 0)
    assert spread_scale(Edges((1, 2), (2, 3)), np.array([[1, 2], [3, 4]])).tolist() == [[1, 1, 2], [3, 3, 4]]
    with pytest.raises(ValueError, match="along a dynamic axis"):
        find_edges((2, None), "bc", parse_block("c8"))
    assert find_edges((2, 3, 5), "bcc", parse_block("c8")) == Edges((1, 8), (2, 15), joined=True)


def test_storage():
    names = {"int8": "INT8", "int5": "INT8", "int3": "INT4", "uint4": "UINT4", "affine8": "UINT8", "int16": "INT16"}
    names |= {"e4m3": "FLOAT8E4M3FN", "e5m2inf": "FLOAT8E5M2", "e2m1": "UINT4", "e4m3b11": "UINT8", "e5m10": "FLOAT16"}
    assert {name: get_storage_type(parse_format(name)).name for name in names} == names
