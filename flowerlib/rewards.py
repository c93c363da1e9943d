"""Item rewards R(i); the trie turns them into flows F(s) and token rewards r(s → s')."""

from __future__ import annotations

import torch
from torch import Tensor

from .trie import TitleTrie


def log_rewards(rewards: Tensor) -> Tensor:
    """log R of any rewards of one's own, (..., n_items) → float64 of the same shape, in nats.

    Raises ValueError: a reward is zero, negative, NaN or infinite; the message names the item.
    """
    rewards = torch.as_tensor(rewards).double()
    _refuse(~((rewards > 0) & rewards.isfinite()), "reward", rewards, "rewards must be positive and finite")
    return rewards.log()


def count_log_rewards(trie: TitleTrie, counts: Tensor, alpha: float = 1.0, smoothing: float = 1.0) -> Tensor:
    """log R(leaf) = α · log(count + smoothing), the popularity reward (α = 1 in Gao et al. 2025), per item in nats.

    Items with equal titles share a leaf: their counts are added first, then raised, and the leaf's reward is split
    equally among them, so that `trie.log_flows` adds up to it again. α = 0 gives each distinct title the same.

    Deviation: the official code gives no flow to items that occur in no history, so they can never be generated;
    here every title counts `smoothing` more than was seen.

    Args:
        counts: (n_items,) interactions of each item, ≥ 0. alpha: finite. smoothing: above 0, finite.

    Returns (n_items,) float64. Raises ValueError: wrong length; a negative, NaN or infinite count (the message names
    the item); alpha or smoothing not as above.
    """
    if not (0 < smoothing < torch.inf and abs(alpha) < torch.inf):
        raise ValueError(f"smoothing is {smoothing} and alpha {alpha}: both must be finite, and smoothing above 0")
    counts = torch.as_tensor(counts).double()
    if counts.shape != (trie.n_items,):
        raise ValueError(f"{tuple(counts.shape)} counts for {trie.n_items} items")
    _refuse(~((counts >= 0) & counts.isfinite()), "count", counts, "counts must be 0 or more, and finite")
    per_leaf = torch.zeros(len(trie.leaves), dtype=torch.float64, device=counts.device)
    total = per_leaf.index_add(0, trie.item_leaf, counts)
    sharers = per_leaf.index_add(0, trie.item_leaf, torch.ones_like(counts))
    return (alpha * (total + smoothing).log() - sharers.log())[trie.item_leaf]


def preference_log_rewards(trie: TitleTrie, log_item_rewards: Tensor, log_p: Tensor, beta: float = 1.0) -> Tensor:
    """log R(leaf | u) = log R(leaf) + β · log p_u(leaf): the exact preference reward, per user and item, in nats.

    log_item_rewards (n_items,) as of `count_log_rewards`; log_p (..., n_leaves) → (..., n_items). Like any
    reward it is raised up the tree: flow is conserved at every node for every user. Items that share a leaf share it.

    Deviation: the paper tilts the edges of a path by the preference for the path's own title (`tilted`).
    """
    return log_item_rewards + beta * log_p[..., trie.item_leaf]


def tilted(log_token_rewards: Tensor, log_p: Tensor, leaf: Tensor, reward: str, strength: float = 1.0) -> Tensor:
    """Token rewards tilted by the preference for the title that each path spells: Gao et al. 2025, Sec. 3.

    div: log r / s_ui, s_ui = (p_ui − mean_j p_uj) / (max_j p_uj − min_j p_uj) + 1, and 1 where max = min.
    add: log r + strength · log p̃_ui, p̃ brought to [1e-8, 1] by the user's minimum and maximum.
    Flow is not conserved where titles branch: siblings are tilted by different titles.

    Args:
        log_token_rewards: (B, T) log r along each path.
        log_p: (B, n_leaves) log preference of each path's user. leaf: (B,) the path's title.

    Raises ValueError: reward is neither div nor add, or the strength is NaN or infinite.
    """
    if reward not in ("div", "add") or not abs(strength) < torch.inf:
        raise ValueError(f"reward is {reward!r} of strength {strength}: choose div or add, and a finite strength")
    p = log_p.double().exp()
    own, (low, high) = p.gather(1, leaf[:, None]), p.aminmax(dim=1, keepdim=True)
    flat = high == low
    span = (high - low).masked_fill(flat, 1)
    if reward == "div":
        s = torch.where(flat, 1.0, (own - p.mean(1, keepdim=True)) / span + 1)
        return log_token_rewards / s.to(log_token_rewards)
    relative = torch.where(flat, 1.0, ((own - low) / span).clamp(min=1e-8))
    return log_token_rewards + strength * relative.log().to(log_token_rewards)


def _refuse(bad: Tensor, name: str, values: Tensor, rule: str) -> None:
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"the {name} of item {index[-1]} is {values[index]:g}; {rule}")
