"""The preference model against naive loops and the ways it can be misused; plain recommenders by hand and by solver."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib import data
from flowerlib.lab import preference, runs, store, training
from flowerlib.lab.settings import PROFILES
from flowerlib.model import Catalogue, prompt_texts, tiny_model

N = 9
ITEM = st.integers(1, 5)
TINY = replace(PROFILES["smoke"], max_history=4, preference_size=32, preference_epochs=60.0)


def cycles(n=60):
    """Sequences in which every title is followed by the next one: fully predictable."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, N, n)
    return [[int(s + t) % N for t in range(rng.integers(3, 11))] for s in starts]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference")
    histories = [[i, (i + 1) % N] for i in range(N)]
    targets = [(i + 2) % N for i in range(N)]
    model, log, made = preference.train_preference(cycles(), histories, targets, N, TINY, folder)
    assert made.parent == folder
    return folder, model, log, histories, targets


def test_it_learns_what_follows(trained):
    _, model, log, histories, targets = trained
    log_p = model.after(histories)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(N))
    assert log_p.argmax(1).tolist() == targets
    validation = log[log.kind == "validation"].loss
    own = -log_p[torch.arange(N), torch.tensor(targets)].mean().item()
    assert own == pytest.approx(validation.min(), abs=1e-4)  # the softmax holds titles alone, in training as in use
    assert own < np.log(N) / 2


def test_the_id_that_begins_a_sequence_is_no_title():
    """Not in the softmax of training, whose loss is minus log p of `after`; and no target."""
    model = preference.PreferenceModel(preference.GPT2Config(
        vocab_size=N + 1, n_positions=6, n_embd=32, n_layer=2, n_head=2, bos_token_id=N, eos_token_id=N,
    )).eval()
    rows = [[0, 3, 5], [7]]
    for last_only in (False, True):
        batch = preference._collate([(row, [-100] * (len(row) - 1) + row[-1:] if last_only else row) for row in rows], N)
        assert batch["input_ids"].tolist() == [[N, 0, 3, 5], [N, 7, N, N]]
        with torch.no_grad():
            out = model(**batch)
        assert out.logits.shape == (2, 4, N)
        targets = [(row[:i], row[i]) for row in rows for i in range(len(row)) if not last_only or i == len(row) - 1]
        log_p = model.after([history for history, _ in targets])
        own = -log_p[torch.arange(len(targets)), [target for _, target in targets]].mean()
        torch.testing.assert_close(out.loss, own)
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(targets)))


def test_a_full_window_is_read_as_well_as_a_short_one(trained):
    """The last place that is read is one that training has seen."""
    _, model, *_ = trained
    assert model.window == TINY.max_history
    histories = [[(i + t) % N for t in range(TINY.max_history)] for i in range(N)]
    log_p = model.after(histories)
    targets = torch.tensor([(i + TINY.max_history) % N for i in range(N)])
    assert (log_p.argmax(1) == targets).all()
    assert -log_p[torch.arange(N), targets].mean() < np.log(N) / 2
    with pytest.raises(ValueError, match="reads 4: cut the history"):
        model.log_p(torch.zeros(1, 5, dtype=torch.long))


def test_padding_and_titles_beyond_the_window_do_not_matter(trained):
    _, model, *_ = trained
    histories = [[], [3], [1, 2, 3, 4], [7, 7, 7, 1, 2, 3, 4]]
    together = model.after(histories)
    for row, history in zip(together, histories):
        torch.testing.assert_close(row, model.after([history])[0])
    torch.testing.assert_close(together[2], together[3])


def test_every_place_sees_the_titles_before_it_alone(trained):
    _, model, *_ = trained
    whole = model.log_p(torch.tensor([[2, 5, 1, 7], [4, 3, -1, -1]]))
    assert whole.shape == (2, 5, N)
    for n in range(5):
        torch.testing.assert_close(whole[0, n], model.after([[2, 5, 1, 7][:n]])[0])
    torch.testing.assert_close(whole[1, 2], model.after([[4, 3]])[0])


def test_a_finished_training_is_taken_as_it_is_and_another_is_not(trained, monkeypatch):
    folder, model, log, histories, targets = trained
    before = sorted(folder.rglob("*"))
    ran = []
    monkeypatch.setattr(preference.Trainer, "train", lambda self, **kwargs: ran.append(1) or 1 / 0)
    again, same, made = preference.train_preference(cycles(), histories, targets, N, TINY, folder)
    torch.testing.assert_close(again.after(histories), model.after(histories))
    assert same.loss.tolist() == pytest.approx(log.loss.tolist())
    same = replace(TINY, theta=0.5, model="another")  # no part of it
    assert preference.train_preference(cycles(), histories, targets, N, same, folder)[2] == made
    others = (replace(TINY, seed=1), targets), (TINY, targets[::-1]), (replace(TINY, preference_size=16), targets)
    for own, of in others:
        with pytest.raises(ZeroDivisionError):
            preference.train_preference(cycles(), histories, of, N, own, folder)
    assert len(ran) == 3 and sorted(made.parent.glob("*/made.json")) == [made / "made.json"]
    assert set(before) <= set(folder.rglob("*"))


def test_other_settings_lie_beside_it(tmp_path):
    histories, targets = [[i, (i + 1) % N] for i in range(N)], [(i + 2) % N for i in range(N)]
    few = replace(TINY, preference_epochs=1.0)
    first, _, one = preference.train_preference(cycles(), histories, targets, N, few, tmp_path)
    second, _, two = preference.train_preference(cycles(), histories, targets, N, replace(few, seed=1), tmp_path)
    assert one != two and sorted(p.name for p in tmp_path.iterdir()) == sorted([one.name, two.name])
    assert not torch.equal(first.after(histories), second.after(histories))  # the seed reaches it
    third, _, again = preference.train_preference(cycles(), histories, targets, N, few, tmp_path)
    assert again == one
    torch.testing.assert_close(third.after(histories), first.after(histories))
    record = store.read_json(one / "made.json")
    assert record["provenance"]["settings"]["seed"] == 0 and record["provenance"]["seconds"] > 0
    out = tmp_path.parent / "run"
    runs.finish(out, "data", few, one)
    (out / "preference").symlink_to(tmp_path)
    torch.testing.assert_close(preference.load_preference(out).after(histories), first.after(histories))


@pytest.mark.parametrize("half", [False, True])
def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, half):
    histories, targets = [[i, (i + 1) % N] for i in range(N)], [(i + 2) % N for i in range(N)]
    few = replace(TINY, preference_epochs=10.0)

    def run(name):
        return preference.train_preference(cycles(), histories, targets, N, few, tmp_path / name)

    whole, log, made = run("whole")
    assert not (made / "checkpoints").exists()
    bar, first_steps = training.OneBar, []
    one_step, begin, n_steps = bar.on_step_end, bar.on_train_begin, int(log.step.max())

    def killed(self, args, state, control, **kwargs):
        if state.global_step == n_steps // 2:
            raise KeyboardInterrupt
        one_step(self, args, state, control)

    monkeypatch.setattr(bar, "on_step_end", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    left, = (tmp_path / "killed").iterdir()
    assert left.name == made.name and not (left / "made.json").exists()
    if half:  # killed while it wrote a checkpoint
        (left / "checkpoints" / f"checkpoint-{n_steps - 1}").mkdir()
    monkeypatch.setattr(bar, "on_step_end", one_step)

    def noted(self, args, state, control, **kwargs):
        first_steps.append(state.global_step)
        begin(self, args, state, control)

    monkeypatch.setattr(bar, "on_train_begin", noted)
    resumed, log_after, again = run("killed")
    assert again == left and len(first_steps) == 1 and 0 < first_steps[0] < n_steps
    assert log_after.step.tolist() == log.step.tolist()
    torch.testing.assert_close(resumed.after(histories), whole.after(histories))
    own = -resumed.after(histories)[torch.arange(N), torch.tensor(targets)].mean().item()
    assert own == pytest.approx(log_after[log_after.kind == "validation"].loss.min(), abs=1e-4)
    run("killed")
    assert len(first_steps) == 1 and (again / "made.json").exists()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=2, max_size=8), st.integers(1, 5))
def test_plain_recommenders_equal_loops(sequences, k):
    together = preference.cooccurrence(sequences, 6)
    users = [{u for u, s in enumerate(sequences) if i in s} for i in range(6)]
    cosine = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            assert together[i, j] == len(users[i] & users[j])
            if i != j and users[i] and users[j]:
                cosine[i, j] = len(users[i] & users[j]) / np.sqrt(len(users[i]) * len(users[j]))
    found = preference.item_knn(together, k)
    for j in range(6):
        kth = sorted(cosine[:, j])[-k]
        np.testing.assert_allclose(found[:, j], [c if c >= kth else 0 for c in cosine[:, j]], atol=1e-12)
    scores = preference.sum_of_rows(found, sequences)
    np.testing.assert_allclose(scores[0], sum(found[i] for i in set(sequences[0])), atol=1e-12)


def test_ease_solves_its_own_problem():
    """Each column is ridge regression of one title on all others (Steck 2019, eq. 3)."""
    x = (np.random.default_rng(0).random((40, 6)) < 0.4).astype(float)
    sequences = [np.flatnonzero(row).tolist() for row in x]
    weights = preference.ease(preference.cooccurrence(sequences, 6), 2.0)
    for j in range(6):
        others = [i for i in range(6) if i != j]
        ridge = np.linalg.solve(x[:, others].T @ x[:, others] + 2 * np.eye(5), x[:, others].T @ x[:, j])
        np.testing.assert_allclose(weights[others, j], ridge, atol=1e-10)
        assert weights[j, j] == 0


def test_top_titles_leaves_seen_ones_out_and_says_where_none_is_left():
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert preference.top_titles(scores, [[0], [1, 2]], 3).tolist() == [[2, 1, -1], [0, -1, -1]]
    assert preference.top_titles(scores, [[], []], 2).tolist() == [[0, 2], [0, 1]]
    assert preference.top_titles(scores, [[0], [1, 2]], 5).tolist() == [[2, 1, -1, -1, -1], [0, -1, -1, -1, -1]]


def test_fair_weights_by_hand():
    """Heat (two items, one leaf) has 3 of 4 slots of the histories and 1 of 4 targets: each of these counts triple."""
    titles = ["Heat", "Fargo", "Heat"]
    rows = pd.DataFrame({"history": [[1], [3], [1], [2]], "target": [2, 2, 2, 3], "user_id": [0, 1, 2, 3],
                         "timestamp": [0, 0, 0, 0]})
    tables = data.Tables(pd.DataFrame({"item_id": [1, 2, 3], "title": titles}), rows, rows[:0], rows[:0])
    _, tokenizer = tiny_model([*titles, *prompt_texts("movie", "target")], seed=0)
    weights = preference.fair_weights(Catalogue.build(tokenizer, titles, "movie", "target"), tables, n_groups=2)
    torch.testing.assert_close(weights, torch.tensor([3.0, 1 / 3], dtype=weights.dtype))
    one_group = preference.fair_weights(Catalogue.build(tokenizer, titles, "movie", "target"), tables, n_groups=1)
    torch.testing.assert_close(one_group, torch.ones_like(one_group))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.lists(ITEM, min_size=1, max_size=4), ITEM), min_size=2, max_size=12))
def test_fair_weights_are_those_of_naive_counting(pairs):
    titles = ["Heat", "Fargo", "Speed", "Alien", "The Rock"]
    rows = pd.DataFrame({"history": [h for h, _ in pairs], "target": [t for _, t in pairs]})
    tables = data.Tables(pd.DataFrame({"item_id": [1, 2, 3, 4, 5], "title": titles}), rows, rows[:0], rows[:0])
    _, tokenizer = tiny_model([*titles, *prompt_texts("movie", "target")], seed=0)
    weights = preference.fair_weights(Catalogue.build(tokenizer, titles, "movie", "target"), tables, n_groups=2)
    before, after = [item for h, _ in pairs for item in h], [t for _, t in pairs]
    ranked = sorted(set(before), key=lambda item: (-before.count(item), item))
    popular = ranked[: -(-len(ranked) // 2)] if len(ranked) > 1 else [1, 2, 3, 4, 5]  # one title: one group of all
    for group in (popular, [item for item in range(1, 6) if item not in popular]):
        share, of_targets = (sum(item in group for item in items) / len(items) for items in (before, after))
        for item in group:
            assert weights[item - 1] == pytest.approx(share / of_targets if of_targets else 1)


def test_a_title_more_is_another_model(trained):
    folder, model, _, histories, targets = trained
    few = replace(TINY, preference_epochs=1.0)
    more, _, made = preference.train_preference(cycles(), histories, targets, N + 1, few, folder)
    assert more.n_leaves == model.n_leaves + 1 and made != folder
