"""Files of kept values: found, made anew, damaged, and where nothing can be written."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompiler.compiler import torch_compat
from qcompiler.compiler.cache.files import recall

MODE = FakeTensorMode()
#: as it is without the fixture of all tests
FIND_CACHE = torch_compat.find_cache


def refuse():
    raise AssertionError("made anew")


def test_a_value_is_made_once(kept):
    assert recall("key", MODE, lambda: {"a": 1}) == {"a": 1}
    assert recall("key", MODE, refuse) == {"a": 1}
    assert recall("other", MODE, lambda: 2) == 2
    assert sorted(path.name for path in kept.iterdir()) == ["key", "other"]


@pytest.mark.parametrize(("key", "mode"), [(None, MODE), ("key", None)])
def test_without_key_or_mode_nothing_is_kept(key, mode, kept):
    assert recall(key, mode, lambda: 1) == 1
    assert not kept.exists()


def test_without_a_folder_nothing_is_kept(kept, monkeypatch):
    monkeypatch.setattr(torch_compat, "find_cache", lambda: None)
    assert [recall("key", MODE, lambda: 1), recall("key", MODE, lambda: 2)] == [1, 2]
    assert not kept.exists()


def test_a_value_that_does_not_fit_is_replaced(kept):
    recall("key", MODE, lambda: 1)
    assert recall("key", MODE, lambda: 2, lambda found: found > 1) == 2
    assert recall("key", MODE, refuse, lambda found: found > 1) == 2


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x80\x05\x95"])
def test_a_damaged_file_is_replaced(data, kept, caplog):
    recall("key", MODE, lambda: 1)
    (kept / "key").write_bytes(data)
    with caplog.at_level("INFO", logger="qcompiler"):
        assert recall("key", MODE, lambda: 2) == 2
    assert "captured anew" in caplog.text
    assert recall("key", MODE, refuse) == 2


def test_every_cut_of_a_file_is_noticed(kept):
    value = {"names": ["a" * 40, "b"], "number": 3}
    recall("key", MODE, lambda: value)
    data = (kept / "key").read_bytes()
    for end in range(len(data)):
        (kept / "key").write_bytes(data[:end])
        assert recall("key", MODE, lambda: "made") == "made"


def test_a_changed_byte_is_noticed(kept):
    recall("key", MODE, lambda: 3)
    data = (kept / "key").read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        (kept / "key").write_bytes(changed)
        assert recall("key", MODE, lambda: "made") == "made"


def test_a_value_that_cannot_be_written_is_used_all_the_same(kept, caplog):
    with caplog.at_level("INFO", logger="qcompiler"):
        assert callable(recall("local", MODE, lambda: lambda: 1))
    assert "not kept for the next process" in caplog.text
    assert not (kept / "local").exists()


def test_a_folder_that_is_a_file_costs_time_alone(kept, caplog):
    kept.write_text("no folder")
    with caplog.at_level("INFO", logger="qcompiler"):
        assert recall("key", MODE, lambda: 1) == 1
    assert "not kept for the next process" in caplog.text
    assert kept.read_text() == "no folder"


def test_an_error_is_not_kept(kept):
    with pytest.raises(AssertionError):
        recall("key", MODE, refuse)
    assert recall("key", MODE, lambda: 1) == 1


def test_the_folder_lies_in_the_one_of_inductor(monkeypatch, tmp_path):
    found = FIND_CACHE()
    assert found is not None
    assert found.name == "qcompiler"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert Path(tmp_path) in FIND_CACHE().parents
    with torch._functorch.config.patch(enable_autograd_cache=False):
        assert FIND_CACHE() is None
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert FIND_CACHE() is None
