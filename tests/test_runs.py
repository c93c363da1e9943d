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
    with pytest.raises(ValueError, match="row 0: method 'Sft' is not one of Popularity, .*SFT, .*Flower"):
        runs.write_results(path, [{"method": "Sft"}], {})
    with pytest.raises(ValueError, match="row 1: dgu is nan"):
        runs.write_results(path, [{}, {"dgu": float("nan")}], {})


def test_settings_of_the_step_before_hold_on(tmp_path):
    runs.write_settings(tmp_path, runs.settings("smoke", category="book"))
    assert runs.settings("smoke", after=tmp_path, alpha=0.5) == runs.settings("smoke", category="book", alpha=0.5)
    with pytest.raises(ValueError, match="made with PROFILE 'smoke', not 'laptop': give another OUT"):
        runs.settings("laptop", after=tmp_path)
    runs.write_json(tmp_path / "settings.json", {"depth": 3})
    with pytest.raises(ValueError, match="start at notebook 01"):
        runs.settings("laptop", after=tmp_path)


def test_a_step_that_begins_anew_takes_back_itself_and_those_after_it(tmp_path):
    for step in runs.STEPS:
        runs.write_settings(tmp_path / step, runs.PROFILES["smoke"])
    assert runs.require(tmp_path, "flower") == tmp_path / "flower"
    runs.begin(tmp_path, "sft")
    assert runs.require(tmp_path, "data") == tmp_path / "data"
    for step, notebook in (("sft", "02_train_sft"), ("flower", "03_train_flower")):
        with pytest.raises(FileNotFoundError, match=f"run notebooks/{notebook}.ipynb"):
            runs.require(tmp_path, step)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"paths": "loged"}, "paths is 'loged': choose one of logged, reward, policy"),
        ({"rows": "row"}, "choose one of sequence, target"),
        ({"split": "random"}, "choose one of leave-one-out, time"),
        ({"theta": 9.5}, "theta is 9.5: it must lie between 0 and 1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "both finite"),
        ({"epochs": 0.0}, "epochs is 0.0"),
        ({"batch_size": 0}, "batch_size is 0: it must lie between 1"),
        ({"test_rows": -5}, "test_rows is -5"),
        ({"max_history": 0}, "max_history is 0"),
        ({"n_beams": 0}, "n_beams is 0"),
        ({"frozen_layers": 0}, "would throw the lower layers away"),
    ],
)
def test_values_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        runs.settings("laptop", **setting)
    assert runs.settings("laptop", frozen_layers=0, tuned_layers=0).alpha == runs.settings("laptop", theta=1).alpha


def test_an_unknown_profile_makes_no_folder():
    with pytest.raises(ValueError, match="unknown profile 'smoky'"):
        runs.output_dir("smoky", None)
    assert not (runs.ROOT / "runs" / "smoky").exists()
