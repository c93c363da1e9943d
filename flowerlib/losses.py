"""Losses as pure functions of log-probabilities (nats); a row of (B, T) is one title's path down the tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .trie import segment_logsumexp

FLOOR_LOG_REWARD = -15.0  # what the official code gives the terminator where the prefix is no title
FLOW_LOSSES = ("subtb", "tb", "db", "modified_subtb", "divergence")


@dataclass(frozen=True)
class Paths:
    """Titles on their way down the tree, and what a flow loss reads of them, in nats.

    Attributes:
        mask: (B, T) bool, True on each title's tokens, its terminator included.
        log_pf, log_r: (B, T) log π and log r of the titles' tokens; for every loss but "divergence".
        edge_log_pf, edge_log_r, visits, n_states: the arguments of `divergence_loss`.
        log_end, log_end_r: log_pterm and log_term_rewards of `modified_subtb_loss`.
    """

    mask: Tensor
    log_pf: Tensor | None = None
    log_r: Tensor | None = None
    edge_log_pf: Tensor | None = None
    edge_log_r: Tensor | None = None
    visits: Tensor | float = 1.0
    n_states: int = 1
    log_end: Tensor | None = None
    log_end_r: Tensor | None = None


def flow_loss(name: str, paths: Paths, lam: float = 1.0) -> Tensor:
    """One of FLOW_LOSSES, a scalar: nats² for the balance losses, nats for the divergence. ValueError for another name."""
    if name == "divergence":
        return divergence_loss(paths.edge_log_pf, paths.edge_log_r, paths.n_states, paths.visits)
    if name == "tb":
        return trajectory_balance_loss(paths.log_pf, paths.log_r, paths.mask)
    if name == "modified_subtb":
        return modified_subtb_loss(paths.log_pf, paths.log_end, paths.log_r, paths.log_end_r, paths.mask, lam)
    if name in ("subtb", "db"):
        return subtb_loss(paths.log_pf, paths.log_r, paths.mask, lam if name == "subtb" else 0.0)
    raise ValueError(f"{name!r} is no flow loss: choose one of {', '.join(FLOW_LOSSES)}")


def sft_loss(log_pf: Tensor, mask: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of −log π over the target tokens, in nats per token: supervised fine-tuning (BIGRec).

    Args:
        log_pf: log π(token | prefix, prompt), any shape.
        mask: bool, the same shape: which tokens count.
        weight: what each token's term is multiplied by before the mean (IFairLRS); averages to 1 over the data.
    """
    return -(torch.where(mask, log_pf, 0) * weight).sum() / mask.sum()


def subtb_loss(log_pf: Tensor, log_token_rewards: Tensor, mask: Tensor, lam: float = 1.0) -> Tensor:
    """Sub-trajectory balance with known flows (Gao et al. 2025): zero exactly where π equals the token rewards.

    With d_t = log π(v_{t+1} | s_t) − log r(s_t → s_{t+1}), the residual of the sub-path from a to b is Σ d_t for
    a ≤ t < b. The loss is the mean of the squared residuals over every sub-path in the batch, weighted by
    lam^(b−a−1), in nats². Neighbours only (lam → 0) is detailed balance.

    Args:
        log_pf, log_token_rewards: (B, T) per token.
        mask: (B, T) bool, True on the path's tokens, its terminator included; False after them.

    Raises:
        ValueError: shapes differ, a mask has holes, or no token is left.
    """
    _check(mask, log_pf, log_token_rewards)
    return _mean_squared_sums(torch.where(mask, log_pf - log_token_rewards, 0), mask, lam)


def modified_subtb_loss(
    log_pf: Tensor, log_pterm: Tensor, log_token_rewards: Tensor, log_term_rewards: Tensor, mask: Tensor,
    lam: float = 1.0,
) -> Tensor:
    """The official code's form, in which every prefix may end: nats², weighted over sub-paths as in `subtb_loss`.

    With p_t = log π(⊤ | s_t) and q_t = Σ_{u<t} log r_u + log_term_rewards_t, the residual of one step is
    Δ_t = q_t + log π(v_{t+1} | s_t) + p_{t+1} − q_{t+1} − p_t. It vanishes not at π = r but at the tree that has one
    pseudo-leaf of relative reward e^−15 more at every prefix that is no title.

    Args:
        log_pf: (B, T) log π of the path's tokens, the terminator last.
        log_pterm: (B, T) log π(⊤ | s_t) at the state before each token.
        log_token_rewards: (B, T) log r of the path's tokens.
        log_term_rewards: (B, T) log r(s_t → s_t⊤) where s_t is a whole title, else FLOOR_LOG_REWARD.
        mask: (B, T) bool as in `subtb_loss`.

    Raises:
        ValueError: as in `subtb_loss`; a batch of one-token paths has no step and is refused too.
    """
    _check(mask, log_pf, log_pterm, log_token_rewards, log_term_rewards)
    q = log_token_rewards.cumsum(-1) - log_token_rewards + log_term_rewards
    delta = (q + log_pf - log_pterm)[:, :-1] + (log_pterm - q)[:, 1:]
    steps = mask[:, 1:]
    if not steps.any():
        raise ValueError("no path has a token before its terminator")
    return _mean_squared_sums(torch.where(steps, delta, 0), steps, lam)


def divergence_loss(
    log_pf: Tensor, log_token_rewards: Tensor, n_states: int, visits: Tensor | float = 1.0
) -> Tensor:
    """Mean of KL(r(·|s) ‖ π(·|s)) over the states s of some paths, in nats: zero exactly where π equals the token
    rewards there. The flow loss of Flower-KL.

    SubTB looks at the one token that a path takes, this at all that could follow. Over paths drawn from the reward, the sum
    along a path is an unbiased estimate of KL(R/Z ‖ π) of whole titles (the chain rule), off the tree included.

    Deviation: not in the official code.

    Args:
        log_pf, log_token_rewards: (n,) log π and log r of all edges that leave the states, of all states together.
        n_states: what the sum is divided by. visits: (n,) or a number, weight of the state that each edge leaves.
    """
    return (visits * log_token_rewards.exp() * (log_token_rewards - log_pf)).sum() / n_states


def trajectory_balance_loss(log_pf: Tensor, log_token_rewards: Tensor, mask: Tensor) -> Tensor:
    """Mean over paths of (Σ_t d_t)², the residual of the whole title alone: nats², arguments as in `subtb_loss`."""
    _check(mask, log_pf, log_token_rewards)
    return torch.where(mask, log_pf - log_token_rewards, 0).sum(-1).square().mean()


def exact_cross_entropy(log_pf: Tensor, log_reach: Tensor) -> Tensor:
    """−Σ_edges F(s')/Z · log π(s → s'), in nats per title: over all edges at once, no path is sampled.

    Over the whole tree it is the expectation of SFT summed over the tokens of titles drawn in proportion to reward.
    Its minimum, at π = r, is the entropy of R/Z. This and the next two are sums over edges (over nodes): a tree may be
    taken in parts, and gradients add up.

    Args:
        log_pf: (n,) log π of the edges.
        log_reach: (n,) log F(s')/Z of the nodes that they lead to.
    """
    return -(log_reach.exp() * log_pf).sum()


def exact_flow_loss(log_pf: Tensor, log_reach: Tensor, log_token_rewards: Tensor) -> Tensor:
    """Σ_edges F(s')/Z · d², d = log π − log r, in nats²: zero exactly where π equals the token rewards.

    Args:
        log_pf, log_reach: (n,) as in `exact_cross_entropy`.
        log_token_rewards: (n,) log r of the edges.
    """
    return (log_reach.exp() * (log_pf - log_token_rewards).square()).sum()


def off_trie_penalty(log_pf: Tensor, parent: Tensor, log_reach: Tensor) -> Tensor:
    """−Σ_s F(s)/Z · log Σ_children π(child | s), in nats: what a policy loses to tokens that continue no title.

    `exact_cross_entropy` is this plus the cross-entropy of the policy renormalised over the children.

    Args:
        log_pf, parent: (n,) log π of the edges and the nodes that they leave; all children of a node, or none.
        log_reach: (n_nodes,) log F(s)/Z of the tree's nodes.
    """
    on_trie = segment_logsumexp(log_pf, parent, len(log_reach))
    left = torch.isfinite(on_trie)
    return -(log_reach[left].exp() * on_trie[left]).sum()


def subpath_weights(mask: Tensor, lam: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, T) → (B, T + 1, T + 1) λ^(b − a − 1) of the sub-path from a to b, 0 where there is none."""
    position = torch.arange(mask.shape[-1] + 1, device=mask.device)
    gap = position[None, :] - position[:, None]
    weight = torch.where(gap > 0, lam ** (gap.clamp(min=1) - 1).to(dtype), 0)
    return weight * (position <= mask.sum(-1)[:, None])[:, None]


def _check(mask: Tensor, *tensors: Tensor) -> None:
    if any(t.shape != mask.shape for t in tensors) or mask.dim() != 2:
        raise ValueError(f"losses take (B, T) tensors of one shape, not {[tuple(t.shape) for t in (*tensors, mask)]}")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("a mask has a hole: its True values must come first in each row")
    if not mask.any():
        raise ValueError("the mask leaves no token")


def _mean_squared_sums(steps: Tensor, mask: Tensor, lam: float) -> Tensor:
    """λ-weighted mean over a < b ≤ length of (Σ_{a ≤ t < b} steps_t)²; steps are 0 where mask is False."""
    sums = torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
    residuals = sums[:, None, :] - sums[:, :, None]
    weight = subpath_weights(mask, lam, steps.dtype)
    return (weight * residuals.square()).sum() / weight.sum()
