"""Speed of the trie. Ratios of times taken side by side in one process are asserted; seconds only generously."""

import statistics
import time

import numpy as np
import pytest
import torch

from flowerlib.trie import TitleTrie

N_BEAMS = 640  # 64 prompts with 10 beams each


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for a busy machine's cores would drown what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def nested_dicts(titles):
    """The usual way: a dictionary of dictionaries, one look-up per token."""
    root = {}
    for title in titles:
        node = root
        for token in title:
            node = node.setdefault(token, {})
    return root


def full_tree(branching, depth):
    """(branching^depth, depth + 1) every sequence of `depth` tokens below `branching`, then a terminator."""
    rows = np.indices((branching,) * depth).reshape(depth, -1).T + 1
    return np.pad(rows, ((0, 0), (0, 1)))


def test_build_100_000_titles(benchmark):
    rng = np.random.default_rng(0)
    words = np.minimum(rng.zipf(1.3, (100_000, 7)), 49_000)  # frequent tokens share beginnings, as titles do
    titles = np.pad(words, ((0, 0), (0, 1))).tolist()  # 8 tokens, the terminator included
    trie = benchmark.pedantic(TitleTrie.from_sequences, args=(titles,), rounds=5, warmup_rounds=1)
    dicts = statistics.median(seconds(nested_dicts, titles) for _ in range(3))
    ours = benchmark.stats.stats.median
    benchmark.extra_info.update(n_nodes=trie.n_nodes, seconds=ours, times_nested_dicts=ours / dicts)
    print(f"\n{trie.n_nodes:,} nodes in {ours:.2f} s: {ours / dicts:.2f} times nested dictionaries' {dicts:.2f} s")
    assert trie.n_items == 100_000
    assert ours < 10


@pytest.mark.parametrize("vocab_size", [100, 49_152])
def test_masks_do_not_slow_down_with_the_catalogue(benchmark, vocab_size):
    """1,000 against 100,000 titles; every queried node has ten children in both."""
    tries = [TitleTrie.from_sequences(full_tree(10, depth)) for depth in (3, 5)]
    assert [trie.n_items for trie in tries] == [1_000, 100_000]
    rng, queries = np.random.default_rng(0), []
    for trie in tries:
        deepest = torch.nonzero(trie.depth == trie.max_depth - 2)[:, 0]  # the last nodes with ten children
        queries.append(deepest[torch.from_numpy(rng.integers(len(deepest), size=N_BEAMS))])
        assert (trie.allowed_mask(queries[-1], vocab_size).sum(1) == 10).all()
    times = [[], []]
    for _ in range(60):  # taken in turns, so that a busy machine slows both
        for taken, trie, nodes in zip(times, tries, queries, strict=True):
            taken.append(seconds(trie.allowed_mask, nodes, vocab_size))
    small, large = map(statistics.median, times)
    benchmark(tries[1].allowed_mask, queries[1], vocab_size)
    benchmark.extra_info.update(ratio=large / small)
    print(f"\nmask of {N_BEAMS} beams: {small * 1e3:.2f} ms at 1,000 titles, {large * 1e3:.2f} ms at 100,000")
    assert large / small <= 1.5


def test_log_flows_of_many_users(benchmark):
    """A reward vector per user up one tree: the batched call against one call a user."""
    trie = TitleTrie.from_sequences(full_tree(10, 3))
    rewards = torch.randn(256, trie.n_items, generator=torch.Generator().manual_seed(0))
    trie.log_flows(rewards)
    together = statistics.median(seconds(trie.log_flows, rewards) for _ in range(5))
    apart = statistics.median(seconds(lambda: [trie.log_flows(r) for r in rewards]) for _ in range(5))
    benchmark(trie.log_flows, rewards)
    benchmark.extra_info.update(times_one_by_one=together / apart)
    print(f"\n256 users: {together * 1e3:.1f} ms together, {apart * 1e3:.1f} ms one by one")
    assert together <= apart
