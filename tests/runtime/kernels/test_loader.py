"""C++ through torch's loader."""

import subprocess
import sys
import threading

import pytest
from torch._inductor.codecache import CppCodeCache

from qcompiler.runtime.kernels import loader

ADD = 'extern "C" int add(int a, int b) { return a + b; }'


def test_functions_can_be_called():
    assert loader.compile_source(ADD).add(2, 40) == 42


def test_code_that_does_not_compile_is_an_error():
    with pytest.raises(Exception, match="no_such_type"):
        loader.compile_source("no_such_type x;")


def fail(code):
    """Raise what torch raises if a compiler ends with a code; below 0 it is the number of a signal."""
    try:
        raise subprocess.CalledProcessError(code, "g++")
    except subprocess.CalledProcessError as error:
        raise RuntimeError("C++ compile error") from error


def test_a_compiler_that_a_signal_ended_is_called_again():
    """Ctrl-C reaches g++ too, and torch keeps the failure in the table of its libraries."""
    codes = [-2, 0]

    def run():
        code = codes.pop(0)
        return fail(code) if code else "library"

    CppCodeCache.cache["failed"] = lambda: None
    assert loader.call_until_compiled(run) == "library"
    assert "failed" not in CppCodeCache.cache


@pytest.mark.parametrize("codes", [[1], [-2, -2], [-2, 1]])
def test_a_compiler_that_fails_is_an_error(codes):
    with pytest.raises(RuntimeError, match="C"):
        loader.call_until_compiled(lambda: fail(codes.pop(0)))
    assert codes == []


def test_a_thread_loads_libraries_once():
    name = "multiply_runs"
    thread = loader.start_loading(name, inductor=True)
    thread.join()
    assert loader.start_loading(name, inductor=True) is thread
    assert loader._load.cache_info().currsize >= 1
    assert not thread.is_alive()


def test_a_library_on_its_way_is_waited_for(monkeypatch):
    """Not compiled twice, and no kernel is refused meanwhile."""
    compiled, waits = [], threading.Event()

    def compile_source(source):
        compiled.append(source)
        assert waits.wait(60)
        return "library"

    assert loader.explain_compiler() == ""
    processor = loader.explain_vectors()
    monkeypatch.setattr(loader, "compile_source", compile_source)
    loader._load.cache_clear()
    thread = loader.start_loading("convolve", inductor=False)
    try:
        assert loader.explain_compiler() == ""
        assert loader.explain_vectors() == processor
    finally:
        waits.set()
    thread.join()
    assert loader.load_library("convolve") == "library"
    loader._load.cache_clear()
    assert len(compiled) == 1


def test_one_thread_tries_the_processor(monkeypatch):
    """Torch changes the flags of a processor while it tries them: two threads would keep wrong ones."""
    asked, answers, waited = threading.Event(), threading.Event(), threading.Event()

    def ask():
        asked.set()
        assert answers.wait(60)
        return "no compiler"

    monkeypatch.setattr(loader, "_ask_processor", ask)
    loader.explain_compiler.cache_clear()
    thread = loader.start_loading(inductor=True)
    waits = threading.Thread(target=lambda: (loader.wait_for_processor(), waited.set()))
    waits.start()
    assert asked.wait(60)
    assert not waited.wait(0.2)
    answers.set()
    for one in (thread, waits):
        one.join()
    assert waited.is_set()
    for cache in (loader.explain_compiler, loader.start_loading):
        cache.cache_clear()


@pytest.fixture
def broken(monkeypatch):
    """A machine without a compiler."""
    caches = (loader._load, loader._ask_processor, loader.explain_compiler, loader.explain_vectors)

    def refuse(source):
        raise RuntimeError("no g++\nat all")

    monkeypatch.setattr(loader, "compile_source", refuse)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_the_reason_is_asked_for_quietly(broken, caplog):
    reason = "processor.cpp does not compile here: RuntimeError: no g++"
    assert loader.explain_compiler() == loader.explain_vectors() == reason
    assert not caplog.records


def test_without_a_compiler_no_library_is_tried(broken, caplog):
    assert loader.load_library("convolve") == "processor.cpp does not compile here: RuntimeError: no g++"
    assert not caplog.records


def test_a_library_that_does_not_compile_is_logged(broken, caplog, monkeypatch):
    monkeypatch.setattr(loader, "explain_compiler", lambda: "")
    reason = "convolve.cpp does not compile here: RuntimeError: no g++"
    assert loader.load_library("convolve") == loader.load_library("convolve") == reason
    assert [record.message for record in caplog.records] == [reason]


def test_a_processor_without_the_instructions(monkeypatch):
    class Library:
        get_lanes = staticmethod(lambda: 0)

    monkeypatch.setattr(loader, "_ask_processor", Library)
    loader.explain_vectors.cache_clear()
    found = loader.explain_vectors()
    loader.explain_vectors.cache_clear()
    assert found == "kernels that multiply codes need a processor with AVX-512 VNNI or AVX2"


def test_headers_of_ours_stand_in_the_source():
    """Each once, and those of the system as they are."""
    source = loader.read_source("convolve.cpp")
    assert source.count("struct Image {") == source.count("struct Matrix {") == 1
    assert '#include "' not in source
    assert "#include <cstdint>" in source


SCRIPT = """
import sys, threading
from qcompiler.runtime.kernels import loader

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if threading.current_thread().name.startswith("qcompiler-"):
            print(name)

loader._import_compiler()
sys.meta_path.insert(0, Recorder())
loader.start_loading("quantize_blocks", "convolve", inductor=True).join()
assert loader.explain_compiler() == ""
"""


def test_the_threads_import_nothing():
    """An import of setuptools changes the list of finders, which an import in another thread walks through."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
