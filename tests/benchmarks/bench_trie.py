"""The tree at a million titles: building it, walking it, sending flows up."""

import numpy as np
import pytest
import torch
from transformers import PrefixConstrainedLogitsProcessor

from flowerlib.trie import TitleTrie

from tiny_world import allowed_mask

N, BEAMS = 1_000_000, 640  # 64 prompts with 10 beams each
VOCABULARY = 49_152


def nested_dicts(sequences):
    """The usual way: a dictionary of dictionaries, one look-up per token."""
    root = {}
    for sequence in sequences:
        node = root
        for token in sequence:
            node = node.setdefault(token, {})
    return root


def million_rows():
    """(N, 8) random tokens below 2,048, the last one the terminator."""
    rows = np.random.default_rng(0).integers(1, 2048, (N, 8))
    rows[:, -1] = 0
    return rows


def uneven_titles(n):
    """Sequences as long as titles are (3 to 40 tokens, 14 on average), of words as unequal as words are; every title
    comes back with suffixes, as editions and sequels do."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.45, 0.45, 4_000), 2, 39).astype(int)
    titles = [np.minimum(rng.zipf(1.3, length), VOCABULARY - 2).tolist() for length in lengths]
    return [[*titles[i % len(titles)], 1 + i // len(titles), 0] for i in range(n)]


def full_tree(branching, depth):
    """(branching^depth, depth + 1) every sequence of `depth` tokens below `branching`, then a terminator."""
    rows = np.indices((branching,) * depth).reshape(depth, -1).T + 1
    return np.pad(rows, ((0, 0), (0, 1)))


@pytest.mark.parametrize(("given", "times"), [("array", 30), ("lists", 10)])
def test_building_a_million_titles(side_by_side, given, times):
    rows = million_rows()
    lists = rows.tolist()
    side_by_side(
        f"build 1,000,000 titles of 8 tokens from {given} / nested dicts", 1 / times,
        lambda: TitleTrie.from_sequences(rows if given == "array" else lists), lambda: nested_dicts(lists), rounds=5,
    )


def test_memory(benchmark, keep):
    """What the tree keeps, with what it computes at first use; length-normalised beams add `deepest`, 8 bytes a node."""
    trie = benchmark.pedantic(TitleTrie.from_sequences, (million_rows(),))
    trie.leaves, trie.item_leaf, trie.node_leaf, trie.forks, trie.inner
    trie.advance(torch.zeros(1, dtype=torch.long), torch.ones(1).long())
    kept = [x for value in vars(trie).values() for x in (value if isinstance(value, tuple) else (value,))]
    n_bytes = sum(x.numel() * x.element_size() for x in kept if isinstance(x, torch.Tensor))
    keep({"name": "memory of 1,000,000 titles, bytes a node / 64 bytes", "ratio": n_bytes / trie.n_nodes / 64, "bound": 1.0})
    assert n_bytes <= 64 * trie.n_nodes


def test_building_is_linear_in_the_tokens(side_by_side):
    titles = uneven_titles(N)
    side_by_side("build 1,000,000 uneven titles / 500,000", 2.2, lambda: TitleTrie.from_sequences(titles),
                 lambda: TitleTrie.from_sequences(titles[: N // 2]), rounds=5)


@pytest.mark.parametrize(("what", "bound"), [("children", 1 / 50), ("full mask", 1 / 20), ("full mask put on the scores", 1)])
def test_one_step_of_640_beams_against_transformers(side_by_side, what, bound):
    """A step down the tree and what may follow, against transformers' processor over nested dictionaries.

    The processor walks each prefix from the root, four tokens here, and hands back a masked copy of the scores. That copy
    alone, 126 MB, takes longer than all the rest of ours: hence a line for the mask and one for the copy.
    """
    rows = full_tree(10, 6)
    trie, dicts = TitleTrie.from_sequences(rows), nested_dicts(rows.tolist())
    prefix = torch.from_numpy(rows[np.random.default_rng(0).integers(N, size=BEAMS), :4])
    scores = torch.zeros(BEAMS, VOCABULARY)

    def allowed(_, tokens):
        node = dicts
        for token in tokens.tolist():
            node = node[token]
        return list(node)

    processor = PrefixConstrainedLogitsProcessor(allowed, num_beams=10)
    above = trie.leaf.new_zeros(BEAMS)
    for column in prefix[:, :-1].T:
        above = trie.advance(above, column)

    def ours():
        nodes = trie.advance(above, prefix[:, -1])
        if what == "full mask":
            return allowed_mask(trie, nodes, VOCABULARY)
        beams, children = trie.children(nodes)
        if what == "children":
            return scores.view(-1).index_select(0, beams * VOCABULARY + trie.token[children])
        masked = torch.full_like(scores, -torch.inf)
        masked[beams, trie.token[children]] = scores[beams, trie.token[children]]
        return masked

    side_by_side(f"step of 640 beams, 1,000,000 titles, {what} / transformers' processor", bound, ours,
                 lambda: processor(prefix, scores), rounds=31)


@pytest.mark.parametrize("vocabulary", [100, VOCABULARY])
def test_a_step_does_not_slow_down_with_the_catalogue(side_by_side, vocabulary):
    """1,000 against 1,000,000 titles; every node in question has ten children in both."""
    steps = []
    for depth in (6, 3):
        trie = TitleTrie.from_sequences(full_tree(10, depth))
        above = torch.nonzero(trie.depth == depth - 2)[:, 0]  # two steps from the end, so that ten children follow
        above = above[torch.from_numpy(np.random.default_rng(0).integers(len(above), size=BEAMS))]
        tokens = torch.from_numpy(np.random.default_rng(1).integers(1, 11, size=BEAMS))
        assert (allowed_mask(trie, trie.advance(above, tokens), vocabulary).sum(1) == 10).all()
        steps.append(lambda trie=trie, above=above, tokens=tokens: allowed_mask(trie, trie.advance(above, tokens), vocabulary))
    side_by_side(f"step of 640 beams, vocabulary {vocabulary:,}, 1,000,000 titles / 1,000", 1.5, *steps, rounds=61)


def test_flows_of_64_users(side_by_side):
    """Rewards of 64 users up a tree of a million titles, against a cumulative sum over as many numbers."""
    trie = TitleTrie.from_sequences(million_rows())
    rewards = torch.randn(64, trie.n_items, generator=torch.Generator().manual_seed(0))
    numbers = torch.zeros(64, trie.n_nodes)
    side_by_side("log flows of 64 users, 1,000,000 titles / cumulative sum", 10, lambda: trie.log_flows(rewards),
                 lambda: numbers.cumsum(-1), rounds=3)
