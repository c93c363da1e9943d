"""Fitting a known distribution: one prompt, no history, the whole tree of titles behind it (the paper's RQ1).

| loss | law: zero, or least, where | sees |
|---|---|---|
| exact_ce | π = r; least value is the entropy of R/Z | every edge, weighted by its flow |
| exact_squared | π = r | every edge, weighted by its flow |
| subtree_ce | as exact_ce; an unbiased estimate of it on paths drawn from the reward | every child of the nodes on paths |
| sft | as exact_ce, of which it is an unbiased estimate; paths drawn from the reward alone | the edges of drawn paths |
| subtb, tb, db | π = r (tb: at least along whole titles) | the edges of drawn paths |
| modified_subtb | on the tree: a pseudo-leaf of relative reward e^−15 at every prefix that is no title | the edges and ⊤ on drawn paths |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from . import losses, metrics
from .backbone import split_layers
from .runs import LOSSES
from .trie import TitleTrie

PATHS = ("reward", "policy", "schedule")


class PackedTree:
    """A trie packed behind one prompt: any part of it goes through the model in one sequence.

    A node stands at the position of its depth and sees the prompt and its own ancestors. Prompt and tree never change,
    so that the frozen lower layers run once, here.

    Attributes:
        model: what is tuned: the upper layers, or all of them.
        forward_tokens: tokens that have gone through `model` in training so far.
    """

    def __init__(
        self, model: PreTrainedModel, trie: TitleTrie, context: Sequence[int], n_frozen: int = 0,
        nodes_at_a_time: int = 512,
    ):
        """nodes_at_a_time bounds the memory: so many nodes' logits over the vocabulary are held at once."""
        self.trie = trie.to(model.device)
        self.context = torch.tensor(context, device=model.device)
        self.width, self.nodes_at_a_time, self.forward_tokens = len(context), nodes_at_a_time, 0
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

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The tree in parts: nodes and mask of `TitleTrie.with_ancestors`, and which of root and nodes are the part's
        own, as positions; the others are there to be seen, and each node is some part's own once."""
        root = self.trie.inner.new_zeros(1)
        for chunk in torch.cat([root, self.trie.inner]).split(self.nodes_at_a_time):
            nodes, on_path = self.trie.with_ancestors(chunk[chunk > 0])
            yield nodes, on_path, torch.isin(torch.cat([root, nodes]), chunk).nonzero()[:, 0]

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

    def edges(self, nodes: Tensor, on_path: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The children of the nodes at `own`, (n,); log π of the edges into them, (n,); and log π of the terminator
        where they start, (len(own),). Over the whole vocabulary, in nats. Arguments as `_chunks` gives them."""
        if self.hidden is None:
            given = {"input_ids": self._tokens(nodes)}
        else:
            given = {"inputs_embeds": self.hidden[self._rows(nodes)][None]}
        if self.model.training:
            self.forward_tokens += self.width + len(nodes)
        packed = self._packed(nodes, on_path)
        kept = self.width - 1 + own
        logits = self.model(**given, **packed, use_cache=False, logits_to_keep=kept).logits[0].float()
        total = logits.logsumexp(-1)
        rows, children = self.trie.children(torch.cat([nodes.new_zeros(1), nodes])[own])
        terminator = self.trie.token[self.trie.leaves[0]]
        return children, logits[rows, self.trie.token[children]] - total[rows], logits[:, terminator] - total

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(children, log π of the edges into them) of the whole tree, every edge once, a part at a time."""
        for chunk in self._chunks():
            yield self.edges(*chunk)[:2]

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """(n_nodes,) log π of every edge over the whole vocabulary, in nats, 0 at the root: exact."""
        total = torch.zeros(self.trie.n_nodes, device=self.context.device)
        for children, log_pf in self.parts():
            total[children] = log_pf
        return total


def loss_parts(
    tree: PackedTree, loss: str, log_item_rewards: Tensor, leaves: Tensor | None, lam: float = 1.0, penalty: float = 0.0
) -> Iterator[Tensor]:
    """One of LOSSES as summands, plus `penalty` times what is lost to tokens that leave the tree, in nats.

    The exact losses are sums over edges, so that a gradient that is added up part by part is exact in bounded memory.

    Args:
        leaves: (n,) leaf nodes that were drawn; None for the exact losses. On them the penalty is of the nodes that
            the drawn titles pass, an unbiased estimate of `losses.off_trie_penalty` where they come from the reward.
    """
    trie = tree.trie
    log_r = trie.log_token_rewards(log_item_rewards).float()
    if leaves is None:
        log_reach = (trie.log_flows(log_item_rewards) - log_item_rewards.logsumexp(0)).float()
        for children, log_pf in tree.parts():
            if loss == "exact_ce":
                value = losses.exact_cross_entropy(log_pf, log_reach[children])
            else:
                value = losses.exact_flow_loss(log_pf, log_reach[children], log_r[children])
            if penalty:
                value = value + penalty * losses.off_trie_penalty(log_pf, trie.parent[children], log_reach)
            yield value
        return
    paths = trie.paths(leaves)
    mask, path = paths >= 0, paths.clamp(min=0)
    before = trie.parent[path].clamp(min=0)
    nodes, on_path = trie.with_ancestors(trie.parent[leaves])
    children, log_pf, log_end = tree.edges(nodes, on_path, torch.arange(1 + len(nodes), device=nodes.device))
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
        value = value + penalty * losses.off_trie_penalty(log_pf, trie.parent[children], visits.log())
    yield value


def draw_leaves(trie: TitleTrie, log_edges: Tensor, n: int) -> Tensor:
    """(n,) leaf nodes, drawn by the probabilities of the edges renormalised over siblings."""
    share = trie.log_leaf_probs(trie.renormalised(log_edges)).exp()
    return trie.leaves[torch.multinomial(share, n, replacement=True)]


def measure(tree: PackedTree, log_item_rewards: Tensor) -> dict[str, float]:
    """How far the model is from R/Z, exactly.

    Returns:
        `metrics.divergences` (nats) of drawing titles under the tree's mask; catalogue_mass, the probability that the
        unmasked model spells some title; kl_tokens, Σ_s F(s)/Z · KL(r‖π) over the whole vocabulary (nats), which is the
        KL of the titles plus what is lost to tokens that leave the tree.
    """
    tree.model.eval()
    log_pf, trie = tree.log_probs().double(), tree.trie
    log_reach = trie.log_flows(log_item_rewards) - log_item_rewards.logsumexp(0)
    found = metrics.divergences(log_reach[trie.leaves].cpu(), trie.log_leaf_probs(trie.renormalised(log_pf)).cpu())
    per_node = metrics.node_divergences(log_reach.cpu(), log_pf.cpu(), trie.parent.cpu())
    return found | {"catalogue_mass": float(trie.log_leaf_probs(log_pf).exp().sum()), "kl_tokens": float(per_node.sum())}


def fit(
    tree: PackedTree, log_item_rewards: Tensor, loss: str, budget: int, paths: str = "reward", n_paths: int = 16,
    learning_rate: float = 1e-3, penalty: float = 0.0, threshold: float = 0.05, evaluations: int = 8, seed: int = 0,
    progress: bool = True, watch: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> pd.DataFrame:
    """Tunes `tree.model` until it draws titles in proportion to reward, as well as the loss can.

    The learning rate rises over the first twentieth of the budget and falls to 0 along a cosine.

    Args:
        log_item_rewards: (n_items,) log R in nats.
        loss: one of LOSSES.
        budget: tokens to put through `tree.model`; the step that passes it is the last. Draws from the policy count.
        paths: where the sampled losses look: titles drawn from the reward, from the policy itself, or the paper's
            schedule, which starts with titles drawn in proportion to their length and moves to the policy by a tenth
            each time that the loss falls below `threshold` (the paper: 0.05, and 0.4 for its large catalogue).
        n_paths: titles a step.
        penalty: weight of what is lost to tokens that leave the tree. The modified SubTB needs it: it compares tokens
            with the terminator alone, so that it vanishes for policies that leave the tree as well.
        watch: is called with each row of the log as it comes.

    Returns:
        One row an evaluation, the first before any step: step, forward_tokens, seconds of training, loss, and
        `measure`.

    Raises:
        ValueError: unknown loss or paths.
    """
    if loss not in LOSSES or paths not in PATHS:
        raise ValueError(f"loss {loss!r} with paths {paths!r}: choose of {', '.join(LOSSES)} and {', '.join(PATHS)}")
    torch.manual_seed(seed)
    if loss == "sft" and paths != "reward":
        raise ValueError(f"sft imitates what is drawn: with paths {paths!r} it would not aim at the reward")
    weights = [w for w in tree.model.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, fused=True)
    log: list[dict[str, Any]] = [{"step": 0, "forward_tokens": 0, "seconds": 0.0} | measure(tree, log_item_rewards)]
    watch(log[0])
    first, tokens, spent, on_policy, step = tree.forward_tokens, 0, 0.0, 0.0, 0
    lengths = tree.trie.depth[tree.trie.leaves].double()
    bar = tqdm(total=budget, desc=f"{loss}, {paths}", unit=" tokens", disable=not progress)
    while tokens < budget:
        start = time.perf_counter()
        step, before, value = step + 1, tokens, 0.0
        tree.model.train()
        leaves = _leaves(tree, log_item_rewards, paths, on_policy, lengths, n_paths) if "exact" not in loss else None
        optimiser.zero_grad()
        for part in loss_parts(tree, loss, log_item_rewards, leaves, penalty=penalty):
            part.backward()
            value += part.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        tokens = tree.forward_tokens - first
        for group in optimiser.param_groups:
            warm, cosine = 20 * tokens / budget, (1 + math.cos(math.pi * before / budget)) / 2
            group["lr"] = learning_rate * min(warm, cosine)
        optimiser.step()
        if value < threshold:
            on_policy = min(1.0, on_policy + 0.1)
        spent += time.perf_counter() - start
        bar.update(tokens - before)
        if tokens >= budget or tokens * evaluations >= budget * len(log):
            row = {"step": step, "forward_tokens": tokens, "seconds": spent, "loss": value}
            log.append(row | measure(tree, log_item_rewards))
            watch(log[-1])
    bar.close()
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
