"""The comparison: its settings, its choice, what it keeps, and what its results hold."""

import json
import shutil

import numpy as np
import pytest

from flowerlib import comparison, runs, train
from flowerlib.decoding import Beams

KEYS = ("method", "decoding", "seed", "ndcg@10", "hr@10", "dgu", "mgu", "h_bits", "ttr", "distinct", "coverage", "gini")


def test_lists_in_settings_are_read_or_refused_in_one_sentence():
    assert set(comparison.PROFILES) == set(runs.PROFILES)
    chosen = comparison.settings("smoke", sweep="-1:0.5, 0 : 1", guides=" 0.1,1")
    assert comparison.sweep(chosen) == [(-1.0, 0.5), (0.0, 1.0)]
    assert comparison.floats(chosen.guides) == [0.1, 1.0]
    for wrong, message in (({"sweep": "-1"}, "write alpha:theta"), ({"sweep": ""}, "write alpha:theta"),
                           ({"sweep": "a:b"}, "no list of numbers"), ({"guides": "much"}, "no list of numbers"),
                           ({"rewards": "none, mul"}, "unknown reward 'mul'"), ({"n_seeds": "two"}, "takes a int"),
                           ({"beams": 3}, "unknown setting 'beams'"), ({"guides": ""}, "name one weight"),
                           ({"n_seeds": 0}, "must be 1 or more"), ({"temperature": 0.0}, "must be above 0")):
        with pytest.raises(ValueError, match=message):
            comparison.settings("smoke", **wrong)
    with pytest.raises(ValueError, match="unknown profile"):
        comparison.settings("tiny")


def test_the_fairest_that_keeps_its_accuracy_is_chosen_or_else_the_most_accurate():
    rows = [{"ndcg@10": n, "dgu": d} for n, d in ((0.10, 0.3), (0.09, 0.1), (0.05, 0.01))]
    assert comparison.choose(rows, {"ndcg@10": 0.09}, "ndcg@10") is rows[1]
    assert comparison.choose(rows, {"ndcg@10": 0.1}, "ndcg@10") is rows[0]
    assert comparison.choose(rows, {"ndcg@10": 0.2}, "ndcg@10") is rows[0]


@pytest.fixture(scope="module")
def arena(smoke):
    return comparison.Arena(smoke)


def test_users_are_drawn_by_the_seed_and_keep_their_rows(arena):
    users = arena.users["test"]
    some = users.some(7, seed=1)
    assert len(some) == len(some.histories) == len(some.seen) == len(some.log_p) == 7
    again, other = users.some(7, seed=1), users.some(7, seed=2)
    assert again.histories == some.histories and other.histories != some.histories
    assert len(users.some(0, seed=1)) == len(users)
    for history, log_p in zip(some.histories, some.log_p):
        row = users.histories.index(history)
        assert (users.log_p[row] == log_p).all()
        np.testing.assert_allclose(arena.preference.after([arena.item_leaf[history].tolist()])[0], log_p, atol=1e-5)


def test_preferences_of_a_part_are_those_of_its_own_rows(arena):
    """Never another split's, as by row number: every row's preference comes from that row's own history."""
    for part in ("valid", "test"):
        users = arena.users[part]
        alone = arena.preference.after([arena.item_leaf[history].tolist() for history in users.histories])
        np.testing.assert_allclose(users.log_p, alone, atol=1e-5)


def test_what_is_done_is_kept_and_what_differs_is_done_anew(smoke, tmp_path, monkeypatch):
    out = shutil.copytree(smoke, tmp_path / "run")
    arena = comparison.Arena(out)
    chosen = comparison.PROFILES["smoke"]
    sft = arena.contender("SFT", 0)
    search = {"beam": Beams(chosen.n_beams)}
    monkeypatch.setattr(comparison.train, "train", lambda *args, **kwargs: pytest.fail("was tuned again"))
    kept = arena.lists(sft, "test", search, chosen.test_users)["beam"]
    assert kept.shape == (chosen.test_users, chosen.n_beams)
    assert arena.mean_share(sft, chosen.exact_users).sum() == pytest.approx(1, abs=1e-4)
    monkeypatch.undo()
    trained = []
    tune = train.train
    monkeypatch.setattr(comparison.train, "train", lambda *args, **kwargs: trained.append(1) or tune(*args, **kwargs))
    again = arena.lists(sft, "test", search | {"wide": Beams(chosen.n_beams + 1)}, chosen.test_users)
    assert (again["beam"] == kept).all() and trained == [1]  # asked for, and taken as it is


def test_one_target_rows_get_equally_many_tokens(arena):
    tokens = arena.forward_tokens(arena.contender("SFT", 0))
    for method in ("SFT, one target", "IFairLRS"):
        contender = arena.one_target(method, tokens)
        assert arena.forward_tokens(contender) == pytest.approx(tokens, rel=1e-3)
        few = arena.one_target(method, 1000)
        assert few.settings.epochs == 1 and 1000 <= arena.forward_tokens(few) < 1200  # to a row
        assert contender.settings.reweight == (method == "IFairLRS") and contender.settings.rows == "target"


def test_the_results_hold_every_key_with_its_interval(smoke):
    found = json.loads((smoke / "results" / "07_which_title_next.json").read_text(encoding="utf-8"))
    assert found["provenance"]["forward_tokens"] > 0
    rows = [row for row in found["rows"] if row["part"] == "test"]
    assert {row["method"] for row in rows} == {"SFT", "Flower", "Temperature", "D3", "Preference", "Popularity",
                                               "IFairLRS", "SFT, one target"}
    for row in rows:
        for key in KEYS:
            assert key in row
            if key not in ("method", "decoding", "seed"):
                assert row[f"{key}_lo"] <= row[key] <= row[f"{key}_hi"]
    flower = [row for row in rows if row["method"] == "Flower"]
    assert {row["reward"] for row in flower} == {"exact", "none", "div", "add"}
    decoded = [row for row in found["rows"] if row["part"] == "test, some users"]
    assert len(decoded) == 12
