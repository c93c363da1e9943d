import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from flowerlib import backbone, decoding, policy

from tiny_world import exact_log_probabilities, tiny_world


@pytest.fixture(scope="module", params=["sequence", "target"])
def world(request):
    return tiny_world(request.param)


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_wide_beams_find_every_title_with_its_exact_score(world, normalised, renormalised):
    model, catalogue = world
    histories = [[0], [3, 4, 6, 1], []]
    search = decoding.Beams(8, length_normalised=normalised, child_renormalised=renormalised, seen_allowed=True)
    _, (leaves, scores), again = decoding.beam_search(model, catalogue, histories, [decoding.Beams(2), search, search])
    assert (leaves == again[0]).all()  # no search sees another
    np.testing.assert_allclose(scores, again[1], atol=1e-5)
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
    [(leaves, _)] = decoding.beam_search(model, catalogue, [[0, 4]], [decoding.Beams(8)])
    assert set(leaves[0]) - {-1} == set(leaf) - {leaf[0], leaf[4]}
    assert leaf[4] == leaf[5]
    [(leaves, _)] = decoding.beam_search(model, catalogue, [[4]], [decoding.Beams(8)], seen=[[0, 4]])
    assert set(leaves[0]) - {-1} == set(leaf) - {leaf[0], leaf[4]}


@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_beams_equal_transformers_generate_under_the_mask(world, normalised):
    model, catalogue = world
    ids, mask = policy.left_padded([catalogue.context([0]), catalogue.context([3, 4, 1])])
    blocked = decoding._nodes_of(catalogue.trie, [[0], [3, 4, 1]])
    config = GenerationConfig(
        num_beams=6, num_return_sequences=3, max_new_tokens=catalogue.trie.max_depth, do_sample=False,
        length_penalty=float(normalised), early_stopping="never", eos_token_id=catalogue.terminator,
        pad_token_id=catalogue.terminator, return_dict_in_generate=True, output_scores=True,
    )
    processor = decoding.TrieLogitsProcessor(catalogue.trie, ids.shape[1], catalogue.terminator, blocked)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=[processor])
    search = decoding.Beams(6, length_normalised=normalised)
    [(_, scores)] = decoding.beam_search(model, catalogue, [[0], [3, 4, 1]], [search])
    np.testing.assert_allclose(scores[:, :3], out.sequences_scores.view(2, 3), atol=1e-4)


def test_a_finished_or_lost_beam_may_only_end(world):
    _, catalogue = world
    processor = decoding.TrieLogitsProcessor(catalogue.trie, 0, catalogue.terminator)
    sequence = catalogue.sequences[0]
    lost = [catalogue.terminator] + sequence[1:]
    scores = processor(torch.tensor([sequence, lost]), torch.zeros(2, 200))
    assert (scores > -torch.inf).nonzero().tolist() == [[0, catalogue.terminator], [1, catalogue.terminator]]


@torch.no_grad()
def test_a_catalogue_of_one():
    model, tokenizer = backbone.tiny_model(["Heat", *policy.prompt_texts("movie", "sequence")], seed=0)
    catalogue = policy.Catalogue.build(tokenizer, ["Heat"], "movie")
    [(leaves, _)] = decoding.beam_search(model.eval(), catalogue, [[]], [decoding.Beams(3)])
    assert leaves[0].tolist() == [0, -1, -1]


def log_leaf_probs(model, catalogue, history, renormalised=True):
    exact = exact_log_probabilities(model, catalogue, history, renormalised)
    return np.array([exact[leaf][0] for leaf in range(len(catalogue.trie.leaves))])


@torch.no_grad()
def test_stochastic_beams_draw_without_replacement(world):
    """First and second title of many drawn pairs, against p_i and p_i p_j / (1 - p_i)."""
    model, catalogue = world
    n, search = 6000, decoding.Beams(2, stochastic=True, seen_allowed=True)
    [(leaves, scores)] = decoding.beam_search(model, catalogue, [[0]] * n, [search], batch_size=1000, seed=3)
    log_p = log_leaf_probs(model, catalogue, [0])
    np.testing.assert_allclose(scores, log_p[leaves], atol=1e-4)
    p = np.exp(log_p)
    pairs = p[:, None] * p / (1 - p[:, None])
    np.fill_diagonal(pairs, 0)
    np.testing.assert_allclose(pairs.sum(), 1, atol=1e-5)
    drawn = np.zeros_like(pairs)
    np.add.at(drawn, tuple(leaves.T), 1 / n)
    assert (np.abs(drawn - pairs) < 5 * np.sqrt(pairs * (1 - pairs) / n) + 1e-3).all()


@torch.no_grad()
def test_narrow_stochastic_beams_are_the_beginning_of_wide_ones_in_law(world):
    """Beams narrower than the catalogue lose nothing: how often each title is among two, by width two and by enumeration."""
    model, catalogue = world
    n = 6000
    narrow = decoding.Beams(2, stochastic=True, seen_allowed=True)
    wide = decoding.Beams(7, stochastic=True, seen_allowed=True)
    lists = [found for found, _ in decoding.beam_search(model, catalogue, [[3, 1]] * n, [narrow, wide], batch_size=1000)]
    for leaves in lists:
        assert all(len(set(row)) == len(row) for row in leaves.tolist())
    shares = [np.bincount(leaves[:, :2].ravel(), minlength=7) / n for leaves in lists]
    assert (np.abs(shares[0] - shares[1]) < 5 * np.sqrt(0.5 / n)).all()


@torch.no_grad()
def test_stochastic_beams_repeat_with_their_seed_and_leave_seen_titles_out(world):
    model, catalogue = world
    search = decoding.Beams(4, stochastic=True)
    first, again, other = (decoding.beam_search(model, catalogue, [[0, 4]] * 20, [search], seed=seed)[0][0]
                           for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    leaf = catalogue.trie.item_leaf
    assert not set(first.ravel()) & {int(leaf[0]), int(leaf[4])}


@torch.no_grad()
def test_a_guide_mixes_the_policy_with_the_preference(world):
    model, catalogue = world
    trie = catalogue.trie
    log_p = torch.randn(1, len(trie.leaves), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for weight in (0.3, 1.0):
        search = decoding.Beams(8, guide=weight, seen_allowed=True)
        [(leaves, scores)] = decoding.beam_search(model, catalogue, [[0]], [search], log_p=log_p)
        expected = (1 - weight) * log_leaf_probs(model, catalogue, [0]) + weight * log_p[0].numpy()
        np.testing.assert_allclose(scores[0, :7], np.sort(expected)[::-1], atol=1e-4)
        np.testing.assert_allclose(scores[0, :7], expected[leaves[0, :7]], atol=1e-4)
    with pytest.raises(ValueError, match="needs log_p"):
        decoding.beam_search(model, catalogue, [[0]], [search])


@torch.no_grad()
def test_a_high_temperature_is_nearly_uniform(world):
    model, catalogue = world
    search = decoding.Beams(8, temperature=1e6, child_renormalised=True, seen_allowed=True)
    [(leaves, scores)] = decoding.beam_search(model, catalogue, [[0]], [search])
    trie = catalogue.trie
    branching = -(trie.child_start[1:] - trie.child_start[:-1]).clamp(min=1).log()
    expected = branching[trie.parent[1:]]
    uniform = trie.log_leaf_probs(torch.cat([torch.zeros(1), expected]))
    np.testing.assert_allclose(scores[0, :7], uniform[leaves[0, :7]], atol=1e-4)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"temperature": 0.0}, {"guide": 1.5}, {"stochastic": True, "guide": 0.5}])
def test_searches_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        decoding.Beams(**wrong)
