"""The model as a policy over titles: prompts, constrained sampling and beams, recommendations."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, Cache, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast,
)

from . import runs
from .readers import clean_title, move_article
from .trie import TitleTrie, segment_logsumexp


@dataclass(frozen=True)
class Catalogue:
    """The titles as the model sees them, encoded once for trie, prompts, training targets and decoding alike.

    Attributes:
        titles: one per item; items with equal titles share a leaf of the trie.
        sequences: tokens of each title, then the terminator ⊤.
        trie: the prefix tree of `sequences`.
        header, separator, footer: token lists; a prompt is header, title, separator, title, separator, …, footer.
        eos: what follows a target in training, or None.
    """

    titles: list[str]
    sequences: list[list[int]]
    trie: TitleTrie
    header: list[int]
    separator: list[int]
    footer: list[int]
    eos: int | None

    @classmethod
    def build(
        cls, tokenizer: PreTrainedTokenizerFast, titles: Sequence[str], category: str, rows: str = "sequence"
    ) -> Catalogue:
        """Encodes titles and prompt.

        Deviation: title and terminator are encoded apart and joined, here and everywhere; the official code encodes
        them together for the target but apart for the trie, which disagree where the tokenizer merges the two.

        Args:
            category: what the prompt calls an item ("movie").
            rows: "sequence" (a list of titles that simply goes on) or "target" (an instruction, one title as answer).

        Raises:
            ValueError: the newline is not one token; a title encodes to nothing or holds the terminator.
        """

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        if len(encode("\n")) != 1:
            raise ValueError("this tokenizer has no token of its own for the newline that ends a title")
        end = encode("\n")
        sequences = [[*ids, *end] for ids in tokenizer(list(titles), add_special_tokens=False).input_ids]
        for i, ids in enumerate(sequences):
            if len(ids) == 1 or end[0] in ids[:-1]:
                raise ValueError(f"item {i} has the title {titles[i]!r}, which is empty or holds a newline: clean it")
        header, separator, footer = prompt_texts(category, rows)
        return cls(
            list(titles), sequences, TitleTrie.from_sequences(sequences), encode(header),
            end if separator == "\n" else encode(separator), encode(footer) if footer else [],
            tokenizer.eos_token_id if rows == "target" else None,
        )

    @property
    def terminator(self) -> int:
        """The token ⊤ that ends every title."""
        return self.sequences[0][-1]

    @property
    def leaf_titles(self) -> list[str]:
        """(n_leaves,) the title of each leaf id."""
        ids = self.trie.node_leaf[self.trie.leaf].tolist()
        return [title for _, title in sorted(dict(zip(ids, self.titles)).items())]

    def context(self, history: Sequence[int]) -> list[int]:
        """Tokens of the prompt for a history of item positions, oldest first. An empty history is allowed."""
        body = [t for item in history for t in (*self.sequences[item][:-1], *self.separator)]
        return [*self.header, *body, *self.footer]


def prompt_texts(category: str, rows: str) -> tuple[str, str, str]:
    """(header, separator, footer) of the two forms of prompt."""
    if rows == "sequence":
        return f"Titles that one person chose, one {category} after the other:\n", "\n", ""
    if rows == "target":
        header = (
            f"### Instruction:\nRecommend the {category} that this user will like next.\n\n"
            f"### Input:\nThe user has enjoyed the following {category} titles: "
        )
        return header, ", ", "\n\n### Response:\n"
    raise ValueError(f"rows is {rows!r}: choose sequence or target")


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token lists → input_ids and attention_mask, (B, T) each, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width) >= width - lengths[:, None]).long()


def positions(attention_mask: Tensor) -> Tensor:
    """(B, T) positions that count from each row's first real token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def sample_leaves(
    model: PreTrainedModel, trie: TitleTrie, input_ids: Tensor, attention_mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Draws one title per prompt from the model renormalised over the children of each node.

    Only the children's logits are looked at; the prompt stays in view through the key-value cache.

    Args:
        input_ids, attention_mask: (B, T) prompts padded on the left.

    Returns:
        (B,) leaf nodes.
    """
    nodes = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    position = positions(attention_mask)
    cache = None
    for _ in range(trie.max_depth):
        out = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )
        cache = out.past_key_values
        rows, children = trie.children(nodes)
        if len(rows) == 0:
            break
        scores = out.logits[rows, -1, trie.token[children]].float() / temperature
        noisy = scores - torch.empty_like(scores).exponential_().log()  # Gumbel noise: the argmax is a sample
        best = torch.full((len(nodes),), -torch.inf, device=scores.device).scatter_reduce(0, rows, noisy, "amax")
        chosen = noisy == best[rows]
        nodes = nodes.index_copy(0, rows[chosen], children[chosen])
        input_ids = trie.token[nodes][:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], -1)
        position = position[:, -1:] + 1
    return nodes


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
    """One way to search the trie for the best titles, by `n` beams.

    A title's score is Σ log π over its tokens, ⊤ included, in nats and over the whole vocabulary. Only the children
    of the beams' nodes are candidates, and every finished title competes, so that with as many beams as titles the
    search is exact.

    Attributes:
        length_normalised: divide the score by the number of tokens, ⊤ included (the official choice).
        child_renormalised: take π over the children of each node alone.
        seen_allowed: titles that the user has seen may be recommended again.
    """

    n: int = 10
    length_normalised: bool = False
    child_renormalised: bool = False
    seen_allowed: bool = False


@torch.no_grad()
def beam_search(
    model: PreTrainedModel, catalogue: Catalogue, histories: Sequence[Sequence[int]], searches: Sequence[Beams],
    seen: Sequence[Sequence[int]] | None = None, batch_size: int = 16, progress: str | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best titles after each history, for each of the searches: they share one pass over the prompts.

    A prompt's beams are one packed sequence behind its key-value cache: the prompt is computed and stored once, and
    no cache is copied when beams change places. `TrieLogitsProcessor` does the same search through transformers'
    `generate`, at the price of a copy of the prompt and its cache per beam, and is its reference in the tests.

    Args:
        histories: item positions, oldest first, that the prompts tell; may be empty.
        seen: item positions not to be recommended, where they are more than the histories.
        progress: label of a progress bar, or None.

    Returns:
        For each search, leaf ids (N, n) best first and -1 where a beam found nothing; scores (N, n), -inf there.
    """
    trie = catalogue.trie.to(model.device)
    contexts = [catalogue.context(history) for history in histories]
    results = [(np.full((len(contexts), s.n), -1), np.full((len(contexts), s.n), -np.inf)) for s in searches]
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        prompt = _read(model, [contexts[i] for i in batch])
        blocked = _nodes_of(trie, [(histories if seen is None else seen)[i] for i in batch])
        for search, (leaves, scores) in zip(searches, results, strict=True):
            found, score = _search(model, trie, prompt, search, None if search.seen_allowed else blocked)
            leaves[batch], scores[batch] = found.cpu().numpy(), score.cpu().numpy()
    return results


@dataclass(frozen=True)
class _Prompt:
    """Prompts as read by a model: mask and positions (B, T), the last token's logits (B, 1, V), the cache of all."""

    mask: Tensor
    position: Tensor
    logits: Tensor
    cache: Cache


def _read(model: PreTrainedModel, contexts: Sequence[Sequence[int]]) -> _Prompt:
    input_ids, mask = (x.to(model.device) for x in left_padded(contexts))
    position = positions(mask)
    out = model(input_ids=input_ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    return _Prompt(mask.bool(), position, out.logits, out.past_key_values)


def tree_log_probs(
    model: PreTrainedModel, trie: TitleTrie, context: Sequence[int], nodes_at_a_time: int = 512
) -> Tensor:
    """log π(token into s | parent of s, prompt) for every node s, over the whole vocabulary: (n_nodes,) nats, root 0.

    Exact, no title is sampled. The tree goes through the model packed: each inner node stands once behind the prompt,
    at the position of its depth, and sees the prompt and its own ancestors. Chunks of the tree in depth-first order
    share the prompt's cache and repeat only ancestors of their own. Differentiable.

    Args:
        nodes_at_a_time: bounds the memory: a chunk's mask is (nodes, prompt + nodes), its logits (nodes, V).
    """
    trie = trie.to(model.device)
    prompt = _read(model, [context])
    width = prompt.mask.shape[1]
    reached, log_pf = [], []

    def note(nodes: Tensor, logits: Tensor) -> None:
        rows, children = trie.children(nodes)
        logits = logits.float()
        reached.append(children)
        log_pf.append(logits[rows, trie.token[children]] - logits.logsumexp(-1)[rows])

    note(torch.zeros(1, dtype=torch.long, device=model.device), prompt.logits[0])
    for chunk in trie.inner.split(nodes_at_a_time):
        nodes, sees = trie.with_ancestors(chunk)
        before = torch.ones(len(nodes), width, dtype=torch.bool, device=nodes.device)
        logits = model(
            input_ids=trie.token[nodes][None], attention_mask=torch.cat([before, sees], 1)[None, None],
            position_ids=(width - 1 + trie.depth[nodes])[None], past_key_values=prompt.cache, use_cache=True,
        ).logits[0]
        prompt.cache.crop(-len(nodes))
        new = torch.isin(nodes, chunk)
        note(nodes[new], logits[new])
    return torch.zeros(trie.n_nodes, device=model.device).index_put((torch.cat(reached),), torch.cat(log_pf))


def _search(
    model: PreTrainedModel, trie: TitleTrie, prompt: _Prompt, search: Beams, blocked: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Leaf ids and scores, (B, n) each. The prompt's cache is as it was when the search ends."""
    n, device = len(prompt.mask), prompt.mask.device
    logits = prompt.logits
    nodes = torch.zeros(n, 1, dtype=torch.long, device=device)
    score = torch.zeros(n, 1, device=device)
    ancestors = torch.zeros(n, 1, 0, dtype=torch.bool, device=device)  # packed columns that each beam has come through
    best = torch.full((n, search.n), -torch.inf, device=device)
    best_node = torch.zeros_like(best, dtype=torch.long)
    for depth in range(1, trie.max_depth + 1):
        total, child, beam = _candidates(trie, logits, nodes, score, blocked, search.child_renormalised)
        is_leaf = trie.node_leaf[child] >= 0
        length = depth if search.length_normalised else 1
        best, place = torch.cat([best, torch.where(is_leaf, total / length, -torch.inf)], 1).topk(search.n)
        best_node = torch.cat([best_node, child], 1).gather(1, place)
        running = torch.where(is_leaf, -torch.inf, total)
        longest = trie.max_depth if search.length_normalised else 1  # no title below a beam can score above this bound
        running = torch.where(running / longest > best[:, -1:], running, -torch.inf)
        score, place = running.topk(min(search.n, running.shape[1]))
        if not torch.isfinite(score).any():
            break
        nodes, beam = child.gather(1, place), beam.gather(1, place)
        ancestors = ancestors.gather(1, beam[..., None].expand(-1, -1, ancestors.shape[-1]))
        itself = torch.eye(nodes.shape[1], dtype=torch.bool, device=device).expand(n, -1, -1)
        ancestors = torch.cat([ancestors, itself], -1)
        visible = torch.cat([prompt.mask[:, None].expand(-1, nodes.shape[1], -1), ancestors], -1)
        logits = model(
            input_ids=trie.token[nodes].clamp(min=0), attention_mask=visible[:, None], past_key_values=prompt.cache,
            position_ids=(prompt.position[:, -1:] + depth).expand_as(nodes), use_cache=True,
        ).logits
    prompt.cache.crop(-ancestors.shape[-1])
    return torch.where(torch.isfinite(best), trie.node_leaf[best_node], -1), best


def _candidates(
    trie: TitleTrie, logits: Tensor, nodes: Tensor, score: Tensor, blocked: Tensor | None, child_renormalised: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The children of every prompt's beams side by side: their summed log π, nodes and beams, (B, most) each.

    logits (B, W, V), nodes and score (B, W); places left over hold -inf.
    """
    n, width = nodes.shape
    rows, children = trie.children(torch.where(torch.isfinite(score), nodes, -1).flatten())
    if blocked is not None:
        free = ~blocked[rows // width, children]
        rows, children = rows[free], children[free]
    logits = logits.flatten(0, 1).float()
    chosen = logits[rows, trie.token[children]]
    if child_renormalised:
        norm = segment_logsumexp(chosen, rows, n * width)
    else:
        norm = logits.logsumexp(-1)
    prompt = rows // width
    counts = torch.bincount(prompt, minlength=n)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[prompt]
    total = torch.full((n, max(1, int(counts.max()))), -torch.inf, device=logits.device)
    child, beam = (torch.zeros(total.shape, dtype=torch.long, device=rows.device) for _ in range(2))
    total[prompt, place] = score.flatten()[rows] + chosen - norm[rows]
    child[prompt, place], beam[prompt, place] = children, rows % width
    return total, child, beam


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
