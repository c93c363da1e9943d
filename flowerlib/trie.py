"""The catalogue as a prefix tree in arrays: every item title is a path of tokens from the root to a leaf."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, pairwise
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

TOKENS = 2**31  # tokens are below it: a node and a token then fit into 63 bits


@dataclass(frozen=True, eq=False)
class TitleTrie:
    """A prefix tree over token sequences, breadth first: parents before children, siblings side by side by token.
    Its arrays are int64, on one device."""

    parent: Tensor  # (n_nodes,) the node above; -1 at the root, which is node 0
    token: Tensor  # (n_nodes,) the token on the edge into a node; -1 at the root
    depth: Tensor  # (n_nodes,) tokens from the root
    leaf: Tensor  # (n_items,) the node at which an item's sequence ends; equal sequences share it
    child_start: Tensor  # (n_nodes + 1,) the children of s are the nodes child_start[s] … child_start[s + 1] - 1

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]] | np.ndarray | Tensor) -> Self:
        """Builds the tree from token sequences, each ending in its terminator: n_items token lists, or one
        (n_items, length) integer array padded on the right with -1.
        Raises ValueError: no items; an empty sequence; a negative or non-integer token; a sequence that continues
        another one, so that an inner node would be an item (their terminator is missing)."""
        flat, length = _flat(sequences)
        end = length.cumsum()
        # Level by level. Of each sequence that goes on: its next token, where it ends, and the node it has reached.
        # Sequences stand in the order of their nodes; a new node begins where one parts from the one above it.
        items, at, node = np.arange(len(length)), end - length, np.zeros(len(length), np.int32)
        parents, tokens, n_nodes = [np.int32([-1])], [np.int32([-1])], 1
        leaf = np.empty(len(items), np.int32)
        while len(items):
            token = flat.take(at)
            if (node[1:] == node[:-1]).any():  # several at one node: sort them by their next tokens
                order = (node.astype(np.int64) * TOKENS + token).argsort()
                items, at, end, node, token = (x.take(order) for x in (items, at, end, node, token))
            parted = np.r_[True, (node[1:] != node[:-1]) | (token[1:] != token[:-1])]
            parents.append(node[parted])
            tokens.append(token[parted])
            node = parted.cumsum(dtype=np.int32) + np.int32(n_nodes - 1)
            n_nodes += len(tokens[-1])
            at += 1
            ends = at == end
            leaf[items[ends]] = node[ends]
            items, at, end, node = (x[~ends] for x in (items, at, end, node))
        parent = np.concatenate(parents, dtype=np.int64)
        child_start = np.r_[1, np.bincount(parent[1:], minlength=n_nodes)].cumsum()
        goes_on = child_start[leaf] < child_start[leaf + 1]
        if goes_on.any():
            item = goes_on.argmax()
            raise ValueError(f"the sequence of item {item} is the beginning of another one: end each in a terminator")
        depth = np.repeat(np.arange(len(tokens)), list(map(len, tokens)))
        arrays = (parent, np.concatenate(tokens, dtype=np.int64), depth, leaf.astype(np.int64), child_start)
        return cls(*map(torch.from_numpy, arrays))

    n_nodes = property(lambda self: len(self.parent))
    n_items = property(lambda self: len(self.leaf))
    max_depth = property(lambda self: len(self._levels) - 1, doc="Tokens of the longest title, ⊤ included.")

    @cached_property
    def leaves(self) -> Tensor:
        """(n_leaves,) the leaf nodes, by the first item that ends there. Their positions are the leaf ids."""
        return torch.from_numpy(pd.unique(self.leaf.numpy(force=True))).to(self.leaf.device)

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

    def to(self, device: torch.device | str) -> Self:
        """The same tree on another device."""
        return TitleTrie(*(getattr(self, f.name).to(device) for f in fields(self)))

    def log_flows(self, log_item_rewards: Tensor) -> Tensor:
        """log F(s) = log Σ R(i) over the items i below s, in nats; the root's is log Z.
        log_item_rewards (..., n_items), one reward vector per leading index, -inf takes an item out → (..., n_nodes),
        differentiable where finite. Raises ValueError: wrong number of items, NaN or +inf; it names the item."""
        if log_item_rewards.shape[-1] != self.n_items:
            raise ValueError(f"{log_item_rewards.shape[-1]} rewards for {self.n_items} items")
        bad = torch.isnan(log_item_rewards) | (log_item_rewards == torch.inf)
        if bad.any():
            raise ValueError(f"the log reward of item {int(bad.nonzero()[0, -1])} is NaN or infinite")
        rewards = log_item_rewards.reshape(-1, self.n_items)
        if len(self.leaves) < self.n_items:
            rewards = segment_logsumexp(rewards, self.item_leaf, len(self.leaves))
        # A node is a row: what is read and written is then side by side for all reward vectors.
        flows = rewards.new_empty(self.n_nodes, len(rewards))
        flows[self.leaves] = rewards.T
        n_children = self.child_start.diff()
        for level in reversed(self._levels[1:]):
            above = self.parent[level]
            alone = n_children[above] == 1  # as most nodes of a tree of titles are
            flows[above[alone]] = flows[level][alone]
            forks, group = above[~alone].unique_consecutive(return_inverse=True)
            flows[forks] = segment_logsumexp(flows[level][~alone].T, group, len(forks)).T
        return flows.T.view(*log_item_rewards.shape[:-1], self.n_nodes)

    def log_token_rewards(self, log_item_rewards: Tensor) -> Tensor:
        """log r(parent → s) = log F(s) − log F(parent) in nats, 0 at the root. Shapes as in `log_flows`. Along a title
        they add up to log R(i)/Z (with equal titles: of the leaf), so a policy equal to r draws items in proportion to
        reward. Raises ValueError: as `log_flows`, or a reward is zero; the message names the item."""
        flows = self.log_flows(log_item_rewards)
        zero = log_item_rewards.detach() == -torch.inf
        if zero.any():
            raise ValueError(f"the reward of item {int(zero.nonzero()[0, -1])} is zero: rewards must be positive")
        return flows - flows[..., self.parent.clamp(min=0)]

    @cached_property
    def depth_first(self) -> tuple[Tensor, Tensor]:
        """(n_nodes,) int32 twice: when a walk through the tree, depth first, enters each node, and when it has left it.
        Node a lies on the path to node s, or is s, exactly where enter[a] <= enter[s] < leave[a]."""
        size = self.from_below(torch.ones_like(self.parent), "sum")
        enter = torch.zeros_like(size)
        for level in self._levels[1:]:
            above, before = self.parent[level], size[level].cumsum(0) - size[level]
            eldest = self.child_start[above] - level.start
            enter[level] = enter[above] + 1 + before - before[eldest]
        return enter.int(), (enter + size).int()

    def on_path(self, above: Tensor, below: Tensor) -> Tensor:
        """(…, A) and (…, B) nodes → (…, B, A) bool: whether each of `above` lies on the path to each of `below`, or is
        it; False where either is -1. Of packed nodes, this says which see which."""
        enter, leave = self.depth_first
        above, below = above[..., None, :], below[..., None]
        inside = (enter[above] <= enter[below]) & (enter[below] < leave[above])
        return inside & (above >= 0) & (below >= 0)

    @property
    def inner(self) -> Tensor:
        """The nodes that have children, without the root, depth first."""
        nodes = self.child_start.diff().nonzero()[1:, 0]
        return nodes[self.depth_first[0][nodes].argsort()]

    @cached_property
    def forks(self) -> Tensor:
        """(n_nodes,) bool: whether more than one title lies below a node."""
        return self.from_below((self.node_leaf >= 0).long(), "sum") > 1

    @cached_property
    def deepest(self) -> Tensor:
        """(n_nodes,) depth of the deepest node below each, itself included: tokens of the longest title through it."""
        return self.from_below(self.depth, "amax")

    def from_below(self, values: Tensor, reduce: str) -> Tensor:
        """(n_nodes,) each node's sum or maximum of the values at it and below."""
        values = values.clone()
        for level in reversed(self._levels[1:]):
            values.scatter_reduce_(0, self.parent[level], values[level].clone(), reduce)
        return values

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
        known = (nodes >= 0) & (tokens >= 0) & (tokens < TOKENS)
        keys = torch.where(known, nodes * TOKENS + tokens, -1)
        found = torch.searchsorted(self._edge_keys, keys).clamp(max=self.n_nodes - 2)
        return torch.where(self._edge_keys.index_select(0, found) == keys, found + 1, -1)

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) nodes → the rows (n,) of `nodes` that have children, repeated, and those child nodes (n,)."""
        inside = nodes.clamp(min=0)
        first = self.child_start.index_select(0, inside)
        counts = (self.child_start.index_select(0, inside + 1) - first) * (nodes >= 0)
        rows = torch.repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        return rows, (first - before).index_select(0, rows) + torch.arange(len(rows), device=nodes.device)

    def paths(self, nodes: Tensor) -> Tensor:
        """(B,) nodes → (B, max_depth) the nodes on the way from the root (left out) down to each, then -1."""
        columns: list[Tensor] = []
        for depth in range(self.max_depth, 0, -1):
            there = (self.depth[nodes] == depth) & (nodes >= 0)
            columns.append(torch.where(there, nodes, -1))
            nodes = torch.where(there, self.parent[nodes], nodes)
        return torch.stack(columns[::-1], 1)

    @cached_property
    def _levels(self) -> list[slice]:
        """The nodes at each depth, which stand side by side."""
        ends = torch.bincount(self.depth).cumsum(0).tolist()
        return [slice(*level) for level in pairwise([0, *ends])]

    @cached_property
    def _edge_keys(self) -> Tensor:
        """(n_nodes - 1,) parent and token in one number per edge: ascending, so that `advance` can search it."""
        return self.parent[1:] * TOKENS + self.token[1:]


def _flat(sequences: Sequence[Sequence[int]] | np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """All tokens one after the other, and (n_items,) how many are each item's, checked."""
    if isinstance(sequences, Tensor):
        sequences = sequences.numpy(force=True)
    if isinstance(sequences, np.ndarray):
        if sequences.ndim != 2 or not np.issubdtype(sequences.dtype, np.integer):
            raise ValueError("an array of sequences must be a 2-D array of integers, padded with -1")
        flat, length = sequences.ravel(), np.full(len(sequences), sequences.shape[1])
        if flat.min(initial=0) < 0:
            inside = sequences >= 0
            flat, length = sequences[inside], inside.sum(1)
            gaps = np.flatnonzero((sequences < -1).any(1) | (inside[:, 1:] & ~inside[:, :-1]).any(1))
            if len(gaps):
                raise ValueError(f"the sequence of item {gaps[0]} is not padded with -1 on the right alone")
    else:
        length = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        try:
            flat = np.frombuffer(array("q", chain.from_iterable(sequences)), dtype=np.int64)
        except (TypeError, OverflowError):
            raise ValueError("tokens must be integers below 2^31") from None
    if len(length) == 0:
        raise ValueError("a trie needs at least one item")
    if not length.all():
        raise ValueError(f"the sequence of item {length.argmin()} is empty")
    for bad, what in ((flat < 0, "negative token"), (flat >= TOKENS, "token of 2^31 or more")):
        if bad.any():
            item = np.searchsorted(length.cumsum(), bad.argmax(), side="right")
            raise ValueError(f"the sequence of item {item} holds a {what}")
    return flat.astype(np.int32), length


def segment_logsumexp(values: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """(..., n) values and (n,) segment ids → (..., n_segments) log Σ exp over each segment."""
    highest = values.new_full((*values.shape[:-1], n_segments), -torch.inf)
    highest = highest.scatter_reduce(-1, segment.expand(values.shape), values.detach(), "amax")
    shift = torch.where(highest == -torch.inf, 0, highest)
    sums = torch.zeros_like(shift).index_add(-1, segment, (values - shift[..., segment]).exp())
    return sums.log() + shift
