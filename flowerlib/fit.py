"""Fitting a known distribution: one prompt, no history, the whole tree of titles behind it (the paper's RQ1).

| loss | law: zero, or least, where | sees |
|---|---|---|
| exact_ce | π = r; least value is the entropy of R/Z | every edge, weighted by its flow |
| exact_squared | π = r | every edge, weighted by its flow |
| subtree_ce | as exact_ce, of which it is an unbiased estimate | every child of the nodes on drawn paths |
| sft | as exact_ce, of which it is an unbiased estimate | the edges of drawn paths |
| subtb, tb, db | π = r (tb: at least along whole titles) | the edges of drawn paths |
| modified_subtb | on the tree: a pseudo-leaf of relative reward e^−15 at every prefix that is no title | the edges and ⊤ on drawn paths |
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from . import losses, metrics
from .backbone import split_layers
from .trie import TitleTrie, segment_logsumexp

LOSSES = ("exact_ce", "exact_squared", "subtree_ce", "sft", "subtb", "tb", "db", "modified_subtb")
PATHS = ("reward", "policy", "schedule")


class PackedTree:
    """A trie packed behind one prompt: any part of it goes through the model in one sequence.

    A node stands at the position of its depth and sees the prompt and its own ancestors. Prompt and tree never change,
    so that the frozen lower layers run once, here.

    Attributes:
        model: what is tuned: the upper layers, or all of them.
        forward_tokens: tokens that have gone through `model` in training so far.
    """

    def __init__(self, model: PreTrainedModel, trie: TitleTrie, context: Sequence[int], n_frozen: int = 0):
        self.trie = trie.to(model.device)
        self.context = torch.tensor(context, device=model.device)
        self.width, self.forward_tokens = len(context), 0
        self.model, self.hidden = model, None
        if n_frozen:
            trunk, self.model = split_layers(model, n_frozen)
            self.model.get_input_embeddings().requires_grad_(False)
            self.hidden = self._run_trunk(trunk)

    @torch.no_grad()
    def _run_trunk(self, trunk: PreTrainedModel) -> Tensor:
        """(width + n_nodes, H) what leaves the frozen layers, for the prompt and then every inner node."""
        hidden = torch.zeros(self.width + self.trie.n_nodes, trunk.config.hidden_size, device=self.context.device)
        for nodes, on_path, _ in self._chunks():
            out = trunk(input_ids=self._tokens(nodes), **self._packed(nodes, on_path), use_cache=False)
            hidden[self._rows(nodes)] = out.last_hidden_state[0]
        return hidden

    def _chunks(self, nodes_at_a_time: int = 512) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for chunk in self.trie.inner.split(nodes_at_a_time):
            yield *self.trie.with_ancestors(chunk), chunk

    def _tokens(self, nodes: Tensor) -> Tensor:
        return torch.cat([self.context, self.trie.token[nodes]])[None]

    def _rows(self, nodes: Tensor) -> Tensor:
        return torch.cat([torch.arange(self.width, device=nodes.device), self.width + nodes])

    def _packed(self, nodes: Tensor, on_path: Tensor) -> dict[str, Tensor]:
        n, width = self.width + len(nodes), self.width
        sees = torch.zeros(n, n, dtype=torch.bool, device=nodes.device)
        sees[:, :width] = torch.ones(n, width, dtype=torch.bool, device=nodes.device).tril()
        sees[width:, width:] = on_path
        position = torch.cat([torch.arange(width, device=nodes.device), width - 1 + self.trie.depth[nodes]])
        return {"attention_mask": sees[None, None], "position_ids": position[None]}

    def logits(self, nodes: Tensor, on_path: Tensor) -> Tensor:
        """(1 + m, V) the model's logits at the root and at these nodes (`TitleTrie.with_ancestors`)."""
        if self.hidden is None:
            given = {"input_ids": self._tokens(nodes)}
        else:
            given = {"inputs_embeds": self.hidden[self._rows(nodes)][None]}
        if self.model.training:
            self.forward_tokens += self.width + len(nodes)
        packed = self._packed(nodes, on_path)
        return self.model(**given, **packed, use_cache=False, logits_to_keep=1 + len(nodes)).logits[0].float()

    def edges(self, nodes: Tensor, on_path: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The children of the root and of these nodes, (n,); log π of the edges into them, (n,); and log π of the
        terminator at the root and at these nodes, (1 + m,). Over the whole vocabulary, in nats."""
        logits = self.logits(nodes, on_path)
        total = logits.logsumexp(-1)
        rows, children = self.trie.children(torch.cat([nodes.new_zeros(1), nodes]))
        terminator = self.trie.token[self.trie.leaves[0]]
        return children, logits[rows, self.trie.token[children]] - total[rows], logits[:, terminator] - total

    def log_probs(self) -> Tensor:
        """(n_nodes,) log π of every edge over the whole vocabulary, in nats, 0 at the root: exact."""
        total = torch.zeros(self.trie.n_nodes, device=self.context.device)
        for nodes, on_path, _ in self._chunks():
            children, log_pf, _ = self.edges(nodes, on_path)
            total = total.index_put((children,), log_pf)
        return total


def loss_of(
    tree: PackedTree, loss: str, log_item_rewards: Tensor, leaves: Tensor | None, lam: float = 1.0, penalty: float = 0.0
) -> Tensor:
    """One of LOSSES, plus `penalty` times what is lost to tokens that leave the tree, in nats.

    Args:
        leaves: (n,) leaf nodes that were drawn; None for the exact losses. On them the penalty is of the nodes that
            the drawn titles pass, an unbiased estimate of `losses.off_trie_penalty` where they come from the reward.
    """
    trie = tree.trie
    flows, log_r = trie.log_flows(log_item_rewards).float(), trie.log_token_rewards(log_item_rewards).float()
    if leaves is None:
        log_pf = tree.log_probs()
        if loss == "exact_ce":
            value = losses.exact_cross_entropy(log_pf, flows)
        else:
            value = losses.exact_flow_loss(log_pf, flows, trie.parent)
        return value + penalty * losses.off_trie_penalty(log_pf, flows, trie.parent) if penalty else value
    paths = trie.paths(leaves)
    mask, path = paths >= 0, paths.clamp(min=0)
    before = trie.parent[path].clamp(min=0)
    nodes, on_path = trie.with_ancestors(trie.parent[leaves])
    children, log_pf, log_end = tree.edges(nodes, on_path)
    visits = torch.bincount(before[mask], minlength=trie.n_nodes) / len(leaves)  # an estimate of F / Z
    edge = torch.zeros(trie.n_nodes, device=path.device).index_put((children,), log_pf)
    if loss == "subtree_ce":
        value = -(visits[trie.parent[children]] * log_r[children].exp() * log_pf).sum()
    elif loss == "sft":
        value = -torch.where(mask, edge[path], 0).sum() / len(leaves)
    elif loss == "tb":
        value = losses.trajectory_balance_loss(edge[path], log_r[path], mask)
    elif loss == "modified_subtb":
        row = torch.zeros(trie.n_nodes, dtype=torch.long, device=path.device)
        row[nodes] = 1 + torch.arange(len(nodes), device=path.device)
        end = trie.advance(before.flatten(), trie.token[trie.leaves[0]].expand(before.numel())).view_as(before)
        log_term = torch.where(end >= 0, log_r[end.clamp(min=0)], losses.FLOOR_LOG_REWARD)
        value = losses.modified_subtb_loss(edge[path], log_end[row[before]], log_r[path], log_term, mask, lam)
    elif loss in ("subtb", "db"):
        value = losses.subtb_loss(edge[path], log_r[path], mask, 0.0 if loss == "db" else lam)
    else:
        raise ValueError(f"{loss!r} takes no drawn titles, or is none of {', '.join(LOSSES)}")
    if penalty:
        on_trie = segment_logsumexp(log_pf, trie.parent[children], trie.n_nodes)
        passed = visits > 0
        value = value - penalty * (visits[passed] * on_trie[passed]).sum()
    return value


def draw_leaves(trie: TitleTrie, log_edges: Tensor, n: int) -> Tensor:
    """(n,) leaf nodes, drawn by the probabilities of the edges renormalised over siblings."""
    share = trie.log_leaf_probs(trie.renormalised(log_edges)).exp()
    return trie.leaves[torch.multinomial(share, n, replacement=True)]


def measure(tree: PackedTree, log_item_rewards: Tensor) -> dict[str, float]:
    """The exact distribution of drawing under the tree's mask against R/Z (nats), and the unmasked mass on titles."""
    tree.model.eval()
    with torch.no_grad():
        log_pf = tree.log_probs().double()
    trie = tree.trie
    target = trie.log_flows(log_item_rewards)[trie.leaves]
    found = metrics.divergences(target.cpu(), trie.log_leaf_probs(trie.renormalised(log_pf)).cpu())
    return found | {"catalogue_mass": float(trie.log_leaf_probs(log_pf).exp().sum())}


def fit(
    tree: PackedTree, log_item_rewards: Tensor, loss: str, steps: int, paths: str = "reward", n_paths: int = 16,
    learning_rate: float = 1e-3, penalty: float = 0.0, threshold: float = 0.05, evaluations: int = 8,
    max_seconds: float = float("inf"), seed: int = 0, progress: bool = True,
) -> pd.DataFrame:
    """Tunes `tree.model` until it draws titles in proportion to reward, as well as the loss can.

    Args:
        log_item_rewards: (n_items,) log R in nats.
        loss: one of LOSSES.
        paths: where the sampled losses look: titles drawn from the reward, from the policy itself, or the paper's
            schedule, which starts with titles drawn in proportion to their length and moves to the policy by a tenth
            each time that the loss falls below `threshold`.
        n_paths: titles a step.
        penalty: weight of what is lost to tokens that leave the tree. The modified SubTB needs it: it compares tokens
            with the terminator alone, so that it vanishes for policies that leave the tree as well.
        max_seconds: of training; evaluations do not count.

    Returns:
        One row an evaluation, the first before any step: step, forward_tokens, seconds, loss, and `measure`.

    Raises:
        ValueError: unknown loss or paths.
    """
    if loss not in LOSSES or paths not in PATHS:
        raise ValueError(f"loss {loss!r} with paths {paths!r}: choose of {', '.join(LOSSES)} and {', '.join(PATHS)}")
    torch.manual_seed(seed)
    weights = [w for w in tree.model.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    log: list[dict[str, Any]] = [{"step": 0, "forward_tokens": 0, "seconds": 0.0} | measure(tree, log_item_rewards)]
    on_policy, spent, value = 0.0, 0.0, math.nan
    lengths = tree.trie.depth[tree.trie.leaves].double()
    for step in tqdm(range(1, steps + 1), desc=f"{loss}, {paths}", disable=not progress):
        start = time.perf_counter()
        tree.model.train()
        leaves = _leaves(tree, log_item_rewards, paths, on_policy, lengths, n_paths) if "exact" not in loss else None
        objective = loss_of(tree, loss, log_item_rewards, leaves, penalty=penalty)
        optimiser.zero_grad()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        value = objective.item()
        if value < threshold:
            on_policy = min(1.0, on_policy + 0.1)
        spent += time.perf_counter() - start
        last = step == steps or spent > max_seconds
        if last or step % max(1, steps // evaluations) == 0:
            row = {"step": step, "forward_tokens": tree.forward_tokens, "seconds": spent, "loss": value}
            log.append(row | measure(tree, log_item_rewards))
        if last:
            break
    return pd.DataFrame(log)


@torch.no_grad()
def _leaves(
    tree: PackedTree, log_item_rewards: Tensor, paths: str, on_policy: float, lengths: Tensor, n: int
) -> Tensor:
    trie = tree.trie
    if paths == "reward":
        return draw_leaves(trie, trie.log_token_rewards(log_item_rewards), n)
    n_own = n if paths == "policy" else round(on_policy * n)
    others = trie.leaves[torch.multinomial(lengths, n - n_own, replacement=True)] if n_own < n else trie.leaves[:0]
    own = draw_leaves(trie, tree.log_probs(), n_own) if n_own else trie.leaves[:0]
    return torch.cat([own, others])
