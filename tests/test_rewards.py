"""Item rewards: positive, merged by leaf, and conserved by the tree."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib.rewards import count_log_rewards, log_rewards, preference_log_rewards, tilted
from flowerlib.trie import TitleTrie

END = 0
prove = settings(max_examples=60, deadline=None, derandomize=True)
titles = st.lists(st.sampled_from([1, 2, 3]), max_size=3).map(lambda t: (*t, END))
counted = st.lists(st.tuples(titles, st.integers(0, 10_000)), min_size=1, max_size=12)
alphas = st.sampled_from([0.0, 0.5, 1.0, 1.5]) | st.floats(-2, 2)


@prove
@given(counted, alphas)
def test_leaves_get_their_merged_count_plus_one_to_the_alpha(items, alpha):
    catalogue, counts = zip(*items, strict=True)
    merged = defaultdict(int)
    for title, count in items:
        merged[title] += count
    trie = TitleTrie.from_sequences(catalogue)
    log_r = count_log_rewards(trie, torch.tensor(counts), alpha)
    flow = trie.log_flows(log_r)
    assert log_r.dtype == torch.float64 and log_r.shape == (trie.n_items,)
    for i, title in enumerate(catalogue):
        assert float(flow[trie.leaf[i]]) == pytest.approx(alpha * math.log(merged[title] + 1), abs=1e-12)
        assert float(log_r[i]) == pytest.approx(float(flow[trie.leaf[i]]) - math.log(catalogue.count(title)), abs=1e-12)
    log_z = math.log(sum((n + 1) ** alpha for n in merged.values()))
    assert float(flow[0]) == pytest.approx(log_z, abs=1e-12)


@prove
@given(counted)
def test_the_popular_are_never_drawn_less_and_alpha_flattens(items):
    merged = defaultdict(int)
    for title, count in items:
        merged[title] += count
    trie, counts = TitleTrie.from_sequences(list(merged)), torch.tensor(list(merged.values()))
    shares = [count_log_rewards(trie, counts, alpha).softmax(-1) for alpha in (1.0, 0.5, 0.0)]
    order = counts.argsort()
    for share in shares:
        assert (share[order].diff() >= -1e-12).all()
    highest = [float(share.max()) for share in shares]
    assert highest[0] >= highest[1] - 1e-12 >= highest[2] - 2e-12
    assert shares[2].tolist() == pytest.approx([1 / len(merged)] * len(merged))


def test_by_hand():
    trie = TitleTrie.from_sequences([[1, END], [1, 2, END], [3, END], [1, END]])
    counts = torch.tensor([2, 0, 7, 6])  # the first and the last are one title: 8 interactions
    assert count_log_rewards(trie, counts).exp().tolist() == pytest.approx([4.5, 1, 8, 4.5])
    assert count_log_rewards(trie, counts, alpha=0.5).exp().tolist() == pytest.approx([1.5, 1, 8**0.5, 1.5])
    assert count_log_rewards(trie, counts, alpha=0).exp().tolist() == pytest.approx([0.5, 1, 1, 0.5])


def test_counts_may_be_a_list_an_array_or_fractions():
    trie = TitleTrie.from_sequences([[1, END], [2, END]])
    expected = [math.log(3), math.log(1.5)]
    for counts in ([2, 0.5], np.array([2, 0.5]), torch.tensor([2, 0.5])):
        assert count_log_rewards(trie, counts).tolist() == pytest.approx(expected)


@prove
@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=8))
def test_log_rewards_are_float64_logarithms(rewards):
    expected = [math.log(r) for r in rewards]
    assert log_rewards(torch.tensor(rewards, dtype=torch.float64)).tolist() == pytest.approx(expected, rel=1e-14)
    assert log_rewards(torch.tensor([[1.0, 2.0]], dtype=torch.float32)).dtype == torch.float64


def test_gradient_of_log_rewards():
    rewards = torch.tensor([[0.5, 2.0, 7.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_rewards, rewards)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0, 0.0], "the reward of item 1 is 0; rewards must be positive and finite"),
        ([-2.0, 1.0], "the reward of item 0 is -2"),
        ([1.0, math.nan, 1.0], "the reward of item 1 is nan"),
        ([1.0, 1.0, math.inf], "the reward of item 2 is inf"),
        ([[1.0, 1.0], [1.0, 0.0]], "the reward of item 1 is 0"),
    ],
)
def test_bad_rewards_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        log_rewards(torch.tensor(rewards))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2], r"\(2,\) counts for 3 items"),
        ([[1, 2, 3]], r"\(1, 3\) counts for 3 items"),
        ([0, -1, 3], "the count of item 1 is -1; counts must be 0 or more, and finite"),
        ([math.nan, 0, 0], "the count of item 0 is nan"),
        ([0, 0, math.inf], "the count of item 2 is inf"),
    ],
)
def test_bad_counts_are_refused(counts, message):
    trie = TitleTrie.from_sequences([[1, END], [2, END], [3, END]])
    with pytest.raises(ValueError, match=message):
        count_log_rewards(trie, torch.tensor(counts))


@prove
@given(counted, st.floats(-2, 2), st.floats(0, 2), st.integers(0, 2**31))
def test_preference_rewards_are_conserved_for_every_user(items, alpha, beta, seed):
    """R(leaf|u) = (Σcount + 1)^α · p^β at the leaves, and every node's flow is the sum of its children's."""
    catalogue, counts = zip(*items, strict=True)
    trie = TitleTrie.from_sequences(catalogue)
    log_p = torch.randn(3, len(trie.leaves), generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)
    flows = trie.log_flows(preference_log_rewards(trie, count_log_rewards(trie, torch.tensor(counts), alpha), log_p, beta)).exp()
    merged = torch.zeros(len(trie.leaves), dtype=torch.double).index_add(0, trie.item_leaf, torch.tensor(counts).double())
    torch.testing.assert_close(flows[:, trie.leaves], (merged + 1) ** alpha * log_p.exp() ** beta)
    for node in range(trie.n_nodes):
        below = range(int(trie.child_start[node]), int(trie.child_start[node + 1]))
        if below:
            torch.testing.assert_close(flows[:, node], flows[:, below].sum(1))


def test_tilts_by_hand():
    log_r = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]).double()
    p = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]).double()
    leaf = torch.tensor([0, 1])
    s = torch.tensor([[(0.7 - 1 / 3) / 0.6 + 1], [(0.25 - 1 / 3) / 0.25 + 1]]).double()
    torch.testing.assert_close(tilted(log_r, p.log(), leaf, "div"), log_r / s)
    added = torch.tensor([[0.0], [math.log(1e-8)]]).double()
    torch.testing.assert_close(tilted(log_r, p.log(), leaf, "add", 0.5), log_r + 0.5 * added)
    flat = torch.full((2, 3), 1 / 3).double().log()
    for reward in ("div", "add"):  # a user who likes all titles alike tilts nothing
        torch.testing.assert_close(tilted(log_r, flat, leaf, reward), log_r)
    with pytest.raises(ValueError, match="choose div or add"):
        tilted(log_r, flat, leaf, "mul")


def test_smoothing_is_added_to_a_titles_count():
    trie = TitleTrie.from_sequences([[1, 0], [2, 0], [2, 0]])
    found = count_log_rewards(trie, torch.tensor([0.0, 3, 1]), alpha=2, smoothing=0.5).exp()
    torch.testing.assert_close(found, torch.tensor([0.25, 4.5**2 / 2, 4.5**2 / 2], dtype=torch.float64))
    with pytest.raises(ValueError, match="smoothing is 0"):
        count_log_rewards(trie, torch.ones(3), smoothing=0)
