from flowerlib.lab import store
"""Work that is kept: written whole or not at all, taken when settings and data are the same, never removed."""

import json
import os
import subprocess
import time

import numpy as np
import pytest
import torch



def test_atomic_replaces_files_and_folders_or_leaves_them(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), store.atomic(path) as new:
        new.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with store.atomic(folder) as new:
            new.mkdir()
            (new / "weights").write_text(text)
    assert (folder / "weights").read_text() == "two" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(KeyError), store.atomic(folder) as new:
        new.mkdir()
        raise KeyError
    assert (folder / "weights").read_text() == "two" and len(list(tmp_path.iterdir())) == 2


def test_json_is_written_whole_with_its_folders_and_refuses_what_is_no_number(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    store.write_json(path, {"title": "日本の夏", "n": [1, 2.5, None]})
    assert store.read_json(path) == {"title": "日本の夏", "n": [1, 2.5, None]}
    assert "日本の夏" in path.read_text(encoding="utf-8")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.write_json(path, {"n": bad})
    assert store.read_json(path)["n"] == [1, 2.5, None] and list(path.parent.iterdir()) == [path]


def test_a_damaged_file_is_named(tmp_path):
    for content in (b'{"half', b"\xff\xfe"):
        (tmp_path / "r.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"r\.json is damaged: remove it"):
            store.read_json(tmp_path / "r.json")


def test_a_digest_names_content_and_where_parts_end():
    array = np.arange(6)
    assert len(store.digest(array)) == 12 and int(store.digest(array), 16) >= 0
    assert store.digest(array) == store.digest(torch.arange(6)) == store.digest(array.tobytes())
    assert store.digest(array.reshape(2, 3).T) == store.digest(np.ascontiguousarray(array.reshape(2, 3).T))
    assert store.digest(array.reshape(2, 3).T) != store.digest(array.reshape(2, 3))
    assert store.digest({"a": 1, "b": 2.0}) == store.digest({"b": 2.0, "a": 1})
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), ()]
    assert len({store.digest(*part) for part in parts}) == len(parts)
    assert len({store.digest(b"ab", b"c"), store.digest(b"a", b"bc"), store.digest(b"abc")}) == 3
    trained = torch.ones(2, requires_grad=True)
    assert store.digest(trained) == store.digest(torch.ones(2))


def test_a_digest_never_changes():
    """Kept work is called by it: not by Python's hashes, which differ from process to process."""
    assert store.digest({"x": [1, "é"], "a": None}, "b", b"c") == "a1a1b2c3c051"


# what is found again

ORIGIN = {"alpha": -0.5, "sweep": (0.3, 0.5), "data": "abc"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where a record may be; this code is of commit "new"."""
    monkeypatch.setattr(store, "commit", lambda: "new")
    monkeypatch.delenv(store.FRESH, raising=False)
    return tmp_path / f"Flower-{store.digest(ORIGIN)}" / "made.json"


def test_what_is_kept_is_found(place, capsys):
    assert store.find(place, ORIGIN) is None
    kept = store.keep(place, ORIGIN, {"commit": "new"}, log=[1, 2])
    assert kept == store.find(place, ORIGIN) == json.loads(place.read_text())
    assert kept["log"] == [1, 2] and kept["provenance"] == {"commit": "new"}
    assert store.find(place, ORIGIN | {"sweep": [0.3, 0.5]}) == kept  # a list in JSON is a tuple in settings
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["made.json", "lists-1.json"])
def test_work_of_another_commit_is_taken_and_the_commit_said(place, capsys, name):
    path = place.with_name(name)
    store._say.cache_clear()
    store.keep(path, ORIGIN, {"commit": "old+changes"})
    for _ in range(2):  # once is enough
        assert store.find(path, ORIGIN)["provenance"]["commit"] == "old+changes"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(place.parent.name) and "made by commit old+changes, taken as it is" in said and "--fresh" in said


@pytest.mark.parametrize("other", [
    ORIGIN | {"alpha": 0.5}, ORIGIN | {"data": "abd"}, ORIGIN | {"beta": 1.0}, {"alpha": -0.5, "data": "abc"},
    ORIGIN | {"sweep": (0.5, 0.3)},
])
def test_other_settings_or_data_are_other_work_and_nothing_is_removed(place, other):
    store.keep(place, ORIGIN, {"commit": "new"}, log=[1])
    before = place.read_bytes()
    assert store.find(place, other) is None
    assert place.read_bytes() == before and store.find(place, ORIGIN)["log"] == [1]
    assert store.digest(other) != store.digest(ORIGIN)  # so that it lies beside it


def test_fresh_work_is_taken_and_older_work_is_not(place, monkeypatch):
    store.keep(place, ORIGIN, {"commit": "new"}, log=[1])
    before = place.read_bytes()
    for moment, taken in ((time.time() - 60, True), (time.time() + 60, False)):
        monkeypatch.setenv(store.FRESH, str(moment))
        assert (store.find(place, ORIGIN) is not None) == taken
    assert place.read_bytes() == before
    os.utime(place, (time.time() + 120,) * 2)  # made again since
    assert store.find(place, ORIGIN)["log"] == [1]


def test_a_damaged_record_is_named_and_stays(place):
    place.parent.mkdir()
    place.write_text("{")
    with pytest.raises(ValueError, match=r"made\.json is damaged"):
        store.find(place, ORIGIN)
    assert place.read_text() == "{"


# where it comes from


def test_provenance_holds_all_that_a_reader_needs():
    found = store.provenance({"seed": 3, "profile": "smoke"}, 1.26, bfloat16=True)
    json.dumps(found)
    assert found["settings"] == {"seed": 3, "profile": "smoke"}
    assert found["bfloat16"] is True and found["seconds"] == 1.3
    assert {"python", "torch", "transformers", "peft", "accelerate", "numpy", "pandas"} <= found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads() and found["matmul_1024_seconds"] > 0
    assert found["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else store.processor()) != ""
    assert found["commit"] == store.commit()
    time.strptime(found["made_at"], "%Y-%m-%d %H:%M:%S")


def test_the_commit_says_whether_files_differ_and_is_unknown_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert store.commit.__wrapped__() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    clean = store.commit.__wrapped__()
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "new.py").write_text("")
    assert store.commit.__wrapped__() == clean + "+changes"
