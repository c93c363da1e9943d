"""Item rewards R(i); the trie turns them into flows F(s) and token rewards r(s → s')."""

from __future__ import annotations

import torch
from torch import Tensor

from .trie import TitleTrie


def log_rewards(rewards: Tensor) -> Tensor:
    """log R of any rewards of one's own, (..., n_items) → float64 of the same shape, in nats.

    Raises:
        ValueError: a reward is zero, negative, NaN or infinite; the message names the item.
    """
    rewards = torch.as_tensor(rewards).double()
    bad = ~((rewards > 0) & torch.isfinite(rewards))
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"the reward of item {index[-1]} is {rewards[index]:g}; rewards must be positive and finite")
    return rewards.log()


def count_log_rewards(trie: TitleTrie, counts: Tensor, alpha: float = 1.0) -> Tensor:
    """log R(leaf) = α · log(count + 1), the popularity reward (α = 1 in Gao et al. 2025), per item in nats.

    Items with equal titles share a leaf: their counts are added first, then raised, and the leaf's reward is split
    equally among them, so that `trie.log_flows` adds up to it again. α = 0 gives each distinct title the same.

    Deviation: the official code gives no flow to items that occur in no history, so they can never be generated;
    here every catalogue item counts one more than was seen.

    Args:
        counts: (n_items,) interactions of each item, ≥ 0.

    Returns:
        (n_items,) float64.

    Raises:
        ValueError: wrong length, or a negative, NaN or infinite count; the message names the item.
    """
    counts = torch.as_tensor(counts).double()
    if counts.shape != (trie.n_items,):
        raise ValueError(f"{tuple(counts.shape)} counts for {trie.n_items} items")
    bad = ~((counts >= 0) & torch.isfinite(counts))
    if bad.any():
        item = int(bad.nonzero()[0, 0])
        raise ValueError(f"the count of item {item} is {counts[item]:g}; counts must be 0 or more, and finite")
    per_leaf = torch.zeros(len(trie.leaves), dtype=torch.float64, device=counts.device)
    total = per_leaf.index_add(0, trie.item_leaf, counts)
    sharers = per_leaf.index_add(0, trie.item_leaf, torch.ones_like(counts))
    return (alpha * (total + 1).log() - sharers.log())[trie.item_leaf]
