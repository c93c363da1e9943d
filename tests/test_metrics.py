"""Metrics against hand values, naive loops, bounds and orderings; intervals against fresh samples of users."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib import metrics
from flowerlib.trie import TitleTrie

TITLES = ["a b", "a c", "d", "a b e", "f", "b", "g g", "h"]


@st.composite
def cases(draw):
    """Lists without repeats (some shorter than K), targets, counts with at least two positive ones, titles."""
    n_leaves, k, n_users = draw(st.integers(3, 8)), draw(st.integers(1, 3)), draw(st.integers(2, 6))
    ids = st.integers(0, n_leaves - 1)
    lists = [draw(st.lists(ids, min_size=1, max_size=k, unique=True)) for _ in range(n_users)]
    targets = draw(st.lists(ids, min_size=n_users, max_size=n_users))
    counts = draw(st.lists(st.integers(0, 9), min_size=n_leaves, max_size=n_leaves).filter(
        lambda c: sum(x > 0 for x in c) >= 2))
    return np.array([x + [-1] * (k - len(x)) for x in lists]), np.array(targets), np.array(counts), TITLES[:n_leaves]


def naive(recommendations, targets, counts, titles, k, n_groups):
    """Every metric by plain loops over lists and Counters."""
    lists = [[int(i) for i in row if i >= 0] for row in recommendations]
    slots = Counter(i for row in lists for i in row)
    n_slots, n, out = sum(slots.values()), len(titles), {}
    hits = [row.index(t) for row, t in zip(recommendations.tolist(), targets) if t in row[:k]]
    out[f"hr@{k}"] = len(hits) / len(lists)
    out[f"ndcg@{k}"] = sum(1 / math.log2(rank + 2) for rank in hits) / len(lists)
    positive = sorted((i for i in range(n) if counts[i] > 0), key=lambda i: (-counts[i], i))
    size, larger = divmod(len(positive), n_groups)
    group, at = {}, 0
    for g in range(n_groups):
        for i in positive[at:at + size + (g < larger)]:
            group[i] = g
        at += size + (g < larger)
    gu = [sum(c for i, c in slots.items() if group.get(i, n_groups - 1) == g) / n_slots
          - sum(counts[i] for i in positive if group[i] == g) / sum(counts) for g in range(n_groups)]
    out["dgu"], out["mgu"] = max(gu) - min(gu), sum(map(abs, gu)) / n_groups
    chosen = Counter(group.get(int(t), n_groups - 1) for t in targets)
    gu_next = [sum(c for i, c in slots.items() if group.get(i, n_groups - 1) == g) / n_slots
               - chosen[g] / len(lists) for g in range(n_groups)]
    out["top_vs_history"], out["top_vs_next"] = gu[0], gu_next[0]
    out["mgu_next"] = sum(map(abs, gu_next)) / n_groups
    out["arp"] = sum(counts[i] * c for i, c in slots.items()) / n_slots
    kept, of_tail = 0, set()
    for i in sorted(range(n), key=lambda i: (counts[i], -i)):
        kept += counts[i]
        if kept <= 0.2 * sum(counts):
            of_tail.add(i)
    out["aplt"] = sum(c for i, c in slots.items() if i in of_tail) / n_slots
    words = Counter(w for i, c in slots.items() for w in titles[i].split() for _ in range(c))
    total = sum(words.values())
    out["h_bits"] = -sum(c / total * math.log2(c / total) for c in words.values())
    out["ttr"] = len(words) / total
    out["distinct"], out["coverage"] = len(slots), len(slots) / n
    out["gini"] = sum(abs(slots[i] - slots[j]) for i in range(n) for j in range(n)) / (2 * n * n_slots)
    return out


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 2))
def test_every_metric_equals_naive_loops_and_keeps_its_bounds(case, n_groups):
    recommendations, targets, counts, titles = case
    k = recommendations.shape[1]
    got = metrics.evaluate(*case, ks=(k,), n_bootstrap=0, n_groups=n_groups)
    assert got == pytest.approx(naive(*case, k, n_groups), abs=1e-12)
    for name in (f"hr@{k}", f"ndcg@{k}", "ttr", "coverage", "gini"):
        assert 0 <= got[name] <= 1
    assert got[f"ndcg@{k}"] <= got[f"hr@{k}"] and 0 <= got["mgu"] <= 2 / n_groups and 0 <= got["dgu"] <= 2
    assert 0 <= got["h_bits"] <= math.log2(len({w for t in titles for w in t.split()})) + 1e-12


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 3))
def test_intervals_hold_the_value_and_nothing_differs_from_itself(case, seed):
    k = case[0].shape[1]
    got = metrics.evaluate(*case, ks=(k,), n_bootstrap=20, seed=seed, n_groups=2)
    for name in metrics.evaluate(*case, ks=(k,), n_bootstrap=0, n_groups=2):
        assert got[f"{name}_lo"] <= got[name] <= got[f"{name}_hi"], name
    same = metrics.compare(case[0], case[0], *case[1:], ks=(k,), n_bootstrap=20, n_groups=2)
    assert set(same.values()) == {(0.0, 0.0, 0.0, 1.0)}


def test_accuracy_by_hand():
    rank = metrics.ranks([[4, 2, 7], [1, 3, -1], [5, 6, 0]], [2, 0, 5])
    assert rank.tolist() == [1, -1, 0]
    assert metrics.hit_rate(rank, 1).tolist() == [0, 0, 1]
    assert metrics.hit_rate(rank, 3).tolist() == [1, 0, 1]
    np.testing.assert_allclose(metrics.ndcg(rank, 3), [1 / math.log2(3), 0, 1])
    assert metrics.ndcg(rank, 1).tolist() == [0, 0, 1]


def test_popularity_groups_by_hand():
    # sorted: leaf 2 (9), leaf 0 and leaf 4 (5 each, lower id first), leaf 1 (1); leaf 3 has none and joins the last
    for dtype in (int, np.uint8, float):
        assert metrics.popularity_groups(np.array([5, 1, 9, 0, 5], dtype), 3).tolist() == [0, 2, 0, 2, 1]


@pytest.mark.parametrize("n_positive, sizes", [(8, [1] * 8), (11, [2, 2, 2, 1, 1, 1, 1, 1]), (16, [2] * 8)])
def test_first_groups_are_one_larger(n_positive, sizes):
    groups = metrics.popularity_groups(np.arange(n_positive, 0, -1))
    assert np.bincount(groups).tolist() == sizes
    assert (np.diff(groups) >= 0).all()


def test_fairness_by_hand():
    groups = np.array([0, 0, 1, 1])
    assert metrics.group_shares([3, 1, 0, 4], groups).tolist() == [0.5, 0.5]
    gu = metrics.group_unfairness([6, 2, 2, 0], [2, 2, 3, 1], groups)
    np.testing.assert_allclose(gu, [0.3, -0.3])
    assert metrics.dgu(gu) == pytest.approx(0.6) and metrics.mgu(gu) == pytest.approx(0.3)
    assert metrics.dgu(metrics.group_unfairness([20, 20, 30, 10], [2, 2, 3, 1], groups)) == pytest.approx(0)
    assert metrics.arp([3, 1], [10, 2]) == 8


def test_diversity_by_hand():
    exposure = metrics.exposure_of([[0, 1], [0, -1]], 3)
    assert exposure.tolist() == [2, 1, 0]
    words = metrics.word_counts(exposure, ["star wars", "star", "alien"])
    assert sorted(words) == [0, 2, 3]
    assert metrics.word_entropy_bits(words) == pytest.approx(-0.4 * math.log2(0.4) - 0.6 * math.log2(0.6))
    assert metrics.type_token_ratio(words) == 0.4
    assert metrics.distinct(exposure) == 2 and metrics.coverage(exposure) == pytest.approx(2 / 3)


def test_extremes():
    assert metrics.gini(np.full(7, 3)) == pytest.approx(0)
    assert metrics.gini([0, 0, 5, 0]) == pytest.approx(3 / 4)
    assert metrics.word_entropy_bits(np.full(8, 2)) == pytest.approx(3)
    assert metrics.word_entropy_bits([5, 0]) == 0


@pytest.fixture
def shop():
    """Counts and titles of 160 leaves, and a function that draws lists in proportion to count^power."""
    n_leaves, rng = 160, np.random.default_rng(0)
    counts = np.maximum(1, 400 // np.arange(1, n_leaves + 1))
    titles = [f"w{i % 31} x{i % 7} y{i}" for i in range(n_leaves)]

    def draw(power: float, n_users: int = 120) -> np.ndarray:
        noise = rng.gumbel(size=(n_users, n_leaves))
        return np.argsort(-(power * np.log(counts) + noise), axis=1)[:, :10]

    return counts, titles, draw


def test_popularity_only_is_more_concentrated_than_random(shop):
    counts, titles, draw = shop
    targets = np.zeros(120, dtype=int)
    popular, prior, random = (metrics.evaluate(lists, targets, counts, titles, n_bootstrap=0)
                              for lists in (np.tile(np.arange(10), (120, 1)), draw(1.0), draw(0.0)))
    for name in ("gini", "arp"):
        assert popular[name] > prior[name] > random[name]
    for name in ("coverage", "distinct", "h_bits", "ttr"):
        assert popular[name] < prior[name] < random[name]
    assert popular["dgu"] > prior["dgu"] < random["dgu"]  # both extremes are unfair, the prior is nearly fair


def test_intervals_shrink_with_users(shop):
    counts, titles, draw = shop
    few, many = (metrics.evaluate(draw(1.0, n), np.arange(n) % 40, counts, titles, n_bootstrap=200) for n in (60, 960))
    for name in ("hr@10", "ndcg@10", "dgu", "arp", "h_bits", "ttr", "gini"):
        assert many[f"{name}_hi"] - many[f"{name}_lo"] < 0.6 * (few[f"{name}_hi"] - few[f"{name}_lo"]), name


def test_intervals_have_the_spread_of_fresh_users_where_percentiles_would_miss_the_value(shop):
    counts, titles, draw = shop
    targets = np.arange(120) % 40
    fresh = [metrics.evaluate(draw(1.5), targets, counts, titles, n_bootstrap=0) for _ in range(100)]
    lists = draw(1.5)
    one = metrics.evaluate(lists, targets, counts, titles, n_bootstrap=300)
    for name, low in (("hr@10", 0.6), ("dgu", 0.6), ("h_bits", 0.6), ("distinct", 0.7), ("ttr", 0.7), ("gini", 0.6)):
        error = (one[f"{name}_hi"] - one[f"{name}_lo"]) / 3.92
        assert low < error / np.std([f[name] for f in fresh]) < 2, name
    rng = np.random.default_rng(1)
    resampled = [metrics.distinct(metrics.exposure_of(lists[rng.integers(120, size=120)], 160)) for _ in range(200)]
    assert np.percentile(resampled, 97.5) < one["distinct"]


def test_paired_comparison(shop):
    counts, titles, draw = shop
    targets = np.arange(120) % 40
    a, b = draw(1.0), draw(1.8)
    forth = metrics.compare(a, b, targets, counts, titles, n_bootstrap=200)
    back = metrics.compare(b, a, targets, counts, titles, n_bootstrap=200)
    points = [metrics.evaluate(x, targets, counts, titles, n_bootstrap=0) for x in (a, b)]
    for name, (difference, lo, hi, p) in forth.items():
        assert difference == pytest.approx(points[1][name] - points[0][name])
        assert lo <= difference <= hi and ((lo <= 0 <= hi) == (p > 0.05) or 0.02 < p < 0.1)
        np.testing.assert_allclose(back[name], (-difference, -hi, -lo, p), atol=1e-12)
    assert forth["gini"][1] > 0 and forth["distinct"][2] < 0
    same = metrics.compare(a, a, targets, counts, titles, n_bootstrap=50)
    assert {p for *_, p in same.values()} == {1.0} and min(p for *_, p in forth.values()) >= 2 / 201

    b = a.copy()
    b[:5, 9] = -1  # nearly the same lists: the paired interval is far narrower than one method's own
    alone = metrics.evaluate(a, targets, counts, titles, n_bootstrap=200)
    _, lo, hi, _ = metrics.compare(a, b, targets, counts, titles, n_bootstrap=200)["arp"]
    assert hi - lo < 0.3 * (alone["arp_hi"] - alone["arp_lo"])


def test_same_seed_same_interval_and_order_of_users_does_not_matter(shop):
    counts, titles, draw = shop
    lists, targets = draw(1.0), np.arange(120) % 40
    first = metrics.evaluate(lists, targets, counts, titles, n_bootstrap=50, seed=3)
    assert first == metrics.evaluate(lists, targets, counts, titles, n_bootstrap=50, seed=3)
    flipped = metrics.evaluate(lists[::-1], targets[::-1], counts, titles, n_bootstrap=0)
    assert flipped == pytest.approx({name: first[name] for name in flipped})


@pytest.mark.parametrize("change, message", [
    ({"recommendations": [[0, 8], [1, 2]]}, "recommendations must be integers from -1 to 7"),
    ({"recommendations": [[0, -2], [1, 2]]}, "from -1"),
    ({"recommendations": [[0.0, 1.0], [1.0, 2.0]]}, "integers"),
    ({"recommendations": [0, 1]}, "need"),
    ({"recommendations": [[0, 0], [1, 2]]}, "twice"),
    ({"recommendations": [[0, 1], [-1, -1]]}, "user 1 has no recommendation"),
    ({"targets": [0, 1, 2]}, "need"),
    ({"targets": [0, -1]}, "from 0"),
    ({"targets": [0, 8]}, "targets"),
    ({"counts": [0] * 8}, "positive sum"),
    ({"counts": [1, -1] * 4}, ">= 0"),
    ({"counts": [1.0, math.nan] * 4}, "counts"),
    ({"counts": [1] * 7 + [0]}, "8 popularity groups"),
    ({"counts": [1] * 9}, "titles"),
    ({"titles": [" "] + TITLES[1:]}, "leaf 0 has an empty title"),
    ({"ks": (1, 3)}, "between 1 and the lists' 2"),
    ({"recommendations": [[0, 1]], "targets": [0]}, "two users"),
])
def test_bad_input(change, message):
    good = {"recommendations": [[0, 1], [1, 2]], "targets": [0, 1], "counts": [1] * 8, "titles": TITLES, "ks": (1, 2)}
    metrics.evaluate(**good, n_bootstrap=5)
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(**(good | change), n_bootstrap=5)


def test_bad_input_of_the_parts():
    with pytest.raises(ValueError, match="not one of 3"):
        metrics.exposure_of([[3]], 3)
    with pytest.raises(ValueError, match="all zero"):
        metrics.gini([0, 0])
    with pytest.raises(ValueError, match="amounts"):
        metrics.group_shares([0, 0], [0, 1])
    with pytest.raises(ValueError, match="n_bootstrap"):
        metrics.compare([[0]], [[1]], [0], [1], ["a"], n_bootstrap=0)


def test_divergences_by_hand_and_their_bounds():
    half, skewed = np.log([0.5, 0.5]), np.log([0.75, 0.25]) + 3.0  # a constant added changes nothing
    found = metrics.divergences(half, skewed)
    assert found["kl_target_model"] == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))
    assert found["kl_model_target"] == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert found["entropy_target"] == pytest.approx(np.log(2))
    assert 0 < found["js"] < np.log(2)
    assert metrics.divergences(half, half)["js"] == metrics.divergences(skewed, skewed)["kl_model_target"] == 0
    far = metrics.divergences(np.log([1 - 1e-300, 1e-300]), np.log([1e-300, 1 - 1e-300]))
    assert far["js"] == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match="finite logarithms"):
        metrics.divergences([0.0, -np.inf], half)


def test_draws_are_compared_as_the_paper_does():
    found = metrics.sampled_divergences([3, 1, 0], np.log([0.5, 0.25, 0.25]))
    expected = 0.5 * np.log(0.5 / 0.75) + 0.25 * np.log(0.25 / 0.25) + 0.25 * np.log(0.25 / 2.2204e-16)
    assert found["kl_target_model"] == pytest.approx(expected, rel=1e-4)


def test_simulated_draws_agree_with_real_ones():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.full(6, 20.0))
    simulated = metrics.sampled_kl(np.log(q), np.log(p), 500, replicates=2000)
    real = [metrics.sampled_divergences(rng.multinomial(500, q), np.log(p))["kl_target_model"] for _ in range(500)]
    assert simulated.shape == (2000,) and np.mean(real) == pytest.approx(simulated.mean(), rel=0.05)
    exact = metrics.divergences(np.log(p), np.log(q))["kl_target_model"]
    assert metrics.sampled_kl(np.log(q), np.log(p), 10**7).mean() == pytest.approx(exact, rel=1e-2)


def test_the_divergence_of_titles_is_the_sum_over_the_nodes():
    trie = TitleTrie.from_sequences([[1, 2, 0], [1, 0], [3, 4, 5, 0], [3, 4, 0], [6, 0]])
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, generator=generator).double()
    edges = trie.renormalised(torch.randn(trie.n_nodes, generator=generator).double())
    reach = trie.log_flows(rewards) - rewards.logsumexp(0)
    nodes = metrics.node_divergences(reach, edges, trie.parent)
    whole = metrics.divergences(reach[trie.leaves], trie.log_leaf_probs(edges))["kl_target_model"]
    assert nodes.sum() == pytest.approx(whole) and (nodes >= -1e-12).all() and (nodes[trie.leaves] == 0).all()
    _, children = trie.children(torch.tensor([0]))
    first = reach[children].exp() * (reach[children] - edges[children])
    assert nodes[0] == pytest.approx(float(first.sum()))


def test_the_next_choices_themselves_follow_the_next_choices(shop):
    counts, titles, draw = shop
    targets = draw(1.0)[:, 0]
    oracle = metrics.evaluate(targets[:, None], targets, counts, titles, ks=(1,), n_bootstrap=50)
    assert oracle["hr@1"] == 1 and oracle["top_vs_next"] == oracle["mgu_next"] == oracle["mgu_next_hi"] == 0
    assert oracle["dgu"] > 0  # chance alone


def test_accuracy_by_the_popularity_of_the_next_title():
    counts = [9, 8, 3, 2, 0]
    found = metrics.accuracy_by_group([[0, 1], [2, 3], [0, 4], [4, 1]], [1, 2, 0, 4], counts, k=2, n_groups=2)
    assert found.group.tolist() == [0, 1, "cold"] and found.n_users.tolist() == [2, 1, 1]
    assert found.hr.tolist() == [1.0, 1.0, 1.0]
    none = metrics.accuracy_by_group([[1, 0]], [0], counts, k=1, n_groups=2)
    assert none.hr.tolist()[0] == 0 and none.hr[1:].isna().all()
    with pytest.raises(ValueError, match="k must lie between 1 and the lists' 2 places"):
        metrics.accuracy_by_group([[0, 1]], [0], counts, k=3, n_groups=2)


def test_exposure_by_name():
    assert metrics.exposure_by_name(["b", "b"], ["a", "b"]).tolist() == [0, 2]
    with pytest.raises(ValueError, match="1 titles are not in the catalogue, such as 'c'"):
        metrics.exposure_by_name(["b", "c"], ["a", "b"])


def test_shares_do_not_leave_their_range_with_two_trainings(shop):
    counts, titles, _ = shop
    targets = np.arange(120) % 40
    right = np.argsort(np.arange(160) != targets[:, None], axis=1, kind="stable")[:, :10]
    nearly = right.copy()
    nearly[:10] = np.arange(140, 150)
    both = metrics.evaluate([right, nearly], targets, counts, titles, n_bootstrap=300)
    assert max(both[f"{name}@10_hi"] for name in ("hr", "ndcg")) == 1
    for wrong in ({"slots": 0}, {"slots": -1}, {"ks": ()}):
        with pytest.raises(ValueError, match="one k at least, and slots above 0"):
            metrics.evaluate(right, targets, counts, titles, n_bootstrap=0, **wrong)


def test_trainings_are_averaged_and_widen_the_intervals(shop):
    counts, titles, draw = shop
    targets, lists = np.arange(120) % 40, [draw(power) for power in (0.8, 1.0, 1.6)]
    alone = [metrics.evaluate(one, targets, counts, titles, n_bootstrap=300) for one in lists]
    of_all = metrics.evaluate(lists, targets, counts, titles, n_bootstrap=300)
    same = metrics.evaluate([lists[1]] * 3, targets, counts, titles, n_bootstrap=300)
    for name in alone[0]:
        if not name.endswith(("_lo", "_hi")):
            assert of_all[name] == pytest.approx(np.mean([one[name] for one in alone]), abs=1e-12)
            assert same[name] == pytest.approx(alone[1][name], abs=1e-12)
    for name in ("dgu", "top_vs_history", "arp", "h_bits", "gini"):
        wide, narrow, one = (x[f"{name}_hi"] - x[f"{name}_lo"] for x in (of_all, same, alone[1]))
        assert wide > 2 * narrow and narrow == pytest.approx(one, rel=0.2), name  # no spread of trainings adds nothing
    one, many = metrics.compare(lists[0], lists, targets, counts, titles), metrics.compare(lists, lists[0], targets, counts, titles)
    np.testing.assert_allclose(one["gini"][:3], np.multiply(many["gini"], -1)[[0, 2, 1]])
    assert one["gini"][3] == many["gini"][3]
    with pytest.raises(ValueError, match="3 and 2 trainings"):
        metrics.compare(lists, lists[:2], targets, counts, titles)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Over users and over trainings whose taste for the popular varies: 200 worlds of three trainings, 150 users."""
    rng, n_users, n_leaves = np.random.default_rng(0), 150, 48
    counts, titles = np.maximum(1, 400 // np.arange(1, n_leaves + 1)), [f"t{i}" for i in range(n_leaves)]
    own = rng.normal(size=(4000, n_leaves))  # what users like

    def lists(users, power):
        return np.argsort(-(power * np.log(counts) + own[users] + rng.gumbel(size=(len(users), n_leaves))), 1)[:, :5]

    powers = rng.normal(0.8, 0.15, 400)
    everybody, targets = np.arange(len(own)), lists(np.arange(len(own)), 0.9)[:, 0]
    truth = [metrics.evaluate(lists(everybody, p), targets, counts, titles, (5,), n_bootstrap=0) for p in powers]
    truth = {name: np.mean([one[name] for one in truth]) for name in ("hr@5", "dgu", "top_vs_next", "mgu_next", "arp")}
    held = dict.fromkeys(truth, 0)
    for world in range(200):
        users = rng.integers(len(own), size=n_users)
        trained = [lists(users, p) for p in rng.normal(0.8, 0.15, 3)]
        got = metrics.evaluate(trained, targets[users], counts, titles, (5,), n_bootstrap=200, seed=world)
        for name, value in truth.items():
            held[name] += got[f"{name}_lo"] <= value <= got[f"{name}_hi"]
    print(held)
    assert all(0.85 <= n / 200 <= 1 for n in held.values()), held


def test_holm_by_hand():
    assert metrics.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.5, 0.9]).tolist() == [1.0, 1.0]


def test_slots_counts_the_first_places_for_all_but_accuracy(shop):
    counts, titles, draw = shop
    lists, targets = draw(1.0), np.arange(120) % 40
    both = metrics.evaluate(lists, targets, counts, titles, ks=(3, 10), slots=3, n_bootstrap=50)
    short, long = (metrics.evaluate(lists[:, :k], targets, counts, titles, ks=(3,), n_bootstrap=50) for k in (3, 10))
    for name in ("dgu", "dgu_lo", "aplt", "h_bits", "h_bits_hi", "distinct", "hr@3", "ndcg@3_hi"):
        assert both[name] == short[name]
    assert both["hr@10"] == metrics.evaluate(lists, targets, counts, titles, n_bootstrap=0)["hr@10"]
    assert long["dgu"] != short["dgu"]


def test_the_tail_holds_its_share_of_the_interactions():
    assert metrics.tail([50, 30, 10, 6, 4]).tolist() == [False, False, True, True, True]
    assert metrics.aplt([0, 0, 1, 0, 3], [50, 30, 10, 6, 4]) == 1
    assert metrics.aplt([1, 1, 1, 1, 0], [97, 1, 1, 1, 0]) == 0.75


def test_a_row_for_every_filled_slot():
    table = metrics.slot_table([[2, 0], [1, -1]], [0, 1], ["a", "b", "c"])
    assert table.values.tolist() == [[0, 1, "c", False], [0, 2, "a", True], [1, 1, "b", True]]
