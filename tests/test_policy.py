import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from flowerlib import backbone, policy

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "Fargo", "The Rock", "The Big Heat"]


@pytest.fixture(scope="module", params=["sequence", "target"])
def world(request):
    model, tokenizer = backbone.tiny_model([*TITLES, *policy.prompt_texts("movie", request.param)], seed=1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(3)  # a policy that is far from uniform
    return model.eval(), policy.Catalogue.build(tokenizer, TITLES, "movie", request.param)


def exact_log_probabilities(model, catalogue, history, renormalised):
    """Σ log π of every leaf, one title and one forward pass at a time, without padding or cache."""
    context, trie, scores = catalogue.context(history), catalogue.trie, {}
    for item, sequence in enumerate(catalogue.sequences):
        logits = model(torch.tensor([context + sequence])).logits[0].double().log_softmax(-1)
        total, node = 0.0, 0
        for t, token in enumerate(sequence):
            log_pi = logits[len(context) + t - 1]
            children = [int(trie.token[c]) for c in range(trie.n_nodes) if trie.parent[c] == node]
            total += log_pi[token].item() - (log_pi[children].logsumexp(0).item() if renormalised else 0)
            node = int(trie.advance(torch.tensor([node]), torch.tensor([token]))[0])
        scores[int(trie.item_leaf[item])] = (total, len(sequence))
    return scores


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_wide_beams_find_every_title_with_its_exact_score(world, normalised, renormalised):
    model, catalogue = world
    histories = [[0], [3, 4, 6, 1], []]
    search = policy.Beams(8, length_normalised=normalised, child_renormalised=renormalised, seen_allowed=True)
    _, (leaves, scores), again = policy.beam_search(model, catalogue, histories, [policy.Beams(2), search, search])
    assert (leaves == again[0]).all() and (scores == again[1]).all()  # a search leaves the prompt's cache as it was
    for history, found, score in zip(histories, leaves, scores):
        exact = exact_log_probabilities(model, catalogue, history, renormalised)
        expected = {leaf: total / (length if normalised else 1) for leaf, (total, length) in exact.items()}
        assert sorted(found[found >= 0]) == sorted(expected)
        np.testing.assert_allclose(score[found >= 0], sorted(expected.values(), reverse=True), atol=1e-4)
        np.testing.assert_allclose(score[found >= 0], [expected[leaf] for leaf in found[found >= 0]], atol=1e-4)
        assert (score[found < 0] == -np.inf).all()


@torch.no_grad()
def test_seen_titles_are_left_out_with_their_namesakes(world):
    model, catalogue = world
    leaf = catalogue.trie.item_leaf.tolist()
    [(leaves, _)] = policy.beam_search(model, catalogue, [[0, 4]], [policy.Beams(8)])
    assert set(leaves[0]) - {-1} == set(leaf) - {leaf[0], leaf[4]}
    assert leaf[4] == leaf[5]
    [(leaves, _)] = policy.beam_search(model, catalogue, [[4]], [policy.Beams(8)], seen=[[0, 4]])
    assert set(leaves[0]) - {-1} == set(leaf) - {leaf[0], leaf[4]}


@torch.no_grad()
def test_samples_follow_the_policy_renormalised_over_children(world):
    model, catalogue = world
    histories = [[0], [3, 4, 6, 1]]  # prompts of unequal length: padding must not matter
    ids, mask = policy.left_padded([catalogue.context(h) for h in histories])
    torch.manual_seed(0)
    n = 4000
    nodes = policy.sample_leaves(model, catalogue.trie, ids.repeat(n, 1), mask.repeat(n, 1)).view(n, 2)
    for column, history in enumerate(histories):
        exact = exact_log_probabilities(model, catalogue, history, renormalised=True)
        probability = np.exp([exact[leaf][0] for leaf in range(len(catalogue.trie.leaves))])
        np.testing.assert_allclose(probability.sum(), 1, atol=1e-5)
        drawn = np.bincount(catalogue.trie.node_leaf[nodes[:, column]].numpy(), minlength=len(probability)) / n
        assert (np.abs(drawn - probability) < 5 * np.sqrt(probability * (1 - probability) / n) + 1e-3).all()


@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_beams_equal_transformers_generate_under_the_mask(world, normalised):
    model, catalogue = world
    ids, mask = policy.left_padded([catalogue.context([0]), catalogue.context([3, 4, 1])])
    blocked = policy._nodes_of(catalogue.trie, [[0], [3, 4, 1]])
    config = GenerationConfig(
        num_beams=6, num_return_sequences=3, max_new_tokens=catalogue.trie.max_depth, do_sample=False,
        length_penalty=float(normalised), early_stopping="never", eos_token_id=catalogue.terminator,
        pad_token_id=catalogue.terminator, return_dict_in_generate=True, output_scores=True,
    )
    processor = policy.TrieLogitsProcessor(catalogue.trie, ids.shape[1], catalogue.terminator, blocked)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=[processor])
    search = policy.Beams(6, length_normalised=normalised)
    [(_, scores)] = policy.beam_search(model, catalogue, [[0], [3, 4, 1]], [search])
    np.testing.assert_allclose(scores[:, :3], out.sequences_scores.view(2, 3), atol=1e-4)


def test_a_finished_or_lost_beam_may_only_end(world):
    _, catalogue = world
    processor = policy.TrieLogitsProcessor(catalogue.trie, 0, catalogue.terminator)
    sequence = catalogue.sequences[0]
    lost = [catalogue.terminator] + sequence[1:]
    scores = processor(torch.tensor([sequence, lost]), torch.zeros(2, 200))
    assert (scores > -torch.inf).nonzero().tolist() == [[0, catalogue.terminator], [1, catalogue.terminator]]


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


@torch.no_grad()
def test_a_catalogue_of_one():
    model, tokenizer = backbone.tiny_model(["Heat", *policy.prompt_texts("movie", "sequence")], seed=0)
    catalogue = policy.Catalogue.build(tokenizer, ["Heat"], "movie")
    [(leaves, _)] = policy.beam_search(model.eval(), catalogue, [[]], [policy.Beams(3)])
    assert leaves[0].tolist() == [0, -1, -1]


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
