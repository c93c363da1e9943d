"""Packed nodes, the exact log π of the tree, draws, beams and lists: against unpadded rows, one a title."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor

from flowerlib import model as models
from flowerlib import tree
from flowerlib.tree import Beams, PackedTree, Prompts, beam_search

from tiny_world import TITLES, allowed_mask, exact_log_probabilities, finished_training, tiny_world

HISTORIES = [[0], [3, 4, 6, 1], []]  # prompts of unequal length: padding must not matter


@pytest.fixture(scope="module", params=["sequence", "target"])
def world(request):
    return tiny_world(request.param)


def log_leaf_probs(model, catalogue, history, renormalised=True):
    exact = exact_log_probabilities(model, catalogue, history, renormalised)
    return np.array([exact[leaf][0] for leaf in range(len(catalogue.trie.leaves))])


# packing


def test_rows_are_padded_on_the_right():
    for multiple in (1, 3, 5):
        ids = tree.right_padded([[5, 6, 7], [8], []], 9, multiple)
        assert ids.shape == (3, 5 if multiple == 5 else 3)
        assert ids[:, :3].tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
        assert (ids[:, 3:] == 9).all()


def right_padded(contexts):
    """Ids, and the length of each row."""
    return tree.right_padded(contexts), torch.tensor([len(context) for context in contexts])


def closed(trie, nodes):
    """The nodes and all above them but the root, in an order that is not that of the tree."""
    return sorted({int(n) for n in trie.paths(torch.tensor(nodes)).flatten() if n > 0}, key=lambda n: (n * 7) % 5)


def row_before(model, trie, context, node):
    """Logits behind a node: an unpadded row of its own, the context and then the tokens down to the node."""
    path = [int(trie.token[n]) for n in trie.paths(torch.tensor([node]))[0] if n > 0]
    return model(torch.tensor([context + path])).logits[0, -1]


@torch.no_grad()
def test_packed_nodes_see_what_an_unpadded_row_of_their_own_would(world):
    """Two groups behind every row, at columns of their own; parents need not stand before children; -1 is nothing."""
    model, catalogue = world
    trie, contexts = catalogue.trie, [catalogue.context(history) for history in HISTORIES]
    ids, length = right_padded(contexts)
    width = ids.shape[1]
    first, second = closed(trie, trie.leaves[[0, 3, 6]].tolist()), closed(trie, trie.leaves[[0, 5]].tolist())
    assert set(first) & set(second)  # a node in both groups
    nodes = torch.tensor([[*first, -1, *second]]).repeat(3, 1)
    nodes[1, len(first) - 1] = -1  # the last one of the first group is missing from one row
    group = torch.tensor([0] * (len(first) + 1) + [4] * len(second))
    limit = length[:, None].repeat(1, len(group))
    limit[:, group == 4] = ((length + 1) // 2)[:, None]
    packed = tree.pack(trie, width, limit, nodes, group)
    assert packed["attention_mask"].any(-1).all()  # no query sees nothing: kernels differ there
    tokens = torch.cat([ids, trie.token[nodes.clamp(min=0)] * (nodes >= 0)], 1)
    logits = model(input_ids=tokens, **packed, use_cache=False).logits
    assert torch.isfinite(logits).all()
    for row, context in enumerate(contexts):
        alone = model(torch.tensor([context])).logits[0]
        torch.testing.assert_close(logits[row, : len(context)], alone, atol=1e-4, rtol=1e-4)
        for place, node in enumerate(nodes[row].tolist()):
            above = set(trie.paths(torch.tensor([node]))[0].tolist()) - {-1} if node > 0 else set()
            if node > 0 and above <= set(nodes[row, group == group[place]].tolist()):
                seen = context[: int(limit[row, place])]
                expected = row_before(model, trie, seen, node)
                torch.testing.assert_close(logits[row, width + place], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prompts_are_read_once_and_extended_by_and_by(world):
    """One group a branch, behind different columns: extended twice, each node has the logits of its own row."""
    model, catalogue = world
    trie, contexts = catalogue.trie, [catalogue.context(history) for history in HISTORIES]
    ids, length = right_padded(contexts)
    branch = torch.stack([torch.full_like(length, 3), length, torch.ones_like(length)], 1)
    prompts, group = Prompts(model, trie, ids, branch), torch.arange(3)
    seen = [[context[: int(end)] for end in ends] for context, ends in zip(contexts, branch)]
    for row in range(3):
        for p in range(3):
            expected = model(torch.tensor([seen[row][p]])).logits[0, -1]
            torch.testing.assert_close(prompts.logits[row, p], expected, atol=1e-4, rtol=1e-4)
    paths = trie.paths(trie.leaves[[0, 2, 6]])
    for depth in (0, 1):
        nodes = torch.stack([paths[:, depth].roll(row) for row in range(3)])
        logits = prompts.extend(nodes, group)
        for row in range(3):
            for p in range(3):
                expected = row_before(model, trie, seen[row][p], int(nodes[row, p]))
                torch.testing.assert_close(logits[row, p], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_searches_behind_one_prompt_do_not_see_each_other(world):
    """Groups of unequal width behind the whole row, as beams of several searches: each against a row of its own."""
    model, catalogue = world
    trie, contexts = catalogue.trie, [catalogue.context(history) for history in HISTORIES]
    ids, length = right_padded(contexts)
    prompts = Prompts(model, trie, ids, length[:, None])
    children = trie.children(torch.zeros(1, dtype=torch.long))[1]
    below = trie.children(children)[1]
    for step, given in enumerate([[(2, children[:3]), (7, children)], [(7, below), (2, below[:2])]]):
        nodes = torch.cat([part for _, part in given])[None].repeat(3, 1)
        nodes[0, 0] = -1
        group = torch.cat([torch.full_like(part, number) for number, part in given])
        logits = prompts.extend(nodes, group)
        assert torch.isfinite(logits).all()
        for row, context in enumerate(contexts):
            for place, node in enumerate(nodes[row].tolist()):
                orphan = row == 0 and step and group[place] == 2 and trie.parent[node] == children[0]
                if node >= 0 and not orphan:  # its parent was packed
                    expected = row_before(model, trie, context, node)
                    torch.testing.assert_close(logits[row, place], expected, atol=1e-4, rtol=1e-4)


# exact


@pytest.mark.parametrize(("n_frozen", "at_a_time"), [(0, 512), (0, 1), (0, 3), (1, 512), (1, 5)])
@torch.no_grad()
def test_the_packed_tree_gives_every_title_its_exact_probability(world, n_frozen, at_a_time):
    model, catalogue = world
    trie = catalogue.trie
    for history in ([], [0], [3, 4, 6, 1]):
        packed = PackedTree(model, trie, catalogue.context(history), n_frozen, at_a_time)
        packed.model.eval()
        edges = packed.log_probs()
        assert edges[0] == 0 and packed.forward_tokens == 0  # which counts what training sends forward
        for renormalised in (False, True):
            titles = trie.log_leaf_probs(trie.renormalised(edges) if renormalised else edges)
            expected = log_leaf_probs(model, catalogue, history, renormalised)
            np.testing.assert_allclose(titles, expected, atol=1e-4)
        np.testing.assert_allclose(titles.exp().sum(), 1, atol=1e-5)
        reached = torch.cat([children for children, _ in packed.parts()])
        assert sorted(reached.tolist()) == list(range(1, trie.n_nodes))  # every edge once


@torch.no_grad()
def test_edges_of_some_nodes_alone_and_what_ends_there(world):
    """A part of the tree: the nodes of two titles; children and terminator against rows of their own."""
    model, catalogue = world
    trie, context = catalogue.trie, catalogue.context([4])
    packed = PackedTree(model.eval(), trie, context)
    nodes = packed.with_ancestors(trie.parent[trie.leaves[[1, 6]]])
    assert nodes.tolist() == sorted(set(closed(trie, trie.parent[trie.leaves[[1, 6]]].tolist())))
    own = torch.tensor([len(nodes), 0])
    children, log_pf, log_end = packed.edges(nodes, own)
    expected_children, expected_pf, expected_end = [], [], []
    for node in (int(nodes[-1]), 0):
        log_pi = row_before(model, trie, context, node).log_softmax(-1)
        below = (trie.parent == node).nonzero()[:, 0]
        expected_children += below.tolist()
        expected_pf.append(log_pi[trie.token[below]])
        expected_end.append(log_pi[catalogue.terminator])
    assert children.tolist() == expected_children
    torch.testing.assert_close(log_pf, torch.cat(expected_pf), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_end, torch.stack(expected_end), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_frozen", [0, 1])
def test_the_packed_tree_is_differentiable_in_chunks(n_frozen):
    gradients = []
    for at_a_time in (2, 512):
        model, catalogue = tiny_world("sequence")
        packed = PackedTree(model, catalogue.trie, catalogue.context([0]), n_frozen, at_a_time)
        packed.model.train()
        for _, log_pf in packed.parts():
            log_pf.sum().backward()
        gradients.append([w.grad for w in packed.model.parameters() if w.requires_grad])
        assert packed.forward_tokens >= len(catalogue.context([0])) + len(catalogue.trie.inner)
    assert len(gradients[0]) == (11 if n_frozen else 21)  # the upper layer without embeddings, or everything
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


# draws


@torch.no_grad()
def test_samples_follow_the_policy_renormalised_over_children(world):
    model, catalogue = world
    histories = HISTORIES[:2]
    contexts = [catalogue.context(h) for h in histories]
    ids, length = right_padded([context + context[-2:] for context in contexts])  # the last two: behind the branch
    torch.manual_seed(0)
    n, n_paths = 1000, 4
    branch = (length - 2).repeat(n)[:, None].repeat(1, n_paths)
    nodes = tree.sample_leaves(Prompts(model, catalogue.trie, ids.repeat(n, 1), branch))
    nodes = nodes.view(n, 2, n_paths).transpose(1, 2).flatten(0, 1)
    n *= n_paths
    for column, history in enumerate(histories):
        probability = np.exp(log_leaf_probs(model, catalogue, history))
        np.testing.assert_allclose(probability.sum(), 1, atol=1e-5)
        drawn = np.bincount(catalogue.trie.node_leaf[nodes[:, column]].numpy(), minlength=len(probability)) / n
        assert (np.abs(drawn - probability) < 5 * np.sqrt(probability * (1 - probability) / n) + 1e-3).all()


def test_scores_that_are_no_numbers_end_in_a_sentence():
    model, catalogue = tiny_world("sequence")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    ids, length = right_padded([catalogue.context([0])])
    with pytest.raises(ValueError, match="scores are NaN"):
        Prompts(model, catalogue.trie, ids, length[:, None])
    with pytest.raises(ValueError, match="scores are NaN"):
        beam_search(model, catalogue, [[0]], [Beams(3)])
    fine, catalogue = tiny_world("sequence")
    prompts = Prompts(fine, catalogue.trie, ids, length[:, None].expand(1, 20))
    prompts.model = lambda **given: model(**given)  # NaN behind a prompt that is none
    with pytest.raises(ValueError, match="scores are NaN"):
        tree.sample_leaves(prompts)


def test_a_tree_behind_a_prompt_must_fit_the_context():
    model, catalogue = tiny_world("sequence")
    limit = models.context_limit(model)
    with pytest.raises(ValueError, match=f"have {limit + 1} tokens and the model reads {limit}"):
        PackedTree(model, catalogue.trie, [0] * (limit + 1 - catalogue.trie.max_depth))


# beams


class TrieLogitsProcessor(LogitsProcessor):
    """Masks every token that does not continue a title, for transformers' `generate`.

    Where nothing continues it allows ⊤ alone: give `generate` eos_token_id=terminator, to stop where titles end.

    Args:
        prompt_length: columns of input_ids that hold the prompt.
        blocked: (n_prompts, n_nodes) bool, nodes that a prompt may not enter, or None.
    """

    def __init__(self, trie, prompt_length, terminator, blocked=None):
        self.trie, self.prompt_length, self.terminator, self.blocked = trie, prompt_length, terminator, blocked

    def __call__(self, input_ids, scores):
        nodes = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        for column in range(self.prompt_length, input_ids.shape[1]):
            nodes = self.trie.advance(nodes, input_ids[:, column])
        allowed = allowed_mask(self.trie, nodes, scores.shape[-1])
        if self.blocked is not None:
            rows, children = self.trie.children(nodes)
            barred = self.blocked[rows // (len(nodes) // len(self.blocked)), children]
            allowed[rows[barred], self.trie.token[children[barred]]] = False
        allowed[:, self.terminator] |= ~allowed.any(-1)
        return scores.masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_wide_beams_find_every_title_with_its_exact_score(world, normalised, renormalised):
    model, catalogue = world
    search = Beams(8, length_normalised=normalised, child_renormalised=renormalised, seen_allowed=True)
    _, (leaves, scores), again = beam_search(model, catalogue, HISTORIES, [Beams(2), search, search])
    assert (leaves == again[0]).all()  # no search sees another
    np.testing.assert_allclose(scores, again[1], atol=1e-5)
    for history, found, score in zip(HISTORIES, leaves, scores):
        exact = exact_log_probabilities(model, catalogue, history, renormalised)
        expected = {leaf: total / (length if normalised else 1) for leaf, (total, length) in exact.items()}
        assert sorted(found[found >= 0]) == sorted(expected)
        np.testing.assert_allclose(score[found >= 0], sorted(expected.values(), reverse=True), atol=1e-4)
        np.testing.assert_allclose(score[found >= 0], [expected[leaf] for leaf in found[found >= 0]], atol=1e-4)
        assert (score[found < 0] == -np.inf).all()


@torch.no_grad()
def test_batches_of_any_size_give_the_same_lists(world):
    model, catalogue = world
    searches, histories = [Beams(3), Beams(2, child_renormalised=True)], [*HISTORIES, [2, 2], [7]]
    expected = beam_search(model, catalogue, histories, searches)
    for size in (1, 2):
        found = beam_search(model, catalogue, histories, searches, batch_size=size)
        for (leaves, scores), (more, others) in zip(found, expected, strict=True):
            assert (leaves == more).all()
            np.testing.assert_allclose(scores, others, atol=1e-4)


@torch.no_grad()
def test_seen_titles_are_left_out_with_their_namesakes(world):
    model, catalogue = world
    leaf = catalogue.trie.item_leaf.tolist()
    [(leaves, _)] = beam_search(model, catalogue, [[0, 4]], [Beams(8)])
    assert set(leaves[0]) - {-1} == set(leaf) - {leaf[0], leaf[4]}
    assert leaf[4] == leaf[5]
    [(leaves, _)] = beam_search(model, catalogue, [[4]], [Beams(8)], seen=[[0, 4]])
    assert set(leaves[0]) - {-1} == set(leaf) - {leaf[0], leaf[4]}


def test_nodes_of_seen_are_those_with_nothing_else_below(world):
    _, catalogue = world
    trie, seen = catalogue.trie, [[], [4], [0, 1, 2], list(range(len(TITLES)))]
    blocked = tree.nodes_of_seen(trie, seen)
    for row, items in enumerate(seen):
        out = {trie.item_leaf[i].item() for i in items}
        for node in range(trie.n_nodes):
            below = {leaf for leaf, path in enumerate(trie.paths(trie.leaves).tolist()) if node in (0, *path)}
            assert bool(blocked[row, node]) == (below <= out)


@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_beams_equal_transformers_generate_under_the_mask(world, normalised):
    model, catalogue = world
    contexts = [torch.tensor(catalogue.context(history)) for history in ([0], [3, 4, 1])]
    ids, mask = (pad_sequence(rows, True, padding_side="left")
                 for rows in (contexts, list(map(torch.ones_like, contexts))))
    blocked = tree.nodes_of_seen(catalogue.trie, [[0], [3, 4, 1]])
    config = GenerationConfig(
        num_beams=6, num_return_sequences=3, max_new_tokens=catalogue.trie.max_depth, do_sample=False,
        length_penalty=float(normalised), early_stopping="never", eos_token_id=catalogue.terminator,
        pad_token_id=catalogue.terminator, return_dict_in_generate=True, output_scores=True,
    )
    processor = TrieLogitsProcessor(catalogue.trie, ids.shape[1], catalogue.terminator, blocked)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=[processor])
    search = Beams(6, length_normalised=normalised)
    [(_, scores)] = beam_search(model, catalogue, [[0], [3, 4, 1]], [search])
    np.testing.assert_allclose(scores[:, :3], out.sequences_scores.view(2, 3), atol=1e-4)


def test_a_finished_or_lost_beam_may_only_end(world):
    _, catalogue = world
    processor = TrieLogitsProcessor(catalogue.trie, 0, catalogue.terminator)
    sequence = catalogue.sequences[0]
    lost = [catalogue.terminator] + sequence[1:]
    scores = processor(torch.tensor([sequence, lost]), torch.zeros(2, 200))
    assert (scores > -torch.inf).nonzero().tolist() == [[0, catalogue.terminator], [1, catalogue.terminator]]


@torch.no_grad()
def test_a_catalogue_of_one():
    model, tokenizer = models.tiny_model(["Heat", *models.prompt_texts("movie", "sequence")], seed=0)
    catalogue = models.Catalogue.build(tokenizer, ["Heat"], "movie")
    [(leaves, _)] = beam_search(model.eval(), catalogue, [[]], [Beams(3)])
    assert leaves[0].tolist() == [0, -1, -1]
    [(leaves, _)] = beam_search(model, catalogue, [[0]], [Beams(3)])  # and that one was seen
    assert leaves[0].tolist() == [-1, -1, -1]


@torch.no_grad()
def test_stochastic_beams_draw_without_replacement(world):
    """First and second title of many drawn pairs, against p_i and p_i p_j / (1 - p_i)."""
    model, catalogue = world
    n, search = 6000, Beams(2, stochastic=True, seen_allowed=True)
    [(leaves, scores)] = beam_search(model, catalogue, [[0]] * n, [search], batch_size=1000, seed=3)
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
    """Beams narrower than the catalogue lose nothing: how often each title is among two, at either width."""
    model, catalogue = world
    n = 6000
    narrow = Beams(2, stochastic=True, seen_allowed=True)
    wide = Beams(7, stochastic=True, seen_allowed=True)
    lists = [found for found, _ in beam_search(model, catalogue, [[3, 1]] * n, [narrow, wide], batch_size=1000)]
    for leaves in lists:
        assert all(len(set(row)) == len(row) for row in leaves.tolist())
    shares = [np.bincount(leaves[:, :2].ravel(), minlength=7) / n for leaves in lists]
    assert (np.abs(shares[0] - shares[1]) < 5 * np.sqrt(0.5 / n)).all()


@torch.no_grad()
def test_stochastic_beams_repeat_with_their_seed_and_leave_seen_titles_out(world):
    model, catalogue = world
    search = Beams(4, stochastic=True)
    first, again, other = (beam_search(model, catalogue, [[0, 4]] * 20, [search], seed=seed)[0][0]
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
        search = Beams(8, guide=weight, seen_allowed=True)
        [(leaves, scores)] = beam_search(model, catalogue, [[0]], [search], log_p=log_p)
        expected = (1 - weight) * log_leaf_probs(model, catalogue, [0]) + weight * log_p[0].numpy()
        np.testing.assert_allclose(scores[0, :7], np.sort(expected)[::-1], atol=1e-4)
        np.testing.assert_allclose(scores[0, :7], expected[leaves[0, :7]], atol=1e-4)
    with pytest.raises(ValueError, match="needs log_p"):
        beam_search(model, catalogue, [[0]], [search])


@pytest.mark.parametrize("alpha", [-1.5, -0.25, 2.0])
@torch.no_grad()
def test_alpha_adds_the_popularity_of_the_whole_title(world, alpha):
    model, catalogue = world
    trie, counts = catalogue.trie, torch.tensor([40, 0, 3, 900, 7, 1, 60, 12])[: catalogue.trie.n_items]
    by_leaf = torch.zeros(len(trie.leaves)).index_add(0, trie.item_leaf, counts.float()).numpy()
    expected = log_leaf_probs(model, catalogue, [0], renormalised=False) + alpha * np.log(by_leaf + 1)
    for n in (len(by_leaf), len(by_leaf) - 1):  # the last one is pruned by its bound alone
        search = Beams(n, alpha=alpha, seen_allowed=True)
        [(leaves, scores)] = beam_search(model, catalogue, [[0]], [search], item_counts=counts)
        np.testing.assert_allclose(scores[0], np.sort(expected)[::-1][:n], atol=1e-4)
        np.testing.assert_allclose(scores[0], expected[leaves[0]], atol=1e-4)
    with pytest.raises(ValueError, match="needs item_counts"):
        beam_search(model, catalogue, [[0]], [search])
    for other in ({"stochastic": True}, {"length_normalised": True, "alpha": 0.5}):
        with pytest.raises(ValueError, match="goes with neither"):
            Beams(3, **({"alpha": -0.5} | other))


def log_left(trie, edges, out):
    """{leaf: Σ of the edges' log-probabilities} of the titles that are not in `out`, siblings renormalised over those
    left at every step: one title and one step at a time."""
    paths = {leaf: [n for n in path if n >= 0] for leaf, path in enumerate(trie.paths(trie.leaves).tolist())}
    left = {leaf: path for leaf, path in paths.items() if leaf not in out}
    open_nodes = {node for path in left.values() for node in path}
    totals = {}
    for leaf, path in left.items():
        steps = []
        for node in path:
            siblings = [n for n in open_nodes if trie.parent[n] == trie.parent[node]]
            steps.append(float(edges[node] - edges[siblings].logsumexp(0)))
        totals[leaf] = sum(steps)
    return totals


@pytest.mark.parametrize("seen", [[4], [0, 1], [3, 4, 6, 1]])
@torch.no_grad()
def test_a_guide_and_the_policy_are_distributions_over_the_same_children_left(world, seen):
    """With seen titles out, each part of a step adds up to one over the children left."""
    model, catalogue = world
    trie = catalogue.trie
    log_p = torch.randn(1, len(trie.leaves), generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    out = {int(trie.item_leaf[i]) for i in seen}
    log_pi = PackedTree(model, trie, catalogue.context(seen)).log_probs().double()
    paths = trie.paths(trie.leaves).tolist()
    below = [[leaf for leaf, path in enumerate(paths) if node in (0, *path)] for node in range(trie.n_nodes)]
    reach = torch.stack([log_p[0, leaves].logsumexp(0) for leaves in below])  # log Σ p over the titles below
    parts = {0.0: log_left(trie, log_pi, out), 1.0: log_left(trie, reach.double(), out)}
    for part in parts.values():
        assert sum(map(np.exp, part.values())) == pytest.approx(1)
    for weight in (0.0, 0.4, 1.0):
        search = Beams(8, guide=weight, child_renormalised=True)
        [(leaves, scores)] = beam_search(model, catalogue, [seen], [search], log_p=log_p)
        expected = {leaf: (1 - weight) * parts[0.0][leaf] + weight * parts[1.0][leaf] for leaf in parts[0.0]}
        found = leaves[0][leaves[0] >= 0]
        assert sorted(found) == sorted(expected)
        np.testing.assert_allclose(scores[0, : len(found)], [expected[leaf] for leaf in found], atol=1e-4)
        np.testing.assert_allclose(scores[0, : len(found)], sorted(expected.values(), reverse=True), atol=1e-4)


@torch.no_grad()
def test_a_high_temperature_is_nearly_uniform(world):
    model, catalogue = world
    search = Beams(8, temperature=1e6, child_renormalised=True, seen_allowed=True)
    [(leaves, scores)] = beam_search(model, catalogue, [[0]], [search])
    trie = catalogue.trie
    branching = -(trie.child_start[1:] - trie.child_start[:-1]).clamp(min=1).log()
    expected = branching[trie.parent[1:]]
    uniform = trie.log_leaf_probs(torch.cat([torch.zeros(1), expected]))
    np.testing.assert_allclose(scores[0, :7], uniform[leaves[0, :7]], atol=1e-4)


@torch.no_grad()
def test_a_temperature_divides_the_logits_of_the_whole_vocabulary(world):
    model, catalogue = world
    [(leaves, scores)] = beam_search(model, catalogue, [[0]], [Beams(8, temperature=1.5, seen_allowed=True)])
    model.lm_head.weight.div_(1.5)
    expected = log_leaf_probs(model, catalogue, [0], renormalised=False)
    model.lm_head.weight.mul_(1.5)
    np.testing.assert_allclose(scores[0, :7], expected[leaves[0, :7]], atol=1e-4)


@pytest.mark.parametrize("wrong", [
    {"n": 0}, {"temperature": 0.0}, {"guide": 1.5}, {"stochastic": True, "guide": 0.5},
    {"stochastic": True, "length_normalised": True},
])
def test_searches_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Beams(**wrong)


# lists for one user


def test_recommend_lists_unseen_titles_by_id_or_title(tmp_path):
    titles = ["The Rock", "Toy Story", "Heat", "Fargo", "Fargo", "The Big Heat"]
    model = finished_training(tmp_path, titles, max_history=2).eval()
    history = [100, "Toy Story", "Fargo"]
    found = tree.recommend(tmp_path, history, k=5)
    assert sorted(found.title) == ["Heat", "The Big Heat"]  # Fargo and its namesake were seen
    catalogue = models.load_trained(tmp_path)[2]
    expected = log_leaf_probs(model, catalogue, [1, 3], renormalised=False)  # the last two of the history
    place = [titles.index(title) for title in found.title]
    assert found.item_id.tolist() == [100 + i for i in place]
    np.testing.assert_allclose(found.score, expected[catalogue.trie.item_leaf[place].numpy()], atol=1e-4)
    assert found.score.is_monotonic_decreasing
    assert found.equals(tree.recommend(tmp_path, ["Rock, The", 101, " Fargo "], k=5))  # as before cleaning
    pd.testing.assert_frame_equal(found.head(1), tree.recommend(tmp_path, history, k=1))
    everything = tree.recommend(tmp_path, [], k=10)
    assert sorted(everything.title) == sorted(set(titles)) and everything.item_id.is_unique
    assert tree.recommend(tmp_path, "Heat", k=1).equals(tree.recommend(tmp_path, ["Heat"], k=1))


def test_recommend_names_what_it_does_not_know(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 02 or 03 first"):
        tree.recommend(tmp_path, [])
    finished_training(tmp_path)
    with pytest.raises(ValueError, match="k is 0"):
        tree.recommend(tmp_path, [], k=0)
    with pytest.raises(ValueError, match="'Toy Storys' is neither an item id nor .*: did you mean 'Toy Story'"):
        tree.recommend(tmp_path, ["Toy Storys"])
    with pytest.raises(ValueError, match=r"'no such film' is neither an item id nor a title of .*items\.parquet$"):
        tree.recommend(tmp_path, ["no such film"])
