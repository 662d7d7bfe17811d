"""Files of kept values: found, made anew, damaged, and where nothing can be written."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompiler.compiler.cache import cache_compat
from qcompiler.compiler.cache.files import recall
from qcompiler.compiler.cache.texts import Key

MODE = FakeTensorMode()
KEY = Key("capture", "forward at model.py:1", "key")
#: as it is without the fixture of all tests
FIND_CACHE = cache_compat.find_cache


def refuse():
    raise AssertionError("made anew")


def test_the_log_says_what_was_made_and_what_was_read(kept, caplog):
    with caplog.at_level("INFO", logger="qcompiler"):
        recall(KEY, MODE, lambda: 1)
        recall(KEY, MODE, refuse)
    assert [record.getMessage() for record in caplog.records] == [
        f"capture of forward at model.py:1: made anew, and kept as {kept}/key",
        f"capture of forward at model.py:1: read from {kept}/key",
    ]


def test_a_value_is_made_once(kept):
    assert recall(KEY, MODE, lambda: {"a": 1}) == {"a": 1}
    assert recall(KEY, MODE, refuse) == {"a": 1}
    assert recall(Key("halves", "forward at model.py:1", "other"), MODE, lambda: 2) == 2
    assert sorted(path.name for path in kept.iterdir()) == ["key", "other"]


@pytest.mark.parametrize(("key", "mode"), [(None, MODE), (KEY, None)])
def test_without_key_or_mode_nothing_is_kept(key, mode, kept):
    assert recall(key, mode, lambda: 1) == 1
    assert not kept.exists()


def test_without_a_folder_nothing_is_kept(kept, monkeypatch):
    monkeypatch.setattr(cache_compat, "find_cache", lambda: None)
    assert [recall(KEY, MODE, lambda: 1), recall(KEY, MODE, lambda: 2)] == [1, 2]
    assert not kept.exists()


def test_a_value_that_does_not_fit_is_replaced(kept):
    recall(KEY, MODE, lambda: 1)
    assert recall(KEY, MODE, lambda: 2, lambda found: found > 1) == 2
    assert recall(KEY, MODE, refuse, lambda found: found > 1) == 2


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x80\x05\x95"])
def test_a_damaged_file_is_replaced(data, kept, caplog):
    recall(KEY, MODE, lambda: 1)
    (kept / "key").write_bytes(data)
    with caplog.at_level("INFO", logger="qcompiler"):
        assert recall(KEY, MODE, lambda: 2) == 2
    assert f"capture of forward at model.py:1: {kept}/key cannot be read" in caplog.text
    assert recall(KEY, MODE, refuse) == 2


def test_every_cut_of_a_file_is_noticed(kept):
    value = {"names": ["a" * 40, "b"], "number": 3}
    recall(KEY, MODE, lambda: value)
    data = (kept / "key").read_bytes()
    for end in range(len(data)):
        (kept / "key").write_bytes(data[:end])
        assert recall(KEY, MODE, lambda: "made") == "made"


def test_a_changed_byte_is_noticed(kept):
    recall(KEY, MODE, lambda: 3)
    data = (kept / "key").read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        (kept / "key").write_bytes(changed)
        assert recall(KEY, MODE, lambda: "made") == "made"


def test_a_value_that_cannot_be_written_is_used_all_the_same(kept, caplog):
    with caplog.at_level("INFO", logger="qcompiler"):
        assert callable(recall(Key("halves", "forward at model.py:1", "local"), MODE, lambda: lambda: 1))
    assert "not kept for the next process" in caplog.text
    assert not (kept / "local").exists()


def test_a_folder_that_is_a_file_costs_time_alone(kept, caplog):
    kept.write_text("no folder")
    with caplog.at_level("INFO", logger="qcompiler"):
        assert recall(KEY, MODE, lambda: 1) == 1
    assert "not kept for the next process" in caplog.text
    assert kept.read_text() == "no folder"


def test_an_error_is_not_kept(kept):
    with pytest.raises(AssertionError):
        recall(KEY, MODE, refuse)
    assert recall(KEY, MODE, lambda: 1) == 1


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
