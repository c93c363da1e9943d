"""Fitting a known distribution on a tree of 12 titles with a tiny model; preference losses by hand; the cases."""

import json
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from flowerlib import losses, metrics, rewards
from flowerlib.lab import fit, store
from flowerlib.lab.settings import FIT_LOSSES, FIT_PATHS, settings
from flowerlib.model import Catalogue, tiny_model
from flowerlib.tree import PackedTree
from flowerlib.trie import TitleTrie

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "The Rock", "The Big Heat", "The Big Sleep",
          "Big", "Big Fish", "Alien", "Aliens"]
FEW = ["Heat", "Alien", "Alien Resurrection", "Fargo"]
COUNTS = torch.tensor([47, 15, 3, 31, 22, 11, 7, 5, 19, 2, 40, 28])
PROMPT = "Recommend a movie:\n"


def world_of(titles, counts, seed=0):
    model, tokenizer = tiny_model([*titles, PROMPT], seed=seed)
    catalogue = Catalogue.build(tokenizer, titles, "movie")
    context = tokenizer.encode(PROMPT, add_special_tokens=False)
    return model, catalogue.trie, context, rewards.count_log_rewards(catalogue.trie, counts)


@pytest.fixture
def world():
    return world_of(TITLES, COUNTS)


@pytest.fixture
def few():
    return world_of(FEW, torch.tensor([60, 25, 10, 2]))


def loss_of(tree, loss, log_rewards, leaves, **options):
    return sum(fit.loss_parts(tree, loss, tree.trie.log_flows(log_rewards), leaves, **options))


# Losses


@pytest.mark.parametrize("loss", ["exact_ce", "exact_squared"])
def test_exact_losses_and_gradients_do_not_depend_on_the_parts(world, loss):
    model, trie, context, log_rewards = world
    values = []
    for nodes_at_a_time in (512, 3):
        model.zero_grad()
        value = loss_of(PackedTree(model, trie, context, 0, nodes_at_a_time), loss, log_rewards, None, penalty=0.5)
        value.backward()
        values.append(torch.cat([value.detach()[None], *(w.grad.flatten() for w in model.parameters())]))
    torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimate", ["subtree_ce", "sft"])
def test_sampled_cross_entropies_are_unbiased(world, estimate):
    """The mean over all titles by their probability is the exact loss: each estimate is an average over drawn titles.
    Drawn subtrees give the divergence: the cross-entropy less the entropy of the rewards."""
    model, trie, context, log_rewards = world
    tree = PackedTree(model.eval(), trie, context)
    log_share = trie.log_flows(log_rewards)[trie.leaves] - log_rewards.logsumexp(0)
    with torch.no_grad():
        exact = loss_of(tree, "exact_ce", log_rewards, None)
        if estimate == "subtree_ce":
            exact = exact + (log_share.exp() * log_share).sum().float()
        single = torch.stack([loss_of(tree, estimate, log_rewards, leaf[None]) for leaf in trie.leaves])
        torch.testing.assert_close((log_share.exp() * single).sum().float(), exact, rtol=1e-5, atol=1e-5)
        drawn = torch.tensor([0, 3, 3, 7])  # a title drawn twice counts twice
        together = loss_of(tree, estimate, log_rewards, trie.leaves[drawn])
        torch.testing.assert_close(together, single[drawn].mean().to(together), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["subtb", "tb", "db", "sft"])
def test_sampled_losses_equal_the_loss_of_each_titles_own_row(world, loss):
    """log π of a title from an unpadded pass of its own, put into the function of `losses`."""
    model, trie, context, log_rewards = world
    tree = PackedTree(model.eval(), trie, context)
    log_r, drawn = trie.log_token_rewards(log_rewards).float(), torch.tensor([1, 4, 4, 8])
    path = trie.paths(trie.leaves[drawn])
    with torch.no_grad():
        value = loss_of(tree, loss, log_rewards, trie.leaves[drawn])
        log_pf = torch.zeros(path.shape)
        for i, row in enumerate(path):
            nodes = row[row >= 0]
            logits = model(torch.tensor([[*context, *trie.token[nodes].tolist()]])).logits[0].log_softmax(-1)
            log_pf[i, : len(nodes)] = logits[len(context) - 1 :].gather(1, trie.token[nodes][:, None])[:, 0]
    mask = path >= 0
    expected = {
        "subtb": lambda: losses.subtb_loss(log_pf, log_r[path.clamp(min=0)], mask, 1.0),
        "tb": lambda: losses.trajectory_balance_loss(log_pf, log_r[path.clamp(min=0)], mask),
        "db": lambda: torch.where(mask, log_pf - log_r[path.clamp(min=0)], 0).square().sum() / mask.sum(),
        "sft": lambda: -log_pf.sum() / len(drawn),  # nats a title
    }[loss]()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", FIT_LOSSES)
def test_the_penalty_on_every_title_by_its_share_is_the_exact_one(world, loss):
    model, trie, context, log_rewards = world
    tree = PackedTree(model.eval(), trie, context)
    share = (trie.log_flows(log_rewards)[trie.leaves] - log_rewards.logsumexp(0)).exp()
    log_reach = (trie.log_flows(log_rewards) - log_rewards.logsumexp(0)).float()
    with torch.no_grad():
        expected = losses.off_trie_penalty(tree.log_probs()[1:], trie.parent[1:], log_reach)
        drawn = [None] if loss.startswith("exact") else [leaf[None] for leaf in trie.leaves]
        parts = [loss_of(tree, loss, log_rewards, leaf, penalty=1.0) - loss_of(tree, loss, log_rewards, leaf)
                 for leaf in drawn]
    weights = share if len(parts) > 1 else torch.ones(1, dtype=share.dtype)
    torch.testing.assert_close((weights * torch.stack(parts)).sum().float(), expected, rtol=1e-4, atol=1e-4)


def test_drawn_edges_are_those_of_the_whole_tree(world):
    model, trie, context, _ = world
    tree = PackedTree(model.eval(), trie, context)
    leaves = trie.leaves[torch.tensor([2, 2, 7])]
    with torch.no_grad():
        (children, into, end), whole = fit.drawn_edges(tree, leaves), tree.log_probs()
    above = {0, *(node for node in trie.paths(trie.parent[leaves]).flatten().tolist() if node > 0)}
    assert sorted(children.tolist()) == [c for c in range(1, trie.n_nodes) if int(trie.parent[c]) in above]
    torch.testing.assert_close(into[children], whole[children], atol=1e-5, rtol=1e-5)
    assert set(into.nonzero()[:, 0].tolist()) == set(children.tolist())
    assert set(end.nonzero()[:, 0].tolist()) == above  # log π of the terminator is known there alone


# Fits


@pytest.mark.parametrize(
    ("loss", "paths"),
    [("exact_ce", "reward"), ("exact_squared", "reward"), ("subtree_ce", "reward"), ("sft", "reward"),
     ("subtb", "reward"), ("subtb", "policy"), ("subtb", "schedule"), ("tb", "reward"), ("db", "reward"),
     ("modified_subtb", "reward")],
)
def test_every_loss_reaches_the_target(world, loss, paths):
    model, trie, context, log_rewards = world
    tree = PackedTree(model, trie, context)
    penalty = 1.0 if loss == "modified_subtb" else 0.0
    budget = 5000 if paths == "reward" else 10000  # draws from the policy take tokens too
    log = fit.fit_target(tree, log_rewards, loss, budget, paths, 32, 3e-3, penalty, evaluations=2, progress=False)
    assert log.kl_target_model.iloc[0] > 0.1
    assert log.kl_target_model.iloc[-1] < 0.05
    assert log.forward_tokens.iloc[-1] >= budget and log.catalogue_mass.iloc[-1] > 0.9


def test_modified_subtb_alone_vanishes_for_policies_that_leave_the_tree(world):
    model, trie, context, log_rewards = world
    tree = PackedTree(model, trie, context)
    log = fit.fit_target(tree, log_rewards, "modified_subtb", 10000, n_titles=32, learning_rate=3e-3, evaluations=1,
                         progress=False)
    assert log.loss.iloc[-1] < 0.01 and log.catalogue_mass.iloc[-1] < 0.5 and log.kl_target_model.iloc[-1] > 0.1


def test_what_is_measured_equals_the_same_by_enumeration(world):
    model, trie, context, log_rewards = world
    tree = PackedTree(model.eval(), trie, context)
    found = fit.measure(tree, log_rewards)
    log_target = torch.zeros(len(trie.leaves), dtype=torch.float64).scatter_add(
        0, trie.item_leaf, log_rewards.softmax(0)).log()
    log_pi, within = torch.zeros(len(trie.leaves)), torch.zeros(len(trie.leaves))
    with torch.no_grad():
        for i, leaf in enumerate(trie.leaves):
            nodes = trie.paths(leaf[None])[0]
            nodes = nodes[nodes >= 0]
            tokens = trie.token[nodes]
            logits = model(torch.tensor([[*context, *tokens.tolist()]])).logits[0].log_softmax(-1)[len(context) - 1 :]
            log_pi[i] = logits[:-1].gather(1, tokens[:, None]).sum()
            for t, node in enumerate(nodes.tolist()):
                siblings = trie.token[1:][trie.parent[1:] == trie.parent[node]]
                within[i] += logits[t, trie.token[node]] - logits[t, siblings].logsumexp(0)
    exact = metrics.divergences(log_target, within.double())
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["catalogue_mass"] == pytest.approx(log_pi.exp().sum().item(), rel=1e-4)
    kl_tokens = (log_target.exp() * (log_target - log_pi.double())).sum().item()  # of titles, over the whole vocabulary
    assert found["kl_tokens"] == pytest.approx(kl_tokens, abs=1e-4)
    assert found["kl_tokens"] > found["kl_target_model"]


def test_the_same_seed_gives_the_same_log_and_it_is_watched(world):
    _, trie, context, log_rewards = world
    logs, seen = [], []
    for seed in (0, 0, 1):
        tree = PackedTree(tiny_model([*TITLES, PROMPT], seed=0)[0], trie, context)
        logs.append(fit.fit_target(tree, log_rewards, "subtb", 300, seed=seed, evaluations=2, progress=False,
                                   watch=seen.append).drop(columns="seconds"))
    assert logs[0].equals(logs[1]) and not logs[0].equals(logs[2])
    assert [row["forward_tokens"] for row in seen] == [n for log in logs for n in log.forward_tokens]
    assert logs[0].forward_tokens[0] == logs[0].step[0] == 0 and len(logs[0]) == 3


def test_unknown_losses_are_refused(world):
    for loss in ("ppo", "divergence", "dpo"):
        with pytest.raises(ValueError, match="choose of exact_ce"):
            fit.fit_target(None, world[3], loss, 1)
    with pytest.raises(ValueError, match="reward, policy, schedule"):
        fit.fit_target(None, world[3], "sft", 1, paths="logged")
    for paths in ("policy", "schedule"):
        with pytest.raises(ValueError, match="it would not aim at the reward"):
            fit.fit_target(None, world[3], "sft", 1, paths=paths)


def test_titles_are_drawn_by_the_edges_renormalised(few):
    _, trie, _, log_rewards = few
    torch.manual_seed(0)
    edges = trie.log_token_rewards(log_rewards) + torch.where(trie.parent >= 0, -2.0, 0.0)  # off the tree: no matter
    counts = torch.bincount(trie.node_leaf[fit.draw_leaves(trie, edges, 20_000)], minlength=4) / 20_000
    share = log_rewards.softmax(0)
    assert ((counts - share).abs() < 5 * (share * (1 - share) / 20_000).sqrt()).all()


# Preference losses


def test_a_policy_gradients_optimum_by_hand():
    log_reference, log_share = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
    torch.testing.assert_close(fit.tilted_optimum(log_reference, log_share, 1.0).exp(), torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(fit.tilted_optimum(log_reference, log_share, 0.5).exp(), torch.tensor([16.0, 1.0]) / 17)
    torch.testing.assert_close(fit.tilted_optimum(log_share, log_share, 1.0).exp(), torch.tensor([16.0, 1.0]) / 17)


def test_dpo_by_hand():
    """The policy has doubled the preferred title's probability and halved the other's: ratio 4, σ = 4^β / (1 + 4^β)."""
    log_reference = torch.tensor([[0.2, 0.4], [0.1, 0.1]]).log()
    log_pi = torch.tensor([[0.4, 0.2], [0.1, 0.1]]).log().requires_grad_()
    torch.testing.assert_close(fit.dpo_loss(log_pi[:1], log_reference[:1], 1.0), torch.tensor(5 / 4).log())
    torch.testing.assert_close(fit.dpo_loss(log_pi[:1], log_reference[:1], 0.5), torch.tensor(3 / 2).log())
    torch.testing.assert_close(fit.dpo_loss(log_pi[1:], log_reference[1:], 1.0), torch.tensor(2.0).log())
    both = fit.dpo_loss(log_pi, log_reference, 1.0)
    torch.testing.assert_close(both, (torch.tensor(5 / 4).log() + torch.tensor(2.0).log()) / 2)
    both.backward()  # the preferred one up, the other down, by β · σ(−ratio) / n
    torch.testing.assert_close(log_pi.grad, torch.tensor([[-1 / 10, 1 / 10], [-1 / 4, 1 / 4]]))


def test_rloo_by_hand():
    """Three completions; paid r − β · log(π / π_ref) = 1, 3, 5 − 0.5 · 2 = 4; the others' means are 3.5, 2.5 and 2."""
    log_reference = torch.tensor([-2.0, -3.0, -4.0])
    log_pi = torch.tensor([-2.0, -3.0, -2.0]).requires_grad_()
    loss = fit.rloo_loss(log_pi, log_reference, torch.tensor([1.0, 3.0, 5.0]), 0.5)
    advantage = torch.tensor([1 - 3.5, 3 - 2.5, 4 - 2.0])
    torch.testing.assert_close(loss, -(advantage * log_pi.detach()).mean())
    loss.backward()  # a policy gradient: no gradient through what is paid
    torch.testing.assert_close(log_pi.grad, -advantage / 3)
    assert advantage.sum() == 0
    same = fit.rloo_loss(log_pi, log_reference, torch.tensor([1.0, 3.0, 5.0]) + 7, 0.5)
    torch.testing.assert_close(same, loss)  # the baseline takes a constant out


def brute_outcomes(trie, log_edges):
    """Probability of each title, and of leaving the tree at each node, by walking."""
    titles, exits = [0.0] * len(trie.leaves), [0.0] * trie.n_nodes

    def walk(node, reached):
        leaf = int(trie.node_leaf[node])
        if leaf >= 0:
            titles[leaf] += reached
            return
        children = [c for c in range(1, trie.n_nodes) if int(trie.parent[c]) == node]
        inside = [float(log_edges[c].exp()) for c in children]
        exits[node] = reached * (1 - sum(inside))
        for child, p in zip(children, inside):
            walk(child, reached * p)

    walk(0, 1.0)
    return titles, exits


@examples(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(2, 5), min_size=0, max_size=4), min_size=1, max_size=8), st.integers(0, 1000))
def test_outcomes_equal_enumeration_and_sum_to_one(titles, seed):
    trie = TitleTrie.from_sequences([[*title, 1] for title in titles])
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(trie.n_nodes, 7, generator=generator).double()  # a vocabulary of 7 tokens, at every node
    log_edges = torch.zeros(trie.n_nodes, dtype=torch.float64)
    log_edges[1:] = logits.log_softmax(-1)[trie.parent[1:], trie.token[1:]]
    found = fit.outcomes(trie, log_edges).exp()
    assert found.shape == (len(trie.leaves) + trie.n_nodes,)
    assert found.sum().item() == pytest.approx(1, abs=1e-6)
    by_walking, exits = brute_outcomes(trie, log_edges)
    np.testing.assert_allclose(found[: len(trie.leaves)], by_walking, atol=1e-9)
    np.testing.assert_allclose(found[len(trie.leaves) :], exits, atol=1e-6)


def test_outcomes_of_the_model_are_what_it_writes_without_a_mask(few):
    """Every text token by token, in passes of its own: it spells a title, or leaves the tree at one node."""
    model, trie, context, _ = few
    tree = PackedTree(model.eval(), trie, context)
    found = fit.outcomes(trie, tree.log_probs()).exp()
    titles, exits = torch.zeros(len(trie.leaves)), torch.zeros(trie.n_nodes)
    vocabulary = model.config.vocab_size

    def walk(node, tokens, reached):
        with torch.no_grad():
            pi = model(torch.tensor([[*context, *tokens]])).logits[0, -1].softmax(-1)
        for token in range(vocabulary):
            child = int(trie.advance(torch.tensor([node]), torch.tensor([token]))[0])
            if child < 0:
                exits[node] += reached * pi[token]
            elif trie.node_leaf[child] >= 0:
                titles[trie.node_leaf[child]] += reached * pi[token]
            else:
                walk(child, [*tokens, token], reached * pi[token])

    walk(0, [], 1.0)
    torch.testing.assert_close(found, torch.cat([titles, exits]), atol=1e-5, rtol=1e-4)


def test_an_outcomes_probability_and_gradient_need_the_edges_of_drawn_paths_alone(few):
    """What `prefer` does in a step: the same log-probability from the edges along a path as from the whole tree."""
    model, trie, context, _ = few
    tree = PackedTree(model.eval(), trie, context)
    whole = fit.outcomes(trie, tree.log_probs())
    possible = whole.isfinite().nonzero()[:, 0]
    for outcome in possible:
        nodes = trie.leaves[outcome[None]] if outcome < len(trie.leaves) else outcome[None] - len(trie.leaves)
        leaves = fit.leaf_below(trie, nodes)
        assert trie.node_leaf[leaves] >= 0
        model.zero_grad()
        log_pi = fit.outcomes(trie, fit.drawn_edges(tree, leaves)[1])[outcome]
        torch.testing.assert_close(log_pi.detach(), whole[outcome], atol=1e-4, rtol=1e-4)
        log_pi.backward()
        assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())


def test_pairs_put_the_more_frequent_title_first():
    log_shares = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    torch.manual_seed(0)
    pairs = fit._pairs(log_shares, 4000)
    assert (log_shares[pairs[:, 0]] > log_shares[pairs[:, 1]]).all()
    found = {tuple(pair): n / 4000 for pair, n in zip(*(x.tolist() for x in pairs.unique(dim=0, return_counts=True)))}
    assert found.keys() == {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)}
    assert all(abs(share - 0.2) < 5 * (0.16 / 4000) ** 0.5 for share in found.values())  # uniform over different shares


@pytest.mark.parametrize("n_frozen", [0, 1])
@pytest.mark.parametrize("method", ["dpo", "rloo"])
def test_preference_tuning_leaves_the_target_for_the_popular_titles(few, method, n_frozen):
    """Both start at a policy close to the target and concentrate; RLOO's way ends at the optimum that is known."""
    model, trie, context, log_rewards = few
    tree = PackedTree(model, trie, context, n_frozen)
    start = fit.fit_target(tree, log_rewards, "exact_ce", 3000, learning_rate=3e-3, evaluations=1, progress=False)
    start = start.iloc[-1]
    assert start.kl_target_model < 0.01
    log = fit.prefer(tree, log_rewards, method, 6000, beta=1.0, n_titles=16, learning_rate=1e-3, evaluations=3,
                     progress=False)
    end = log.iloc[-1]
    assert log.forward_tokens[0] == 0 and log.kl_target_model[0] == pytest.approx(start.kl_target_model, rel=1e-3)
    assert end.kl_target_model > 0.05 and end.entropy_model < end.entropy_target - 0.1
    assert 6000 <= end.forward_tokens < 9000 and len(log) == 4 and log.seconds.is_monotonic_increasing
    if method == "rloo":
        optimum = fit.tilted_optimum(log_rewards.log_softmax(0), log_rewards, 1.0)
        reached = trie.log_leaf_probs(trie.renormalised(tree.log_probs().double()))
        assert (reached.exp() - optimum.exp()).abs().max() < 0.12


def test_the_same_seed_gives_the_same_preference_tuning(few):
    _, trie, context, log_rewards = few
    for method in ("dpo", "rloo"):
        logs = []
        for seed in (0, 0, 1):
            tree = PackedTree(tiny_model([*FEW, PROMPT], seed=0)[0], trie, context)
            logs.append(fit.prefer(tree, log_rewards, method, 300, learning_rate=1e-3, evaluations=1, seed=seed,
                                   progress=False).drop(columns="seconds"))
        assert logs[0].equals(logs[1]) and not logs[0].equals(logs[2])


def test_bad_requests_are_refused(few):
    model, trie, context, log_rewards = few
    tree = PackedTree(model, trie, context)
    for method in ("ppo", "sft"):
        with pytest.raises(ValueError, match=f"'{method}' is none of dpo, rloo"):
            fit.prefer(tree, log_rewards, method, 10)
    with pytest.raises(ValueError, match="no two titles differ"):
        fit.prefer(tree, torch.zeros(4).double(), "dpo", 10)


# The study of notebook 05


SMALL = pd.Series({"Heat": 9.0, "Alien": 5.0, "Fargo": 3.0, "Speed": 2.0, "Alien Resurrection": 1.0})


@pytest.fixture
def own():
    return settings("smoke", fit=True, n_titles=3, min_count=1, methods=["exact_ce", "sft"], fit_paths=["reward"],
                    budget=200, large_budget=200)


def test_cases_by_hand(own):
    listed = fit.cases(replace(own, methods=("exact_ce", "subtb", "dpo", "rloo"), fit_paths=("reward", "policy"),
                               n_seeds=2, longer=3), SMALL)
    small = [(c.target, c.method, c.paths, c.seed, c.budget) for c in listed if len(c.titles) == 3]
    assert small == [
        ("counts", "exact_ce", "all", 0, 200),
        ("counts", "subtb", "reward", 0, 200), ("counts", "subtb", "reward", 1, 200),
        ("counts", "subtb", "policy", 0, 200), ("counts", "subtb", "policy", 1, 200),
        ("counts", "dpo", "pairs", 0, 200), ("counts", "dpo", "pairs", 1, 200),
        ("counts", "rloo", "policy", 0, 200), ("counts", "rloo", "policy", 1, 200),
        ("counts", "subtb", "reward", 0, 600),
        ("permuted", "exact_ce", "all", 0, 200), ("permuted", "exact_ce", "all", 1, 200),
    ]
    assert listed[0].titles == ("Heat", "Alien", "Fargo")
    np.testing.assert_allclose(listed[0].log_rewards, own.target_alpha * np.log([9, 5, 3]))
    assert sorted(listed[-2].log_rewards) == sorted(listed[0].log_rewards)
    assert len(listed[-1].titles) == 5 and listed[-1].method == "subtree_ce" and len(set(listed)) == len(listed)
    drawn = [c.n_draws for c in listed if c.target == "counts" and len(c.titles) == 3]
    assert drawn == [own.n_draws * (c.seed == 0) for c in listed if c.target == "counts" and len(c.titles) == 3]
    assert not [c for c in fit.cases(replace(own, min_count=0), SMALL) if len(c.titles) == 5]
    assert len(fit.cases(replace(own, n_titles=0), SMALL)[0].titles) == 5
    later = fit.cases(replace(own, seed=4, n_seeds=2), SMALL)
    assert {c.seed for c in later if c.method == "sft"} == {4, 5}


def test_every_case_has_a_path_of_its_own_under_its_folder(own, tmp_path, monkeypatch):
    paths = []
    monkeypatch.setattr(fit.store, "find", lambda path, made_from, *content: paths.append(path) or {"row": {}})
    every = replace(own, methods=(*FIT_LOSSES, "dpo", "rloo"), fit_paths=FIT_PATHS, n_seeds=2, longer=2)
    listed = fit.cases(every, SMALL)
    for case in listed:
        fit.run_case(case, every, tmp_path)
    assert len(set(paths)) == len(listed) and {path.parent for path in paths} == {tmp_path}


def test_a_case_is_kept_until_something_it_depends_on_changes_and_whatever_the_code(own, tmp_path, monkeypatch, capsys):
    case = fit.cases(own, SMALL)[1]
    first = fit.run_case(case, own, tmp_path)
    assert first["row"]["method"] == "sft" and sum(first["draws"]) == own.n_draws
    assert first["row"]["forward_tokens"] >= 200 and first["curve"][0]["forward_tokens"] == 0
    assert first["provenance"]["settings"]["budget"] == 200 and first["provenance"]["seconds"] >= 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(fit, "open_case", lambda *_: pytest.fail("was run again"))
    assert fit.run_case(case, own, tmp_path) == first
    assert "made by commit" not in capsys.readouterr().out
    others = replace(own, kl_weight=0.5, n_seeds=9, penalty=3.0, epochs=1.0, theta=0.9, methods=("exact_ce",))
    assert fit.run_case(case, others, tmp_path) == first  # no part of SFT
    monkeypatch.setattr(store, "commit", lambda: "0123456789ab")  # other code has the same record
    assert fit.run_case(case, own, tmp_path) == first
    assert "taken as it is (--fresh makes it again)" in capsys.readouterr().out
    monkeypatch.undo()
    again = fit.run_case(case, replace(own, learning_rate=1e-4), tmp_path)
    assert again["row"]["kl_target_model"] != first["row"]["kl_target_model"]
    for other in (replace(case, seed=1), replace(case, n_titles=5), replace(case, n_draws=7)):
        fit.run_case(other, own, tmp_path)
    fit.run_case(case, replace(own, prompt="A movie:\n"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    assert all(path.read_bytes() == content for path, content in before.items())  # and nothing is removed


def test_preference_settings_belong_to_preference_methods(own, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fit.store, "find", lambda path, made_from, *content: asked.append(made_from) or {"row": {}})
    case = fit.cases(own, SMALL)[1]
    for method in ("sft", "modified_subtb", "dpo"):
        fit.run_case(replace(case, method=method), own, tmp_path)
    first, modified, dpo = (set(made_from) for made_from in asked)
    assert first == {"prompt", "base", "frozen_layers", "learning_rate", *asdict(case)}
    assert modified - first == {"penalty"}
    assert dpo - first == {"kl_weight", "preference_titles", "preference_learning_rate"}


def test_fresh_makes_a_case_again(own, tmp_path, monkeypatch):
    case = replace(fit.cases(own, SMALL)[1], n_draws=0)
    first = fit.run_case(case, own, tmp_path)
    path, = tmp_path.iterdir()
    monkeypatch.setenv(store.FRESH, str(path.stat().st_mtime + 1))
    monkeypatch.setattr(store, "commit", lambda: "fedcba987654")
    second = fit.run_case(case, own, tmp_path)
    assert second["provenance"]["commit"] == "fedcba987654" != first["provenance"]["commit"]
    assert json.loads(path.read_text()) == second and second["log_edges"] == first["log_edges"]


@pytest.mark.parametrize("method", ["sft", "rloo"])
def test_the_same_seed_gives_the_same_case(own, tmp_path, method):
    case = replace(fit.cases(own, SMALL)[1], method=method, n_draws=50)
    both = [fit.run_case(case, own, tmp_path / name) for name in "ab"]
    for result in both:
        del result["provenance"]
        for record in [result["row"], *result["curve"]]:
            del record["seconds"]
    assert both[0] == both[1]
    curve = both[0]["curve"]
    assert all(a["step"] < b["step"] and a["forward_tokens"] < b["forward_tokens"] for a, b in zip(curve, curve[1:]))
    assert both[0]["row"]["forward_tokens"] == curve[-1]["forward_tokens"] >= 200


def test_every_seed_has_a_model_and_a_draw_of_its_own(own, tmp_path):
    """A tiny model starts from the case's seed, so that a record does not depend on which seeds stand beside it."""
    case = replace(fit.cases(own, SMALL)[0], n_draws=0)
    models = [fit.open_case(replace(case, seed=seed), own).model for seed in (0, 1)]
    assert not torch.equal(*(model.get_input_embeddings().weight for model in models))
    alone = fit.open_case(replace(case, seed=1), replace(own, seed=1)).model
    torch.testing.assert_close(alone.state_dict(), models[1].state_dict())


def test_counts_of_the_users_own_table(own, tmp_path):
    (tmp_path / "counts.csv").write_text("title,count\nHeat,3\nFargo,4\n")
    counts = fit.title_counts(replace(own, counts_path=str(tmp_path / "counts.csv")))
    assert counts.to_dict() == {"Fargo": 4.0, "Heat": 3.0} and list(counts.index) == ["Fargo", "Heat"]
