"""The model on the tree of titles: nodes packed behind prompts, the exact log π of every edge, draws, beams, lists.

Packed means: rows of tokens and, behind them in one sequence, nodes of the tree. A node stands at the position of its depth
behind its row. It sees the row as far as it follows it, and the packed nodes of its own group on the path to it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel

from .data import clean_title, move_article
from .model import Catalogue, load_trained, split_layers, trained_folder
from .rewards import preference_log_rewards
from .trie import TitleTrie, segment_logsumexp

# Packing


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token lists → input_ids and attention_mask, (B, T) each, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width) >= width - lengths[:, None]).long()


def positions(attention_mask: Tensor) -> Tensor:
    """(B, T) positions that count from each row's first real token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def seen_by_nodes(
    trie: TitleTrie, attention_mask: Tensor, limit: Tensor, nodes: Tensor, group: Tensor, packed: Tensor, packed_group: Tensor
) -> Tensor:
    """What nodes see of their rows and of the nodes packed behind these: (B, W, T + N) bool.

    Args:
        attention_mask: (B, T) of the rows. limit: (B, W) how many columns of its row each node follows.
        nodes: (B, W), -1 where there is none. group: (W,) a number; nodes see their own group alone.
        packed, packed_group: (B, N) and (N,) all nodes in the sequence, `nodes` among them.
    """
    column = torch.arange(attention_mask.shape[1], device=limit.device)
    of_row = attention_mask.bool()[:, None] & (column < limit[..., None])
    of_tree = trie.on_path(packed, nodes) & (packed_group == group[:, None])
    return torch.cat([of_row, of_tree], -1)


def pack(trie: TitleTrie, attention_mask: Tensor, limit: Tensor, nodes: Tensor, group: Tensor) -> dict[str, Tensor]:
    """Mask (B, 1, T + W, T + W) and positions (B, T + W) for a pass over rows and the nodes behind them, without a cache.

    Args:
        attention_mask: (B, T). limit, nodes, group: as `seen_by_nodes` takes them.
    """
    n, width = attention_mask.shape
    rows = attention_mask.bool()[:, None] & torch.ones(width, width, dtype=torch.bool, device=nodes.device).tril()
    rows = torch.nn.functional.pad(rows, (0, nodes.shape[1]))
    visible = torch.cat([rows, seen_by_nodes(trie, attention_mask, limit, nodes, group, nodes, group)], 1)
    itself = torch.eye(visible.shape[1], dtype=torch.bool, device=nodes.device)  # a softmax over nothing would be NaN
    position = positions(attention_mask)
    behind = position.gather(1, limit - 1) + trie.depth[nodes.clamp(min=0)]
    return {"attention_mask": (visible | itself)[:, None], "position_ids": torch.cat([position, behind], 1)}


class Prompts:
    """Rows of tokens that a model has read into a cache, and the nodes packed behind them so far.

    Attributes:
        logits: (B, P, V) where each of the P groups begins.
    """

    def __init__(
        self, model: PreTrainedModel, trie: TitleTrie, input_ids: Tensor, attention_mask: Tensor, branch: Tensor | None = None
    ):
        """branch: (B, P) how many columns of its row each group follows; None is one group behind the whole row."""
        self.model, self.trie, self.mask = model, trie, attention_mask
        everything = torch.full((len(input_ids), 1), input_ids.shape[1], device=input_ids.device)
        self.branch = everything if branch is None else branch
        position, last = positions(attention_mask), (self.branch - 1).unique()
        out = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position, use_cache=True,
                    logits_to_keep=last)
        place = torch.searchsorted(last, self.branch - 1)[..., None].expand(-1, -1, out.logits.shape[-1])
        self.logits, self.cache = out.logits.gather(1, place), out.past_key_values
        self.position = position.gather(1, self.branch - 1)
        self.nodes = torch.zeros(len(input_ids), 0, dtype=torch.long, device=input_ids.device)
        self.group = self.nodes[0]

    def extend(self, nodes: Tensor, group: Tensor) -> Tensor:
        """Packs (B, W) more nodes, -1 where there is none, of (W,) groups → (B, W, V) logits there."""
        self.nodes, self.group = torch.cat([self.nodes, nodes], 1), torch.cat([self.group, group])
        of_branch = group if self.branch.shape[1] > 1 else torch.zeros_like(group)
        visible = seen_by_nodes(self.trie, self.mask, self.branch[:, of_branch], nodes, group, self.nodes, self.group)
        node = nodes.clamp(min=0)
        return self.model(
            input_ids=self.trie.token[node].clamp(min=0), attention_mask=visible[:, None], past_key_values=self.cache,
            position_ids=self.position[:, of_branch] + self.trie.depth[node], use_cache=True,
        ).logits


# Exact distribution and draws


class PackedTree:
    """A whole tree behind one prompt: log π of any of its edges, exact, trainable.

    Prompt and tree never change, so that frozen lower layers run once, here.

    Attributes:
        model: what is tuned: the upper layers, or all of them.
        forward_tokens: tokens that have gone through `model` in training so far.
    """

    def __init__(
        self, model: PreTrainedModel, trie: TitleTrie, context: Sequence[int], n_frozen: int = 0,
        nodes_at_a_time: int = 512,
    ):
        """context: the prompt's tokens. nodes_at_a_time bounds the memory: so many nodes' logits are held at once."""
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
        for nodes, _ in self._chunks():
            out = trunk(**self._inputs(nodes), use_cache=False)
            hidden[self._rows(nodes)] = out.last_hidden_state[0]
        return hidden

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The tree in parts: nodes that go through the model, ascending; and which of root and these are the part's own, as
        places (the others are there to be seen). Every inner node is one part's own."""
        root = self.trie.parent.new_zeros(1)
        for chunk in torch.cat([root, self.trie.inner]).split(self.nodes_at_a_time):
            nodes = self.with_ancestors(chunk[chunk > 0])
            yield nodes, torch.isin(torch.cat([root, nodes]), chunk).nonzero()[:, 0]

    def with_ancestors(self, nodes: Tensor) -> Tensor:
        """The given nodes and all nodes above them but the root, ascending, (m,)."""
        closed = self.trie.paths(nodes).unique()
        return closed[closed > 0]

    def _inputs(self, nodes: Tensor) -> dict[str, Tensor]:
        """What the model takes to read the prompt and the nodes behind it."""
        prompt, limit = torch.ones_like(self.context)[None], torch.full_like(nodes, self.width)[None]
        packed = pack(self.trie, prompt, limit, nodes[None], torch.zeros_like(nodes))
        if self.hidden is None:
            return {"input_ids": torch.cat([self.context, self.trie.token[nodes]])[None], **packed}
        return {"inputs_embeds": self.hidden[self._rows(nodes)][None], **packed}

    def _rows(self, nodes: Tensor) -> Tensor:
        return torch.cat([torch.arange(self.width, device=nodes.device), self.width + nodes])

    def edges(self, nodes: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π over the whole vocabulary, nats, where titles go on.

        Args:
            nodes: (m,) as `with_ancestors` gives them. own: (k,) places in root and nodes.

        Returns:
            The children of the nodes at `own`, (n,); log π of the edges into them, (n,); log π of the terminator at the
            nodes at `own`, (k,).
        """
        if self.model.training:
            self.forward_tokens += self.width + len(nodes)
        logits_to_keep = self.width - 1 + own
        logits = self.model(**self._inputs(nodes), use_cache=False, logits_to_keep=logits_to_keep).logits[0].float()
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
        """(n_nodes,) log π of every edge over the whole vocabulary, in nats, 0 at the root: exact, no title is drawn."""
        total = torch.zeros(self.trie.n_nodes, device=self.context.device)
        for children, log_pf in self.parts():
            total[children] = log_pf
        return total


@torch.no_grad()
def sample_leaves(
    model: PreTrainedModel, trie: TitleTrie, input_ids: Tensor, attention_mask: Tensor, branch: Tensor
) -> Tensor:
    """Draws P titles for each row from the model renormalised over the children of each node.

    Each row is read once; its paths go through the model packed behind it. Only the children's logits are looked at, and
    the model is asked no more once no path can fork.

    Args:
        input_ids, attention_mask: (B, T) rows padded on the left.
        branch: (B, P) how many columns of its row each path follows; it does not see the others.

    Returns:
        (B, P) leaf nodes.

    Raises:
        ValueError: the model's scores are NaN.
    """
    prompts, group = Prompts(model, trie, input_ids, attention_mask, branch), torch.arange(branch.shape[1], device=branch.device)
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
            while (inner := trie.node_leaf[nodes] < 0).any():
                nodes = torch.where(inner, trie.child_start[nodes], nodes)
            return nodes.view_as(branch)
        logits = prompts.extend(nodes.view_as(branch), group)


# Beams


class TrieLogitsProcessor(LogitsProcessor):
    """Masks every token that does not continue a title, for transformers' `generate`.

    Where nothing continues it allows ⊤ alone: give `generate` eos_token_id=terminator, so that it stops where titles end.

    Args:
        prompt_length: columns of input_ids that hold the prompt.
        blocked: (n_prompts, n_nodes) bool, nodes that a prompt may not enter, or None.
    """

    def __init__(self, trie: TitleTrie, prompt_length: int, terminator: int, blocked: Tensor | None = None):
        self.trie, self.prompt_length, self.terminator, self.blocked = trie, prompt_length, terminator, blocked

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        nodes = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        for column in range(self.prompt_length, input_ids.shape[1]):
            nodes = self.trie.advance(nodes, input_ids[:, column])
        allowed = self.trie.allowed_mask(nodes, scores.shape[-1])
        if self.blocked is not None:
            rows, children = self.trie.children(nodes)
            barred = self.blocked[rows // (len(nodes) // len(self.blocked)), children]
            allowed[rows[barred], self.trie.token[children[barred]]] = False
        allowed[:, self.terminator] |= ~allowed.any(-1)
        return scores.masked_fill(~allowed, -torch.inf)


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
            top n by Gumbel noise sent down the tree (Kool et al. 2019): exact. The list is in the order of drawing.
        temperature: logits are divided by it before anything else.
        guide: weight w of the user's preference: a step scores (1 − w) · log π + w · log r, π over the children and r
            the token reward of p_ui (D3, Bao et al. 2024).
    """

    n: int = 10
    length_normalised: bool = False
    child_renormalised: bool = False
    seen_allowed: bool = False
    stochastic: bool = False
    temperature: float = 1.0
    guide: float = 0.0

    def __post_init__(self) -> None:
        if self.n < 1 or self.temperature <= 0 or not 0 <= self.guide <= 1:
            raise ValueError(f"need n >= 1, temperature > 0 and guide from 0 to 1, not {self}")
        if self.stochastic and (self.length_normalised or self.guide):
            raise ValueError("stochastic beams draw from π: neither length_normalised nor guide goes with them")


@torch.no_grad()
def beam_search(
    model: PreTrainedModel, catalogue: Catalogue, histories: Sequence[Sequence[int]], searches: Sequence[Beams],
    seen: Sequence[Sequence[int]] | None = None, batch_size: int = 16, progress: str | None = None,
    log_p: Tensor | None = None, seed: int = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best titles after each history, for each of the searches; they share the passes through the model.

    The beams of all searches are packed behind their prompt: it is computed and stored once, and no cache is copied when
    beams change places. `TrieLogitsProcessor` does the same search through transformers' `generate`, with a copy of the
    prompt and its cache per beam, and is its reference in the tests.

    Args:
        histories: item positions in the prompts, oldest first; may be empty.
        seen: item positions not to be recommended, where they are more than the histories.
        progress: label of a progress bar, or None.
        log_p: (N, n_leaves) log preference of each user, for searches with a guide.
        seed: of the stochastic searches.

    Returns:
        For each search, leaf ids (N, n) best first and -1 where a list is shorter; scores (N, n), -inf there.

    Raises:
        ValueError: a search has a guide, and log_p is missing.
    """
    if log_p is None and any(s.guide for s in searches):
        raise ValueError("a search with a guide needs log_p, the users' preferences")
    trie = catalogue.trie.to(model.device)
    generators = [torch.Generator(model.device).manual_seed(seed) for _ in searches]  # none depends on the others
    contexts = [catalogue.context(history) for history in histories]
    results = [(np.full((len(contexts), s.n), -1), np.full((len(contexts), s.n), -np.inf)) for s in searches]
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        prompts = Prompts(model, trie, *(x.to(model.device) for x in left_padded([contexts[i] for i in batch])))
        blocked = nodes_of_seen(trie, [(histories if seen is None else seen)[i] for i in batch])
        guide = None if log_p is None else _guide(trie, log_p[batch].to(model.device))
        started = [
            _Search(trie, search, None if search.seen_allowed else blocked, guide, generator).run(prompts.logits)
            for search, generator in zip(searches, generators)
        ]
        for (leaf, score), (leaves, scores) in zip(_run(prompts, started), results, strict=True):
            leaves[batch], scores[batch] = leaf.cpu().numpy(), score.cpu().numpy()
    return results


_Steps = Generator[Tensor, Tensor, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Candidates:
    """The children of every prompt's beams side by side, (B, most): key ranks them, -inf at unused places."""

    key: Tensor
    score: Tensor  # the sum so far, nats
    node: Tensor


def _run(prompts: Prompts, searches: Sequence[_Steps]) -> list[tuple[Tensor, Tensor]]:
    """What each of the searches returns; the beams of all go through the model together, a group each."""
    results: dict[int, tuple[Tensor, Tensor]] = {}
    wanted: dict[int, Tensor] = {}

    def go_on(i: int, logits: Tensor | None) -> None:
        try:
            wanted[i] = searches[i].send(logits)
        except StopIteration as end:
            results[i] = end.value
            wanted.pop(i, None)

    for i in range(len(searches)):
        go_on(i, None)
    while wanted:
        widths = [nodes.shape[1] for nodes in wanted.values()]
        group = torch.tensor([i for i, width in zip(wanted, widths) for _ in range(width)], device=prompts.nodes.device)
        logits = prompts.extend(torch.cat(list(wanted.values()), 1), group)
        for i, part in zip(list(wanted), logits.split(widths, 1)):
            go_on(i, part)
    return [results[i] for i in range(len(searches))]


@dataclass(frozen=True)
class _Search:
    """One search behind B prompts: (B, n_nodes) blocked nodes, or None, and the guide's log token rewards, or None."""

    trie: TitleTrie
    beams: Beams
    blocked: Tensor | None
    guide: Tensor | None
    generator: torch.Generator

    def run(self, logits: Tensor) -> _Steps:
        """Yields the beams' nodes, (B, W) and -1 where there is none; is sent the logits there, (B, W, V); returns leaf ids
        and scores, (B, n) each. logits: (B, 1, V) after the prompts."""
        trie, normalised, n, device = self.trie, self.beams.length_normalised, len(logits), logits.device
        nodes = torch.zeros(n, 1, dtype=torch.long, device=device)
        key, score = torch.zeros(n, 1, device=device), torch.zeros(n, 1, device=device)
        best = torch.full((n, self.beams.n), -torch.inf, device=device)
        best_score, best_node = best.clone(), torch.zeros_like(best, dtype=torch.long)
        for depth in range(1, trie.max_depth + 1):
            candidates = self._candidates(logits, nodes, key, score)
            is_leaf = trie.node_leaf[candidates.node] >= 0
            length = depth if normalised else 1
            finished = torch.where(is_leaf, candidates.key / length, -torch.inf)
            best, place = torch.cat([best, finished], 1).topk(self.beams.n)
            best_score = torch.cat([best_score, candidates.score / length], 1).gather(1, place)
            best_node = torch.cat([best_node, candidates.node], 1).gather(1, place)
            running = torch.where(is_leaf, -torch.inf, candidates.key)
            longest = trie.deepest[candidates.node] if normalised else 1  # no title below ranks above this bound
            running = torch.where(running / longest > best[:, -1:], running, -torch.inf)
            key, place = running.topk(min(self.beams.n, running.shape[1]))
            width = int(torch.isfinite(key).sum(1).max())
            if not width:
                break
            key, place = key[:, :width], place[:, :width]
            nodes = torch.where(torch.isfinite(key), candidates.node.gather(1, place), -1)
            score = candidates.score.gather(1, place)
            logits = yield nodes
        filled = torch.isfinite(best)
        return torch.where(filled, trie.node_leaf[best_node], -1), torch.where(filled, best_score, -torch.inf)

    def _candidates(self, logits: Tensor, nodes: Tensor, key: Tensor, score: Tensor) -> _Candidates:
        """logits (B, W, V); nodes, key and score of the beams (B, W); a node of -1 has no children."""
        trie, beams, (n, width) = self.trie, self.beams, nodes.shape
        rows, children = trie.children(nodes.flatten())
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
        total = score.flatten()[rows] + step
        ranked = _gumbels(total, key.flatten()[rows], rows, n * width, self.generator) if beams.stochastic else total
        counts = torch.bincount(prompt, minlength=n)
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[prompt]
        empty = torch.full((n, max(1, int(counts.max()))), -torch.inf, device=logits.device)
        at = (prompt, place)
        none = torch.zeros(empty.shape, dtype=torch.long, device=rows.device)
        return _Candidates(empty.index_put(at, ranked), empty.index_put(at, total), none.index_put(at, children))


def _gumbels(log_p: Tensor, above: Tensor, rows: Tensor, n_rows: int, generator: torch.Generator) -> Tensor:
    """Gumbel variables located at log_p (n,) whose largest within each row is the parent's, `above` (n,).

    Source: Kool, van Hoof and Welling, *Stochastic Beams and Where to Find Them*, ICML 2019, appendix B.3.
    """
    noise = torch.empty_like(log_p).exponential_(generator=generator)
    g = log_p - noise.log()
    largest = torch.full((n_rows,), -torch.inf, device=g.device).scatter_reduce(0, rows, g, "amax")[rows]
    v = above - g + torch.log1p(-(g - largest).exp())
    return above - v.clamp(min=0) - torch.log1p((-v.abs()).exp())


def _guide(trie: TitleTrie, log_p: Tensor) -> Tensor:
    """(B, n_nodes) log token rewards of R(leaf | u) = p_u(leaf)."""
    sharers = torch.bincount(trie.item_leaf, minlength=len(trie.leaves))
    return trie.log_token_rewards(preference_log_rewards(trie, -sharers[trie.item_leaf].log(), log_p))


def nodes_of_seen(trie: TitleTrie, seen: Sequence[Sequence[int]]) -> Tensor:
    """(B, n_nodes) bool: nodes under which every title was seen. Equal titles are seen together."""
    flows = torch.zeros(len(seen), trie.n_items, device=trie.leaf.device)
    for row, items in enumerate(seen):
        flows[row, list(items)] = -torch.inf
    by_leaf = torch.zeros(len(seen), len(trie.leaves), device=flows.device)
    by_leaf.index_add_(1, trie.item_leaf, flows)
    return trie.log_flows(by_leaf[:, trie.item_leaf]) == -torch.inf


def recommend(run: str | Path, history: Sequence[Any], k: int = 10) -> pd.DataFrame:
    """The k best titles for one new user, best first, none of them seen. Searched with the run's number of beams.

    Args:
        run: folder of a finished training, such as runs/laptop/flower; a relative path counts from the project's root.
        history: item ids as in its items.parquet, or titles as there or before cleaning, oldest first; may be empty.

    Returns:
        Columns item_id, title, score (Σ log π in nats).

    Raises:
        FileNotFoundError: no finished training there. ValueError: an entry of the history is unknown, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: ask for one title at least")
    folder = trained_folder(run)
    model, _, catalogue = load_trained(folder)
    items = pd.read_parquet(folder / "items.parquet")
    by_id, by_title = pd.Index(items.item_id), pd.Series(items.index, items.title).groupby(level=0).first()
    places = []
    for entry in [history] if isinstance(history, str) else history:
        place = by_id.get_indexer([entry])[0]
        known = [name for name in (entry, move_article(clean_title(str(entry)))) if name in by_title]
        if place < 0 and not known:
            near = get_close_matches(str(entry), by_title.index, n=3, cutoff=0.6)
            hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"{entry!r} is neither an item id nor a title of {folder / 'items.parquet'}{hint}")
        places.append(int(place) if place >= 0 else int(by_title[known[0]]))
    settings = json.loads((folder / "made.json").read_text(encoding="utf-8"))["provenance"]["settings"]
    beams = Beams(max(k, settings.get("n_beams", 10)))
    [(leaves, scores)] = beam_search(model, catalogue, [places[-settings["max_history"] :]], [beams], seen=[places])
    leaves, scores = leaves[0, :k], scores[0, :k]
    first = {leaf: item for item, leaf in reversed(list(enumerate(catalogue.trie.item_leaf.tolist())))}
    listed = [first[leaf] for leaf in leaves if leaf >= 0]
    return items.iloc[listed].reset_index(drop=True).assign(score=scores[: len(listed)])
