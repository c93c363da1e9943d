"""The model as a policy over titles: the catalogue in tokens, prompts, draws, and the exact log π of the whole tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerFast

from .trie import TitleTrie


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
    model: PreTrainedModel, trie: TitleTrie, input_ids: Tensor, attention_mask: Tensor, branch: Tensor
) -> Tensor:
    """Draws P titles for each row from the model renormalised over the children of each node.

    Each row is read once, into a cache that its paths share: they go through the model packed behind it. Only the
    children's logits are looked at, and the model is asked no more once no path can fork.

    Args:
        input_ids, attention_mask: (B, T) rows padded on the left.
        branch: (B, P) how many columns of its row each path follows; it does not see the others.

    Returns:
        (B, P) leaf nodes.

    Raises:
        ValueError: the model's scores are NaN.
    """
    n, n_paths = branch.shape
    position = positions(attention_mask)
    last = (branch - 1).unique()
    out = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position, use_cache=True,
                logits_to_keep=last)
    logits = out.logits.gather(1, torch.searchsorted(last, branch - 1)[..., None].expand(-1, -1, out.logits.shape[-1]))
    position = position.gather(1, branch - 1)
    column = torch.arange(input_ids.shape[1], device=branch.device)
    visible = attention_mask.bool()[:, None] & (column < branch[..., None])
    itself = torch.eye(n_paths, dtype=torch.bool, device=branch.device).expand(n, -1, -1)
    nodes = torch.zeros(n * n_paths, dtype=torch.long, device=branch.device)
    while True:
        rows, children = trie.children(nodes)
        scores = logits.flatten(0, 1)[rows, trie.token[children]].float()
        noisy = scores - torch.empty_like(scores).exponential_().log()  # Gumbel noise: the argmax is a sample
        best = torch.full((len(nodes),), -torch.inf, device=scores.device).scatter_reduce(0, rows, noisy, "amax")
        if best.isnan().any():
            raise ValueError("the model's scores are NaN, so that no title can be drawn: lower learning_rate")
        chosen = noisy == best[rows]
        nodes = nodes.index_copy(0, rows[chosen], children[chosen])
        if not trie.forks[nodes].any():
            while (inner := trie.node_leaf[nodes] < 0).any():
                nodes = torch.where(inner, trie.child_start[nodes], nodes)
            return nodes.view(n, n_paths)
        visible, position = torch.cat([visible, itself], -1), position + 1
        logits = model(
            input_ids=trie.token[nodes].view(n, n_paths), attention_mask=visible[:, None], position_ids=position,
            past_key_values=out.past_key_values, use_cache=True,
        ).logits


@dataclass(frozen=True)
class Prompt:
    """Prompts as read by a model: mask and positions (B, T), the last token's logits (B, 1, V), the cache of all."""

    mask: Tensor
    position: Tensor
    logits: Tensor
    cache: Cache


def read_prompts(model: PreTrainedModel, contexts: Sequence[Sequence[int]]) -> Prompt:
    input_ids, mask = (x.to(model.device) for x in left_padded(contexts))
    position = positions(mask)
    out = model(input_ids=input_ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    return Prompt(mask.bool(), position, out.logits, out.past_key_values)


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
    prompt = read_prompts(model, [context])
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
