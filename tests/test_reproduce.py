import json
import subprocess
import sys

import pytest

from flowerlib import policy, reproduce, runs


def test_smoke_leaves_results_figures_and_pages(smoke):
    for name in reproduce.NOTEBOOKS:
        stem = name.removesuffix(".ipynb")
        source = json.loads((smoke / "results" / f"{stem}.json").read_text())["provenance"]
        assert source["settings"]["profile"] == "smoke"
    page = reproduce.report(smoke).read_text(encoding="utf-8")
    assert all(f'<h1 id="{n}-' in page for n in ("01", "02", "03", "04"))
    assert "step/s" not in page and "<img" in page
    table = reproduce.comparison(smoke)
    assert {"SFT", "Flower"} == set(table.index.get_level_values("method"))
    assert len(list((smoke / "figures").glob("*.png"))) >= 5


def test_nothing_changed_nothing_runs(smoke, capsys):
    reproduce.reproduce("smoke", str(smoke), {})
    assert capsys.readouterr().out.count("skipped") == len(reproduce.NOTEBOOKS)


def test_the_same_seed_gives_the_same_results_but_for_times(smoke, tmp_path):
    again = reproduce.reproduce("smoke", str(tmp_path), {})
    for path in sorted((smoke / "results").glob("*.json")):
        first, second = (
            [line for line in (folder / "results" / path.name).read_text().splitlines() if "seconds" not in line]
            for folder in (smoke, again)
        )
        assert first == second


def test_an_override_holds_in_the_notebooks_after_it_and_an_error_is_one_sentence(tmp_path):
    names = reproduce.NOTEBOOKS[:2]
    folder = reproduce.reproduce("smoke", str(tmp_path), {"category": "book", "max_history": 4, "epochs": 0.2}, names)
    for stem in ("data", "sft"):
        chosen = json.loads((folder / stem / "settings.json").read_text())
        assert (chosen["category"], chosen["max_history"]) == ("book", 4)
    with pytest.raises(reproduce.NotebookError, match="02_train_sft.ipynb stopped with ValueError: the model has 2 lay"):
        reproduce.reproduce("smoke", str(tmp_path), {"tuned_layers": 9}, names)


def test_recommend_for_a_new_user_in_three_lines(smoke):
    items = policy.pd.read_parquet(smoke / "flower" / "items.parquet")
    history = [items.item_id[0], items.title[1]]
    found = policy.recommend(smoke / "flower", history, k=5)
    assert len(found) == 5 and found.score.is_monotonic_decreasing
    assert not set(found.title) & set(items.title[:2])
    with pytest.raises(ValueError, match="neither an item id nor a title"):
        policy.recommend(smoke / "flower", ["no such film"])
    with pytest.raises(FileNotFoundError, match="run notebook 02 or 03 first"):
        policy.recommend(smoke / "nothing", [])


def test_misspelt_parameters_and_profiles_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no notebook has a parameter 'epoch'"):
        reproduce.reproduce("smoke", str(tmp_path), {"epoch": 2})
    with pytest.raises(ValueError, match="choose one of smoke, laptop, paper"):
        reproduce.reproduce("smok", str(tmp_path), {})
    command = [sys.executable, "-m", "flowerlib.reproduce", "-p", "epoch=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("error: no notebook has a parameter 'epoch'")


def test_a_missing_input_names_the_notebook_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebooks/01_prepare_the_data.ipynb"):
        runs.require(tmp_path / "items.parquet", "01_prepare_the_data.ipynb")
