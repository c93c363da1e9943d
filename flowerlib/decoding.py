"""From the model to lists of titles: searches down the trie, and recommendations for one user."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast

from . import runs
from .policy import Catalogue, Prompt, read_prompts
from .readers import clean_title, move_article
from .rewards import preference_log_rewards
from .trie import TitleTrie, segment_logsumexp


_Search = Generator[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]


class TrieLogitsProcessor(LogitsProcessor):
    """Masks every token that does not continue a title, for transformers' `generate`.

    Where nothing continues it allows ⊤ alone: give `generate` eos_token_id=terminator, so that a title's end is its.

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
        if self.blocked is None:
            allowed = self.trie.allowed_mask(nodes, scores.shape[-1])
        else:
            rows, children = self.trie.children(nodes)
            beams = len(nodes) // len(self.blocked)
            free = ~self.blocked[rows // beams, children]
            allowed = torch.zeros_like(scores, dtype=torch.bool)
            allowed[rows[free], self.trie.token[children[free]]] = True
        allowed[:, self.terminator] |= ~allowed.any(-1)
        return scores.masked_fill(~allowed, -torch.inf)


@dataclass(frozen=True)
class Beams:
    """One way to search the trie for titles, by `n` beams.

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
    """The best titles after each history, for each of the searches: they share the pass over the prompts and those after it.

    The beams of all searches are one packed sequence behind their prompt's key-value cache: the prompt is computed and
    stored once, and no cache is copied when beams change places. `TrieLogitsProcessor` does the same search through transformers'
    `generate`, at the price of a copy of the prompt and its cache per beam, and is its reference in the tests.

    Args:
        histories: item positions, oldest first, that the prompts tell; may be empty.
        seen: item positions not to be recommended, where they are more than the histories.
        progress: label of a progress bar, or None.
        log_p: (N, n_leaves) log preference of each user, for searches with a guide.
        seed: of the stochastic searches.

    Returns:
        For each search, leaf ids (N, n) best first and -1 where a beam found nothing; scores (N, n), -inf there.
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
        prompt = read_prompts(model, [contexts[i] for i in batch])
        blocked = _nodes_of(trie, [(histories if seen is None else seen)[i] for i in batch])
        liked = None if log_p is None else _liked(trie, log_p[batch].to(model.device))
        started = [
            _search(_Free(trie, None if search.seen_allowed else blocked, liked if search.guide else None), search,
                    prompt.logits, generator)
            for search, generator in zip(searches, generators)
        ]
        for (found, score), (leaves, scores) in zip(_run(model, prompt, started), results, strict=True):
            leaves[batch], scores[batch] = found.cpu().numpy(), score.cpu().numpy()
    return results


@dataclass(frozen=True)
class _Free:
    """The tree as some users may walk it: (B, n_nodes) blocked nodes, or None, and log token rewards, or None."""

    trie: TitleTrie
    blocked: Tensor | None
    liked: Tensor | None


@dataclass(frozen=True)
class _Candidates:
    """The children of every prompt's beams side by side, (B, most): key ranks them; -inf where places are left over."""

    key: Tensor
    score: Tensor  # the sum so far, nats
    node: Tensor
    beam: Tensor


def _run(
    model: PreTrainedModel, prompt: Prompt, searches: Sequence[_Search]
) -> list[tuple[Tensor, Tensor]]:
    """What each of the searches returns. The beams of all go through the model together, packed behind their prompt, each
    seeing the prompt and the columns that it has come through. The prompt's cache is as it was at the end."""
    n, device = len(prompt.mask), prompt.mask.device
    results: dict[int, tuple[Tensor, Tensor]] = {}
    wanted: dict[int, tuple[Tensor, Tensor]] = {}
    ancestors = {i: torch.zeros(n, 1, 0, dtype=torch.bool, device=device) for i in range(len(searches))}

    def go_on(i: int, logits: Tensor | None) -> None:
        try:
            wanted[i] = searches[i].send(logits)
        except StopIteration as end:
            results[i] = end.value
            wanted.pop(i, None)

    for i in range(len(searches)):
        go_on(i, None)
    depth = n_packed = 0
    while wanted:
        depth += 1
        widths = [tokens.shape[1] for tokens, _ in wanted.values()]
        blocks = torch.eye(sum(widths), dtype=torch.bool, device=device).split(widths)
        for (i, (_, beam)), own in zip(wanted.items(), blocks):
            before = ancestors[i].gather(1, beam[..., None].expand(-1, -1, ancestors[i].shape[-1]))
            ancestors[i] = torch.cat([before, own.expand(n, -1, -1)], -1)
        tokens = torch.cat([tokens for tokens, _ in wanted.values()], 1)
        seen = torch.cat([ancestors[i] for i in wanted], 1)
        visible = torch.cat([prompt.mask[:, None].expand(-1, tokens.shape[1], -1), seen], -1)
        logits = model(
            input_ids=tokens, attention_mask=visible[:, None], past_key_values=prompt.cache,
            position_ids=(prompt.position[:, -1:] + depth).expand_as(tokens), use_cache=True,
        ).logits
        n_packed += tokens.shape[1]
        for i, part in zip(list(wanted), logits.split(widths, 1)):
            go_on(i, part)
    prompt.cache.crop(-n_packed)
    return [results[i] for i in range(len(searches))]


def _search(free: _Free, search: Beams, logits: Tensor, generator: torch.Generator) -> _Search:
    """One search, told what it needs of the model: it yields the next token of each beam and the beam that this one goes
    on from, (B, W) each, is sent the logits there, (B, W, V), and returns leaf ids and scores, (B, n) each.

    Args:
        logits: (B, 1, V) after the prompts.
    """
    trie, n, device = free.trie, len(logits), logits.device
    nodes = torch.zeros(n, 1, dtype=torch.long, device=device)
    key, score = torch.zeros(n, 1, device=device), torch.zeros(n, 1, device=device)
    best = torch.full((n, search.n), -torch.inf, device=device)
    best_score, best_node = best.clone(), torch.zeros_like(best, dtype=torch.long)
    for depth in range(1, trie.max_depth + 1):
        found = _candidates(free, search, logits, nodes, key, score, generator)
        is_leaf = trie.node_leaf[found.node] >= 0
        length = depth if search.length_normalised else 1
        best, place = torch.cat([best, torch.where(is_leaf, found.key / length, -torch.inf)], 1).topk(search.n)
        best_score = torch.cat([best_score, found.score / length], 1).gather(1, place)
        best_node = torch.cat([best_node, found.node], 1).gather(1, place)
        running = torch.where(is_leaf, -torch.inf, found.key)
        longest = trie.deepest[found.node] if search.length_normalised else 1  # no title below can rank above this bound
        running = torch.where(running / longest > best[:, -1:], running, -torch.inf)
        key, place = running.topk(min(search.n, running.shape[1]))
        width = int(torch.isfinite(key).sum(1).max())
        if not width:
            break
        key, place = key[:, :width], place[:, :width]
        nodes, score, beam = (x.gather(1, place) for x in (found.node, found.score, found.beam))
        logits = yield trie.token[nodes].clamp(min=0), beam
    got = torch.isfinite(best)
    return torch.where(got, trie.node_leaf[best_node], -1), torch.where(got, best_score, -torch.inf)


def _candidates(
    free: _Free, search: Beams, logits: Tensor, nodes: Tensor, key: Tensor, score: Tensor, generator: torch.Generator
) -> _Candidates:
    """logits (B, W, V); nodes, key and score of the beams (B, W); a beam whose key is -inf has no children."""
    trie, (n, width) = free.trie, nodes.shape
    rows, children = trie.children(torch.where(torch.isfinite(key), nodes, -1).flatten())
    if free.blocked is not None:
        left = ~free.blocked[rows // width, children]
        rows, children = rows[left], children[left]
    logits = logits.flatten(0, 1)
    step = logits[rows, trie.token[children]].float() / search.temperature
    if search.child_renormalised or search.stochastic or search.guide:
        step = step - segment_logsumexp(step, rows, n * width)[rows]
    else:
        hot = logits if search.temperature == 1 else logits / search.temperature
        step = step - hot.float().logsumexp(-1)[rows]
    if search.guide:
        step = (1 - search.guide) * step + search.guide * free.liked[rows // width, children]
    total = score.flatten()[rows] + step
    ranked = _gumbels(total, key.flatten()[rows], rows, n * width, generator) if search.stochastic else total
    prompt = rows // width
    counts = torch.bincount(prompt, minlength=n)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[prompt]
    empty = torch.full((n, max(1, int(counts.max()))), -torch.inf, device=logits.device)
    none = torch.zeros(empty.shape, dtype=torch.long, device=rows.device)
    at = (prompt, place)
    return _Candidates(empty.index_put(at, ranked), empty.index_put(at, total), none.index_put(at, children),
                       none.index_put(at, rows % width))


def _gumbels(log_p: Tensor, above: Tensor, rows: Tensor, n_rows: int, generator: torch.Generator) -> Tensor:
    """Gumbel variables located at log_p (n,) whose largest within each row is the parent's, `above` (n,).

    Source: Kool, van Hoof and Welling, *Stochastic Beams and Where to Find Them*, ICML 2019, appendix B.3.
    """
    noise = torch.empty_like(log_p).exponential_(generator=generator)
    g = log_p - noise.log()
    largest = torch.full((n_rows,), -torch.inf, device=g.device).scatter_reduce(0, rows, g, "amax")[rows]
    v = above - g + torch.log1p(-(g - largest).exp())
    return above - v.clamp(min=0) - torch.log1p((-v.abs()).exp())


def _liked(trie: TitleTrie, log_p: Tensor) -> Tensor:
    """(B, n_nodes) log token rewards of R(leaf | u) = p_u(leaf)."""
    sharers = torch.bincount(trie.item_leaf, minlength=len(trie.leaves))
    return trie.log_token_rewards(preference_log_rewards(trie, -sharers[trie.item_leaf].log(), log_p))


def _nodes_of(trie: TitleTrie, seen: Sequence[Sequence[int]]) -> Tensor:
    """(B, n_nodes) bool: nodes under which every title was seen. Equal titles are seen together."""
    flows = torch.zeros(len(seen), trie.n_items, device=trie.leaf.device)
    for row, items in enumerate(seen):
        flows[row, list(items)] = -torch.inf
    by_leaf = torch.zeros(len(seen), len(trie.leaves), device=flows.device)
    by_leaf.index_add_(1, trie.item_leaf, flows)
    return trie.log_flows(by_leaf[:, trie.item_leaf]) == -torch.inf


def load_run(run: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Catalogue]:
    """Model, tokenizer and catalogue of a finished run, such as runs/laptop/flower; kept until the run changes.

    Raises:
        FileNotFoundError: the folder holds no finished run. A relative path counts from the project's root.
    """
    mark = runs.ROOT / run / "settings.json"  # written last
    if not mark.exists():
        raise FileNotFoundError(f"{mark.parent} holds no finished run: run notebook 02 or 03 first")
    return _load_run(mark.parent, mark.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _load_run(run: Path, _written: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Catalogue]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    chosen = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    titles = pd.read_parquet(run / "items.parquet").title.tolist()
    return model, tokenizer, Catalogue.build(tokenizer, titles, chosen["category"], chosen["rows"])


def recommend(run: str | Path, history: Sequence[Any], k: int = 10) -> pd.DataFrame:
    """The k best titles for one new user, best first, none of them seen. Searched with the run's number of beams.

    Args:
        run: folder of a finished run, such as runs/laptop/flower; a relative path counts from the project's root.
        history: item ids as in its items.parquet, or titles as there or before cleaning, oldest first; may be empty.

    Returns:
        Columns item_id, title, score (Σ log π in nats).

    Raises:
        FileNotFoundError: no finished run there. ValueError: an entry of the history is unknown, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: ask for one title at least")
    model, _, catalogue = load_run(run)
    folder = runs.ROOT / run
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
    chosen = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    beams = Beams(max(k, chosen["n_beams"]))
    [(leaves, scores)] = beam_search(model, catalogue, [places[-chosen["max_history"] :]], [beams], seen=[places])
    leaves, scores = leaves[0, :k], scores[0, :k]
    first = {leaf: item for item, leaf in reversed(list(enumerate(catalogue.trie.item_leaf.tolist())))}
    found = [first[leaf] for leaf in leaves if leaf >= 0]
    return items.iloc[found].reset_index(drop=True).assign(score=scores[: len(found)])
