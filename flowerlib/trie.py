"""The catalogue as a prefix tree in arrays: every item title is a path of tokens from the root to a leaf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TitleTrie:
    """A prefix tree over token sequences, breadth first: parents before children, siblings side by side by token.

    Attributes (all int64, on one device):
        parent: (n_nodes,) the node above; -1 at the root, which is node 0.
        token: (n_nodes,) the token on the edge into a node; -1 at the root.
        depth: (n_nodes,) tokens from the root.
        leaf: (n_items,) the node at which an item's sequence ends; equal sequences share it.
        child_start: (n_nodes + 1,) the children of s are the nodes child_start[s] … child_start[s + 1] - 1.
    """

    parent: Tensor
    token: Tensor
    depth: Tensor
    leaf: Tensor
    child_start: Tensor

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]] | np.ndarray | Tensor) -> TitleTrie:
        """Builds the tree from token sequences, each ending in its terminator.

        Args:
            sequences: n_items token lists, or one (n_items, length) integer array padded on the right with -1.

        Raises:
            ValueError: no items; an empty sequence; a negative or non-integer token; a sequence that continues
                another one, so that an inner node would be an item (their terminator is missing).
        """
        rows = _padded(sequences)
        order = _lexicographic_order(rows)
        rows = rows[order]
        differs = np.ones(rows.shape, dtype=bool)
        np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1, out=differs[1:])
        parents, tokens, depths = [np.array([-1])], [np.array([-1])], [np.array([0])]
        node, n_nodes = np.zeros(len(rows), dtype=np.int64), 1  # the node that each sequence has reached
        for column in range(rows.shape[1]):
            alive = rows[:, column] >= 0
            new = differs[:, column] & alive
            parents.append(node[new])
            tokens.append(rows[new, column])
            depths.append(np.full(len(tokens[-1]), column + 1))
            node = np.where(alive, n_nodes - 1 + np.cumsum(new), node)
            n_nodes += len(tokens[-1])
        leaf = np.empty_like(node)
        leaf[order] = node
        parent = np.concatenate(parents)
        child_start = np.searchsorted(parent[1:], np.arange(n_nodes + 1)) + 1
        inner = np.flatnonzero(child_start[leaf + 1] > child_start[leaf])
        if len(inner):
            raise ValueError(
                f"the sequence of item {inner[0]} is the beginning of another one: end each in a terminator"
            )
        arrays = (parent, np.concatenate(tokens), np.concatenate(depths), leaf, child_start)
        return cls(*(torch.from_numpy(a.astype(np.int64)) for a in arrays))

    @property
    def n_nodes(self) -> int:
        return len(self.parent)

    @property
    def n_items(self) -> int:
        return len(self.leaf)

    @property
    def max_depth(self) -> int:
        """Tokens of the longest title, its terminator included."""
        return len(self._level_start) - 2

    @cached_property
    def leaves(self) -> Tensor:
        """(n_leaves,) the leaf nodes, by the first item that ends there. Their positions are the leaf ids."""
        first = torch.full((self.n_nodes,), self.n_items, device=self.leaf.device)
        first.scatter_reduce_(0, self.leaf, torch.arange(self.n_items, device=self.leaf.device), "amin")
        return first.argsort(stable=True)[: int((first < self.n_items).sum())]

    @cached_property
    def item_leaf(self) -> Tensor:
        """(n_items,) the leaf id of each item."""
        return self.node_leaf[self.leaf]

    @cached_property
    def node_leaf(self) -> Tensor:
        """(n_nodes,) the leaf id of each node that is a leaf, -1 at the others."""
        ids = torch.full((self.n_nodes,), -1, device=self.leaf.device)
        ids[self.leaves] = torch.arange(len(self.leaves), device=ids.device)
        return ids

    def to(self, device: torch.device | str) -> TitleTrie:
        """The same tree on another device."""
        return TitleTrie(*(getattr(self, f.name).to(device) for f in fields(self)))

    def log_flows(self, log_item_rewards: Tensor) -> Tensor:
        """log F(s) = log Σ R(i) over the items i below s, in nats; the root's is log Z.

        Args:
            log_item_rewards: (..., n_items), one reward vector per leading index; -inf takes an item out.

        Returns:
            (..., n_nodes), differentiable where finite.

        Raises:
            ValueError: wrong number of items, NaN or +inf; the message names the item.
        """
        if log_item_rewards.shape[-1] != self.n_items:
            raise ValueError(f"{log_item_rewards.shape[-1]} rewards for {self.n_items} items")
        bad = torch.isnan(log_item_rewards) | (log_item_rewards == torch.inf)
        if bad.any():
            raise ValueError(f"the log reward of item {int(bad.nonzero()[0, -1])} is NaN or infinite")
        start, (items, item_start) = self._level_start, self._items_by_depth
        levels: list[Tensor] = []
        for depth in range(self.max_depth, -1, -1):
            own = items[item_start[depth] : item_start[depth + 1]]
            below, owner = log_item_rewards[..., own], self.leaf[own]
            if levels:
                below = torch.cat([levels[-1], below], -1)
                owner = torch.cat([self.parent[start[depth + 1] : start[depth + 2]], owner])
            levels.append(segment_logsumexp(below, owner - start[depth], start[depth + 1] - start[depth]))
        return torch.cat(levels[::-1], -1)

    def log_token_rewards(self, log_item_rewards: Tensor) -> Tensor:
        """log r(parent → s) = log F(s) − log F(parent) in nats, 0 at the root. Shapes as in `log_flows`.

        Along a title they add up to log R(i)/Z (with equal titles: of the leaf), so a policy equal to r draws
        items in proportion to reward.

        Raises:
            ValueError: as `log_flows`, or a reward is zero; the message names the item.
        """
        flows = self.log_flows(log_item_rewards)
        zero = log_item_rewards.detach() == -torch.inf
        if zero.any():
            raise ValueError(f"the reward of item {int(zero.nonzero()[0, -1])} is zero: rewards must be positive")
        return flows - flows[..., self.parent.clamp(min=0)]

    def with_ancestors(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The given nodes and all nodes above them but the root, ascending, (m,); and which of them lie on the path to
        each, itself included, (m, m) bool. Packed into one sequence, that is what each may see."""
        closed = self.paths(nodes).unique()
        closed = closed[closed >= 0]
        column = torch.full((self.n_nodes + 1,), len(closed), device=closed.device)
        column[closed] = torch.arange(len(closed), device=closed.device)
        on_path = torch.zeros(len(closed), len(closed) + 1, dtype=torch.bool, device=closed.device)
        on_path.scatter_(1, column[self.paths(closed)], True)  # -1, past a path's end, hits the last column
        return closed, on_path[:, :-1]

    @cached_property
    def inner(self) -> Tensor:
        """The nodes that have children, without the root, depth first: near ones share most of their ancestors."""
        nodes = (self.child_start[1:] > self.child_start[:-1]).nonzero()[1:, 0]
        order = np.lexsort(self.paths(nodes).numpy(force=True).T[::-1])  # -1, past a path's end, comes first
        return nodes[torch.from_numpy(order).to(nodes.device)]

    def log_leaf_probs(self, log_edges: Tensor) -> Tensor:
        """Log-probabilities of the edges into each node, (n_nodes,), → their sums along each title, (n_leaves,)."""
        path = self.paths(self.leaves)
        return torch.where(path >= 0, log_edges[path], 0).sum(-1)

    def renormalised(self, log_edges: Tensor) -> Tensor:
        """(n_nodes,) log-probabilities of the edges → those of drawing under the tree's mask, siblings adding to 1."""
        total = segment_logsumexp(log_edges[1:], self.parent[1:], self.n_nodes)
        return torch.cat([log_edges[:1], log_edges[1:] - total[self.parent[1:]]])

    def advance(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """(B,) nodes, (B,) tokens → (B,) the children reached; -1 off the trie, and from -1 or a leaf always -1."""
        known = (nodes >= 0) & (tokens >= 0) & (tokens < self._n_tokens)
        keys = torch.where(known, nodes * self._n_tokens + tokens, -1)
        found = torch.searchsorted(self._edge_keys, keys).clamp(max=self.n_nodes - 2)
        return torch.where(self._edge_keys[found] == keys, found + 1, -1)

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) nodes → the rows (n,) of `nodes` that have children, repeated, and those child nodes (n,)."""
        inside = nodes.clamp(min=0)
        first = self.child_start[inside]
        counts = torch.where(nodes >= 0, self.child_start[inside + 1] - first, 0)
        rows = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        within = torch.arange(len(rows), device=nodes.device) - (counts.cumsum(0) - counts)[rows]
        return rows, first[rows] + within

    def allowed_mask(self, nodes: Tensor, vocab_size: int) -> Tensor:
        """(B,) nodes → (B, vocab_size) bool, True where a child follows; all False at a leaf and at -1."""
        mask = torch.zeros(len(nodes), vocab_size, dtype=torch.bool, device=nodes.device)
        rows, children = self.children(nodes)
        mask[rows, self.token[children]] = True
        return mask

    def paths(self, nodes: Tensor) -> Tensor:
        """(B,) nodes → (B, max_depth) the nodes on the way from the root (left out) down to each, then -1."""
        steps = torch.arange(1, self.max_depth + 1, device=nodes.device)
        paths = torch.full((len(nodes), self.max_depth), -1, device=nodes.device)
        for _ in range(self.max_depth):
            depth = self.depth[nodes]
            paths = torch.where(steps == depth[:, None], nodes[:, None], paths)
            nodes = torch.where(depth > 0, self.parent[nodes], nodes)
        return paths

    @cached_property
    def _level_start(self) -> list[int]:
        counts = torch.bincount(self.depth)
        return [0, *counts.cumsum(0).tolist()]

    @cached_property
    def _items_by_depth(self) -> tuple[Tensor, list[int]]:
        depth = self.depth[self.leaf]
        counts = torch.bincount(depth, minlength=self.max_depth + 1)
        return depth.argsort(stable=True), [0, *counts.cumsum(0).tolist()]

    @cached_property
    def _n_tokens(self) -> int:
        return int(self.token.max()) + 1

    @cached_property
    def _edge_keys(self) -> Tensor:
        """(n_nodes - 1,) parent and token in one number per edge: ascending, so that `advance` can search it."""
        return self.parent[1:] * self._n_tokens + self.token[1:]


def _padded(sequences: Sequence[Sequence[int]] | np.ndarray | Tensor) -> np.ndarray:
    """(n_items, length) int64, padded on the right with -1, checked."""
    if isinstance(sequences, Tensor):
        sequences = sequences.numpy(force=True)
    if isinstance(sequences, np.ndarray):
        if sequences.ndim != 2 or not np.issubdtype(sequences.dtype, np.integer):
            raise ValueError("an array of sequences must be a 2-D array of integers, padded with -1")
        rows = sequences.astype(np.int64)
    else:
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        try:
            flat = np.fromiter((t for s in sequences for t in s), dtype=object, count=int(lengths.sum()))
            tokens = flat.astype(np.int64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("tokens must be integers below 2^31") from None
        if (tokens != flat).any():
            raise ValueError("tokens must be integers below 2^31")
        if (tokens < 0).any():
            item = int(np.repeat(np.arange(len(lengths)), lengths)[tokens < 0][0])
            raise ValueError(f"the sequence of item {item} holds a negative token")
        rows = np.full((len(lengths), lengths.max(initial=0)), -1)
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = tokens
    if len(rows) == 0:
        raise ValueError("a trie needs at least one item")
    empty = np.flatnonzero(rows[:, 0] < 0) if rows.shape[1] else np.array([0])
    if len(empty):
        raise ValueError(f"the sequence of item {empty[0]} is empty")
    gaps = np.flatnonzero(((rows[:, :-1] < 0) & (rows[:, 1:] >= 0)).any(1) | (rows < -1).any(1))
    if len(gaps):
        raise ValueError(f"the sequence of item {gaps[0]} is not padded with -1 on the right alone")
    huge = np.flatnonzero((rows >= 2**31).any(1))  # node · token must fit into 63 bits
    if len(huge):
        raise ValueError(f"the sequence of item {huge[0]} holds a token of 2^31 or more")
    return rows


def _lexicographic_order(rows: np.ndarray) -> np.ndarray:
    """(N, L) → (N,) the order that sorts the rows; as many columns as fit are packed into one 63-bit sort key."""
    bits = int(rows.max() + 1).bit_length()
    per_key = max(1, 63 // bits)
    keys = []
    for start in range(0, rows.shape[1], per_key):
        key = np.zeros(len(rows), dtype=np.int64)
        for column in rows[:, start : start + per_key].T:
            key = (key << bits) | (column + 1)
        keys.append(key)
    return np.lexsort(keys[::-1])


def segment_logsumexp(values: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """(..., n) values and (n,) segment ids → (..., n_segments) log Σ exp over each segment."""
    index = segment.expand(values.shape)
    shape = (*values.shape[:-1], n_segments)
    highest = torch.full(shape, -torch.inf, dtype=values.dtype, device=values.device)
    highest = highest.scatter_reduce(-1, index, values.detach(), "amax")
    shift = torch.where(highest == -torch.inf, 0, highest)
    sums = torch.zeros(shape, dtype=values.dtype, device=values.device)
    return sums.index_add(-1, segment, (values - shift[..., segment]).exp()).log() + shift
