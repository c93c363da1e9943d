"""The preference model against naive loops and the ways it can be misused; plain recommenders by hand and by solver."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib import preference, runs

N = 9
CHOSEN = replace(runs.PROFILES["smoke"], max_history=4, preference_size=32, preference_epochs=60.0)


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
    model, log = preference.train_preference(cycles(), histories, targets, N, CHOSEN, folder)
    return folder, model, log, histories, targets


def test_it_learns_what_follows(trained):
    _, model, log, histories, targets = trained
    log_p = model.after(histories)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(N))
    assert log_p.argmax(1).tolist() == targets
    validation = log[log.kind == "validation"].loss
    own = -log_p[torch.arange(N), torch.tensor(targets)].mean().item()
    assert validation.min() - 0.02 < own <= validation.min() + 1e-4  # the loss knows one class more: the beginning
    assert own < np.log(N) / 2


def test_a_full_window_is_read_as_well_as_a_short_one(trained):
    """The last place that is read is one that training has seen."""
    _, model, *_ = trained
    assert model.window == CHOSEN.max_history
    histories = [[(i + t) % N for t in range(CHOSEN.max_history)] for i in range(N)]
    log_p = model.after(histories)
    targets = torch.tensor([(i + CHOSEN.max_history) % N for i in range(N)])
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
    ran = []
    monkeypatch.setattr(preference.Trainer, "train", lambda self: ran.append(1) or 1 / 0)
    again, same = preference.train_preference(cycles(), histories, targets, N, CHOSEN, folder)
    torch.testing.assert_close(again.after(histories), model.after(histories))
    assert same.loss.tolist() == pytest.approx(log.loss.tolist())
    for other in ({"chosen": replace(CHOSEN, seed=1)}, {"targets": targets[::-1]}):
        given_ = {"targets": targets, "chosen": CHOSEN} | other
        with pytest.raises(ZeroDivisionError):
            preference.train_preference(cycles(), histories, given_["targets"], N, given_["chosen"], folder)
    assert len(ran) == 2


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
