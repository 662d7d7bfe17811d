"""C++ through torch's loader."""

import pytest

from qcompiler.runtime.kernels import loader

ADD = 'extern "C" int add(int a, int b) { return a + b; }'


def test_functions_can_be_called():
    assert loader.compile_source(ADD).add(2, 40) == 42


def test_code_that_does_not_compile_is_an_error():
    with pytest.raises(Exception, match="no_such_type"):
        loader.compile_source("no_such_type x;")


def test_a_thread_loads_libraries_once():
    name = "multiply_runs"
    thread = loader.start_loading(name)
    thread.join()
    assert loader.start_loading(name) is thread
    assert loader.load_library.cache_info().currsize >= 1
    assert not thread.is_alive()


def test_headers_of_ours_stand_in_the_source():
    """Each once, and those of the system as they are."""
    source = loader.read_source("convolve.cpp")
    assert source.count("struct Image {") == source.count("struct Matrix {") == 1
    assert '#include "' not in source
    assert "#include <cstdint>" in source
