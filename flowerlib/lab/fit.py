"""Fitting a known distribution: one prompt, no history, a whole tree of titles behind it (the paper's first question).

| loss | law: zero, or least, where | sees |
|---|---|---|
| exact_ce | π = r; least value is the entropy of R/Z | every edge, weighted by its flow |
| exact_squared | π = r | every edge, weighted by its flow |
| subtree_ce | π = r; an unbiased estimate of exact_ce less the entropy | every child of the nodes on drawn paths |
| sft | as exact_ce, of which it is an unbiased estimate; paths drawn from the reward alone | the edges of drawn paths |
| subtb, tb, db | π = r (tb: at least along whole titles) | the edges of drawn paths |
| modified_subtb | on the tree: a pseudo-leaf of reward e^−15 at every prefix that is no title | edges, ⊤ on paths |
| dpo | none: a preference without doubt drives the ratio on and on | pairs of titles, the more frequent one preferred |
| rloo | π_ref · exp(r/β), r = log R/Z, FLOOR_LOG_REWARD off the tree | its own titles, and where it leaves the tree |
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from .. import losses, metrics
from ..model import Backbone
from ..tree import PackedTree, Prompts, leaf_below, sample_leaves
from ..trie import TitleTrie, segment_logsumexp
from . import sources, store, training
from .settings import FIT_LOSSES, FIT_PATHS, PREFERENCE_LOSSES, Settings

# where methods look: "all" edges, "pairs" of titles, or one of FIT_PATHS; the others as the settings say
PATHS = {"exact_ce": ("all",), "exact_squared": ("all",), "subtree_ce": ("reward",), "sft": ("reward",),
         "dpo": ("pairs",), "rloo": ("policy",)}


def loss_parts(tree: PackedTree, loss: str, log_flows: Tensor, leaves: Tensor | None,
               penalty: float = 0.0) -> Iterator[Tensor]:
    """One of FIT_LOSSES as summands, nats (nats²) a title, plus `penalty` times what is lost to tokens off the tree.
    log_flows: of `TitleTrie.log_flows`. The exact losses are sums over edges, so that a gradient that is added up part
    by part is exact in bounded memory; the others are of the (n,) leaf nodes that were drawn. On these the penalty is
    of the nodes that they pass, an unbiased estimate of `losses.off_trie_penalty` if they come from the reward."""
    trie = tree.trie
    log_r = (log_flows - log_flows[trie.parent.clamp(min=0)]).float()
    if leaves is None:
        log_reach = (log_flows - log_flows[0]).float()
        parts = tree.parts()
    else:
        path = trie.paths(leaves)
        mask, path = path >= 0, path.clamp(min=0)
        before = trie.parent[path].clamp(min=0)
        visits = torch.bincount(before[mask], minlength=trie.n_nodes) / len(leaves)  # an estimate of F / Z
        log_reach = visits.log()
        children, into, terminator = drawn_edges(tree, leaves)
        parts = [(children, into[children])]
    for children, log_pf in parts:
        if loss == "exact_ce":
            value = losses.exact_cross_entropy(log_pf, log_reach[children])
        elif loss == "exact_squared":
            value = losses.exact_flow_loss(log_pf, log_reach[children], log_r[children])
        elif loss == "subtree_ce":
            value = losses.divergence_loss(log_pf, log_r[children], 1, visits[trie.parent[children]])
        elif loss == "sft":
            value = losses.sft_loss(into[path], mask) * mask.sum() / len(leaves)  # nats a token → nats a title
        else:
            end = trie.advance(before.flatten(), trie.token[trie.leaves[0]].expand(before.numel())).view_as(before)
            log_end_r = torch.where(end >= 0, log_r[end.clamp(min=0)], losses.FLOOR_LOG_REWARD)
            value = losses.flow_loss(loss, into[path], log_r[path], mask, end=(terminator[before], log_end_r))
        if penalty:
            value = value + penalty * losses.off_trie_penalty(log_pf, trie.parent[children], log_reach)
        yield value


def drawn_edges(tree: PackedTree, leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All edges that leave the nodes of drawn titles, in one pass: the (n,) nodes that they lead to; by node,
    (n_nodes,), log π of the edge into it, and of the terminator at it, 0 elsewhere."""
    nodes, unknown = tree.with_ancestors(tree.trie.parent[leaves]), torch.zeros(tree.trie.n_nodes, device=leaves.device)
    children, log_pf, log_end = tree.edges(nodes, torch.arange(1 + len(nodes), device=nodes.device))
    place = torch.cat([nodes.new_zeros(1), nodes])
    return children, unknown.index_put((children,), log_pf), unknown.index_put((place,), log_end)


def draw_leaves(trie: TitleTrie, log_edges: Tensor, n: int) -> Tensor:
    """(n,) leaf nodes, drawn by the probabilities of the edges renormalised over siblings."""
    share = trie.log_leaf_probs(trie.renormalised(log_edges)).exp()
    return trie.leaves[torch.multinomial(share, n, replacement=True)]


def measure(tree: PackedTree, log_item_rewards: Tensor) -> dict[str, float]:
    """How far the model is from R/Z, exactly: `metrics.divergences` (nats) of drawing titles under the tree's mask;
    catalogue_mass, the probability that the unmasked model spells a title; kl_tokens, Σ_s F(s)/Z · KL(r‖π) over the
    whole vocabulary (nats), which is the KL of the titles plus what is lost to tokens that leave the tree."""
    tree.model.eval()
    log_pf, trie = tree.log_probs().double(), tree.trie
    log_reach = trie.log_flows(log_item_rewards) - log_item_rewards.logsumexp(0)
    exact = metrics.divergences(log_reach[trie.leaves].cpu(), trie.log_leaf_probs(trie.renormalised(log_pf)).cpu())
    kl_tokens = metrics.node_divergences(log_reach.cpu(), log_pf.cpu(), trie.parent.cpu()).sum()
    return exact | {"catalogue_mass": float(trie.log_leaf_probs(log_pf).exp().sum()), "kl_tokens": float(kl_tokens)}


def tune(tree: PackedTree, log_item_rewards: Tensor, step: Callable[[], Iterator[Tensor]], budget: int,
         learning_rate: float, label: str, evaluations: int = 8, progress: bool = True,
         watch: Callable[[dict[str, Any]], Any] = lambda row: None) -> pd.DataFrame:
    """AdamW on the losses that `step` yields, added up, until `budget` tokens have gone through `tree.model`.
    The learning rate rises over the first twentieth of the budget and falls to 0 along a cosine. Returns the log, and
    calls `watch` with each row as it comes, one an evaluation, the first before any step: step, forward_tokens, seconds
    of training, loss, and `measure`."""
    weights = [w for w in tree.model.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, fused=True)
    log: list[dict[str, Any]] = []
    first, tokens, seconds, n_steps, value = tree.forward_tokens, 0, 0.0, 0, math.nan
    bar = tqdm(total=budget, desc=label, unit=" tokens", disable=not progress)
    while True:
        if tokens >= budget or tokens * evaluations >= budget * len(log):
            row = {"step": n_steps, "forward_tokens": tokens, "seconds": seconds, "loss": value}
            log.append(row | measure(tree, log_item_rewards))
            watch(log[-1])
        if tokens >= budget:
            bar.close()
            return pd.DataFrame(log)
        start = time.perf_counter()
        n_steps, before, value = n_steps + 1, tokens, 0.0
        tree.model.train()
        optimiser.zero_grad()
        for part in step():
            part.backward()
            value += part.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        tokens = tree.forward_tokens - first
        warm, cosine = 20 * tokens / budget, (1 + math.cos(math.pi * before / budget)) / 2
        optimiser.param_groups[0]["lr"] = learning_rate * min(warm, cosine)
        optimiser.step()
        seconds += time.perf_counter() - start
        bar.update(tokens - before)


def fit_target(tree: PackedTree, log_item_rewards: Tensor, loss: str, budget: int, paths: str = "reward",
               n_titles: int = 16, learning_rate: float = 1e-3, penalty: float = 0.0, seed: int = 0,
               **how: Any) -> pd.DataFrame:
    """Tunes `tree.model` until it draws titles in proportion to reward, as well as the loss can. Returns as `tune`.
    Raises ValueError: unknown loss or paths; sft with paths that are not drawn from the reward.

    Args:
        log_item_rewards: (n_items,) log R in nats. loss: one of FIT_LOSSES. n_titles: titles a step.
        budget: tokens to put through `tree.model`; the step that passes it is the last. Draws from the policy count.
        paths: where the sampled losses look: titles drawn from the reward, from the policy itself, or the paper's
            schedule, which starts with titles drawn in proportion to their length and moves to the policy by a tenth
            each time that the loss falls below 0.05 (the paper's; 0.4 for its large catalogue).
        penalty: weight of what is lost to tokens that leave the tree. The modified SubTB needs it: it compares tokens
            with the terminator alone, so that it vanishes for policies that leave the tree as well.
        how: evaluations, progress and watch of `tune`."""
    if loss not in FIT_LOSSES or paths not in FIT_PATHS:
        raise ValueError(f"loss {loss!r}, paths {paths!r}: choose of {', '.join(FIT_LOSSES)}; {', '.join(FIT_PATHS)}")
    if loss == "sft" and paths != "reward":
        raise ValueError(f"sft imitates what is drawn: with paths {paths!r} it would not aim at the reward")
    torch.manual_seed(seed)
    trie, on_policy, log_flows = tree.trie, float(paths == "policy"), tree.trie.log_flows(log_item_rewards)
    reward = trie.log_leaf_probs(trie.log_token_rewards(log_item_rewards)).exp()
    off_policy = reward if paths == "reward" else trie.depth[trie.leaves].double()

    def drawn_leaves() -> Tensor:
        n_own = round(on_policy * n_titles)
        off = torch.multinomial(off_policy, n_titles - n_own, replacement=True) if n_own < n_titles else []
        own = draw_leaves(trie, tree.log_probs(), n_own) if n_own else trie.leaves[:0]
        return torch.cat([own, trie.leaves[off]])

    def step() -> Iterator[Tensor]:
        nonlocal on_policy
        value, leaves = 0.0, None if loss.startswith("exact") else drawn_leaves()
        for part in loss_parts(tree, loss, log_flows, leaves, penalty):
            value += part.item()
            yield part
        if paths == "schedule" and value < 0.05:
            on_policy = min(1.0, on_policy + 0.1)

    return tune(tree, log_item_rewards, step, budget, learning_rate, f"{loss}, {paths}", **how)


# Preference tuning on the same tree
def tilted_optimum(log_reference: Tensor, log_reward: Tensor, beta: float) -> Tensor:
    """(n_leaves,) log of π_ref · exp(r/β), normalised: what a policy gradient with KL penalty β converges to. With r =
    log R and a uniform reference, β = 1 gives R/Z itself, the target of Flower; a smaller β sharpens it."""
    return (log_reference + log_reward / beta).log_softmax(-1)


def dpo_loss(log_pi: Tensor, log_reference: Tensor, beta: float) -> Tensor:
    """−mean log σ(β · (ratio of the preferred title − ratio of the other)), ratio = log π − log π_ref: nats, of (n, 2)
    pairs of titles, the preferred one first. Source: Rafailov et al., *Direct Preference Optimization*, 2023, eq. 7."""
    ratio = log_pi - log_reference
    return -torch.nn.functional.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1])).mean()


def rloo_loss(log_pi: Tensor, log_reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """REINFORCE with the other completions' mean as baseline; reward r − β · (log π − log π_ref). All (n,), n ≥ 2.
    Source: Ahmadian et al., *Back to Basics*, ACL 2024."""
    paid = rewards - beta * (log_pi.detach() - log_reference)
    advantage = paid - (paid.sum() - paid) / (len(paid) - 1)
    return -(advantage * log_pi).mean()


def prefer(tree: PackedTree, log_item_rewards: Tensor, method: str, budget: int, beta: float = 0.1, n_titles: int = 16,
           learning_rate: float = 1e-5, seed: int = 0, **how: Any) -> pd.DataFrame:
    """Tunes with one of PREFERENCE_LOSSES, by exact log π on the packed tree; returns the log of `tune`. The model as
    it comes is the reference π_ref; one pass over the tree tells all that is needed of it.
    RLOO's completions are unmasked: titles, or a prefix with a token that leaves the tree there. All such tokens of one
    prefix are one outcome, so that the tree's log π tell the probability of each.
    budget, how: as `fit_target` takes them. beta: weight of the divergence from the reference. n_titles: titles a step:
    n_titles / 2 pairs for DPO, n_titles completions for RLOO.
    Raises ValueError: unknown method; no two titles differ in reward, so that DPO has no pair."""
    if method not in PREFERENCE_LOSSES:
        raise ValueError(f"{method!r} is none of {', '.join(PREFERENCE_LOSSES)}")
    torch.manual_seed(seed)
    trie = tree.trie
    tree.model.eval()
    log_shares = trie.log_flows(log_item_rewards)[trie.leaves] - log_item_rewards.logsumexp(0)
    if method == "dpo" and log_shares.unique().numel() < 2:
        raise ValueError("no two titles differ in reward: DPO has no pair to prefer in")
    reference = outcomes(trie, tree.log_probs())
    paid = torch.cat([log_shares.float(), reference.new_full((trie.n_nodes,), losses.FLOOR_LOG_REWARD)])
    leaf_or_node = torch.cat([trie.leaves, torch.arange(trie.n_nodes, device=trie.leaves.device)])

    def step() -> Iterator[Tensor]:
        if method == "dpo":
            drawn = _pairs(log_shares, max(1, n_titles // 2))
        else:
            drawn = torch.multinomial(outcomes(trie, tree.log_probs()).exp(), n_titles, replacement=True)
        _, into, _ = drawn_edges(tree, leaf_below(trie, leaf_or_node[drawn.flatten()]))
        log_pi, log_ref = outcomes(trie, into)[drawn], reference[drawn]
        yield dpo_loss(log_pi, log_ref, beta) if method == "dpo" else rloo_loss(log_pi, log_ref, paid[drawn], beta)

    return tune(tree, log_item_rewards, step, budget, learning_rate, method, **how)


def outcomes(trie: TitleTrie, log_edges: Tensor) -> Tensor:
    """(n_leaves + n_nodes,) log-probability that an unmasked draw spells each title, and that it leaves the tree at
    each node (0 at leaves). log_edges: (n_nodes,) over the whole vocabulary, 0 where not known: they tell nothing."""
    inside = segment_logsumexp(log_edges[1:], trie.parent[1:], trie.n_nodes).clamp(max=-1e-7)
    path = trie.paths(torch.arange(trie.n_nodes, device=log_edges.device))
    reached = torch.where(path >= 0, log_edges[path], 0).sum(-1)
    exits = torch.where(trie.node_leaf >= 0, -torch.inf, reached + torch.log(-torch.expm1(inside)))
    return torch.cat([reached[trie.leaves], exits])


def _pairs(log_shares: Tensor, n: int) -> Tensor:
    """(n, 2) leaf ids drawn uniformly, of different shares, the larger one first."""
    drawn = torch.randint(len(log_shares), (n, 2), device=log_shares.device)
    while (tied := log_shares[drawn[:, 0]] == log_shares[drawn[:, 1]]).any():
        drawn[tied] = torch.randint(len(log_shares), (int(tied.sum()), 2), device=drawn.device)
    return drawn.gather(1, log_shares[drawn].argsort(descending=True))


# The study of notebook 05, case by case
def title_counts(settings: Settings) -> pd.Series:
    """Title → count, most frequent first: the user's table, or all ratings of MovieLens-100K (no split: nothing here
    is predicted)."""
    if settings.counts_path:
        return sources.read_counts(store.ROOT / Path(settings.counts_path).expanduser())
    items, interactions = sources.read_recbole(sources.movielens_100k())
    title = interactions.item_id.map(items.set_index("item_id").title)
    return title.value_counts(sort=False).astype(float).sort_values(ascending=False, kind="stable")


@dataclass(frozen=True)
class Case:
    """One model tuned in one way on one target."""

    titles: tuple[str, ...]
    log_rewards: tuple[float, ...]  # log R
    target: str
    method: str
    paths: str
    seed: int
    budget: int
    n_titles: int  # a step
    n_draws: int


def cases(settings: Settings, counts: pd.Series) -> list[Case]:
    """All cases: every method on the most frequent titles, one on permuted counts, one on the large catalogue.
    Permuted counts belong to other titles than their own, so that what the model has read about fame is of no help:
    another permutation for each seed. On the true counts the exact losses depend on no seed: they draw nothing, and a
    pretrained model starts where it starts."""
    small = counts.head(settings.n_titles or len(counts))
    large = counts[counts >= settings.min_count] if settings.min_count else counts[:0]
    seeds = range(settings.seed, settings.seed + settings.n_seeds)

    def case(of: pd.Series, method: str, paths: str, seed: int, **more: Any) -> Case:
        n_draws = settings.n_draws if seed == settings.seed else 0
        common = {"target": "counts", "budget": settings.budget, "n_titles": settings.fit_titles, "n_draws": n_draws}
        log_rewards = tuple(settings.target_alpha * np.log(of))
        return Case(tuple(of.index), log_rewards, method=method, paths=paths, seed=seed, **common | more)

    listed = [case(small, method, paths, seed) for method in settings.methods
              for paths in PATHS.get(method, settings.fit_paths)
              for seed in (seeds[:1] if method.startswith("exact") else seeds)]
    if settings.longer > 1 and "subtb" in settings.methods:
        listed.append(case(small, "subtb", "reward", settings.seed, budget=settings.longer * settings.budget))
    if "exact_ce" in settings.methods:
        for seed in seeds:
            shuffled = pd.Series(np.random.default_rng(seed).permutation(small), small.index)
            listed.append(case(shuffled, "exact_ce", "all", seed, target="permuted", n_draws=0))
    if len(large) > len(small):
        paths = PATHS.get(settings.large_method, settings.fit_paths)[0]
        listed.append(case(large, settings.large_method, paths, settings.seed, budget=settings.large_budget,
                           n_titles=settings.large_titles, n_draws=0))
    return listed


def run_case(case: Case, settings: Settings, folder: Path) -> dict[str, Any]:
    """Tunes and measures one case, or reads its record under `folder` if the same settings have written it. The dry
    run's record goes into a folder `cache` beside it.
    Returns row: the case and its figures, `measure` and the tokens and seconds of training among them; curve: one
    record an evaluation; log_edges: (n_nodes,) log π over the whole vocabulary; draws: (n_leaves,) titles drawn by the
    decoder, or empty. Nodes and leaves are those of the tree that `open_case` gives."""
    preference, penalised = case.method in PREFERENCE_LOSSES, case.method == "modified_subtb"
    used = ["prompt", "frozen_layers", "learning_rate"] + ["penalty"] * penalised
    used += ["kl_weight", "preference_titles", "preference_learning_rate"] * preference
    origin = {name: getattr(settings, name) for name in used} | asdict(case)
    origin["base"] = training.base_digest(sources.model_folder(settings.model))
    name = f"{len(case.titles)}_{case.target}_{case.method}_{case.paths}_{case.budget}_{case.seed}"
    path = folder / f"{name}-{store.digest(origin)}.json"
    if record := store.find(path, origin, "row", "curve", "log_edges", "draws"):
        return record
    training.dry_run(settings, case.titles, folder.parent / "cache", settings.prompt)
    start = time.perf_counter()
    model, _, catalogue = open_case(case, settings)
    log_rewards = torch.tensor(case.log_rewards, dtype=torch.float64, device=model.device)
    tree = PackedTree(model, catalogue.trie, catalogue.header, settings.frozen_layers)
    loss, budget = ("sft", case.budget // 2) if preference else (case.method, case.budget)
    log = fit_target(tree, log_rewards, loss, budget, "reward" if loss in PATHS else case.paths, case.n_titles,
                     settings.learning_rate, settings.penalty * penalised, case.seed)
    if preference:
        before = log.to_dict("records")[-1]
        after = prefer(tree, log_rewards, case.method, case.budget - before["forward_tokens"], settings.kl_weight,
                       settings.preference_titles, settings.preference_learning_rate, case.seed)[1:]
        for column in ("step", "forward_tokens", "seconds"):
            after[column] += before[column]
        log = pd.concat([log, after])
    draws = drawn(model.eval(), tree.trie, catalogue.header, case.n_draws, case.seed) if case.n_draws else []
    curve = log.drop(columns="loss").to_dict("records")
    row = {name: getattr(case, name) for name in ("target", "method", "paths", "seed", "budget")} | curve[-1]
    source = store.provenance(asdict(settings), time.perf_counter() - start)
    return store.keep(path, origin, source, row={"n_titles": len(case.titles)} | row, curve=curve,
                      log_edges=tree.log_probs().tolist(), draws=draws)


def open_case(case: Case, settings: Settings) -> Backbone:
    """Untuned model and the case's titles; `catalogue.header` is the prompt. On the GPU if there is one."""
    backbone = sources.open_backbone(replace(settings, seed=case.seed), case.titles, settings.prompt)
    return backbone._replace(model=backbone.model.to("cuda" if torch.cuda.is_available() else "cpu"))


@torch.no_grad()
def drawn(model: Any, trie: TitleTrie, context: Sequence[int], n: int, seed: int, batch: int = 250) -> list[int]:
    """(n_leaves,) how often each title comes up in n draws, token by token under the tree's mask."""
    torch.manual_seed(seed)
    leaves = []
    for prompts in torch.tensor([[*context]] * n, device=model.device).split(batch):
        ends = torch.full((len(prompts), 1), len(context), device=model.device)
        leaves.append(sample_leaves(Prompts(model, trie, prompts, ends)).flatten())
    return torch.bincount(trie.node_leaf[torch.cat(leaves)], minlength=len(trie.leaves)).tolist()
