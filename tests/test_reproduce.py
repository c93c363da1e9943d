"""Runs of the notebooks: what changed runs again, what did not is skipped, and nothing is trained twice."""

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace

import another_house
import pandas as pd
import pytest

from flowerlib.lab import launch, reproduce, runs, store, training
from flowerlib.lab.preference import Trainer
from flowerlib.lab.settings import PROFILES
from flowerlib.tree import recommend

PREPARE, SFT, FLOWER, MEASURE = reproduce.NOTEBOOKS


@pytest.fixture
def dry(monkeypatch, tmp_path):
    """An empty run whose notebooks are only noted, with what they are given, and leave a result."""
    ran = []

    def noted(name, given, folder, screen):
        ran.append((name[:2], given))
        for path in (folder / "notebooks" / name, folder / "results" / f"{name[:2]}_a.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(given))
        return 1.0

    monkeypatch.setattr(reproduce, "_run", noted)
    monkeypatch.setattr(store, "matmul_seconds", lambda *_, **__: 0.01)

    def run(overrides={}, only=reproduce.NOTEBOOKS, **more):
        ran.clear()
        reproduce.reproduce("smoke", str(tmp_path / "dry"), overrides, only, **more)
        return [name for name, _ in ran]

    run.given = ran
    return run


def trained(folder):
    """Every finished training → its record, and when that was written."""
    return {path.parent: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*/*/made.json")}


def forbid_training(monkeypatch):
    for trainer in (training.FlowerTrainer, Trainer):
        monkeypatch.setattr(trainer, "train", lambda self, *args, **kwargs: pytest.fail("was trained again"))


# Whole runs


def test_a_run_says_at_its_start_how_long_what_is_left_will_take(dry, monkeypatch, capsys):
    published = store.read_json(reproduce.TIMES / "timings_smoke.json")
    then = statistics.median(entry["matmul_1024_seconds"] for entry in published.values())
    monkeypatch.setattr(store, "matmul_seconds", lambda *_, **__: 2 * then)
    dry(only=[PREPARE, SFT])
    seconds = [2 * published[name]["seconds"] for name in (PREPARE, SFT)]
    assert f"about {reproduce.minutes(sum(seconds))} from scratch on this machine" in capsys.readouterr().out
    dry(only=[PREPARE, SFT])
    assert "from scratch" not in capsys.readouterr().out  # all is there
    dry(only=[PREPARE, SFT, MEASURE])
    assert f"about {2 * published[MEASURE]['seconds']:.0f} s from scratch" in capsys.readouterr().out
    dry({"theta": 0.5})
    assert "from scratch" not in capsys.readouterr().out  # nobody has measured these settings


def test_the_times_are_those_of_a_machine_like_this(monkeypatch):
    assert reproduce.times_file(PROFILES["smoke"]) == "timings_smoke.json"
    for able, name in ((True, "timings.json"), (False, "timings_float32.json")):
        monkeypatch.setattr(reproduce, "computes_in_bfloat16", lambda: able)
        assert reproduce.times_file(PROFILES["laptop"]) == name
    assert reproduce.times_file(replace(PROFILES["laptop"], bfloat16=False)) == "timings_float32.json"
    assert all(map(math.isnan, reproduce.expected_seconds("paper", {}, [PREPARE, SFT])))


def test_bars_show_the_whole_run_and_never_a_time_that_is_over(monkeypatch, capsys):
    now = iter([0, 60, 60, 1000, 0, 0])
    monkeypatch.setattr(reproduce.time, "perf_counter", lambda: next(now))
    screen = reproduce.Screen("1 of 2", 200.0, 600.0)
    assert str(screen) == "1 of 2, 12 min left"  # 140 + 600 s
    screen.write("\rtraining: 3%")
    assert capsys.readouterr().err == "\r[1 of 2, 12 min left] training: 3%"
    assert str(screen) == "1 of 2, 10 min left"  # it takes longer than expected
    assert str(reproduce.Screen("1 of 2", float("nan"), 600.0)) == "1 of 2"  # nobody knows


def test_smoke_leaves_results_and_figures(smoke):
    for name in (*reproduce.NOTEBOOKS, reproduce.FIT, reproduce.CURVES, reproduce.COMPARISON):
        document = runs.read_document(smoke / "results" / name.replace(".ipynb", ".json"))
        assert document["rows"] and document["provenance"]["settings"]["profile"] == "smoke"
        assert {"versions", "device", "commit", "seconds", "made_at", "bfloat16"} <= document["provenance"].keys()
    rows = runs.read_results(smoke / "results" / MEASURE.replace(".ipynb", ".json"))
    assert {row["method"] for row in rows} == {"Next choices", "Popularity", "SFT", "Flower-KL"} and len(rows) == 4
    assert len(list((smoke / "figures").glob("*.png"))) >= 5
    assert len(list((smoke / "preference").iterdir())) == 1
    methods = {folder.name.rsplit("-", 1)[0] for folder in trained(smoke)}
    assert methods == {"p_ui", "SFT", "Flower", "Flower-KL"}
    assert not list(smoke.glob("*/*/checkpoints"))


def test_timings_name_every_notebook(smoke):
    timings = store.read_json(smoke / "timings.json")
    assert timings.keys() == {*reproduce.NOTEBOOKS, *reproduce.STUDIES}
    assert all(entry["seconds"] > 0 and entry["matmul_1024_seconds"] > 0 for entry in timings.values())
    for name in timings:
        record = store.read_json(smoke / "notebooks" / name.replace(".ipynb", ".json"))
        assert record["provenance"]["seconds"] == timings[name]["seconds"]


def test_nothing_changed_nothing_runs(alone, capsys):
    reproduce.reproduce("smoke", str(alone), {})
    assert capsys.readouterr().out.count("skipped") == len(reproduce.NOTEBOOKS)


@pytest.mark.parametrize("name", [*reproduce.NOTEBOOKS, *reproduce.STUDIES])
def test_one_notebook_after_a_whole_run_does_nothing(alone, capsys, monkeypatch, name):
    monkeypatch.setattr(reproduce, "_run", lambda *args: pytest.fail("ran again"))
    reproduce.reproduce("smoke", str(alone), {}, [name])
    assert capsys.readouterr().out == f"{name}: unchanged since its last complete run, skipped\n"


def test_the_command_prints_the_table_and_where_all_lies(alone):
    command = [sys.executable, "-m", "flowerlib.lab.reproduce", "--profile", "smoke", "--out", str(alone),
               "--only", "04_bias_and_diversity"]
    done = subprocess.run(command, cwd=store.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout and "Profile smoke" in done.stdout
    assert all(method in done.stdout for method in ("Popularity", "SFT", "Flower-KL"))
    assert f"report: {alone / 'report.html'}" in done.stdout and f"results: {alone / 'results'}" in done.stdout


# What runs again


def test_what_a_notebook_is_given_decides_whether_it_runs(dry):
    assert dry() == ["01", "02", "03", "04"] and dry() == []
    assert dry({"theta": 0.5}) == ["03", "04"]  # 04 reads what 03 leaves
    assert dry.given[0][1]["theta"] == 0.5 and "theta" not in dry.given[1][1]
    assert dry({"theta": 0.5}) == [] and dry() == ["03", "04"]
    assert dry({"n_beams": 3}) == ["04"]
    assert dry({"seed": 1}, [PREPARE, reproduce.FIT]) == ["01", "05"]  # every notebook that has the name
    assert dry({"sweep": [[0, 0.5]]}, [reproduce.COMPARISON]) == ["07"]
    assert dry.given[0][1]["sweep"] == [[0, 0.5]] and dry({"sweep": [[0, 0.5]]}, [reproduce.COMPARISON]) == []


def test_what_another_notebook_has_left_is_read_anew(dry, tmp_path):
    everything = (*reproduce.NOTEBOOKS, *reproduce.STUDIES)
    assert dry(only=everything) == ["01", "02", "03", "04", "05", "06", "07", "08", "09"] and dry(only=everything) == []
    for name, readers in (("01", ["01", "02", "03", "04", "07", "09"]), ("02", ["02", "03", "04", "07", "09"]),
                          ("03", ["03", "04", "07", "09"]), ("04", ["04", "09"]), ("05", ["05"]), ("07", ["07", "09"])):
        path = tmp_path / "dry" / "results" / f"{name}_a.json"
        path.write_text("changed by hand")
        ran = dry(only=everything)
        assert ran[0] == name  # made again as it was, so that its readers see no change
        assert ran == [name]
        (tmp_path / "dry" / "results" / f"{name}_b.json").write_text("more than it left")
        assert dry(only=[other for other in everything if other[:2] != name]) == readers[1:]
        (tmp_path / "dry" / "results" / f"{name}_b.json").unlink()
        dry(only=everything)


def test_files_that_are_brought_are_looked_at(dry, tmp_path):
    table = tmp_path / "counts.csv"
    table.write_text("title,count\nHeat,3\nFargo,4\n")
    given = {"counts_path": str(table)}
    assert dry(given, [reproduce.FIT]) == ["05"] and dry(given, [reproduce.FIT]) == []
    table.write_text("title,count\nHeat,3\nFargo,40\n")
    assert dry(given, [reproduce.FIT]) == ["05"] and dry(given, [reproduce.FIT]) == []


def test_a_changed_cell_or_a_changed_comment_in_the_library_runs_again(dry, tmp_path, monkeypatch):
    another_house.build(house := tmp_path / "house")
    monkeypatch.setattr(reproduce, "__file__", str(house / "flowerlib" / "lab" / "reproduce.py"))
    monkeypatch.setattr(reproduce, "FOLDER", house / "notebooks")
    assert dry() == ["01", "02", "03", "04"] and dry() == []
    notebook = json.loads((house / "notebooks" / SFT).read_text(encoding="utf-8"))
    words = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    words["source"] = "# Other words"
    (house / "notebooks" / SFT).write_text(json.dumps(notebook), encoding="utf-8")
    assert dry() == []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][-1]
    code["source"] = "".join(code["source"]) + "\n# a remark"
    (house / "notebooks" / SFT).write_text(json.dumps(notebook), encoding="utf-8")
    assert dry() == ["02"]  # whose results are the same, so that 03 and 04 read what they have read
    for room in ("losses.py", "lab/plots.py"):
        with open(house / "flowerlib" / room, "a", encoding="utf-8") as file:
            file.write("# a remark\n")
        assert dry() == ["01", "02", "03", "04"] and dry() == []


@pytest.mark.long
def test_a_whole_house_with_a_changed_docstring_trains_nothing_again(copy, tmp_path):
    """All run with the other library, take what is trained, and say that another commit made it; then only what was
    deleted or changed by hand is made again."""
    another_house.build(house := tmp_path / "house")
    for path in (house / "flowerlib").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"""', '"""Other words. ', 1) + "# a remark\n", encoding="utf-8")

    names = (*reproduce.NOTEBOOKS, reproduce.FIT, reproduce.COMPARISON)
    before, fits = trained(copy), {path: path.read_bytes() for path in (copy / "fit").glob("*.json")}
    out = another_house.run(house, copy, *(f"--only={name[:-6]}" for name in names))
    assert "skipped" not in out and out.count("trained already with these settings, taken as it is") == 2
    assert len(fits) > 9 and {path: path.read_bytes() for path in (copy / "fit").glob("*.json")} == fits
    for step in ("data", "sft", "flower"):
        made = store.read_json(copy / step / "settings.json")["made"]
        by = store.read_json(next(copy.glob(f"*/{made}/made.json")))["provenance"]["commit"]
        said = f"{made}: made by commit {by}, taken as it is (--fresh makes it again)"
        assert said in out or by == "unknown"  # the house is no repository
    (copy / "flower" / "settings.json").unlink()
    (copy / "results" / "04_bias_and_diversity.json").write_text("{}")
    as_users = another_house.run(house, copy, how=("-m", "flowerlib.lab.reproduce"))  # kernels that are not forked
    assert as_users.count("skipped") == 2
    assert len(runs.read_results(copy / "results" / "04_bias_and_diversity.json")) == 4
    assert trained(copy) == before


def test_fresh_makes_anew(copy, monkeypatch, capsys):
    before = trained(copy)
    monkeypatch.setenv(store.FRESH, "0")  # put back afterwards
    reproduce.reproduce("smoke", str(copy), {}, [PREPARE, SFT], fresh=True)
    out = capsys.readouterr().out
    assert "skipped" not in out and "taken as it is" not in out
    after = trained(copy)
    made = {path for path in after if after[path] != before[path]}
    assert after.keys() == before.keys() and {path.name.rsplit("-", 1)[0] for path in made} == {"p_ui", "SFT"}
    for path in made:
        logs = [pd.DataFrame(json.loads(content)["log"]) for content, _ in (before[path], after[path])]
        pd.testing.assert_frame_equal(*logs)  # the same training
    reproduce.reproduce("smoke", str(copy), {}, [SFT])
    assert "skipped" in capsys.readouterr().out


def test_fresh_passes_by_what_is_done(dry):
    assert dry() == ["01", "02", "03", "04"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(store.FRESH, "0")
        assert dry(only=[FLOWER], fresh=True) == ["03"]
    assert dry() == []


# Parameters and errors


@pytest.mark.long
def test_an_override_holds_in_the_notebooks_after_it_and_an_error_is_one_sentence(tmp_path, smoke):
    names = [PREPARE, SFT]
    given = {"category": "book", "max_history": 4, "seed": 1, "preference_epochs": 2, "epochs": 0.4}
    folder = reproduce.reproduce("smoke", str(tmp_path), given, names)
    for stem in ("data", "sft"):
        used = store.read_json(folder / stem / "settings.json")["settings"]
        assert (used["category"], used["max_history"], used["seed"]) == ("book", 4, 1)
    made = [store.read_json(path / "made.json") for path in trained(folder)]
    assert len(made) == 2 and all(record["made_from"]["seed"] == 1 for record in made)  # the seed reaches every model
    assert all(record["provenance"]["settings"]["seed"] == 1 for record in made)
    assert not {path.name for path in trained(folder)} & {path.name for path in trained(smoke)}
    with pytest.raises(reproduce.NotebookError, match="02_train_sft.ipynb stopped with ValueError: the model has 2 la"):
        reproduce.reproduce("smoke", str(tmp_path), {"tuned_layers": 9}, names)


def test_misspelt_parameters_and_profiles_are_errors(dry, tmp_path):
    for name in ("epoch", "OUT", "PROFILE"):
        with pytest.raises(ValueError, match=f"no notebook has a parameter '{name}': there are alpha, "):
            dry({name: "x"})
    of_another_one = ("budget", reproduce.NOTEBOOKS), ("theta", [MEASURE]), ("guides", [reproduce.FIT])
    for name, only in of_another_one:
        with pytest.raises(ValueError, match=f"no notebook has a parameter '{name}'"):
            dry({name: 3}, only)
    with pytest.raises(ValueError, match="choose one of smoke, laptop, study, paper"):
        reproduce.reproduce("smok", str(tmp_path / "none"), {})
    assert dry.given == [] and not (tmp_path / "dry").exists() and not (tmp_path / "none").exists()
    command = [sys.executable, "-m", "flowerlib.lab.reproduce", "-p", "epoch=2"]
    done = subprocess.run(command, cwd=store.ROOT, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("error: no notebook has a parameter 'epoch'")


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize("folder", ["data/shop", "data/shop/"])
def test_make_hands_on_values_with_spaces(monkeypatch, folder):
    given = "PARAMETERS=n_seeds=3 category='video game' sweep='[[-0.5, 0.1]]'"
    alone = {name: value for name, value in os.environ.items() if name[:4] != "MAKE"}  # `make test` is a make too
    make = ["make", "-n", "study", f"DATA={folder}", given]
    printed = subprocess.run(make, cwd=store.ROOT, env=alone, capture_output=True, text=True).stdout
    command = shlex.split(printed.partition("flowerlib.lab.reproduce")[2].replace("\\\n", " "))
    calls = []
    monkeypatch.setattr(sys, "argv", ["reproduce", *command])
    monkeypatch.setattr(reproduce, "reproduce", lambda *args: calls.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reproduce.main()
    profile, out, overrides, names, _ = calls[0]
    assert (profile, out, len(names)) == ("study", "runs/study-shop", 5)
    assert overrides == {"n_seeds": 3, "category": "video game", "sweep": [[-0.5, 0.1]], "data_path": folder}


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_refuses_a_misspelt_variable():
    """Else it would begin with `laptop`, which takes long."""
    alone = {name: value for name, value in os.environ.items() if name[:4] != "MAKE"}
    make = ["make", "-n", "reproduce", "OUT=a b", "PARAMETERS=a='b c'"]
    done = subprocess.run([*make, "PROFIL=smoke"], cwd=store.ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode and "no rule here reads PROFIL: the variables are PROFILE OUT " in done.stderr
    assert subprocess.run([*make, "PROFILE=smoke"], cwd=store.ROOT, env=alone, capture_output=True).returncode == 0


def test_notebooks_run_in_their_order_however_they_are_named(monkeypatch):
    calls = []
    named = ["--only=07_which_title_next", "--only=02_train_sft", "--only=01_prepare_the_data"]
    monkeypatch.setattr(sys, "argv", ["reproduce", *named])
    monkeypatch.setattr(reproduce, "reproduce", lambda *args: calls.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reproduce.main()
    assert calls[0][3] == [PREPARE, SFT, reproduce.COMPARISON]


def test_values_are_looked_at_before_anything_runs(dry):
    for overrides, only, message in (({"theta": 9}, reproduce.NOTEBOOKS, "theta is 9.0: it must lie between 0 and 1"),
                                     ({"methods": "sft"}, [reproduce.FIT], "methods takes a list"),
                                     ({"methods": ["ppo"]}, [reproduce.FIT], "methods has 'ppo'"),
                                     ({"frozen_layers": 0}, reproduce.NOTEBOOKS, "set both or neither"),
                                     ({"n_seeds": 0}, [PREPARE, reproduce.COMPARISON], "n_seeds is 0")):
        with pytest.raises(ValueError, match=message):
            dry(overrides, only)
    assert dry({"fit_paths": ["reward", "policy"], "frozen_layers": 0}, [reproduce.FIT]) == ["05"]  # of the whole model
    assert dry.given[0][1]["fit_paths"] == ["reward", "policy"] and dry.given[0][1]["frozen_layers"] == 0
    assert dry({"user": 3}, [reproduce.EXPLORERS]) == ["09"]  # no setting, a parameter all the same


def test_notebooks_ask_for_the_step_before(tmp_path):
    for name in (SFT, reproduce.COMPARISON):
        with pytest.raises(reproduce.NotebookError, match="run notebooks/01_prepare_the_data.ipynb with this PROFILE"):
            reproduce.reproduce("smoke", str(tmp_path), {}, [name])


# What the notebooks leave


def test_recommend_for_a_new_user_in_three_lines(smoke):
    items = pd.read_parquet(next((smoke / "flower").glob("*/items.parquet")))
    history = [items.item_id[0], items.title[1]]
    lists = recommend(smoke / "flower", history, k=5)
    assert len(lists) == 5 and lists.score.is_monotonic_decreasing
    assert not set(lists.title) & set(items.title[:2])
    assert lists.head(1).equals(recommend(smoke / "flower", history, k=1))
    made = store.read_json(smoke / "flower" / "settings.json")["made"]
    assert lists.equals(recommend(smoke / "flower" / made, history, k=5))  # the training itself
    with pytest.raises(ValueError, match="k is 0"):
        recommend(smoke / "flower", history, k=0)
    assert recommend(smoke / "flower", items.title[1], k=1).equals(
        recommend(smoke / "flower", [f" {items.title[1]} "], k=1)
    )
    with pytest.raises(ValueError, match=f"did you mean .*{items.title[1]}"):
        recommend(smoke / "flower", [items.title[1] + "s"])
    with pytest.raises(ValueError, match="neither an item id nor a title"):
        recommend(smoke / "flower", ["no such film"])
    with pytest.raises(FileNotFoundError, match="run notebook 02 or 03 first"):
        recommend(smoke / "nothing", [])


def test_launch_takes_what_the_notebooks_made(copy, monkeypatch):
    before = trained(copy)
    made = {step: copy / step / store.read_json(copy / step / "settings.json")["made"] for step in ("sft", "flower")}
    forbid_training(monkeypatch)
    for method, step in (("SFT", "sft"), ("Flower", "flower")):  # one after the other, without a notebook between
        assert launch.launch(method, "smoke", str(copy), {}) == made[step]
        assert store.read_json(runs.require(copy, step) / "settings.json")["made"] == made[step].name
    assert trained(copy) == before


def test_the_notebooks_take_what_launch_made(copy, capsys):
    """Weighted targets too: launch and notebooks hand the same to `finetune`."""
    given = {"epochs": 0.4, "reweight": True}
    made = [launch.launch("SFT", "smoke", str(copy), given)]
    with pytest.raises(FileNotFoundError, match="run notebooks/03_train_flower.ipynb"):
        runs.require(copy, "flower")  # that one was another SFT's
    made.append(launch.launch("Flower", "smoke", str(copy), {}))
    before = trained(copy)
    capsys.readouterr()
    reproduce.reproduce("smoke", str(copy), given, [SFT, FLOWER])
    out = capsys.readouterr().out
    assert [folder.name for folder in made if f"{folder.name}: trained already" not in out] == []
    assert trained(copy) == before
