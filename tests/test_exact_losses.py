"""The exact losses over a whole tree: against sums over titles, and at the policy where they must vanish."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib import losses
from flowerlib.trie import TitleTrie

prove = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def trees(draw):
    """A trie, float64 log rewards of its items, and log-probabilities of its edges with some mass off the trie."""
    titles = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=2, max_size=8))
    trie = TitleTrie.from_sequences([[*title, 0] for title in titles])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    log_rewards = torch.randn(trie.n_items, generator=generator, dtype=torch.float64)
    edges = trie.renormalised(torch.randn(trie.n_nodes, generator=generator, dtype=torch.float64))
    return trie, log_rewards, edges - torch.rand(trie.n_nodes, generator=generator, dtype=torch.float64)


@prove
@given(trees())
def test_exact_losses_equal_the_sums_over_titles(tree):
    trie, log_rewards, edges = tree
    log_reach, log_r = trie.log_flows(log_rewards) - log_rewards.logsumexp(0), trie.log_token_rewards(log_rewards)
    share = log_reach[trie.leaves].exp()
    expected = -(share * trie.log_leaf_probs(edges)).sum()  # the expectation of SFT over titles drawn from the target
    torch.testing.assert_close(losses.exact_cross_entropy(edges[1:], log_reach[1:]), expected)
    squared = 0.0
    for leaf, p in zip(trie.leaves, share):
        path = trie.paths(leaf[None])[0]
        path = path[path >= 0]
        squared += p * (edges[path] - log_r[path]).square().sum()
    torch.testing.assert_close(losses.exact_flow_loss(edges[1:], log_reach[1:], log_r[1:]), squared)
    inside = losses.exact_cross_entropy(trie.renormalised(edges)[1:], log_reach[1:])
    penalty = losses.off_trie_penalty(edges[1:], trie.parent[1:], log_reach)
    torch.testing.assert_close(inside + penalty, expected)


@prove
@given(trees())
def test_the_law_of_every_loss_at_the_exact_policy(tree):
    trie, log_rewards, edges = tree
    log_reach, log_r = trie.log_flows(log_rewards) - log_rewards.logsumexp(0), trie.log_token_rewards(log_rewards)
    path = trie.paths(trie.leaves)
    mask = path >= 0
    paths_r = log_r[path.clamp(min=0)]
    entropy = -(log_reach[trie.leaves].exp() * log_reach[trie.leaves]).sum()
    torch.testing.assert_close(losses.exact_cross_entropy(log_r[1:], log_reach[1:]), entropy)
    for zero in (
        losses.exact_flow_loss(log_r[1:], log_reach[1:], log_r[1:]),
        losses.off_trie_penalty(log_r[1:], trie.parent[1:], log_reach),
        losses.trajectory_balance_loss(paths_r, paths_r, mask),
    ):
        assert abs(zero) < 1e-9
    assert losses.exact_cross_entropy(edges[1:], log_reach[1:]) >= entropy - 1e-9
    d = torch.where(mask, edges[path.clamp(min=0)] - paths_r, 0)
    balance = losses.trajectory_balance_loss(edges[path.clamp(min=0)], paths_r, mask)
    torch.testing.assert_close(balance, torch.stack([row.sum() ** 2 for row in d]).mean())
    detailed = losses.subtb_loss(edges[path.clamp(min=0)], paths_r, mask, lam=0.0)
    torch.testing.assert_close(detailed, d[mask].square().mean())
