"""The losses against double loops, at the policies where they must vanish, and under what must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from flowerlib.losses import (
    FLOOR_LOG_REWARD, FLOW_LOSSES, divergence_loss, flow_loss, modified_subtb_loss, sft_loss, subtb_loss,
    trajectory_balance_loss,
)
from flowerlib.trie import TitleTrie

END = 0
prove = settings(max_examples=50, deadline=None, derandomize=True)
lams = st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.7])
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(lengths, extra=0):
    return torch.arange(max(lengths) + extra) < torch.tensor(lengths)[:, None]


def batch_of(lengths, seed, extra=0):
    """Random inputs of both losses: log π, log π(⊤), log r, log r(⊤), and the mask."""
    mask = mask_of(lengths, extra)
    return [*(randn(*mask.shape, seed=seed + i) for i in range(4)), mask]


def plain_loss(log_pf, log_pterm, log_r, log_r_term, mask, lam):
    return subtb_loss(log_pf, log_r, mask, lam)


losses = pytest.mark.parametrize("loss", [plain_loss, modified_subtb_loss])


# against naive references


def naive_mean(rows, lam):
    """λ-weighted mean of the squared sums over every sub-path a < b of every row of steps."""
    total = weights = 0.0
    for steps in rows:
        for a in range(len(steps)):
            for b in range(a + 1, len(steps) + 1):
                weight = lam ** (b - a - 1)
                total += weight * sum(steps[a:b]) ** 2
                weights += weight
    return total / weights


def naive_subtb(log_pf, log_pterm, log_r, log_r_term, lengths, lam):
    rows = [[float(log_pf[i, t] - log_r[i, t]) for t in range(n)] for i, n in enumerate(lengths)]
    return naive_mean(rows, lam)


def naive_modified(log_pf, log_pterm, log_r, log_r_term, lengths, lam):
    rows = []
    for i, n in enumerate(lengths):
        q = [float(sum(log_r[i, :t]) + log_r_term[i, t]) for t in range(n)]
        p = [float(x) for x in log_pterm[i]]
        rows.append([q[t] + float(log_pf[i, t]) + p[t + 1] - q[t + 1] - p[t] for t in range(n - 1)])
    return naive_mean(rows, lam)


@pytest.mark.parametrize(("loss", "naive"), [(plain_loss, naive_subtb), (modified_subtb_loss, naive_modified)])
@prove
@given(lengths=lengths, lam=lams, seed=seeds)
def test_losses_equal_double_loops(loss, naive, lengths, lam, seed):
    *inputs, mask = batch_of([2, *lengths], seed)  # at least one step, which the modified form needs
    expected = naive(*inputs, [2, *lengths], lam)
    assert float(loss(*inputs, mask, lam)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_subtb_by_hand():
    d = torch.tensor([[1.0, -3.0], [2.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    # sub-paths: 1, -3, their sum -2 (weight lam), and 2; the 9 is padding
    assert float(subtb_loss(d, torch.zeros(2, 2), mask)) == pytest.approx((1 + 9 + 4 + 4) / 4)
    assert float(subtb_loss(d, torch.zeros(2, 2), mask, lam=0.5)) == pytest.approx((1 + 9 + 0.5 * 4 + 4) / 3.5)
    assert float(subtb_loss(d, torch.zeros(2, 2), mask, lam=0)) == pytest.approx((1 + 9 + 4) / 3)


def test_modified_subtb_by_hand():
    log_pf, log_pterm = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-5.0, -2.0]])
    log_r, log_r_term = torch.tensor([[-0.5, 0.0]]), torch.tensor([[FLOOR_LOG_REWARD, 0.0]])
    delta = -15 - 1 - 2 - (-0.5) + 5  # q_0 + log π + p_1 − q_1 − p_0
    loss = modified_subtb_loss(log_pf, log_pterm, log_r, log_r_term, torch.tensor([[True, True]]))
    assert float(loss) == pytest.approx(delta**2)


def test_sft_by_hand():
    log_pf = torch.tensor([[0.5, 0.25], [0.125, 0.7]]).log()
    mask = torch.tensor([[True, True], [True, False]])
    assert float(sft_loss(log_pf, mask)) == pytest.approx(math.log(2) * (1 + 2 + 3) / 3)


def test_sft_ignores_what_is_masked():
    log_pf = torch.tensor([-1.0, torch.nan, -torch.inf, -3.0], requires_grad=True)
    loss = sft_loss(log_pf, torch.tensor([True, False, False, True]))
    loss.backward()
    assert float(loss.detach()) == 2
    assert log_pf.grad.tolist() == [-0.5, 0, 0, -0.5]


# where they vanish

titles = st.lists(st.sampled_from([1, 2, 3]), max_size=3).map(lambda t: (*t, END))
distinct_catalogues = st.lists(titles, min_size=1, max_size=8, unique=True)


def along_titles(trie, values):
    """(n_nodes,) values → (n_items, T) along every title, and the mask."""
    paths = trie.paths(trie.leaf)
    return values[paths.clamp(min=0)], paths >= 0


@prove
@given(distinct_catalogues, seeds, lams)
def test_subtb_is_zero_exactly_at_the_token_rewards(catalogue, seed, lam):
    trie = TitleTrie.from_sequences(catalogue)
    log_r, mask = along_titles(trie, trie.log_token_rewards(2 * randn(trie.n_items, seed=seed)))
    assert subtb_loss(log_r, log_r, mask, lam) == 0
    other, _ = along_titles(trie, trie.log_token_rewards(2 * randn(trie.n_items, seed=seed + 1)))
    if not torch.allclose(other, log_r):  # a tree with nothing to choose has one policy only
        assert subtb_loss(other, log_r, mask, lam) > 1e-8
    for row, column in mask.nonzero().tolist()[:5]:
        moved = log_r.clone()
        moved[row, column] -= 0.01
        assert subtb_loss(moved, log_r, mask, lam) > 0


def with_pseudo_leaves(catalogue, log_item_rewards):
    """The tree whose exact policy the modified form asks for, and log π and log π(⊤) along the titles in it.

    Every prefix that is no title, the empty one included, gets a leaf prefix + ⊤ of reward e^−15 · F(prefix).
    """
    trie = TitleTrie.from_sequences(catalogue)
    flow = trie.log_flows(log_item_rewards)
    extra, log_extra = [], []
    for prefix in {title[:n] for title in catalogue for n in range(len(title))}:
        if (*prefix, END) not in catalogue:
            node = torch.zeros(1, dtype=torch.int64)
            for token in prefix:
                node = trie.advance(node, torch.tensor([token]))
            extra.append((*prefix, END))
            log_extra.append(FLOOR_LOG_REWARD + float(flow[node]))
    bigger = TitleTrie.from_sequences([*catalogue, *extra])
    log_pi = bigger.log_token_rewards(torch.cat([log_item_rewards, torch.tensor(log_extra, dtype=torch.float64)]))
    paths = bigger.paths(bigger.leaf[: len(catalogue)])[:, : trie.max_depth]
    ends = bigger.advance(bigger.parent[paths].flatten(), torch.full_like(paths, END).flatten()).view(paths.shape)
    return trie, log_pi[paths.clamp(min=0)], torch.where(paths >= 0, log_pi[ends], 0)


def term_rewards(trie, log_r):
    """(n_nodes,) log r of ⊤ after the node's parent where that is a whole title, else the floor."""
    ends = trie.advance(trie.parent.clamp(min=0), torch.full((trie.n_nodes,), END))
    return torch.where(ends >= 0, log_r[ends], FLOOR_LOG_REWARD)


@prove
@given(distinct_catalogues.filter(lambda c: any(len(t) > 1 for t in c)), seeds, lams)
def test_modified_subtb_is_zero_at_the_tree_with_pseudo_leaves(catalogue, seed, lam):
    log_item_rewards = randn(len(catalogue), seed=seed)
    trie, log_pi, log_pterm = with_pseudo_leaves(catalogue, log_item_rewards)
    by_node = trie.log_token_rewards(log_item_rewards)
    log_r, mask = along_titles(trie, by_node)
    log_r_term, _ = along_titles(trie, term_rewards(trie, by_node))
    assert modified_subtb_loss(log_pi, log_pterm, log_r, log_r_term, mask, lam) < 1e-20
    for row, column in mask[:, 1:].nonzero().tolist()[:5]:
        moved = log_pi.clone()
        moved[row, column] -= 0.01
        assert modified_subtb_loss(moved, log_pterm, log_r, log_r_term, mask, lam) > 1e-6


@prove
@given(distinct_catalogues, seeds, st.sampled_from([-14.0, -16.0, -30.0]))
def test_modified_subtb_is_not_zero_at_the_token_rewards(catalogue, seed, elsewhere):
    """π = r on the tree, with e^elsewhere left for the terminator where it does not belong."""
    if all((*t[:n], END) in catalogue for t in catalogue for n in range(len(t))):
        return  # every prefix is a title: both trees are the same
    log_item_rewards = randn(len(catalogue), seed=seed)
    trie = TitleTrie.from_sequences(catalogue)
    by_node = trie.log_token_rewards(log_item_rewards)
    log_r, mask = along_titles(trie, by_node)
    log_r_term, _ = along_titles(trie, term_rewards(trie, by_node))
    log_pterm = torch.where(log_r_term == FLOOR_LOG_REWARD, elsewhere, log_r_term)
    loss = modified_subtb_loss(log_r, log_pterm, log_r, log_r_term, mask)
    assert loss > 1e-3
    assert subtb_loss(log_r, log_r, mask) == 0


# what must not matter


@losses
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@prove
@given(lengths=lengths, lam=lams, seed=seeds)
def test_padding_leaks_neither_into_the_value_nor_into_gradients(loss, junk, lengths, lam, seed):
    *inputs, mask = batch_of([2, *lengths], seed, extra=2)
    clean = [x.clone().requires_grad_() for x in inputs]
    dirty = [torch.where(mask, x, junk).requires_grad_() for x in inputs]
    values = [loss(*tensors, mask, lam) for tensors in (clean, dirty)]
    for value in values:
        value.backward()
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)
    for x, y in zip(clean, dirty, strict=True):
        if x.grad is not None:  # log π(⊤) and its rewards play no part in the plain form
            torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-12)
            assert (y.grad[~mask] == 0).all()


@losses
@prove
@given(lengths=lengths, seed=seeds, random=st.randoms(use_true_random=False))
def test_width_and_order_of_the_batch_do_not_matter(loss, lengths, seed, random):
    lengths = [2, *lengths]
    *inputs, mask = batch_of(lengths, seed, extra=3)
    value = loss(*inputs, mask, 0.7)
    narrow = [x[:, : max(lengths)] for x in (*inputs, mask)]
    order = random.sample(range(len(lengths)), len(lengths))
    torch.testing.assert_close(loss(*narrow, 0.7), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(*(x[order] for x in (*inputs, mask)), 0.7), value, rtol=1e-12, atol=0)


@losses
def test_a_repeated_batch_has_the_same_mean(loss):
    batch = batch_of([3, 1, 4], seed=3)
    torch.testing.assert_close(loss(*(torch.cat([x, x]) for x in batch), 0.7), loss(*batch, 0.7))


@losses
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_gradients(loss, lam):
    *inputs, mask = batch_of([4, 1, 2], seed=5)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: loss(*x, mask, lam), inputs)


def test_gradient_of_sft():
    log_pf = randn(2, 3).requires_grad_()
    mask = mask_of([3, 1])
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, mask), log_pf)


@losses
def test_half_precision_stays_half_precision(loss):
    *inputs, mask = batch_of([4, 1, 2], seed=5)
    value = loss(*(x.bfloat16() for x in inputs), mask, 0.9)
    assert value.dtype == torch.bfloat16
    assert float(value) == pytest.approx(float(loss(*inputs, mask, 0.9)), rel=0.05)


# what they train


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_a_tabular_policy_learns_the_target(lam):
    """One free logit per edge, SubTB over the twelve titles, Adam: KL(target || policy) in nats."""
    catalogue = [(1, END), (1, 2, END), (1, 2, 3, END), (1, 4, 3, END), (2, 1, END), (2, 2, END), (3, END),
                 (3, 3, 3, 3, END), (3, 3, 4, END), (4, 1, END), (4, 1, 2, 3, 4, END), (END,)]  # fmt: skip
    trie = TitleTrie.from_sequences(catalogue)
    log_item_rewards = torch.arange(1, 13, dtype=torch.float64).log()
    log_target = log_item_rewards.log_softmax(-1)
    log_r, mask = along_titles(trie, trie.log_token_rewards(log_item_rewards))
    logits = randn(trie.n_nodes).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    divergences = []
    for _ in range(300):
        totals = torch.zeros_like(logits).index_add(0, trie.parent[1:], logits[1:].exp())
        log_pf, _ = along_titles(trie, logits - totals.log()[trie.parent.clamp(min=0)])
        log_policy = torch.where(mask, log_pf, 0).sum(-1).detach()
        divergences.append(float((log_target.exp() * (log_target - log_policy)).sum()))
        optimiser.zero_grad()
        subtb_loss(log_pf, log_r, mask, lam).backward()
        optimiser.step()
    assert divergences[0] > 0.1
    assert divergences[-1] < 1e-5


# errors


@losses
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True, False, True]], "a mask has a hole: its True values must come first in each row"),
        ([[True, True, True], [False, True, True]], "a mask has a hole"),
        ([[False, False, False]], "the mask leaves no token"),
    ],
)
def test_bad_masks_are_refused(loss, mask, message):
    mask = torch.tensor(mask)
    with pytest.raises(ValueError, match=message):
        loss(*(torch.zeros(mask.shape) for _ in range(4)), mask, 1.0)


@losses
def test_shapes_must_agree(loss):
    mask = torch.ones(2, 3, dtype=torch.bool)
    good, bad = torch.zeros(2, 3), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"one shape, not .*\(2, 1\)"):
        loss(good, good, bad, good, mask, 1.0)
    with pytest.raises(ValueError, match=r"take \(B, T\) tensors"):
        loss(*(torch.zeros(3) for _ in range(4)), torch.ones(3, dtype=torch.bool), 1.0)


def test_modified_subtb_refuses_a_batch_of_terminators():
    one = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="no path has a token before its terminator"):
        modified_subtb_loss(one, one, one, one, torch.ones(2, 1, dtype=torch.bool))
    assert subtb_loss(one, one, torch.ones(2, 1, dtype=torch.bool)) == 0


@prove
@given(seeds)
def test_the_divergence_is_the_mean_of_the_states_and_vanishes_at_the_rewards(seed):
    """States with two and three children; π keeps some mass off the tree."""
    log_r = torch.cat([randn(2, seed=seed).log_softmax(0), randn(3, seed=seed + 1).log_softmax(0)])
    log_pf = torch.cat([randn(3, seed=seed + 2).log_softmax(0)[:2], randn(4, seed=seed + 3).log_softmax(0)[:3]])
    by_hand = sum(math.exp(r) * (r - p) for r, p in zip(log_r.tolist(), log_pf.tolist())) / 2
    assert divergence_loss(log_pf, log_r, 2).item() == pytest.approx(by_hand)
    assert by_hand > 0 and divergence_loss(log_r, log_r, 2) == 0


def test_the_divergence_along_drawn_paths_estimates_the_divergence_of_whole_titles():
    """Chain rule: the expectation of its sum along a path drawn from the reward is KL(R/Z ‖ π), by enumeration."""
    trie = TitleTrie.from_sequences([(1, 2, END), (1, 3, 3, END), (2, END), (1, 2, 2, END)])
    log_r = trie.log_token_rewards(torch.tensor([1.0, 4.0, 2.0, 0.5]).log().double())
    log_pi = trie.renormalised(randn(trie.n_nodes))
    share, model = (trie.log_leaf_probs(x) for x in (log_r, log_pi))
    total = 0.0
    for leaf, path in enumerate(trie.paths(trie.leaves)):
        path = path[path >= 0]
        _, children = trie.children(trie.parent[path])
        total += share[leaf].exp() * divergence_loss(log_pi[children], log_r[children], 1)
    torch.testing.assert_close(total, (share.exp() * (share - model)).sum())


@prove
@given(seeds)
def test_visits_weigh_the_states(seed):
    """States with two and three children, visited twice and five times, are seven states visited once."""
    log_r = torch.cat([randn(2, seed=seed).log_softmax(0), randn(3, seed=seed + 1).log_softmax(0)])
    log_pf = torch.cat([randn(2, seed=seed + 2).log_softmax(0), randn(3, seed=seed + 3).log_softmax(0)])
    visits = torch.tensor([2, 2, 5, 5, 5])
    repeated = [torch.cat([x[:2]] * 2 + [x[2:]] * 5) for x in (log_pf, log_r)]
    torch.testing.assert_close(divergence_loss(log_pf, log_r, 7, visits), divergence_loss(*repeated, 7))


def test_the_gradient_of_the_divergence():
    log_r, visits = randn(5, seed=1).log_softmax(0), torch.tensor([1.0, 1, 2, 2, 2]).double()
    assert torch.autograd.gradcheck(lambda x: divergence_loss(x, log_r, 3, visits), randn(5).requires_grad_())


def test_weights_stand_inside_the_mean_over_tokens():
    log_pf = torch.tensor([-1.0, -2.0, -4.0])
    weight = torch.tensor([3.0, 0.0, 9.0])
    assert float(sft_loss(log_pf, torch.tensor([True, True, False]), weight)) == pytest.approx((3 * 1 + 0 * 2) / 2)


# by name


@prove
@given(lengths=lengths, lam=lams, seed=seeds)
def test_flow_loss_calls_the_loss_that_it_names(lengths, lam, seed):
    *inputs, mask = batch_of([2, *lengths], seed)
    log_pf, log_end, log_r, log_end_r = inputs
    expected = {
        "subtb": subtb_loss(log_pf, log_r, mask, lam), "tb": trajectory_balance_loss(log_pf, log_r, mask),
        "db": subtb_loss(log_pf, log_r, mask, 0.0),
        "modified_subtb": modified_subtb_loss(log_pf, log_end, log_r, log_end_r, mask, lam),
    }
    assert set(expected) == set(FLOW_LOSSES)
    for name, value in expected.items():
        assert flow_loss(name, log_pf, log_r, mask, lam, end=(log_end, log_end_r)) == value
        longer = [pad(x, (0, 1, 0, 1)) for x in (log_pf, log_r, mask, log_end, log_end_r)]  # a row without tokens
        torch.testing.assert_close(flow_loss(name, *longer[:3], lam, end=tuple(longer[3:])), value)
    assert len(set(map(float, expected.values()))) > 1


def test_flow_losses_ask_for_what_they_read_alone():
    mask, zeros = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    for name in set(FLOW_LOSSES) - {"modified_subtb"}:
        assert flow_loss(name, zeros, zeros, mask) == 0


def test_an_unknown_flow_loss_is_refused():
    with pytest.raises(ValueError, match="'ppo' is no flow loss: choose one of subtb, tb, db, modified_subtb"):
        flow_loss("ppo", torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
