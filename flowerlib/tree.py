"""The model on the tree of titles: nodes packed behind prompts, the exact log π of every edge, draws, beams, lists.

Packed means: rows of tokens and, behind them in one sequence, nodes of the tree (-1: none). A node stands at the
position of its depth behind its row. It sees the row as far as it follows it, and the packed nodes of its own group on
the path to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad as padded
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from .data import clean_title, move_article
from .model import Catalogue, context_limit, load_trained, split_layers, trained_folder, trained_on
from .rewards import count_log_rewards, preference_log_rewards
from .trie import TitleTrie, segment_logsumexp


def right_padded(rows: Sequence[Sequence[int] | np.ndarray], pad: int = 0, multiple: int = 1) -> Tensor:
    """Lists of ids → (B, T) int64, padded on the right, T a multiple of this number. A causal model needs no mask then:
    nothing sees what stands behind it. (Rows padded on the left begin with queries that see nothing; of a softmax over
    nothing a GPU's kernel may make NaN gradients.)"""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    return padded(ids, (0, -ids.shape[1] % multiple), value=pad)


def seen_by_nodes(
    trie: TitleTrie, width: int, limit: Tensor, nodes: Tensor, group: Tensor, packed: Tensor, packed_group: Tensor,
) -> Tensor:
    """What nodes see of their rows and of the nodes packed behind these: (B, W, T + N) bool.

    Args:
        width: T, of the rows. limit: (B, W) how many columns of its row each node follows.
        nodes: (B, W). group: (W,) a number; nodes see their own group alone.
        packed, packed_group: (B, N) and (N,) all nodes in the sequence.
    """
    of_row = torch.arange(width, device=limit.device) < limit[..., None]
    of_tree = trie.on_path(packed, nodes) & (packed_group == group[:, None])
    return torch.cat([of_row, of_tree], -1)


def pack(trie: TitleTrie, width: int, limit: Tensor, nodes: Tensor, group: Tensor) -> dict[str, Tensor]:
    """Mask (B, 1, T + W, T + W) and positions (B, T + W) for a pass over rows and the nodes behind them, no cache.

    The arguments are those of `seen_by_nodes`.
    """
    column = torch.arange(width, device=nodes.device).expand(len(nodes), -1)
    limits = torch.cat([column + 1, limit], 1)  # of rows' tokens too
    of_all, groups = padded(nodes, (width, 0), value=-1), padded(group, (width, 0))
    visible = seen_by_nodes(trie, width, limits, of_all, groups, nodes, group)
    behind = limit - 1 + trie.depth[nodes.clamp(min=0)]
    return {"attention_mask": visible[:, None], "position_ids": torch.cat([column, behind], 1)}


def additive(model: PreTrainedModel, visible: Tensor) -> Tensor:
    """The mask as the model's attention takes it: bool, or numbers that eager attention adds to its scores."""
    eager = model.config.get_text_config()._attn_implementation == "eager"
    return (~visible).float() * torch.finfo(torch.float32).min if eager else visible


def check_length(model: PreTrainedModel, n: int) -> None:
    """Raises ValueError if the model reads fewer than the n tokens of prompt and title."""
    if n > (limit := context_limit(model)):
        raise ValueError(f"prompt and title may have {n} tokens and the model reads {limit}: shorten the history")


class Prompts:
    """Rows of tokens that a model has read into a cache, and the nodes packed behind them so far. With gradients, where
    they are enabled.

    Attributes:
        kept: (B, K, V) logits of the rows at the columns `keep`. logits: (B, P, V) where each of the P groups begins.
    """

    def __init__(self, model: PreTrainedModel, trie: TitleTrie, input_ids: Tensor, branch: Tensor,
                 keep: Tensor | None = None):
        """input_ids: (B, T), padded on the right. branch: (B, P) how many columns of its row each group follows; the
        groups after the P-th follow as many as it. keep: (K,) ascending, branch - 1 among them; None: these alone.
        Raises ValueError if the context is too short, or if the model's scores are NaN."""
        self.model, self.plain = model, getattr(model, "module", model)  # in DDP, and out of it
        check_length(self.plain, int(branch.max()) + trie.max_depth)
        self.trie, self.branch, self.width = trie, branch, input_ids.shape[1]
        keep = (branch - 1).unique() if keep is None else keep
        cache = DynamicCache()  # one that slides would lose the prompt
        out = model(input_ids=input_ids, use_cache=True, past_key_values=cache, logits_to_keep=keep)
        self.kept, self.cache = out.logits, out.past_key_values
        place = torch.searchsorted(keep, branch - 1)
        self.logits = self.kept[torch.arange(len(branch), device=branch.device)[:, None], place]
        if self.logits.isnan().any():
            raise ValueError("the model's scores are NaN, so that no title can be found: lower learning_rate")
        self.nodes = branch.new_zeros(len(branch), 0)
        self.group = self.nodes[0]

    def detached(self) -> Prompts:
        """The rows alone, without gradients: nodes packed behind them do not reach these prompts."""
        other, other.cache = copy.copy(self), DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            other.cache.update(layer.keys[:, :, : self.width].detach(), layer.values[:, :, : self.width].detach(), i)
        other.model, other.logits = self.plain, self.logits.detach()
        other.nodes, other.group = self.nodes[:, :0], self.group[:0]
        return other

    def extend(self, nodes: Tensor, group: Tensor) -> Tensor:
        """Packs (B, W) more nodes of (W,) groups → (B, W, V) logits there."""
        self.nodes, self.group = torch.cat([self.nodes, nodes], 1), torch.cat([self.group, group])
        limit = self.branch[:, group.clamp(max=self.branch.shape[1] - 1)]
        visible = seen_by_nodes(self.trie, self.width, limit, nodes, group, self.nodes, self.group)
        node = nodes.clamp(min=0)
        return self.model(
            input_ids=self.trie.token[node].clamp(min=0), attention_mask=additive(self.plain, visible[:, None]),
            position_ids=limit - 1 + self.trie.depth[node], past_key_values=self.cache, use_cache=True
        ).logits


class PackedTree:
    """A whole tree behind one prompt: log π of any of its edges, exact, trainable. Frozen lower layers run once, here.

    Attributes:
        model: what is tuned: the upper layers, or all of them.
        forward_tokens: tokens that have gone through `model` in training so far.
    """

    def __init__(
        self, model: PreTrainedModel, trie: TitleTrie, context: Sequence[int], n_frozen: int = 0,
        nodes_at_a_time: int = 512):
        """context: the prompt's tokens. nodes_at_a_time bounds the memory: so many nodes' logits are held at once."""
        check_length(model, len(context) + trie.max_depth)
        self.model, self.trie = model, trie.to(model.device)
        self.width, self.nodes_at_a_time, self.forward_tokens = len(context), nodes_at_a_time, 0
        tokens = torch.cat([torch.tensor(context, device=model.device), self.trie.token])
        self.read = {"input_ids": tokens}  # what the model reads of prompt and nodes, (width + n_nodes, …)
        if n_frozen:
            trunk, self.model = split_layers(model, n_frozen)
            self.model.get_input_embeddings().requires_grad_(False)
            hidden = torch.zeros(len(tokens), trunk.config.hidden_size, device=model.device)
            with torch.no_grad():
                for nodes, _ in self._chunks():
                    hidden[self._rows(nodes)] = trunk(**self._inputs(nodes), use_cache=False).last_hidden_state[0]
            self.read = {"inputs_embeds": hidden}

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The tree in parts: nodes that go through the model, ascending; and which of root and these are the part's
        own, as places (the others are there to be seen). Every inner node is one part's own."""
        root = self.trie.parent.new_zeros(1)
        for chunk in torch.cat([root, self.trie.inner]).split(self.nodes_at_a_time):
            nodes = self.with_ancestors(chunk[chunk > 0])
            yield nodes, torch.isin(torch.cat([root, nodes]), chunk).nonzero()[:, 0]

    def with_ancestors(self, nodes: Tensor) -> Tensor:
        """The given nodes and all nodes above them but the root, ascending, (m,)."""
        closed = self.trie.paths(nodes).unique()
        return closed[closed > 0]

    def _rows(self, nodes: Tensor) -> Tensor:
        return torch.cat([torch.arange(self.width, device=nodes.device), self.width + nodes])

    def _inputs(self, nodes: Tensor) -> dict[str, Tensor]:
        """What the model takes to read the prompt and the nodes behind it."""
        limit = torch.full_like(nodes, self.width)[None]
        packed = pack(self.trie, self.width, limit, nodes[None], torch.zeros_like(nodes))
        packed["attention_mask"] = additive(self.model, packed["attention_mask"])
        return packed | {name: values[self._rows(nodes)][None] for name, values in self.read.items()}

    def edges(self, nodes: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes (m,), as `with_ancestors` gives them, and places (k,) in root and nodes → children of the nodes there,
        (n,); log π of the edges into these, (n,); log π of the terminator there, (k,): over the vocabulary, nats."""
        if self.model.training:
            self.forward_tokens += self.width + len(nodes)
        out = self.model(**self._inputs(nodes), use_cache=False, logits_to_keep=self.width - 1 + own)
        logits, token = out.logits[0].float(), self.trie.token
        total = logits.logsumexp(-1)
        rows, children = self.trie.children(torch.cat([nodes.new_zeros(1), nodes])[own])
        return children, logits[rows, token[children]] - total[rows], logits[:, token[self.trie.leaves[0]]] - total

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(children, log π of the edges into them) of the whole tree, every edge once, a part at a time."""
        for chunk in self._chunks():
            yield self.edges(*chunk)[:2]

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """(n_nodes,) log π of every edge over the whole vocabulary, nats, 0 at the root: exact, no title is drawn."""
        total = torch.zeros(self.trie.n_nodes, device=self.trie.parent.device)
        for children, log_pf in self.parts():
            total[children] = log_pf
        return total


@torch.no_grad()
def sample_leaves(prompts: Prompts) -> Tensor:
    """Draws a title for each group of the prompts from the model renormalised over the children of each node: (B, P)
    leaf nodes. Its paths go through the model packed behind the rows, while one can fork. ValueError: NaN scores."""
    trie, branch = prompts.trie, prompts.branch
    nodes, logits = torch.zeros_like(branch).flatten(), prompts.logits
    while True:
        rows, children = trie.children(nodes)
        scores = logits.flatten(0, 1)[rows, trie.token[children]].float()
        noisy = scores - torch.empty_like(scores).exponential_().log()  # Gumbel noise: the argmax is a sample
        best = torch.full((len(nodes),), -torch.inf, device=scores.device).scatter_reduce(0, rows, noisy, "amax")
        if best.isnan().any():
            raise ValueError("the model's scores are NaN, so that no title can be drawn: lower learning_rate")
        drawn = noisy == best[rows]
        nodes = nodes.index_copy(0, rows[drawn], children[drawn])
        if not trie.forks[nodes].any():
            return leaf_below(trie, nodes).view_as(branch)
        logits = prompts.extend(nodes.view_as(branch), torch.arange(branch.shape[1], device=branch.device))


def leaf_below(trie: TitleTrie, nodes: Tensor) -> Tensor:
    """The first leaf node at or below each node."""
    while (inner := trie.node_leaf[nodes] < 0).any():
        nodes = torch.where(inner, trie.child_start[nodes], nodes)
    return nodes


@dataclass(frozen=True)
class Beams:
    """One way to search the tree for titles, by `n` beams.

    A title's score is Σ log π over its tokens, ⊤ included, in nats and over the whole vocabulary. Only the children
    of the beams' nodes are candidates, and every finished title competes, so that with as many beams as titles the
    search is exact.

    Attributes:
        length_normalised: divide the score by the number of tokens, ⊤ included (the official choice).
        child_renormalised: take π over the children of each node alone (those left, where seen titles are out).
        seen_allowed: titles that the user has seen may be recommended again.
        stochastic: draw n different titles, one after the other without replacement, from π over the children, as the
            top n by Gumbel noise sent down the tree (Kool, van Hoof and Welling, *Stochastic Beams and Where to Find
            Them*, ICML 2019): exact. The list is in the order of drawing.
        temperature: logits are divided by it before anything else.
        guide: weight w of the user's preference: a step scores (1 − w) · log π + w · log r, π over the children and r
            the token reward of p_ui (D3, Bao et al. 2024).
        alpha: a title's score gains alpha · log(count + 1); on the way to it, the logarithm of the mean of
            (count + 1)^alpha over the titles below. It does while decoding what the reward's α does in training.
    """

    n: int = 10
    length_normalised: bool = False
    child_renormalised: bool = False
    seen_allowed: bool = False
    stochastic: bool = False
    temperature: float = 1.0
    guide: float = 0.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        numbers = isinstance(self.n, Integral) and 0 < self.temperature < np.inf and 0 <= self.guide <= 1 <= self.n
        if not numbers or self.n is True:
            raise ValueError(f"need a whole n >= 1, a finite temperature > 0 and guide from 0 to 1, not {self}")
        if self.stochastic and (self.length_normalised or self.guide):
            raise ValueError("stochastic beams draw from π: neither length_normalised nor guide goes with them")
        refused = self.stochastic or self.length_normalised and self.alpha > 0
        if not abs(self.alpha) < np.inf or self.alpha and refused:
            raise ValueError(f"alpha {self.alpha} goes with neither stochastic nor, above 0, length_normalised beams")


@torch.no_grad()
def beam_search(
    model: PreTrainedModel, catalogue: Catalogue, histories: Sequence[Sequence[int]], searches: Sequence[Beams],
    seen: Sequence[Sequence[int]] | None = None, batch_size: int = 16, progress: str | None = None,
    log_p: Tensor | None = None, seed: int = 0, item_counts: Tensor | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best titles after each history, for each of the searches: their beams are packed behind one prompt, which is
    read once, and no cache is copied when beams change places.

    Args:
        histories: item positions in the prompts, oldest first; may be empty.
        seen: item positions not to be recommended, where they are more than the histories.
        progress: label of a progress bar, or None. seed: of the stochastic searches.
        log_p: (N, n_leaves) log preference of each user; ValueError if a search has a guide and it is missing.
        item_counts: (n_items,) interactions; ValueError if a search has an alpha and they are missing.

    Returns:
        For each search, leaf ids (N, n) best first and -1 where a list is shorter; scores (N, n), -inf there.
    """
    if log_p is None and any(s.guide for s in searches):
        raise ValueError("a search with a guide needs log_p, the users' preferences")
    if item_counts is None and any(s.alpha for s in searches):
        raise ValueError("a search with an alpha needs item_counts")
    trie = catalogue.trie.to(model.device)
    generators = [torch.Generator(model.device).manual_seed(seed) for _ in searches]  # none depends on the others
    contexts = [catalogue.context(history) for history in histories]
    even = count_log_rewards(trie, torch.zeros(trie.n_items, device=model.device), alpha=0.0).float()
    tilts = [_tilt(trie, item_counts.to(model.device), s.alpha) if s.alpha else None for s in searches]
    results = [(np.full((len(contexts), s.n), -1), np.full((len(contexts), s.n), -np.inf)) for s in searches]
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        rows = [contexts[i] for i in batch]
        lengths = torch.tensor([[len(row)] for row in rows], device=model.device)
        prompts = Prompts(model, trie, right_padded(rows).to(model.device), lengths)
        blocked = nodes_of_seen(trie, [(histories if seen is None else seen)[i] for i in batch])
        guide = None
        if any(s.guide for s in searches):  # token rewards of R(leaf | u) = p_u(leaf)
            guide = trie.log_token_rewards(preference_log_rewards(trie, even, log_p[batch].to(model.device)))
        started = [_Search(trie, search, None if search.seen_allowed else blocked, guide, tilt, generator,
                           prompts.logits) for search, tilt, generator in zip(searches, tilts, generators)]
        while going := [(i, search) for i, search in enumerate(started) if search.nodes.numel()]:
            nodes = [search.nodes for _, search in going]
            group = torch.cat([torch.full_like(beams[0], i) for (i, _), beams in zip(going, nodes)])
            logits = prompts.extend(torch.cat(nodes, 1), group).split([beams.shape[1] for beams in nodes], 1)
            for (_, search), part in zip(going, logits):
                search.step(part)
        for search, (leaves, scores) in zip(started, results):
            leaves[batch], scores[batch] = search.leaf.cpu().numpy(), search.best_score.cpu().numpy()
    return results


def _tilt(trie: TitleTrie, item_counts: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(n_nodes,) the logarithm of the mean of (count + 1)^alpha over the titles below each node, 0 at the root; and how
    far it can still rise on the way to one of them."""
    log_mean, even = (trie.log_flows(count_log_rewards(trie, item_counts, a)) for a in (alpha, 0.0))
    log_mean = log_mean - even
    highest = trie.from_below(torch.where(trie.node_leaf >= 0, log_mean, -torch.inf), "amax")
    return log_mean.index_fill(0, trie.leaves.new_zeros(1), 0.0).float(), (highest - log_mean).float()


class _Search:
    """One search behind B prompts, a step at a time.

    Attributes:
        nodes: (B, W) of the beams; W is 0 when the search is done.
        leaf, best_score: (B, n) the best titles so far, -1 and -inf where there is none.
    """

    def __init__(self, trie: TitleTrie, beams: Beams, blocked: Tensor | None, guide: Tensor | None,
                 tilt: tuple[Tensor, Tensor] | None, generator: torch.Generator, logits: Tensor):
        """blocked, guide: (B, n_nodes) nodes left out, and log token rewards; tilt: of `_tilt`. logits: (B, 1, V) after
        the prompts."""
        self.trie, self.beams, self.blocked, self.guide, self.generator = trie, beams, blocked, guide, generator
        self.tilt, self.rise = tilt or (None, None)
        self.nodes, self.depth = trie.parent.new_zeros(len(logits), 1), 0
        self.key = self.score = torch.zeros(len(logits), 1, device=logits.device)  # by key beams are ranked, nats both
        self.best_key = self.best_score = self.key.new_full((len(logits), beams.n), -torch.inf)
        self.leaf = torch.full_like(self.best_key, -1, dtype=torch.long)
        self.step(logits)

    def step(self, logits: Tensor) -> None:
        """Goes down by one token. logits: (B, W, V) at the nodes."""
        trie, n, normalised = self.trie, self.beams.n, self.beams.length_normalised
        key, score, node = self._candidates(logits)
        self.depth += 1
        leaf, length = trie.node_leaf[node], self.depth if normalised else 1
        ended_key, ended_score = (torch.where(leaf >= 0, x / length, -torch.inf) for x in (key, score))
        self.best_key, place = torch.cat([self.best_key, ended_key], 1).topk(n)
        self.best_score = torch.cat([self.best_score, ended_score], 1).gather(1, place)
        self.leaf = torch.cat([self.leaf, leaf], 1).gather(1, place)
        longest = trie.deepest[node] if normalised else 1
        most = key if self.rise is None else key + self.rise[node]
        goes_on = (leaf < 0) & (most / longest > self.best_key[:, -1:])  # no title below ranks above this bound
        self.key, place = torch.where(goes_on, key, -torch.inf).topk(min(n, key.shape[1]))
        width = int(torch.isfinite(self.key).sum(1).max())
        self.key, place = self.key[:, :width], place[:, :width]
        self.nodes = torch.where(torch.isfinite(self.key), node.gather(1, place), -1)
        self.score = score.gather(1, place)

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The children of every prompt's beams side by side: key, score, node, (B, most); unused keys are -inf."""
        trie, beams, (n, width) = self.trie, self.beams, self.nodes.shape
        rows, children = trie.children(self.nodes.flatten())
        if self.blocked is not None:
            left = ~self.blocked[rows // width, children]
            rows, children = rows[left], children[left]
        logits, prompt = logits.flatten(0, 1), rows // width
        step = logits[rows, trie.token[children]].float() / beams.temperature
        if beams.child_renormalised or beams.stochastic or beams.guide:
            step = step - segment_logsumexp(step, rows, n * width)[rows]
        else:
            hot = logits if beams.temperature == 1 else logits / beams.temperature
            step = step - hot.float().logsumexp(-1)[rows]
        if beams.guide:
            guide = self.guide[prompt, children]
            guide = guide - segment_logsumexp(guide, rows, n * width)[rows]  # over the children left, as π is
            step = (1 - beams.guide) * step + beams.guide * guide
        if self.tilt is not None:
            step = step + self.tilt[children] - self.tilt[trie.parent[children]]
        score = self.score.flatten()[rows] + step
        key = _gumbels(score, self.key.flatten()[rows], rows, n * width, self.generator) if beams.stochastic else score
        counts = torch.bincount(prompt, minlength=n)
        at = prompt, torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[prompt]
        empty = torch.full((n, max(1, int(counts.max()))), -torch.inf, device=logits.device)
        node = torch.zeros_like(empty, dtype=torch.long).index_put(at, children)
        return empty.index_put(at, key), empty.index_put(at, score), node


def _gumbels(log_p: Tensor, above: Tensor, rows: Tensor, n_rows: int, generator: torch.Generator) -> Tensor:
    """Gumbel variables at log_p (n,) whose largest in each row is the parent's, `above` (n,): Kool et al., B.3."""
    noise = torch.empty_like(log_p).exponential_(generator=generator)
    g = log_p - noise.log()
    largest = torch.full((n_rows,), -torch.inf, device=g.device).scatter_reduce(0, rows, g, "amax")[rows]
    v = above - g + torch.log1p(-(g - largest).exp())
    return above - v.clamp(min=0) - torch.log1p((-v.abs()).exp())


def nodes_of_seen(trie: TitleTrie, seen: Sequence[Sequence[int]]) -> Tensor:
    """(B, n_nodes) bool: nodes under which every title was seen. Equal titles are seen together."""
    by_leaf = torch.zeros(len(seen), len(trie.leaves), device=trie.leaf.device)
    for row, items in zip(by_leaf, seen):
        row[trie.item_leaf[list(items)]] = -torch.inf
    return trie.log_flows(by_leaf[:, trie.item_leaf]) == -torch.inf


def recommend(run: str | Path, history: Sequence[Any], k: int = 10) -> pd.DataFrame:
    """The k best titles for one new user, best first, none of them seen. Searched with the run's number of beams.

    Args:
        run: folder of a finished training, such as runs/laptop/flower; a relative path counts from the project's root.
        history: item ids as in its items.parquet, or titles as there or before cleaning, oldest first; may be empty.

    Returns: columns item_id, title, score (Σ log π in nats).

    Raises:
        FileNotFoundError: no finished training there. ValueError: k or history is not as above, or an entry is unknown.
    """
    if not isinstance(k, Integral) or k is True or k < 1:
        raise ValueError(f"k is {k!r}: ask for a whole number of titles, one at least")
    history = [history] if isinstance(history, str) else history
    if not isinstance(history, (Sequence, np.ndarray, pd.Series, pd.Index)) or getattr(history, "ndim", 1) != 1:
        raise ValueError(f"the history is a {type(history).__name__}: give a flat list of item ids or titles")
    folder = trained_folder(run)
    settings, items = trained_on(folder)
    model, _, catalogue = load_trained(folder)
    by_id = dict(zip(items.item_id, items.index))
    by_title = dict(zip(items.title[::-1], items.index[::-1]))  # of several, the first
    places = []
    for entry in history:
        names = (by_id, entry), (by_title, entry), (by_title, move_article(clean_title(str(entry))))
        one = pd.api.types.is_scalar(entry) and not pd.isna(entry)
        place = next((known[name] for known, name in names if name in known), None) if one else None
        if place is None:
            near = get_close_matches(str(entry), by_title, n=3, cutoff=0.6)
            hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"{entry!r} is neither an item id nor a title of {folder / 'items.parquet'}{hint}")
        places.append(place)
    beams = Beams(min(max(k, settings.get("n_beams", 10)), len(catalogue.trie.leaves)))
    [(leaves, scores)] = beam_search(model, catalogue, [places[-settings["max_history"] :]], [beams], seen=[places])
    leaves, scores = leaves[0, :k], scores[0, :k]
    first = np.unique(catalogue.trie.item_leaf, return_index=True)[1]  # item of each leaf
    return items.iloc[first[leaves[leaves >= 0]]].reset_index(drop=True).assign(score=scores[leaves >= 0])
