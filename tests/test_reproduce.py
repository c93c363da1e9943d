import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from flowerlib import comparison, decoding, launch, report, reproduce, runs, study


def test_smoke_leaves_results_figures_and_pages(smoke):
    for name in reproduce.NOTEBOOKS:
        stem = name.removesuffix(".ipynb")
        source = json.loads((smoke / "results" / f"{stem}.json").read_text())["provenance"]
        assert source["settings"]["profile"] == "smoke"
    page = report.report(smoke).read_text(encoding="utf-8")
    assert all(f'<h1 id="{n}-' in page for n in ("01", "02", "03", "04"))
    assert "step/s" not in page
    table = report.comparison(smoke)
    assert {"Popularity", "SFT", "Flower"} == set(table.index.get_level_values("method"))
    assert len(list((smoke / "figures").glob("*.png"))) >= 5


def test_the_report_needs_no_network_and_says_what_its_pictures_show(smoke):
    page = report.report(smoke).read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", page) and "import(" not in page
    alts = re.findall(r"<img[^>]*?alt=\"(.*?)\"", page, re.DOTALL)
    assert len(alts) == page.count("<img") > 5 and all(len(alt) > 10 for alt in alts)
    assert "<math" in page and "$$" not in page
    assert "Settings and provenance" in page


def test_formulas_and_prices():
    said = report.FORMULA.sub(report._mathml, "for $5 or $6, and $x^2$ of\n$$F(s) = \\sum_i R(i)$$")
    assert said.startswith("for $5 or $6, and <math") and said.count("<math") == 2 and 'display="block"' in said
    for kept in ("`PRICE=$x$`", "```\necho $HOME$\n```", "$\\left($"):
        assert report.FORMULA.sub(report._mathml, kept) == kept


def test_a_report_of_a_notebook_that_stopped(smoke, tmp_path):
    folder = shutil.copytree(smoke, tmp_path / "run")
    with pytest.raises(reproduce.NotebookError):
        reproduce.reproduce("smoke", str(folder), {"tuned_layers": 9}, reproduce.NOTEBOOKS[1:2])
    page = report.report(folder).read_text(encoding="utf-8")
    assert "was encountered" not in page.split("01 · ")[0] and page.count("This notebook stopped with an error") == 1
    (folder / "results" / "01_prepare_the_data.json").write_text("{}")
    with pytest.raises(ValueError, match="01_prepare_the_data.json is damaged: remove it"):
        report.report(folder)


def test_nothing_changed_nothing_runs(smoke, capsys):
    reproduce.reproduce("smoke", str(smoke), {})
    assert capsys.readouterr().out.count("skipped") == len(reproduce.NOTEBOOKS)


def test_the_same_seed_gives_the_same_results_but_for_times(smoke, tmp_path):
    again = reproduce.reproduce("smoke", str(tmp_path), {}, (*reproduce.NOTEBOOKS, *reproduce.STUDIES))
    results = {path for path in (smoke / "results").glob("*.json") if path.stem not in reproduce.SPEED}  # times alone
    assert len(results) > 6
    for path in sorted(results):
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
    items = decoding.pd.read_parquet(smoke / "flower" / "items.parquet")
    history = [items.item_id[0], items.title[1]]
    found = decoding.recommend(smoke / "flower", history, k=5)
    assert len(found) == 5 and found.score.is_monotonic_decreasing
    assert not set(found.title) & set(items.title[:2])
    assert found.head(1).equals(decoding.recommend(smoke / "flower", history, k=1))
    with pytest.raises(ValueError, match="k is 0"):
        decoding.recommend(smoke / "flower", history, k=0)
    assert decoding.recommend(smoke / "flower", items.title[1], k=1).equals(
        decoding.recommend(smoke / "flower", [f" {items.title[1]} "], k=1)
    )
    with pytest.raises(ValueError, match=f"did you mean .*{items.title[1]}"):
        decoding.recommend(smoke / "flower", [items.title[1] + "s"])
    with pytest.raises(ValueError, match="neither an item id nor a title"):
        decoding.recommend(smoke / "flower", ["no such film"])
    with pytest.raises(FileNotFoundError, match="run notebook 02 or 03 first"):
        decoding.recommend(smoke / "nothing", [])


def test_misspelt_parameters_and_profiles_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no notebook has a parameter 'epoch'"):
        reproduce.reproduce("smoke", str(tmp_path), {"epoch": 2})
    with pytest.raises(ValueError, match="no notebook has a parameter 'OUT'"):
        reproduce.reproduce("smoke", str(tmp_path), {"OUT": "x"})
    with pytest.raises(ValueError, match="choose one of smoke, laptop, paper"):
        reproduce.reproduce("smok", str(tmp_path), {})
    command = [sys.executable, "-m", "flowerlib.reproduce", "-p", "epoch=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("error: no notebook has a parameter 'epoch'")


def test_every_setting_is_a_parameter_of_a_notebook():
    names = {name for notebook in reproduce.NOTEBOOKS for name in reproduce.parameters(reproduce.FOLDER / notebook)}
    assert names == {field.name for field in fields(runs.Settings)} - {"profile"} | {"PROFILE", "OUT"}
    for notebook, of in ((reproduce.FIT, study.FitSettings), (reproduce.COMPARISON, comparison.ComparisonSettings)):
        names = set(reproduce.parameters(reproduce.FOLDER / notebook))
        assert names == {field.name for field in fields(of)} - {"profile"} | {"PROFILE", "OUT"}


def test_what_was_deleted_or_changed_by_hand_is_made_again(smoke, tmp_path, capsys):
    folder = shutil.copytree(smoke, tmp_path / "run")
    given = json.loads(json.dumps({"profile": "smoke", "out": str(folder), "overrides": {}}))
    reproduce.reproduce(**given)  # OUT is another one: all run, and what is trained is taken as it is
    assert capsys.readouterr().out.count("taken as it is") == 2
    (folder / "flower" / "settings.json").unlink()
    (folder / "results" / "04_bias_and_diversity.json").write_text("{}")
    reproduce.reproduce(**given)
    assert capsys.readouterr().out.count("skipped") == 2
    assert len(report.comparison(folder)) == 7


def test_what_another_notebook_has_left_is_read_anew(smoke, tmp_path, capsys):
    folder = shutil.copytree(smoke, tmp_path / "run")
    measure = [reproduce.NOTEBOOKS[3]]
    reproduce.reproduce("smoke", str(folder), {}, measure)
    reproduce.reproduce("smoke", str(folder), {}, measure)
    assert capsys.readouterr().out.count("skipped") == 1
    reproduce.reproduce("smoke", str(folder), {"theta": 0.9}, reproduce.NOTEBOOKS[2:3])
    reproduce.reproduce("smoke", str(folder), {}, measure)
    assert "skipped" not in capsys.readouterr().out


def test_notebook_05_says_itself_what_its_parameters_may_be(monkeypatch, tmp_path):
    ran = []
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(reproduce, "_run", lambda name, given, folder: ran.append(given))
    reproduce.reproduce("smoke", str(tmp_path), {"paths": "reward, policy", "frozen_layers": 0}, [reproduce.FIT])
    assert ran[0]["paths"] == "reward, policy" and ran[0]["frozen_layers"] == 0
    with pytest.raises(ValueError, match="set both or neither"):
        reproduce.reproduce("smoke", str(tmp_path), {"frozen_layers": 0}, reproduce.NOTEBOOKS)


def test_notebooks_ask_for_the_step_before(tmp_path):
    with pytest.raises(reproduce.NotebookError, match="run notebooks/01_prepare_the_data.ipynb with this PROFILE"):
        reproduce.reproduce("smoke", str(tmp_path), {}, reproduce.NOTEBOOKS[1:2])


def test_launch_trains_what_the_notebooks_take_up(smoke, tmp_path):
    folder = shutil.copytree(smoke, tmp_path / "run")
    before = (folder / "flower" / "plan.json").read_text()
    shutil.rmtree(folder / "flower")
    launch.launch("Flower", "smoke", str(folder), {})
    assert (folder / "flower" / "plan.json").read_text() == before
    launch.launch("SFT", "smoke", str(folder), {"epochs": 0.5})
    with pytest.raises(FileNotFoundError, match="run notebooks/03_train_flower.ipynb"):
        runs.require(folder, "flower")
