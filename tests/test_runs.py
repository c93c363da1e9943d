"""A run's folder: steps that are done or not, results with the provenance of the work behind them, figures."""

import json

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from flowerlib.lab import reproduce, runs, store
from flowerlib.lab.settings import PROFILES


def test_a_run_has_one_folder(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    assert runs.output_dir("smoke", str(folder)) == folder and folder.is_dir()
    monkeypatch.setattr(store, "ROOT", tmp_path)  # a relative path counts from there, whatever the working directory
    assert runs.output_dir("smoke", "runs/smoke") == runs.output_dir("smoke", None) == tmp_path / "runs" / "smoke"
    assert (tmp_path / "runs" / "smoke").is_dir()


def test_an_unknown_profile_makes_no_folder(tmp_path):
    for out in (None, str(tmp_path / "run")):
        with pytest.raises(ValueError, match="unknown profile 'smoky'"):
            runs.output_dir("smoky", out)
    assert not (store.ROOT / "runs" / "smoky").exists() and not (tmp_path / "run").exists()


def test_a_step_that_begins_anew_takes_back_itself_and_those_after_it(tmp_path):
    for step in runs.STEPS:
        runs.finish(tmp_path, step, PROFILES["smoke"])
        assert runs.require(tmp_path, step) == tmp_path / step
    assert runs.begin(tmp_path, "sft") == tmp_path / "sft"
    assert runs.require(tmp_path, "data") == tmp_path / "data"
    for step, notebook in (("sft", "02_train_sft"), ("flower", "03_train_flower")):
        with pytest.raises(FileNotFoundError, match=f"run notebooks/{notebook}.ipynb with this PROFILE"):
            runs.require(tmp_path, step)
    runs.begin(tmp_path / "new", "data")  # nothing to take back


def test_a_finished_step_names_its_settings_and_its_training(tmp_path):
    runs.finish(tmp_path, "data", PROFILES["smoke"])
    runs.finish(tmp_path, "sft", PROFILES["smoke"], tmp_path / "sft" / "SFT-0123456789ab")
    marks = [store.read_json(tmp_path / step / "settings.json") for step in ("data", "sft")]
    assert [mark["made"] for mark in marks] == [None, "SFT-0123456789ab"]
    assert all(mark["settings"]["profile"] == "smoke" for mark in marks)
    (tmp_path / "sft" / "SFT-0123456789ab").mkdir()
    runs.begin(tmp_path, "data")
    assert (tmp_path / "sft" / "SFT-0123456789ab").is_dir()  # what is trained stays


def test_every_step_has_a_notebook():
    assert list(runs.STEPS.values()) == list(reproduce.NOTEBOOKS[:3])
    assert all((reproduce.FOLDER / notebook).is_file() for notebook in runs.STEPS.values())


# Results


def source(seconds=1.0, **other):
    return {"settings": {"seed": 0}, "seconds": seconds, "commit": "a", "device": "x", "versions": {"torch": "2"},
            "matmul_1024_seconds": 0.1} | other


def test_results_are_checked_and_rounded(tmp_path):
    path = tmp_path / "results" / "r.json"
    rows = [{"method": "SFT", "dgu": 0.123456789, "n": 123456789, "seen": "allowed", "decoding": "beam"}]
    runs.write_results(path, rows, source())
    assert json.loads(path.read_text()) == {"provenance": source(), "rows": [rows[0] | {"dgu": 0.123457}]}
    assert runs.read_results(path) == runs.read_document(path)["rows"] and list(path.parent.iterdir()) == [path]
    for row, message in (({"method": "Sft"}, "row 1: method 'Sft' is not one of Popularity, .*SFT, .*Flower-KL"),
                         ({"decoding": "greedy"}, "row 1: decoding 'greedy' is not one of top, beam"),
                         ({"seen": "yes"}, "row 1: seen 'yes' is not one of excluded, allowed"),
                         ({"dgu": float("nan")}, "row 1: dgu is nan"), ({"dgu": float("-inf")}, "row 1: dgu is -inf")):
        with pytest.raises(ValueError, match=message):
            runs.write_results(path, [{}, row], source())
    assert runs.read_results(path)[0]["n"] == 123456789  # a refused write leaves the file as it was


def test_every_method_has_its_name(tmp_path):
    known = [*runs.METHODS, *runs.FIT_LOSSES, *runs.PREFERENCE_LOSSES]
    runs.write_results(tmp_path / "r.json", [{"method": method} for method in known], source())
    assert {"SFT", "Flower", "Flower-KL"} <= set(runs.METHODS)


def test_several_pieces_of_work_have_one_provenance():
    sources = [source(1.04), source(2.0, commit="b", settings={"seed": 1}), source(3.0, matmul_1024_seconds=0.2)]
    joint = runs.joint_provenance(sources)
    assert joint == source(6.0, commit=["a", "b"], matmul_1024_seconds=0.2)  # settings and speed of the last
    assert runs.joint_provenance(sources[:1]) == source(1.0)
    assert sources[0] == source(1.04)  # as it was
    more = [source(versions={"torch": "2"}), source(versions={"torch": "3"}), source(versions={"torch": "2"})]
    assert runs.joint_provenance(more)["versions"] == [{"torch": "2"}, {"torch": "3"}]


def test_an_entry_that_one_piece_of_work_lacks_is_not_lost():
    joint = runs.joint_provenance([source(resumed=True), source()])
    assert joint["resumed"] == [True, None]


def test_results_of_several_pieces_of_work(tmp_path):
    runs.write_results(tmp_path / "r.json", [{"dgu": 1.0}], [source(1.0), source(2.0, device="y")])
    assert runs.read_document(tmp_path / "r.json")["provenance"] == source(3.0, device=["x", "y"])


@pytest.mark.parametrize("text", ["{", "{}", '{"rows": []}', '{"provenance": {}}', "[]"])
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    for read in (runs.read_results, runs.read_document):
        with pytest.raises(ValueError, match="r.json is damaged: remove it and run its notebook again"):
            read(tmp_path / "r.json")


def test_figures_carry_their_titles_and_equal_figures_are_equal_files(tmp_path):
    for name in "ab":
        figure, axes = plt.subplots(1, 2)
        axes[0].set_title("Long\ntail")
        axes[1].set_title("Groups", loc="left")
        runs.save_figure(figure, tmp_path / f"{name}.png")
        plt.close(figure)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").text["Title"] == "Long tail; Groups"
