import numpy as np
import pytest
import torch
from flowerlib import backbone, policy

from tiny_world import TITLES, exact_log_probabilities, tiny_world


@pytest.fixture(scope="module", params=["sequence", "target"])
def world(request):
    return tiny_world(request.param)


@torch.no_grad()
def test_samples_follow_the_policy_renormalised_over_children(world):
    model, catalogue = world
    histories = [[0], [3, 4, 6, 1]]  # prompts of unequal length: padding must not matter
    ids, mask = policy.left_padded([catalogue.context(h) for h in histories])
    torch.manual_seed(0)
    n, n_paths = 1000, 4
    branch = torch.full((2 * n, n_paths), ids.shape[1])
    ids, mask = torch.cat([ids, ids[:, -2:]], 1), torch.cat([mask, mask[:, -2:]], 1)  # what stands behind the branch
    nodes = policy.sample_leaves(model, catalogue.trie, ids.repeat(n, 1), mask.repeat(n, 1), branch)
    nodes = nodes.view(n, 2, n_paths).transpose(1, 2).flatten(0, 1)
    n *= n_paths
    for column, history in enumerate(histories):
        exact = exact_log_probabilities(model, catalogue, history, renormalised=True)
        probability = np.exp([exact[leaf][0] for leaf in range(len(catalogue.trie.leaves))])
        np.testing.assert_allclose(probability.sum(), 1, atol=1e-5)
        drawn = np.bincount(catalogue.trie.node_leaf[nodes[:, column]].numpy(), minlength=len(probability)) / n
        assert (np.abs(drawn - probability) < 5 * np.sqrt(probability * (1 - probability) / n) + 1e-3).all()


def test_title_and_terminator_are_encoded_once(world):
    _, catalogue = world
    assert catalogue.leaf_titles == list(dict.fromkeys(TITLES))
    start = len(catalogue.header)
    assert catalogue.context([0])[start : start + len(catalogue.sequences[0]) - 1] == catalogue.sequences[0][:-1]


@pytest.mark.parametrize("title", ["", "two\nlines"])
def test_a_title_that_is_empty_or_holds_a_newline_is_named(title):
    _, tokenizer = backbone.tiny_model(["a", "two lines"], seed=0)
    with pytest.raises(ValueError, match="item 1 has the title"):
        policy.Catalogue.build(tokenizer, ["a", title], "movie")


@pytest.mark.parametrize("at_a_time", [1, 3, 512])
@torch.no_grad()
def test_the_packed_tree_gives_every_title_its_exact_probability(world, at_a_time):
    model, catalogue = world
    trie = catalogue.trie
    for history in ([], [0], [3, 4, 6, 1]):
        edges = policy.tree_log_probs(model, trie, catalogue.context(history), at_a_time)
        for renormalised in (False, True):
            titles = trie.log_leaf_probs(trie.renormalised(edges) if renormalised else edges)
            exact = exact_log_probabilities(model, catalogue, history, renormalised)
            expected = [exact[leaf][0] for leaf in range(len(trie.leaves))]
            np.testing.assert_allclose(titles, expected, atol=1e-4)
        np.testing.assert_allclose(titles.exp().sum(), 1, atol=1e-5)


def test_the_packed_tree_is_differentiable_in_chunks(world):
    model, catalogue = world
    gradients = []
    for at_a_time in (2, 512):
        model.zero_grad()
        policy.tree_log_probs(model, catalogue.trie, catalogue.context([0]), at_a_time).sum().backward()
        gradients.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    model.zero_grad()


def test_scores_that_are_no_numbers_end_in_a_sentence():
    model, catalogue = tiny_world("sequence")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    ids, mask = policy.left_padded([catalogue.context([0])])
    with pytest.raises(ValueError, match="scores are NaN"):
        policy.sample_leaves(model, catalogue.trie, ids, mask, torch.tensor([[ids.shape[1]]]))
