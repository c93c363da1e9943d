"""The trie against a plain set of prefixes: structure, flows, walking, masks, errors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib.trie import TitleTrie

from tiny_world import allowed_mask

END = 0
TOKENS = (1, 2, 49_151, 2**31 - 1)  # few, so that titles share beginnings; up to the largest

prove = settings(max_examples=60, deadline=None, derandomize=True)
titles = st.lists(st.sampled_from(TOKENS), max_size=4)  # [] is the empty title: its terminator alone
catalogues = st.lists(titles, min_size=1, max_size=12).map(lambda c: [[*t, END] for t in c])
encoded_texts = st.lists(st.text(max_size=6), min_size=1, max_size=10).map(
    lambda texts: [[1 + byte for byte in text.encode("utf-8")] + [END] for text in texts]
)
any_catalogue = catalogues | encoded_texts


@st.composite
def rewarded(draw, rewards=st.floats(1e-3, 1e3)):
    catalogue = draw(any_catalogue)
    return catalogue, draw(st.lists(rewards, min_size=len(catalogue), max_size=len(catalogue)))


def prefixes_in_order(catalogue):
    """Every prefix of every sequence, by length and then by token: the breadth-first order, without a tree."""
    prefixes = {tuple(sequence[:n]) for sequence in catalogue for n in range(len(sequence) + 1)}
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def log_fraction(value):
    """log of an exact fraction, in nats; also where it would overflow or underflow a float."""
    return math.log(value.numerator) - math.log(value.denominator)


def naive_log_flows(catalogue, rewards):
    """log F by exact sums: for every prefix, all the items that begin with it."""
    return [
        log_fraction(sum(Fraction(r) for s, r in zip(catalogue, rewards, strict=True) if tuple(s[: len(p)]) == p))
        for p in prefixes_in_order(catalogue)
    ]


def log64(rewards):
    return torch.tensor(rewards, dtype=torch.float64).log()


def padded(catalogue, extra=0):
    rows = np.full((len(catalogue), max(map(len, catalogue)) + extra), -1)
    for row, sequence in zip(rows, catalogue, strict=True):
        row[: len(sequence)] = sequence
    return rows


# structure


@prove
@given(any_catalogue)
def test_a_node_forks_where_several_titles_go_on_from_it(catalogue):
    distinct = {tuple(sequence) for sequence in catalogue}
    several = [sum(s[: len(p)] == p for s in distinct) > 1 for p in prefixes_in_order(catalogue)]
    assert TitleTrie.from_sequences(catalogue).forks.tolist() == several


def walk(catalogue):
    """Every prefix as a walk depth first enters it, children by token; and how many prefixes begin with it."""
    prefixes = prefixes_in_order(catalogue)
    return sorted(prefixes), [sum(q[: len(p)] == p for q in prefixes) for p in prefixes]


@prove
@given(any_catalogue)
def test_depth_first_is_a_walk_that_enters_each_node_once(catalogue):
    trie, prefixes = TitleTrie.from_sequences(catalogue), prefixes_in_order(catalogue)
    entered, sizes = walk(catalogue)  # sorted by token, a prefix stands before all that goes on from it
    enter, leave = trie.depth_first
    assert enter.dtype == leave.dtype == torch.int32
    assert enter.tolist() == [entered.index(p) for p in prefixes]
    assert (leave - enter).tolist() == sizes


@prove
@given(any_catalogue)
def test_inner_nodes_are_those_with_children_depth_first(catalogue):
    trie, prefixes = TitleTrie.from_sequences(catalogue), prefixes_in_order(catalogue)
    whole = {tuple(sequence) for sequence in catalogue}
    expected = [prefixes.index(p) for p in sorted(prefixes) if p and p not in whole]
    assert trie.inner.tolist() == expected


@prove
@given(any_catalogue, st.data())
def test_on_path_says_which_prefixes_begin_which(catalogue, data):
    """Two batches with leading dimensions of their own; -1 is on no path and has none."""
    trie, prefixes = TitleTrie.from_sequences(catalogue), prefixes_in_order(catalogue)
    nodes = st.integers(-1, trie.n_nodes - 1)
    n_above, n_below = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    above = torch.tensor(data.draw(st.lists(nodes, min_size=2 * n_above, max_size=2 * n_above))).view(2, n_above)
    below = torch.tensor(data.draw(st.lists(nodes, min_size=2 * n_below, max_size=2 * n_below))).view(2, n_below)
    found = trie.on_path(above, below)
    assert found.shape == (2, n_below, n_above) and found.dtype == torch.bool
    for row in range(2):
        for i, low in enumerate(below[row].tolist()):
            for j, high in enumerate(above[row].tolist()):
                begins = low >= 0 and high >= 0 and prefixes[low][: len(prefixes[high])] == prefixes[high]
                assert bool(found[row, i, j]) == begins
    assert trie.on_path(above[0], below[0]).equal(found[0])
    everything = torch.arange(trie.n_nodes)
    assert trie.on_path(everything, everything).sum(-1).equal(trie.depth + 1)  # itself and all above it, the root too


@prove
@given(any_catalogue, st.integers(0, 2**31))
def test_sums_along_titles_and_under_the_mask(catalogue, seed):
    """log_leaf_probs adds the edges of each title; renormalised makes siblings add up to one."""
    trie, prefixes = TitleTrie.from_sequences(catalogue), prefixes_in_order(catalogue)
    edges = torch.randn(trie.n_nodes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    number = {prefix: node for node, prefix in enumerate(prefixes)}
    titles = dict.fromkeys(map(tuple, catalogue))
    expected = [sum(float(edges[number[t[: n + 1]]]) for n in range(len(t))) for t in titles]
    assert trie.log_leaf_probs(edges).tolist() == pytest.approx(expected)
    inside = trie.renormalised(edges)
    for node, prefix in enumerate(prefixes[1:], start=1):
        siblings = [edges[number[p]] for p in prefixes if p and p[:-1] == prefix[:-1]]
        assert float(inside[node]) == pytest.approx(float(edges[node] - torch.stack(siblings).logsumexp(0)), abs=1e-12)
    assert float(trie.log_leaf_probs(torch.cat([torch.zeros(1), inside[1:]])).exp().sum()) == pytest.approx(1)


def test_a_walk_by_hand():
    trie = TitleTrie.from_sequences([[5, END], [5, 6, END], [7, END]])
    enter, leave = trie.depth_first  # root, 5, 7, 5⊤, 56, 7⊤, 56⊤
    assert enter.tolist() == [0, 1, 5, 2, 3, 6, 4]
    assert leave.tolist() == [7, 5, 7, 3, 5, 7, 5]
    assert trie.inner.tolist() == [1, 4, 2]
    assert trie.forks.tolist() == [True, True, False, False, False, False, False]
    sees = trie.on_path(torch.tensor([0, 1, 4]), torch.tensor([6, 5]))
    assert sees.tolist() == [[True, True, True], [True, False, False]]


@prove
@given(any_catalogue)
def test_the_deepest_node_below_each(catalogue):
    longest = [max(len(s) for s in catalogue if tuple(s[: len(p)]) == p) for p in prefixes_in_order(catalogue)]
    assert TitleTrie.from_sequences(catalogue).deepest.tolist() == longest


@prove
@given(any_catalogue)
def test_nodes_are_the_prefixes_breadth_first(catalogue):
    trie, prefixes = TitleTrie.from_sequences(catalogue), prefixes_in_order(catalogue)
    number = {prefix: node for node, prefix in enumerate(prefixes)}
    assert trie.n_nodes == len(prefixes)
    assert trie.n_items == len(catalogue)
    assert trie.max_depth == max(map(len, catalogue))
    assert trie.depth.tolist() == [len(p) for p in prefixes]
    assert trie.token.tolist() == [p[-1] if p else -1 for p in prefixes]
    assert trie.parent.tolist() == [number[p[:-1]] if p else -1 for p in prefixes]
    assert trie.leaf.tolist() == [number[tuple(s)] for s in catalogue]


@prove
@given(any_catalogue)
def test_parents_come_first_and_siblings_side_by_side(catalogue):
    trie = TitleTrie.from_sequences(catalogue)
    assert (trie.parent[1:] < torch.arange(1, trie.n_nodes)).all()
    assert (trie.parent.diff() >= 0).all() and (trie.depth.diff() >= 0).all()
    for node in range(trie.n_nodes):
        inside = range(int(trie.child_start[node]), int(trie.child_start[node + 1]))
        assert list(inside) == (trie.parent == node).nonzero()[:, 0].tolist()
        tokens = trie.token[inside.start : inside.stop].tolist()
        assert tokens == sorted(set(tokens))


@prove
@given(any_catalogue)
def test_leaves_are_the_distinct_titles_by_first_item(catalogue):
    trie = TitleTrie.from_sequences(catalogue)
    distinct = list(dict.fromkeys(map(tuple, catalogue)))
    assert len(trie.leaves) == len(distinct)
    assert trie.item_leaf.tolist() == [distinct.index(tuple(s)) for s in catalogue]
    assert trie.leaves[trie.item_leaf].equal(trie.leaf)
    assert [int(i) for i in trie.node_leaf if i >= 0] == [int(trie.node_leaf[n]) for n in trie.leaves.sort().values]
    assert trie.node_leaf[trie.leaves].tolist() == list(range(len(distinct)))


@prove
@given(any_catalogue, st.integers(0, 3))
def test_lists_arrays_and_tensors_give_the_same_tree(catalogue, extra):
    expected = TitleTrie.from_sequences(catalogue)
    rows = padded(catalogue, extra)
    for given_as in (rows, rows.astype(np.int32), torch.from_numpy(rows), [tuple(s) for s in catalogue]):
        trie = TitleTrie.from_sequences(given_as)
        for name in ("parent", "token", "depth", "leaf", "child_start"):
            assert getattr(trie, name).equal(getattr(expected, name))
            assert getattr(trie, name).dtype == torch.int64


@prove
@given(any_catalogue, st.randoms(use_true_random=False))
def test_the_tree_does_not_depend_on_the_order_of_the_items(catalogue, random):
    order = random.sample(range(len(catalogue)), len(catalogue))
    trie, shuffled = TitleTrie.from_sequences(catalogue), TitleTrie.from_sequences([catalogue[i] for i in order])
    assert trie.parent.equal(shuffled.parent) and trie.token.equal(shuffled.token)
    assert trie.leaf[order].equal(shuffled.leaf)


def test_long_titles_need_more_than_one_sort_key():
    rng = np.random.default_rng(0)
    catalogue = [[*rng.integers(1, 50_000, 3), *rng.choice([3, 40_000], 20), END] for _ in range(40)]
    catalogue = [[int(t) for t in s] for s in catalogue] * 2
    trie = TitleTrie.from_sequences(catalogue)
    assert trie.token.tolist() == [p[-1] if p else -1 for p in prefixes_in_order(catalogue)]
    assert len(trie.leaves) == 40


def test_by_hand():
    trie = TitleTrie.from_sequences([[5, END], [5, 6, END], [7, END], [5, END]])
    assert trie.parent.tolist() == [-1, 0, 0, 1, 1, 2, 4]
    assert trie.token.tolist() == [-1, 5, 7, END, 6, END, END]
    assert trie.depth.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert trie.leaf.tolist() == [3, 6, 5, 3]
    assert trie.child_start.tolist() == [1, 3, 5, 6, 6, 7, 7, 7]
    assert trie.leaves.tolist() == [3, 6, 5]
    assert trie.log_flows(log64([1, 2, 4, 8])).exp().tolist() == pytest.approx([15, 11, 4, 9, 2, 4, 2])


@pytest.mark.parametrize("sequence", [[END], [3, END], [3, 4, 5, END]])
def test_a_catalogue_of_one_is_certain(sequence):
    trie = TitleTrie.from_sequences([sequence])
    assert trie.n_nodes == len(sequence) + 1
    assert trie.log_token_rewards(log64([0.3])).eq(0).all()
    assert trie.log_flows(log64([0.3])).exp().tolist() == pytest.approx([0.3] * trie.n_nodes)


def test_to_keeps_the_tree():
    trie = TitleTrie.from_sequences([[5, END], [5, 6, END]])
    moved = trie.to("cpu")
    assert moved.parent.equal(trie.parent) and moved.child_start.equal(trie.child_start)


# flows and token rewards


@prove
@given(rewarded(st.floats(1e-300, 1e300)))
def test_flows_are_exact_sums_over_six_hundred_orders_of_magnitude(case):
    catalogue, rewards = case
    flows = TitleTrie.from_sequences(catalogue).log_flows(log64(rewards))
    assert flows.dtype == torch.float64
    assert flows.tolist() == pytest.approx(naive_log_flows(catalogue, rewards), rel=1e-13, abs=1e-12)


@prove
@given(rewarded())
def test_flow_is_conserved_at_every_node(case):
    catalogue, rewards = case
    trie = TitleTrie.from_sequences(catalogue)
    flow = trie.log_flows(log64(rewards)).exp()
    for node in range(trie.n_nodes):
        out = sum(float(flow[c]) for c in range(trie.child_start[node], trie.child_start[node + 1]))
        own = sum(r for leaf, r in zip(trie.leaf.tolist(), rewards, strict=True) if leaf == node)
        assert float(flow[node]) == pytest.approx(out + own, rel=1e-12)
    assert float(flow[0]) == pytest.approx(sum(rewards), rel=1e-12)


@prove
@given(rewarded(st.floats(1e-300, 1e300)))
def test_token_rewards_along_a_title_telescope(case):
    catalogue, rewards = case
    trie = TitleTrie.from_sequences(catalogue)
    r = trie.log_token_rewards(log64(rewards))
    assert r[0] == 0 and (r <= 1e-12).all()
    total = sum(map(Fraction, rewards))
    for sequence, leaf in zip(catalogue, trie.leaf.tolist(), strict=True):
        share = sum(Fraction(x) for s, x in zip(catalogue, rewards, strict=True) if s == sequence) / total
        product, node = 0.0, leaf
        while node > 0:
            product, node = product + float(r[node]), int(trie.parent[node])
        assert product == pytest.approx(log_fraction(share), rel=1e-12, abs=1e-11)


@prove
@given(rewarded())
def test_token_rewards_of_siblings_add_up_to_one(case):
    catalogue, rewards = case
    trie = TitleTrie.from_sequences(catalogue)
    r = trie.log_token_rewards(log64(rewards)).exp()
    sums = torch.zeros(trie.n_nodes, dtype=torch.float64).index_add(0, trie.parent[1:], r[1:])
    inner = trie.child_start[1:] > trie.child_start[:-1]
    torch.testing.assert_close(sums[inner], torch.ones_like(sums[inner]), rtol=1e-12, atol=0)


@prove
@given(any_catalogue, st.integers(1, 3), st.integers(0, 2**31))
def test_batched_rewards_equal_one_by_one(catalogue, n, seed):
    trie = TitleTrie.from_sequences(catalogue)
    rewards = torch.randn(n, 2, len(catalogue), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9
    flows, r = trie.log_flows(rewards), trie.log_token_rewards(rewards)
    assert flows.shape == r.shape == (n, 2, trie.n_nodes)
    for i in range(n):
        for j in range(2):
            torch.testing.assert_close(flows[i, j], trie.log_flows(rewards[i, j]), rtol=1e-14, atol=0)
            torch.testing.assert_close(r[i, j], trie.log_token_rewards(rewards[i, j]), rtol=1e-14, atol=1e-14)


@prove
@given(rewarded(), st.data())
def test_minus_infinity_takes_an_item_out(case, data):
    catalogue, rewards = case
    out = data.draw(st.integers(0, len(catalogue) - 1))
    trie, log_r = TitleTrie.from_sequences(catalogue), log64(rewards)
    log_r[out] = -torch.inf
    flow = trie.log_flows(log_r).exp()
    left = [0.0 if i == out else r for i, r in enumerate(rewards)]
    for node, prefix in enumerate(prefixes_in_order(catalogue)):
        below = sum(r for s, r in zip(catalogue, left, strict=True) if tuple(s[: len(prefix)]) == prefix)
        assert float(flow[node]) == pytest.approx(below, rel=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(titles, min_size=1, max_size=5).map(lambda c: [[*t, END] for t in c]), st.integers(0, 2**31))
def test_gradients_of_flows_and_token_rewards(catalogue, seed):
    trie = TitleTrie.from_sequences(catalogue)
    rewards = torch.randn(2, len(catalogue), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rewards.requires_grad_()
    assert torch.autograd.gradcheck(trie.log_flows, rewards)
    assert torch.autograd.gradcheck(trie.log_token_rewards, rewards)


@prove
@given(rewarded(st.floats(1e-300, 1e300)))
def test_the_gradient_of_log_z_is_the_share_of_each_item(case):
    catalogue, rewards = case
    log_r = log64(rewards).requires_grad_()
    trie = TitleTrie.from_sequences(catalogue)
    trie.log_flows(log_r)[0].backward()
    torch.testing.assert_close(log_r.grad, log_r.detach().softmax(-1), rtol=1e-9, atol=1e-300)


# walking


@prove
@given(any_catalogue, st.data())
def test_advance_walks_like_a_dictionary(catalogue, data):
    trie, prefixes = TitleTrie.from_sequences(catalogue), prefixes_in_order(catalogue)
    number = {prefix: node for node, prefix in enumerate(prefixes)}
    inside = sorted({t for s in catalogue for t in s})
    token = st.sampled_from(inside) | st.sampled_from([-1, -5, -(2**62), 3, 60_000, 2**40, 2**62, 2**63 - 1])
    pairs = data.draw(st.lists(st.tuples(st.integers(-1, trie.n_nodes - 1), token), min_size=1, max_size=20))
    nodes, tokens = torch.tensor(pairs).T
    expected = [number.get((*prefixes[n], t), -1) if n >= 0 else -1 for n, t in pairs]
    assert trie.advance(nodes, tokens).tolist() == expected


@prove
@given(any_catalogue)
def test_advancing_along_a_title_ends_at_its_leaf_and_then_falls_off(catalogue):
    trie, rows = TitleTrie.from_sequences(catalogue), torch.from_numpy(padded(catalogue, extra=1))
    nodes = torch.zeros(len(catalogue), dtype=torch.int64)
    for depth, column in enumerate(rows.T):
        ended = torch.tensor([len(s) for s in catalogue]) == depth
        assert nodes[ended].equal(trie.leaf[ended])
        for token in (END, *TOKENS):
            assert (trie.advance(nodes[ended], torch.full_like(nodes[ended], token)) == -1).all()
        nodes = trie.advance(nodes, column)
    assert (nodes == -1).all()


@prove
@given(any_catalogue, st.data())
def test_masks_and_children_are_the_continuations(catalogue, data):
    catalogue = [[t % 1000 for t in s] for s in catalogue]  # a mask is as wide as the vocabulary
    trie, prefixes = TitleTrie.from_sequences(catalogue), prefixes_in_order(catalogue)
    vocab_size = max(t for s in catalogue for t in s) + 1 + data.draw(st.integers(0, 2))
    nodes = data.draw(st.lists(st.integers(-1, trie.n_nodes - 1), min_size=1, max_size=6))
    mask = allowed_mask(trie, torch.tensor(nodes), vocab_size)
    assert mask.shape == (len(nodes), vocab_size) and mask.dtype == torch.bool
    rows, children = trie.children(torch.tensor(nodes))
    for i, node in enumerate(nodes):
        after = [m for m, p in enumerate(prefixes) if p and node >= 0 and p[:-1] == prefixes[node]]
        assert children[rows == i].tolist() == after
        assert mask[i].nonzero()[:, 0].tolist() == [prefixes[m][-1] for m in after]


def test_nothing_is_allowed_at_a_leaf_and_off_the_trie():
    trie = TitleTrie.from_sequences([[5, END], [5, 6, END]])
    assert not allowed_mask(trie, torch.tensor([*trie.leaves.tolist(), -1]), 8).any()
    assert allowed_mask(trie, torch.tensor([0, -1]), 8).sum(1).tolist() == [1, 0]


@prove
@given(any_catalogue)
def test_paths_are_the_prefixes_of_a_prefix(catalogue):
    trie, prefixes = TitleTrie.from_sequences(catalogue), prefixes_in_order(catalogue)
    number = {prefix: node for node, prefix in enumerate(prefixes)}
    paths = trie.paths(torch.arange(trie.n_nodes))
    assert paths.shape == (trie.n_nodes, trie.max_depth)
    for prefix, path in zip(prefixes, paths.tolist(), strict=True):
        way = [number[prefix[: n + 1]] for n in range(len(prefix))]
        assert path == way + [-1] * (trie.max_depth - len(way))
    assert trie.paths(torch.tensor([-1])).tolist() == [[-1] * trie.max_depth]


# errors


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "a trie needs at least one item"),
        (np.empty((0, 3), dtype=np.int64), "a trie needs at least one item"),
        ([[]], "the sequence of item 0 is empty"),
        ([[1, END], [], [2, END]], "the sequence of item 1 is empty"),
        (np.array([[1, 0], [-1, -1]]), "the sequence of item 1 is empty"),
        (np.empty((2, 0), dtype=np.int64), "the sequence of item 0 is empty"),
        ([[1, END], [2, -1, END]], "the sequence of item 1 holds a negative token"),
        (np.array([[1, 0, -1], [2, -1, 0]]), "item 1 is not padded with -1 on the right alone"),
        (np.array([[1, 0, -1], [2, 0, -7]]), "item 1 is not padded with -1 on the right alone"),
        ([[1, END], [1.5, END]], "tokens must be integers"),
        ([[1, END], [float("nan"), END]], "tokens must be integers"),
        ([[1, END], [2**31, END]], r"the sequence of item 1 holds a token of 2\^31 or more"),
        (np.array([[1, 0], [2**63 - 1, 0]]), r"the sequence of item 1 holds a token of 2\^31 or more"),
        ([[2**63, END]], "tokens must be integers"),
        ([["one", END]], "tokens must be integers"),
        ([["1", END]], "tokens must be integers"),
        ([[None, END]], "tokens must be integers"),
        (np.array([[1.0, 0.0]]), "must be a 2-D array of integers"),
        (np.array([1, 2]), "must be a 2-D array of integers"),
        (torch.tensor([[1.0, 0.0]]), "must be a 2-D array of integers"),
        ([[2, END], [1, 5], [1]], "item 2 is the beginning of another one: end each in a terminator"),
        ([[2, END], [1], [1], [1, 5]], "item 1 is the beginning of another one"),
    ],
)
def test_bad_catalogues_are_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        TitleTrie.from_sequences(sequences)


@pytest.mark.parametrize(
    ("log_rewards", "message"),
    [
        (torch.zeros(2), "2 rewards for 3 items"),
        (torch.zeros(3, 4), "4 rewards for 3 items"),
        (torch.tensor([0, torch.nan, torch.nan]), "the log reward of item 1 is NaN or infinite"),
        (torch.tensor([0, 0, torch.inf]), "the log reward of item 2 is NaN or infinite"),
        (torch.tensor([[0, 0, 0], [torch.nan, 0, 0]]), "the log reward of item 0 is NaN or infinite"),
    ],
)
def test_bad_log_rewards_are_refused(log_rewards, message):
    trie = TitleTrie.from_sequences([[1, END], [2, END], [3, END]])
    for function in (trie.log_flows, trie.log_token_rewards):
        with pytest.raises(ValueError, match=message):
            function(log_rewards)


def test_token_rewards_refuse_a_reward_of_zero_and_name_the_item():
    trie = TitleTrie.from_sequences([[1, 9], [2, 9]])
    with pytest.raises(ValueError, match="the reward of item 1 is zero"):
        trie.log_token_rewards(torch.tensor([0.0, -torch.inf]))
