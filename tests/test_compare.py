"""The comparison of notebook 07: users, contenders, what is made once, and what its results hold."""

import json
import shutil
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from flowerlib import train
from flowerlib.lab import compare, preference, reproduce, runs, store, training
from flowerlib.lab.settings import PROFILES, settings
from flowerlib.tree import Beams

KEYS = ("method", "decoding", "seed", "trainings", "ndcg@10", "hr@10", "dgu", "mgu", "top_vs_history", "top_vs_next",
        "mgu_next", "arp", "aplt", "h_bits", "ttr", "distinct", "coverage", "gini")


def test_the_closest_to_the_next_choices_that_is_level_with_sft_is_selected_or_else_the_most_accurate():
    rows = [{"ndcg@10": n, "mgu_next": d} for n, d in ((0.10, 0.3), (0.09, 0.1), (0.05, 0.01))]
    assert compare.select(rows, {"ndcg@10": 0.0945}, "ndcg@10") is rows[1]  # 95% of it are 0.0898
    assert compare.select(rows, {"ndcg@10": 0.1}, "ndcg@10") is rows[0]
    assert compare.select(rows, {"ndcg@10": 0.2}, "ndcg@10") is rows[0]


@pytest.fixture(scope="module")
def comparison(smoke):
    return compare.Comparison(smoke)


@pytest.fixture
def copy(smoke, tmp_path):
    """A run of its own, to be changed."""
    for name in ("data", "preference", "sft", "flower", "lists", "exact", "cache"):
        shutil.copytree(smoke / name, tmp_path / "run" / name)
    return tmp_path / "run"


def test_its_settings_are_those_of_the_run_and_what_is_given(smoke, comparison):
    assert comparison.settings == PROFILES["smoke"]
    other = compare.Comparison(smoke, guides=[0.2], n_beams=3, exact_users=None)
    assert (other.settings.guides, other.settings.n_beams) == ((0.2,), 3)
    assert other.settings.exact_users == PROFILES["smoke"].exact_users
    with pytest.raises(ValueError, match="unknown setting 'beams'"):
        compare.Comparison(smoke, beams=3)
    with pytest.raises(FileNotFoundError, match="run notebooks/01_prepare_the_data.ipynb"):
        compare.Comparison(smoke / "nowhere")


def test_notebook_07_has_the_settings_that_02_and_03_were_given(smoke, tmp_path):
    shutil.copytree(smoke, tmp_path / "run", ignore=shutil.ignore_patterns(".*"))
    mark = tmp_path / "run" / "flower" / "settings.json"
    document = store.read_json(mark)
    document["settings"] |= {"learning_rate": 0.007, "counts": "windowed"}
    store.write_json(mark, document)
    notebook = nbformat.read(reproduce.FOLDER / reproduce.COMPARISON, 4)
    given, begin = [cell.source for cell in notebook.cells if cell.cell_type == "code"][:2]
    exec(given, place := {})
    exec(begin, place := place | {"PROFILE": "smoke", "OUT": str(tmp_path / "run"), "n_beams": 3})
    for used in (place["run"], place["comparison"].settings):
        assert (used.learning_rate, used.counts, used.n_beams) == (0.007, "windowed", 3)


def test_a_user_stands_there_once(copy):
    """Rows of one user would count as independent in the intervals."""
    place = copy / "data" / "test.parquet"
    rows = pd.read_parquet(place, dtype_backend="pyarrow")
    pd.concat([rows, rows.iloc[:3], rows.iloc[:1]]).to_parquet(place, index=False)
    doubled = compare.Comparison(copy)
    assert len(doubled.users["test"]) == rows.user_id.nunique() == len(rows)


def test_users_are_drawn_by_the_seed_and_stay_beside_their_rows(comparison):
    users = comparison.users["test"]
    sample = users.sample(7, seed=1)
    assert len(sample) == len(sample.histories) == len(sample.seen) == len(sample.log_p) == 7
    again, other = users.sample(7, seed=1), users.sample(7, seed=2)
    assert again.histories == sample.histories and other.histories != sample.histories
    assert len(users.sample(0, seed=1)) == len(users) and users.sample(0, seed=1).histories == users.histories
    for history, seen, target, log_p in zip(sample.histories, sample.seen, sample.targets, sample.log_p):
        row = users.histories.index(history)
        assert (users.log_p[row] == log_p).all() and users.seen[row] == seen and users.targets[row] == target
        alone = comparison.preference.after([comparison.item_leaf[history].tolist()])[0]
        np.testing.assert_allclose(alone, log_p, atol=1e-5)


def test_preferences_of_a_part_are_those_of_its_own_rows(comparison):
    """Never another split's, as by row number: every row's preference comes from that row's own history."""
    for part in ("valid", "test"):
        users = comparison.users[part]
        alone = torch.cat([comparison.preference.after([comparison.item_leaf[history].tolist()])
                           for history in users.histories])
        np.testing.assert_allclose(users.log_p, alone, atol=1e-5)
        assert [set(leaves) for leaves in comparison.seen_leaves(users)] == [
            {int(comparison.item_leaf[item]) for item in items} for items in users.seen]
        assert all(set(history) <= set(seen) for history, seen in zip(users.histories, users.seen))


def test_leaves_are_titles(comparison):
    assert comparison.titles == comparison.tables.items.title.drop_duplicates().tolist()
    assert [comparison.titles[leaf] for leaf in comparison.item_leaf] == comparison.tables.items.title.tolist()
    assert comparison.counts.sum() == comparison.item_counts.sum() and len(comparison.counts) == len(comparison.titles)


def test_contenders_have_the_settings_of_the_run_but_for_their_own(comparison):
    own = comparison.settings
    assert comparison.contender(0).settings == own and comparison.contender(0).method == "Flower-KL"
    sft = comparison.contender(3, theta=1.0)
    assert (sft.method, sft.settings.seed, sft.settings.theta) == ("SFT", 3, 1.0)
    assert comparison.contender(0, flow="subtb", reward="none").method == "Flower"
    assert comparison.contender(0, "IFairLRS", theta=1.0, reweight=True).method == "IFairLRS"
    with pytest.raises(ValueError, match="theta is 3.0"):
        comparison.contender(0, theta=3.0)


def counted(monkeypatch, fail=False):
    """Notes each training that is begun; `fail` forbids them."""
    begun, begin = [], training.FlowerTrainer.train

    def noted(self, *args, **kwargs):
        begun.append(self.args.output_dir)
        return pytest.fail("was tuned again") if fail else begin(self, *args, **kwargs)

    monkeypatch.setattr(training.FlowerTrainer, "train", noted)
    return begun


def test_what_is_done_is_read_and_what_differs_is_done_anew(copy, monkeypatch):
    begun = counted(monkeypatch, fail=True)
    comparison = compare.Comparison(copy)
    own = comparison.settings
    sft = comparison.contender(0, theta=1.0)
    search = {"beam": Beams(own.n_beams)}
    with monkeypatch.context() as patch:
        patch.setattr(compare, "beam_search", lambda *args: pytest.fail("was decoded again"))
        patch.setattr(training, "finetune", lambda *args: pytest.fail("no model is needed"))
        lists = comparison.lists(sft, "test", search, own.test_rows)["beam"]
        assert lists.shape == (len(comparison.users["test"]), own.n_beams)
        log_shares = comparison.log_shares(sft, own.exact_users)
        assert log_shares.shape == (own.exact_users, len(comparison.titles))
        assert (np.exp(log_shares).sum(1) < 1 + 1e-3).all()  # a part may lie off the tree
    decoded, decode = [], compare.beam_search
    monkeypatch.setattr(compare, "beam_search", lambda *args: decoded.append(args[3]) or decode(*args))
    again = comparison.lists(sft, "test", search | {"wide": Beams(own.n_beams + 1)}, own.test_rows)
    assert decoded == [[Beams(own.n_beams + 1)]] and not begun  # the model is read, not tuned
    assert list(again) == ["beam", "wide"]
    assert (again["beam"] == lists).all() and again["wide"].shape[1] == own.n_beams + 1
    models = comparison.train(sft)
    assert comparison.train(sft)[0] is models[0]  # the last one stays in memory


def test_other_settings_are_tuned_beside_those_of_the_run(copy, monkeypatch):
    begun = counted(monkeypatch)
    before = set(copy.rglob("made.json"))
    comparison = compare.Comparison(copy)
    other = comparison.contender(0, theta=1.0, epochs=0.2)
    comparison.lists(other, "test", {"beam": Beams(3)}, 4)
    assert len(begun) == 1
    made, = set(copy.rglob("made.json")) - before
    assert made.parent.parent == copy / "sft" and before <= set(copy.rglob("made.json"))
    assert store.read_json(made)["made_from"] == json.loads(json.dumps(comparison.origin(other)))
    compare.Comparison(copy).train(other)
    assert len(begun) == 1


@pytest.mark.parametrize("given", [
    {"theta": 1.0}, {}, {"alpha": -1.0, "theta": 0.2}, {"flow": "subtb", "reward": "div"},
    {"flow": "subtb", "reward": "none"},
])
def test_its_origin_is_that_of_the_training(copy, given):
    """`origin` and `finetune` name a training alike, so that lists are found without the model."""
    comparison = compare.Comparison(copy)
    contender = comparison.contender(0, epochs=0.1, **given)
    folder = comparison.train(contender)[2]
    assert store.read_json(folder / "made.json")["made_from"] == json.loads(json.dumps(comparison.origin(contender)))
    for method in ("IFairLRS", "SFT, one target"):
        few = comparison.one_target(method, 500)
        folder = comparison.train(few)[2]
        assert store.read_json(folder / "made.json")["made_from"] == json.loads(json.dumps(comparison.origin(few)))


def test_lists_depend_on_their_users_and_on_what_guides_them(copy, monkeypatch):
    """Users drawn by another seed, another draw, another p_ui under a guided search: all are other lists."""
    comparison = compare.Comparison(copy)
    sft = comparison.contender(0, theta=1.0)
    decoded, decode = [], compare.beam_search
    monkeypatch.setattr(compare, "beam_search", lambda *args: decoded.append(args[3]) or decode(*args))
    searches = {"beam": Beams(3), "guided": Beams(3, guide=0.5), "drawn": Beams(3, stochastic=True)}
    first = comparison.lists(sft, "test", searches, 5)
    assert len(decoded) == 1
    comparison.settings = settings("smoke", seed=1)
    comparison.lists(sft, "test", {"beam": Beams(3)}, 5)
    assert len(decoded) == 2
    comparison.settings = settings("smoke")
    other = comparison.lists(sft, "test", {"drawn": searches["drawn"]}, 5, draw=1)["drawn"]
    assert len(decoded) == 3 and (other != first["drawn"]).any()
    assert (comparison.lists(sft, "test", searches, 5, draw=0)["drawn"] == first["drawn"]).all() and len(decoded) == 3
    with torch.no_grad():
        comparison.preference.transformer.wte.weight.add_(1.0)
    again = comparison.lists(sft, "test", searches, 5)
    assert decoded[3:] == [[searches["guided"]]] and (again["beam"] == first["beam"]).all()


def test_no_seen_title_is_in_a_list_unless_it_is_allowed(comparison):
    users = comparison.users["test"].sample(PROFILES["smoke"].decoding_users, 0)
    sft = comparison.contender(0, theta=1.0)
    lists = comparison.lists(sft, "test", {"beam": Beams(10), "again": Beams(10, seen_allowed=True)}, len(users))
    for row, seen in zip(lists["beam"], comparison.seen_leaves(users)):
        titles, left = row[row >= 0], len(comparison.titles) - len(set(seen))  # this user may have seen most of 80
        assert not set(titles) & set(seen) and len(set(titles)) == len(titles) == min(10, left)
    assert any(set(row) & set(seen) for row, seen in zip(lists["again"], comparison.seen_leaves(users)))


def test_one_target_rows_get_equally_many_tokens(comparison):
    tokens = comparison.forward_tokens(comparison.contender(0, theta=1.0))
    for method in ("SFT, one target", "IFairLRS"):
        whole = comparison.one_target(method, 20 * tokens)  # more than one pass has
        assert whole.settings.epochs > 1 and comparison.forward_tokens(whole) == pytest.approx(20 * tokens, rel=1e-3)
        contender = comparison.one_target(method, tokens)
        a_row_less = replace(contender, n_rows=contender.n_rows - 1)
        assert comparison.forward_tokens(a_row_less) < tokens <= comparison.forward_tokens(contender)
        catalogue = comparison._backbone(contender.settings).catalogue  # of the training: its prompts are longer
        n = train.training_rows(catalogue, comparison._tables(contender), contender.settings).start[-1]
        assert comparison.forward_tokens(contender) == round(contender.settings.epochs * n)
        few = comparison.one_target(method, 1000)
        assert few.settings.epochs == 1 and 1000 <= comparison.forward_tokens(few) < 1200  # to a row
        assert contender.settings.reweight == (method == "IFairLRS") and contender.settings.rows == "target"
        assert contender.settings.method == "SFT" and contender.method == method


def test_provenance_is_of_the_work_behind_it(copy, monkeypatch):
    """A list has two: its training's and its own, so that newer code does not claim the older one's commit."""
    comparison = compare.Comparison(copy)
    assert comparison.sources == []
    sft = comparison.contender(0, theta=1.0)
    trained = store.read_json(comparison.train(sft)[2] / "made.json")["provenance"]
    monkeypatch.setattr(store, "commit", lambda: "0123456789ab")
    for _ in range(2):
        comparison.lists(sft, "test", {"beam": Beams(4), "few": Beams(3)}, 5)
    monkeypatch.setattr(store, "commit", lambda: "ba9876543210")  # else both may have one provenance, to the second
    comparison.log_shares(sft, 3)
    assert len(comparison.sources) == 10 and all(source["settings"]["theta"] == 1.0 for source in comparison.sources)
    assert comparison.sources[::2] == [trained] * 5
    decoded, *_, exact = own = comparison.sources[1::2]
    assert own == [decoded] * 4 + [exact]
    commits = [source["commit"] for source in (trained, decoded, exact)]
    assert commits[1:] == ["0123456789ab", "ba9876543210"]
    assert all(source["bfloat16"] == trained["bfloat16"] for source in own)
    joint = runs.joint_provenance(comparison.sources)
    seconds = trained["seconds"] + decoded["seconds"] + exact["seconds"]  # one piece of work is counted once
    assert joint["seconds"] == pytest.approx(seconds) and joint["commit"] == commits


def test_records_of_before_with_one_provenance_are_read(copy):
    comparison = compare.Comparison(copy)
    sft = comparison.contender(0, theta=1.0)
    lists = comparison.lists(sft, "test", {"beam": Beams(2)}, 3)["beam"]
    path = max((copy / "lists").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    record = store.read_json(path)
    store.write_json(path, {key: value for key, value in record.items() if key != "trained"})
    assert (comparison.lists(sft, "test", {"beam": Beams(2)}, 3)["beam"] == lists).all()
    assert comparison.sources == [record["trained"], record["provenance"], record["provenance"]]


def test_the_results_hold_every_key_with_its_interval(smoke):
    document = json.loads((smoke / "results" / "07_which_title_next.json").read_text(encoding="utf-8"))
    assert document["provenance"]["forward_tokens"] > 0
    rows = document["rows"]
    tilted = {f"{method}, α while decoding" for method in ("SFT", "D3", "Preference")}
    assert {row["method"] for row in rows} == tilted | {
        "SFT", "Flower", "Flower-KL", "Temperature", "D3", "Preference", "EASE", "Popularity", "IFairLRS",
        "SFT, one target", "Next choices"}
    for row in rows:
        for key in KEYS:
            if row["method"] != "Next choices" or "@10" not in key:
                assert key in row
                if key not in ("method", "decoding", "seed", "trainings"):
                    assert row[f"{key}_lo"] <= row[key] <= row[f"{key}_hi"]
    plain = {row["method"]: row for row in rows if (row["decoding"], row["seen"]) == ("beam", "excluded")}
    of_all_seeds = "SFT", "Flower", "Flower-KL", "SFT, α while decoding"
    assert {plain[name]["trainings"] for name in of_all_seeds} == {PROFILES["smoke"].n_seeds}
    assert plain["D3"]["trainings"] == 1
    oracle, = [row for row in rows if row["method"] == "Next choices"]
    assert oracle["hr@1"] == 1 and oracle["top_vs_next"] == oracle["mgu_next"] == 0
    kl, sft = plain["Flower-KL"], plain["SFT"]
    assert kl["mgu_next_minus_sft"] == pytest.approx(kl["mgu_next"] - sft["mgu_next"], abs=1e-5)
    assert 0 <= kl["mgu_next_minus_sft_p"] <= 1


def test_contrasts_are_with_sft_and_with_what_needs_no_flower(smoke):
    contrasts = runs.read_results(smoke / "results" / "07_contrasts.json")
    assert [contrasts[0][key] for key in ("method", "minus", "metric")] == ["Flower-KL", "SFT", "mgu_next"]
    pairs = {(row["method"], row["minus"]): row["trainings"] for row in contrasts}
    n = PROFILES["smoke"].n_seeds
    assert pairs["Flower", "SFT"] == pairs["Preference", "Flower-KL"] == n and pairs["D3", "Flower-KL"] == 1
    for row in contrasts:
        assert row["lo"] <= row["difference"] <= row["hi"] and 0 < row["p"] <= 1
    rows = runs.read_results(smoke / "results" / "07_which_title_next.json")
    beams = {row["method"]: row for row in rows if (row["decoding"], row["seen"]) == ("beam", "excluded")}
    for row in contrasts:
        if row["minus"] == "SFT":
            assert beams[row["method"]][f"{row['metric']}_minus_sft"] == row["difference"]


def test_settings_are_selected_on_validation_users(smoke):
    swept = runs.read_results(smoke / "results" / "07_sweep.json")
    assert {row["part"] for row in swept} == {"valid"}
    flower = [(row["reward"], row["theta"]) for row in swept if row["method"] == "Flower"]
    assert flower == [*PROFILES["smoke"].flower_sweep]
    tilted = [row for row in swept if row["method"] == "SFT, α while decoding"]
    assert [row.get("decoding_alpha", 0.0) for row in tilted] == list(PROFILES["smoke"].alphas)


def test_the_design_stands_beside_sft_of_as_many_passes(smoke):
    designed = runs.read_results(smoke / "results" / "07_design.json")
    assert {row["part"] for row in designed} == {"valid, one pass"} and len(designed) == 22
    assert [row["flow"] for row in designed].count("none") == 1 and designed[0]["method"] == "SFT"
    assert {row["paths"] for row in designed[1:]} == {"logged", "reward", "policy"}


def test_other_decodings_stand_beside_the_first_training(smoke):
    rows = runs.read_results(smoke / "results" / "07_which_title_next.json")
    of_sft = {(row["decoding"], row["seen"]): row["trainings"] for row in rows if row["method"] == "SFT"}
    assert of_sft == {("beam", "excluded"): PROFILES["smoke"].n_seeds, ("beam", "allowed"): 1,
                      ("beam_normalised", "excluded"): 1, ("beam_normalised", "allowed"): 1}
    as_in_paper = runs.read_results(smoke / "results" / "07_as_in_paper.json")
    assert [row["method"] for row in as_in_paper].count("Flower") == 2
    assert all(row["DGU / SFT's"] == 1 for row in as_in_paper if row["method"] == "SFT")


def test_weights_and_rewards_are_of_all_rows(comparison):
    """IFairLRS is trained on a part of them."""
    few, whole = comparison.one_target("IFairLRS", 500), comparison.contender(0, theta=1.0, rows="target", reweight=True)
    assert 0 < few.n_rows < len(comparison.tables.train)
    assert comparison.origin(few)["weights"] == comparison.origin(whole)["weights"]
    assert comparison.origin(few)["data"] != comparison.origin(whole)["data"]


def test_the_results_say_how_long_their_models_were_trained(smoke):
    """Not how long the last notebook took to read them."""
    provenance = runs.read_document(smoke / "results" / "07_which_title_next.json")["provenance"]
    trained = [store.read_json(path)["provenance"]["seconds"] for path in smoke.glob("*/*/made.json")
               if path.parent.parent.name in ("sft", "flower")]
    made = [store.read_json(path)["provenance"] for kind in ("lists", "exact") for path in (smoke / kind).iterdir()]
    decoded = {json.dumps(source, sort_keys=True): source["seconds"] for source in made}
    assert max(trained) < provenance["seconds"] < sum(trained) + sum(decoded.values()) + 0.1
    assert provenance["settings"]["profile"] == "smoke" and "sweep" in provenance["settings"]


def test_the_bias_is_taken_apart(smoke):
    steps = runs.read_results(smoke / "results" / "07_exact.json")
    assert {row["model"] for row in steps} == {"SFT", "Flower-KL", "reward"}
    shares = {(row["model"], row["seen"], row["step"]): row["shares"] for row in steps}
    for share in shares.values():
        assert sum(share) == pytest.approx(1)
    for seen in ("allowed", "excluded"):  # on 80 titles beams of 50 and 200 miss nothing of the ten likeliest
        for model in ("SFT", "Flower-KL"):
            assert shares[model, seen, "beams of 200"] == pytest.approx(shares[model, seen, "the 10 likeliest"])


def test_plain_recommenders_stand_in_the_results_of_notebook_01(smoke):
    methods = {row["method"] for row in runs.read_results(smoke / "results" / "01_preference.json")}
    assert {"Popularity", "ItemKNN", "EASE", "Preference"} <= methods
    assert set(preference.top_titles(np.ones((1, 3)), [[]], 3)[0]) == {0, 1, 2}
