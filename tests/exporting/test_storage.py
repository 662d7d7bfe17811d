"""The types that hold codes in a file."""

from qcompiler.exporting.storage import get_storage_type
from qcompiler.runtime.numbers.formats import parse_format


def test_storage():
    names = {"int8": "INT8", "int5": "INT8", "int3": "INT4", "uint4": "UINT4", "affine8": "UINT8", "int16": "INT16"}
    names |= {"e4m3": "FLOAT8E4M3FN", "e5m2inf": "FLOAT8E5M2", "e2m1": "UINT4", "e4m3b11": "UINT8", "e5m10": "FLOAT16"}
    assert {name: get_storage_type(parse_format(name)).name for name in names} == names
