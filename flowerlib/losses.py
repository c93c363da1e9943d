"""Losses as pure functions of log-probabilities (nats).

The balance losses take (B, T) tensors, a row the path of one title: log_pf log π and log_token_rewards log r of its
tokens, mask True on them, its terminator included, and False after them. ValueError: shapes differ, a mask has a hole,
or no token is left. The exact losses take (n,) edges of the tree. Each is a sum over edges (or nodes): a tree may be
taken in parts, and gradients add up. log_reach is log F(s)/Z of a node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .trie import segment_logsumexp

FLOOR_LOG_REWARD = -15.0  # what the official code gives the terminator where the prefix is no title
FLOW_LOSSES = ("subtb", "tb", "db", "modified_subtb")  # of paths; `divergence_loss` is of the states on them


def flow_loss(name: str, log_pf: Tensor, log_token_rewards: Tensor, mask: Tensor, lam: float = 1.0,
              end: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """One of FLOW_LOSSES over titles' paths, a scalar in nats²; ValueError for another name. end: log_pterm and
    log_term_rewards of `modified_subtb_loss`, which alone reads them."""
    if name == "tb":
        return trajectory_balance_loss(log_pf, log_token_rewards, mask)
    if name == "modified_subtb":
        log_pterm, log_term_rewards = end
        return modified_subtb_loss(log_pf, log_pterm, log_token_rewards, log_term_rewards, mask, lam)
    if name in ("subtb", "db"):
        return subtb_loss(log_pf, log_token_rewards, mask, lam if name == "subtb" else 0.0)
    raise ValueError(f"{name!r} is no flow loss: choose one of {', '.join(FLOW_LOSSES)}")


def sft_loss(log_pf: Tensor, mask: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of −log π over the target tokens, in nats per token: supervised fine-tuning (BIGRec).

    log_pf and mask have any one shape. weight: what each token's term is multiplied by before the mean (IFairLRS); it
    averages to 1 over the data.
    """
    return -(torch.where(mask, log_pf, 0) * weight).sum() / mask.sum()


def subtb_loss(log_pf: Tensor, log_token_rewards: Tensor, mask: Tensor, lam: float = 1.0) -> Tensor:
    """Sub-trajectory balance with known flows (Gao et al. 2025): zero exactly where π equals the token rewards.

    With d_t = log π(v_{t+1} | s_t) − log r(s_t → s_{t+1}), the residual of the sub-path from a to b is Σ d_t for
    a ≤ t < b. The loss is the mean of the squared residuals over every sub-path in the batch, weighted by
    lam^(b−a−1), in nats². Neighbours only (lam → 0) is detailed balance. (B, T) tensors and errors: as the module says.
    """
    _check(mask, log_pf, log_token_rewards)
    return _mean_squared_sums(torch.where(mask, log_pf - log_token_rewards, 0), mask, lam)


def modified_subtb_loss(
    log_pf: Tensor, log_pterm: Tensor, log_token_rewards: Tensor, log_term_rewards: Tensor, mask: Tensor,
    lam: float = 1.0) -> Tensor:
    """The official code's form, in which every prefix may end: nats², weighted over sub-paths as in `subtb_loss`.

    With p_t = log π(⊤ | s_t) and q_t = Σ_{u<t} log r_u + log_term_rewards_t, the residual of one step is
    Δ_t = q_t + log π(v_{t+1} | s_t) + p_{t+1} − q_{t+1} − p_t. It vanishes not at π = r but at the tree that has one
    pseudo-leaf of relative reward e^−15 more at every prefix that is no title.

    Args:
        log_pterm: (B, T) log π(⊤ | s_t) at the state before each token.
        log_term_rewards: (B, T) log r(s_t → s_t⊤) where s_t is a whole title, else FLOOR_LOG_REWARD.

    Raises:
        ValueError: as the module says; a batch of one-token paths has no step and is refused too.
    """
    _check(mask, log_pf, log_pterm, log_token_rewards, log_term_rewards)
    q = log_token_rewards.cumsum(-1) - log_token_rewards + log_term_rewards
    delta = (q + log_pf - log_pterm)[:, :-1] + (log_pterm - q)[:, 1:]
    steps = mask[:, 1:]
    if not steps.any():
        raise ValueError("no path has a token before its terminator")
    return _mean_squared_sums(torch.where(steps, delta, 0), steps, lam)


def divergence_loss(log_pf: Tensor, log_token_rewards: Tensor, n_states: int, visits: Tensor | float = 1.0) -> Tensor:
    """Flower-KL's flow loss: mean of KL(r(·|s) ‖ π(·|s)) over the states s of some paths, in nats, zero just at π = r.

    SubTB looks at the one token that a path takes, this at all that could follow. Over paths drawn from the reward, the
    sum along a path is an unbiased estimate of KL(R/Z ‖ π) of whole titles (the chain rule), off the tree included.

    Deviation: not in the official code.

    Args:
        log_pf, log_token_rewards: (n,) log π and log r of all edges that leave the states, of all states together.
        n_states: what the sum is divided by. visits: (n,) or a number, weight of the state that each edge leaves.
    """
    return (visits * log_token_rewards.exp() * (log_token_rewards - log_pf)).sum() / n_states


def trajectory_balance_loss(log_pf: Tensor, log_token_rewards: Tensor, mask: Tensor) -> Tensor:
    """Mean over paths of (Σ_t d_t)², the residual of the whole title alone, in nats²; (B, T) as above."""
    _check(mask, log_pf, log_token_rewards)
    return torch.where(mask, log_pf - log_token_rewards, 0).sum(-1)[mask[:, 0]].square().mean()


def exact_cross_entropy(log_pf: Tensor, log_reach: Tensor) -> Tensor:
    """−Σ_edges F(s')/Z · log π(s → s'), in nats per title: over all edges at once, no path is sampled.

    Over the whole tree it is the expectation of SFT summed over the tokens of titles drawn in proportion to reward.
    Its minimum, at π = r, is the entropy of R/Z. log_pf, log_reach: (n,) of the edges and of the nodes they lead to.
    """
    return -(log_reach.exp() * log_pf).sum()


def exact_flow_loss(log_pf: Tensor, log_reach: Tensor, log_token_rewards: Tensor) -> Tensor:
    """Σ_edges F(s')/Z · (log π − log r)², in nats², zero at π = r. All are (n,), log_reach where they lead."""
    return (log_reach.exp() * (log_pf - log_token_rewards).square()).sum()


def off_trie_penalty(log_pf: Tensor, parent: Tensor, log_reach: Tensor) -> Tensor:
    """−Σ_s F(s)/Z · log Σ_children π(child | s), in nats: what a policy loses to tokens that continue no title.

    `exact_cross_entropy` is this plus the cross-entropy of the policy renormalised over the children. log_pf, parent:
    (n,) of the edges and the nodes that they leave, all children of a node or none; log_reach: (n_nodes,).
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
