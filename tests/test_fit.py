"""Fitting a known distribution on a tree of 12 titles with a tiny model."""

import pytest
import torch

from flowerlib import backbone, fit, losses, policy, rewards

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "The Rock", "The Big Heat", "The Big Sleep", "Big",
          "Big Fish", "Alien", "Aliens"]
COUNTS = torch.tensor([47, 15, 3, 31, 22, 11, 7, 5, 19, 2, 40, 28])


@pytest.fixture
def world():
    model, tokenizer = backbone.tiny_model([*TITLES, "Recommend a movie:\n"], seed=0)
    catalogue = policy.Catalogue.build(tokenizer, TITLES, "movie")
    context = tokenizer.encode("Recommend a movie:\n", add_special_tokens=False)
    return model, catalogue.trie, context, rewards.count_log_rewards(catalogue.trie, COUNTS)


def loss_of(*args, **options):
    return sum(fit.loss_parts(*args, **options))


@pytest.mark.parametrize(("n_frozen", "nodes_at_a_time"), [(0, 512), (1, 512), (0, 1), (1, 5)])
def test_the_packed_tree_equals_the_one_behind_a_cache(world, n_frozen, nodes_at_a_time):
    model, trie, context, _ = world
    tree = fit.PackedTree(model.eval(), trie, context, n_frozen, nodes_at_a_time)
    torch.testing.assert_close(tree.log_probs(), policy.tree_log_probs(model, trie, context), atol=1e-5, rtol=1e-4)
    edges = torch.cat([children for children, _ in tree.parts()])
    assert sorted(edges.tolist()) == list(range(1, trie.n_nodes))  # every edge once


@pytest.mark.parametrize("loss", ["exact_ce", "exact_squared"])
def test_exact_losses_and_gradients_do_not_depend_on_the_parts(world, loss):
    model, trie, context, log_rewards = world
    found = []
    for nodes_at_a_time in (512, 3):
        model.zero_grad()
        value = loss_of(fit.PackedTree(model, trie, context, 0, nodes_at_a_time), loss, log_rewards, None, penalty=0.5)
        value.backward()
        found.append(torch.cat([value.detach()[None], *(w.grad.flatten() for w in model.parameters())]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimate", ["subtree_ce", "sft"])
def test_sampled_cross_entropies_are_unbiased(world, estimate):
    """The mean over all titles by their probability is the exact loss: each estimate is an average over drawn titles."""
    model, trie, context, log_rewards = world
    tree = fit.PackedTree(model.eval(), trie, context)
    share = (trie.log_flows(log_rewards)[trie.leaves] - log_rewards.logsumexp(0)).exp()
    with torch.no_grad():
        exact = loss_of(tree, "exact_ce", log_rewards, None)
        single = torch.stack([loss_of(tree, estimate, log_rewards, leaf[None]) for leaf in trie.leaves])
        torch.testing.assert_close((share * single).sum().float(), exact, rtol=1e-5, atol=1e-5)
        drawn = torch.tensor([0, 3, 3, 7])  # a title drawn twice counts twice
        together = loss_of(tree, estimate, log_rewards, trie.leaves[drawn])
        torch.testing.assert_close(together, single[drawn].mean().to(together), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "paths"),
    [("exact_ce", "reward"), ("exact_squared", "reward"), ("subtree_ce", "reward"), ("sft", "reward"),
     ("subtb", "reward"), ("subtb", "policy"), ("subtb", "schedule"), ("tb", "reward"), ("db", "reward"),
     ("modified_subtb", "reward")],
)
def test_every_loss_reaches_the_target(world, loss, paths):
    model, trie, context, log_rewards = world
    tree = fit.PackedTree(model, trie, context)
    penalty = 1.0 if loss == "modified_subtb" else 0.0
    budget = 5000 if paths == "reward" else 10000  # draws from the policy take tokens too
    log = fit.fit(tree, log_rewards, loss, budget, paths, 32, 3e-3, penalty, evaluations=2, progress=False)
    assert log.kl_target_model.iloc[0] > 0.1
    assert log.kl_target_model.iloc[-1] < 0.05
    assert log.forward_tokens.iloc[-1] > 0 and log.catalogue_mass.iloc[-1] > 0.9


def test_modified_subtb_alone_vanishes_for_policies_that_leave_the_tree(world):
    model, trie, context, log_rewards = world
    tree = fit.PackedTree(model, trie, context)
    log = fit.fit(tree, log_rewards, "modified_subtb", 10000, n_paths=32, learning_rate=3e-3, evaluations=1, progress=False)
    assert log.loss.iloc[-1] < 0.01 and log.catalogue_mass.iloc[-1] < 0.5 and log.kl_target_model.iloc[-1] > 0.1


@pytest.mark.parametrize("loss", fit.LOSSES)
def test_the_penalty_on_every_title_by_its_share_is_the_exact_one(world, loss):
    model, trie, context, log_rewards = world
    tree = fit.PackedTree(model.eval(), trie, context)
    share = (trie.log_flows(log_rewards)[trie.leaves] - log_rewards.logsumexp(0)).exp()
    log_reach = (trie.log_flows(log_rewards) - log_rewards.logsumexp(0)).float()
    with torch.no_grad():
        expected = losses.off_trie_penalty(tree.log_probs()[1:], trie.parent[1:], log_reach)
        drawn = [None] if loss.startswith("exact") else [leaf[None] for leaf in trie.leaves]
        parts = [loss_of(tree, loss, log_rewards, leaf, penalty=1.0) - loss_of(tree, loss, log_rewards, leaf)
                 for leaf in drawn]
    weights = share if len(parts) > 1 else torch.ones(1, dtype=share.dtype)
    torch.testing.assert_close((weights * torch.stack(parts)).sum().float(), expected, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_log(world):
    _, trie, context, log_rewards = world
    logs = []
    for _ in range(2):
        model, _ = backbone.tiny_model([*TITLES, "Recommend a movie:\n"], seed=0)
        tree = fit.PackedTree(model, trie, context)
        logs.append(fit.fit(tree, log_rewards, "subtb", 100, progress=False).drop(columns="seconds"))
    assert logs[0].equals(logs[1])


def test_unknown_losses_are_refused(world):
    with pytest.raises(ValueError, match="choose of exact_ce"):
        fit.fit(None, world[3], "ppo", 1)
