"""From tables to batches: rows of titles as tokens, what the frozen layers make of them, and their order."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_length_grouped_indices

from . import data, runs
from .policy import Catalogue, left_padded, positions
from .preference import right_padded
from .runs import Settings

NO_TARGET, EOS_TARGET = -1, -2  # values in a row's `nodes` where there is no trie node


class Rows(Dataset):
    """Training or validation rows: token ids and, for each, the trie node that it reaches if it is a target.

    Attributes:
        input_ids, nodes: lists of (L,) int64 arrays; nodes is NO_TARGET on the prompt and EOS_TARGET on an eos.
        leaves: lists of leaf ids, the history's and then the targets'. n_history: how many are the history's.
        hidden: what the frozen trunk makes of all rows' tokens, (Σ L, H) float16, or None.
    """

    def __init__(
        self, input_ids: list[np.ndarray], nodes: list[np.ndarray], leaves: list[list[int]], n_history: list[int]
    ):
        self.input_ids, self.nodes, self.leaves, self.n_history = input_ids, nodes, leaves, n_history
        self.start = np.r_[0, np.cumsum([len(ids) for ids in input_ids])]
        self.hidden: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {"input_ids": self.input_ids[i], "nodes": self.nodes[i], "leaves": self.leaves[i],
               "n_history": self.n_history[i]}
        if self.hidden is not None:
            row["hidden"] = self.hidden[self.start[i] : self.start[i + 1]]
        return row

    def digest(self, *weights: Tensor) -> str:
        """A name for these rows as these weights read them."""
        sha = hashlib.sha256(self.start.tobytes())
        for part in (*self.input_ids, *(w.detach().numpy(force=True) for w in weights)):
            sha.update(np.ascontiguousarray(part))
        return sha.hexdigest()[:16]

    def run_trunk(self, trunk: PreTrainedModel, folder: Path, name: str, batch_size: int = 16) -> None:
        """Runs the frozen layers once over all rows and keeps their output on disk as float16, memory-mapped.

        The file is folder/<name>-<digest>.npy; one of other rows or weights is replaced.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{self.digest(*trunk.parameters())}.npy"
        if not path.exists():
            for stale in folder.glob(f"{name}-*.npy"):
                stale.unlink()
            shape = (int(self.start[-1]), trunk.config.hidden_size)
            needed, free = 2 * shape[0] * shape[1], shutil.disk_usage(folder).free
            if needed > free:  # a memory-mapped file that outgrows the disk would kill the process
                raise OSError(f"{folder} needs {needed >> 20:,} MB and the disk has {free >> 20:,} MB free: make room")
            with runs.atomic(path) as new:
                out = np.lib.format.open_memmap(new, mode="w+", dtype=np.float16, shape=shape)
                order = sorted(range(len(self)), key=lambda i: -len(self.input_ids[i]))
                for first in tqdm(range(0, len(order), batch_size), desc="frozen layers, once", unit="batch"):
                    batch = order[first : first + batch_size]
                    for i, states in zip(batch, self._states(trunk, batch), strict=True):
                        out[self.start[i] : self.start[i + 1]] = states
                out.flush()
                del out
        self.hidden = np.load(path, mmap_mode="r")

    @torch.no_grad()
    def _states(self, trunk: PreTrainedModel, batch: Sequence[int]) -> list[np.ndarray]:
        ids, mask = (x.to(trunk.device) for x in left_padded([self.input_ids[i].tolist() for i in batch]))
        states = trunk(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state.half()
        if not torch.isfinite(states[mask.bool()]).all():
            raise ValueError("the frozen layers' output leaves float16's range: set frozen_layers to 0")
        return [row[-len(self.input_ids[i]) :] for i, row in zip(batch, states.numpy(force=True))]


def make_rows(catalogue: Catalogue, histories: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Rows:
    """Rows of prompt, then targets one after the other, each ending in ⊤, then eos if the catalogue has one.

    Args:
        histories: item positions of each prompt.
        targets: item positions of each row's targets (one in the paper's form, a whole sequence in the other).
    """
    item_paths = [path[path >= 0].numpy() for path in catalogue.trie.paths(catalogue.trie.leaf)]
    item_leaf = catalogue.trie.item_leaf.tolist()
    ids, nodes = [], []
    for history, wanted in zip(histories, targets, strict=True):
        prompt = catalogue.context(history)
        tail = [] if catalogue.eos is None else [catalogue.eos]
        ids.append(np.array(prompt + [t for i in wanted for t in catalogue.sequences[i]] + tail))
        nodes.append(np.concatenate(
            [np.full(len(prompt), NO_TARGET), *(item_paths[i] for i in wanted), np.full(len(tail), EOS_TARGET)]
        ).astype(np.int64))
    leaves = [[item_leaf[i] for i in (*history, *wanted)] for history, wanted in zip(histories, targets)]
    return Rows(ids, nodes, leaves, list(map(len, histories)))


def training_rows(catalogue: Catalogue, tables: data.Tables, chosen: Settings) -> Rows:
    """Every training target once: in rows of up to max_history titles ("sequence"), or one a prompt ("target")."""
    index = pd.Index(tables.items.item_id)
    if chosen.rows == "target":
        histories, targets = data.row_positions(tables, tables.train)
        return make_rows(catalogue, histories, [[t] for t in targets])
    flat, start = data.sequences(tables.train)
    flat = index.get_indexer(flat).tolist()
    windows = [
        flat[i : min(i + chosen.max_history, stop)]
        for first, stop in zip(start[:-1], start[1:]) for i in range(first, stop, chosen.max_history)
    ]
    return make_rows(catalogue, [[]] * len(windows), windows)


def validation_rows(catalogue: Catalogue, tables: data.Tables, chosen: Settings) -> Rows:
    """Rows of valid.parquet, one target each; `chosen.validation_rows` of them, drawn by the seed."""
    histories, targets = data.row_positions(tables, tables.valid)
    keep = np.random.default_rng(chosen.seed).permutation(len(targets))[: chosen.validation_rows or None]
    return make_rows(catalogue, [histories[i] for i in keep], [[targets[i]] for i in keep])


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows → input_ids, attention_mask, nodes (B, L) and, with a trunk, inputs_embeds (B, L, H), padded on the left;
    leaves (B, M), -1 on the right, and n_history (B,)."""
    ids, mask = left_padded([row["input_ids"].tolist() for row in rows])
    nodes, _ = left_padded([row["nodes"].tolist() for row in rows], pad=NO_TARGET)
    batch = {"input_ids": ids, "attention_mask": mask, "nodes": nodes,
             "leaves": right_padded([row["leaves"] for row in rows], -1),
             "n_history": torch.tensor([row["n_history"] for row in rows])}
    if "hidden" in rows[0]:
        hidden = torch.zeros(*ids.shape, rows[0]["hidden"].shape[-1])
        for i, row in enumerate(rows):
            hidden[i, ids.shape[1] - len(row["hidden"]) :] = torch.from_numpy(np.asarray(row["hidden"], np.float32))
        batch["inputs_embeds"] = hidden
    return batch


class LikeLengths(Sampler[int]):
    """Indices in an order that puts rows of like length into one batch, a fifth less padding; random by epoch.

    transformers' own `group_by_length` draws its order anew when a run resumes; this one goes on where it was.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
