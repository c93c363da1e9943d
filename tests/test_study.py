import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from flowerlib import readers, runs, study

COUNTS = pd.Series({"Heat": 9.0, "Alien": 5.0, "Fargo": 3.0, "Speed": 2.0, "Alien Resurrection": 1.0})


@pytest.fixture
def chosen():
    return study.settings("smoke", n_titles=3, min_count=1, methods="exact_ce, sft", budget=200, large_budget=200)


def test_cases_by_hand(chosen):
    found = study.cases(replace(chosen, methods="exact_ce, subtb, dpo", paths="reward, policy", n_seeds=2, longer=3),
                        COUNTS)
    small = [(c.target, c.method, c.paths, c.seed, c.budget) for c in found if len(c.titles) == 3]
    assert small == [
        ("counts", "exact_ce", "all", 0, 200),
        ("counts", "subtb", "reward", 0, 200), ("counts", "subtb", "reward", 1, 200),
        ("counts", "subtb", "policy", 0, 200), ("counts", "subtb", "policy", 1, 200),
        ("counts", "dpo", "pairs", 0, 200), ("counts", "dpo", "pairs", 1, 200),
        ("counts", "subtb", "reward", 0, 600),
        ("permuted", "exact_ce", "all", 0, 200), ("permuted", "exact_ce", "all", 1, 200),
    ]
    assert found[0].titles == ("Heat", "Alien", "Fargo")
    assert np.allclose(found[0].log_rewards, chosen.alpha * np.log([9, 5, 3]))
    assert sorted(found[-2].log_rewards) == sorted(found[0].log_rewards)
    assert len(found[-1].titles) == 5 and found[-1].method == "subtree_ce" and len({c.name for c in found}) == len(found)
    assert not [c for c in study.cases(replace(chosen, min_count=0), COUNTS) if len(c.titles) == 5]
    assert len(study.cases(replace(chosen, n_titles=0), COUNTS)[0].titles) == 5


def test_a_case_is_kept_until_something_it_depends_on_changes(chosen, tmp_path, monkeypatch):
    case = study.cases(chosen, COUNTS)[1]
    first = study.run(case, chosen, tmp_path)
    assert first["row"]["method"] == "sft" and sum(first["draws"]) == chosen.n_draws
    assert first["row"]["forward_tokens"] >= 200 and first["curve"][0]["forward_tokens"] == 0
    monkeypatch.setattr(study, "load", lambda *_: pytest.fail("was run again"))
    assert study.run(case, chosen, tmp_path) == first
    assert study.run(case, replace(chosen, beta=0.5, n_seeds=9), tmp_path) == first  # no part of SFT
    monkeypatch.undo()
    again = study.run(case, replace(chosen, learning_rate=1e-4), tmp_path)
    assert again["row"]["kl_target_model"] != first["row"]["kl_target_model"]


def test_the_same_seed_gives_the_same_case(chosen, tmp_path):
    case = study.cases(chosen, COUNTS)[1]
    both = [study.run(case, chosen, tmp_path / name) for name in "ab"]
    for result in both:
        for record in [result["row"], *result["curve"]]:
            del record["seconds"]
    assert both[0] == both[1]


def test_settings_are_checked():
    assert set(study.PROFILES) == set(runs.PROFILES)
    with pytest.raises(ValueError, match="methods has ppo: choose of exact_ce"):
        study.settings("smoke", methods="sft, ppo")
    with pytest.raises(ValueError, match="budget is 0"):
        study.settings("smoke", budget=0)
    with pytest.raises(ValueError, match="unknown setting 'n_beams'"):
        study.settings("smoke", n_beams=3)
    with pytest.raises(ValueError, match="unknown profile 'tiny'"):
        study.settings("tiny")


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_tables_of_counts_are_read_and_equal_titles_added_up(tmp_path, ending):
    table = pd.DataFrame({"id": [1, 2, 3, 4], "title": ["Heat", "Alien ", "Heat", "Fargo"], "count": [1, 7, 2.5, 1]})
    path = tmp_path / f"counts.{ending}"
    if ending == "json":
        path.write_text(json.dumps(table.to_dict("records")))
    else:
        table.to_csv(path) if ending == "csv" else table.to_parquet(path)
    assert readers.read_counts(path).to_dict() == {"Alien": 7.0, "Heat": 3.5, "Fargo": 1.0}
    assert list(readers.read_counts(path).index) == ["Alien", "Heat", "Fargo"]
    path = tmp_path / "object.json"
    path.write_text('{"Heat": 3, "Fargo": 4}')
    assert readers.read_counts(path).to_dict() == {"Fargo": 4.0, "Heat": 3.0}
    path = tmp_path / "two.csv"
    path.write_text("name,times\nHeat,3\nFargo,4\n")
    assert readers.read_counts(path).to_dict() == {"Fargo": 4.0, "Heat": 3.0}


@pytest.mark.parametrize(("text", "message"), [
    ("title,count\nHeat,3\nFargo,-1\n", "bad.csv, line 3: the count -1 is no positive number"),
    ("title,count\nHeat,3\nFargo,0\n", "line 3: the count 0"),
    ("title,count\nHeat,3\nFargo,many\n", "line 3: the count 'many'"),
    ("title,count\n,3\nFargo,1\n", "line 2: the title is blank"),
    ("title,count\nHeat,3\n", "has 1 title"),
    ("a,b,c\n1,2,3\n", "needs the columns title and count, and has a, b, c"),
    ("", "bad.csv is damaged"),
])
def test_bad_tables_of_counts_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        readers.read_counts(path)
    with pytest.raises(ValueError, match="ends in .csv, .json or .parquet"):
        readers.read_counts(path.rename(tmp_path / "bad.txt"))
    with pytest.raises(FileNotFoundError, match="is no file"):
        readers.read_counts(path)
