"""The result store: what is written whole is read back, and nothing else is."""

import os

import pytest
from sla2_eval.runs.store import ResultStore, canonical, digest, write_atomic

KEY = ("ab" * 32, "psnr", "cd" * 32)


def test_round_trip(tmp_path):
    store = ResultStore(tmp_path)
    assert store.get(*KEY) is None
    store.put(*KEY, {"value": 0.1})
    assert ResultStore(tmp_path).get(*KEY) == {"value": 0.1}
    assert store.get(KEY[0], "ssim", KEY[2]) is None
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{KEY[0]}-{KEY[2][:16]}.json"]


@pytest.mark.parametrize("damage", ["truncate", "edit", "empty", "other key"])
def test_damaged_results_are_not_read_back(tmp_path, damage):
    store = ResultStore(tmp_path)
    store.put(*KEY, {"value": 0.125})
    path = store.path(*KEY)
    text = path.read_text()
    path.write_text(
        {
            "truncate": text[:-9],
            "edit": text.replace("0.125", "0.126"),
            "empty": "",
            "other key": text.replace("psnr", "ssim"),
        }[damage]
    )
    assert store.get(*KEY) is None


def test_same_hash_beginning_is_not_the_same_settings(tmp_path):
    store = ResultStore(tmp_path)
    store.put(*KEY, {"value": 1.0})
    assert store.get(KEY[0], KEY[1], KEY[2][:16] + "0" * 48) is None


def test_canonical_json_is_one_form_and_refuses_nan():
    assert canonical({"b": 1, "a": [0.1]}) == '{"a":[0.1],"b":1}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x.json", "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "x.json", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.json", "old")]
