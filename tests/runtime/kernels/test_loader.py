"""C++ through torch's loader."""

import pytest

from qcompiler.runtime.kernels import loader

ADD = 'extern "C" int add(int a, int b) { return a + b; }'


def test_functions_can_be_called():
    assert loader.compile_source(ADD).add(2, 40) == 42


def test_code_that_does_not_compile_is_an_error():
    with pytest.raises(Exception, match="no_such_type"):
        loader.compile_source("no_such_type x;")
