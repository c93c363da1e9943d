import json

import pytest

from flowerlib import runs


def test_settings_take_overrides_and_refuse_nonsense():
    assert runs.settings("smoke", epochs=2, alpha=None).epochs == 2.0
    with pytest.raises(ValueError, match="unknown profile 'x'"):
        runs.settings("x")
    with pytest.raises(ValueError, match="unknown setting 'epoch'"):
        runs.settings("smoke", epoch=1.0)
    with pytest.raises(ValueError, match="setting n_beams takes a int"):
        runs.settings("smoke", n_beams="ten")


def test_atomic_replaces_files_and_folders_or_leaves_them(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), runs.atomic(path) as new:
        new.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with runs.atomic(folder) as new:
            new.mkdir()
            (new / "weights").write_text(text)
    assert (folder / "weights").read_text() == "two" and len(list(tmp_path.iterdir())) == 2


def test_results_are_checked_and_rounded(tmp_path):
    path = tmp_path / "r.json"
    runs.write_results(path, [{"method": "SFT", "dgu": 0.123456789}], {"seed": 0})
    assert json.loads(path.read_text()) == {"provenance": {"seed": 0}, "rows": [{"method": "SFT", "dgu": 0.123457}]}
    with pytest.raises(ValueError, match="row 0: method 'sft' is not one of SFT, Flower"):
        runs.write_results(path, [{"method": "sft"}], {})
    with pytest.raises(ValueError, match="row 1: dgu is nan"):
        runs.write_results(path, [{}, {"dgu": float("nan")}], {})


def test_settings_of_the_step_before_hold_on(tmp_path):
    runs.write_settings(tmp_path, runs.settings("smoke", category="book"))
    assert runs.settings("smoke", after=tmp_path, alpha=0.5) == runs.settings("smoke", category="book", alpha=0.5)
    with pytest.raises(ValueError, match="made with PROFILE 'smoke', not 'laptop': give another OUT"):
        runs.settings("laptop", after=tmp_path)
    runs.write_json(tmp_path / "settings.json", {"depth": 3})
    with pytest.raises(ValueError, match="start again at notebook 01"):
        runs.settings("laptop", after=tmp_path)
