"""How much a user likes each title: a small sequential model p_ui, and plain recommenders to hold it against.

Everything is by leaf (`data.item_leaves`): U users, L leaves. No language model is in here.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, logging, set_seed)
from transformers.utils import ModelOutput

from .. import data, metrics
from ..model import Catalogue
from ..tree import right_padded
from . import store
from .runs import require
from .settings import Settings
from .training import OneBar, last_checkpoint, log_table, trainer_arguments

Floats = NDArray[np.float64]
IGNORED = -100  # labels that transformers leaves out of a loss
BATCH = 64


class PreferenceModel(GPT2LMHeadModel):
    """A causal transformer over leaf ids with a softmax over all leaves: SASRec (Kang & McAuley 2018) with the full
    cross-entropy in the place of a sampled one. Two layers of transformers' GPT-2, which, like SASRec, has learned
    positions and dropout; one more id, L, begins every sequence.

    Deviation: SASRec was published with one drawn negative a target; the full softmax is the stronger loss, and p_ui is
    its own output.
    """

    n_leaves = property(lambda self: self.config.vocab_size - 1)
    window = property(lambda self: self.config.n_positions - 2, doc="Titles that it reads at most; the target not.")

    def log_p(self, leaves: Tensor) -> Tensor:
        """log p of each leaf after the first 0, 1, …, T titles: (B, T) leaf ids, -1 after a row's end → (B, T + 1, L)
        nats. ValueError for rows longer than the window: a place would be read that no training has seen."""
        if leaves.shape[1] > self.window:
            raise ValueError(f"{leaves.shape[1]} titles, and the preference model reads {self.window}: cut the history")
        ids = torch.nn.functional.pad(leaves, (1, 0), value=-1)
        ids = torch.where(ids < 0, self.n_leaves, ids)
        return self(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        """GPT-2's, but for the logits, (B, T, L): the id that begins a sequence is no title, in training neither."""
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits[..., : self.n_leaves]
        if labels is not None:
            out.loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                                         ignore_index=IGNORED)
        return out

    @torch.no_grad()
    def after(self, histories: Sequence[Sequence[int]], batch_size: int = 256) -> Tensor:
        """log p_ui after each history of leaf ids, oldest first, the last window of it: (U, L) nats."""
        parts = []
        for first in range(0, len(histories), batch_size):
            batch = [list(history)[-self.window :] for history in histories[first : first + batch_size]]
            log_p = self.log_p(right_padded(batch, -1).to(self.device))
            parts.append(log_p[range(len(batch)), list(map(len, batch))])
        return torch.cat(parts)


class _Windows(Dataset):
    """A random window of a user's sequence at each call, as often as the sequence holds windows: ids, and labels."""

    def __init__(self, sequences: Sequence[Sequence[int]], window: int):
        self.sequences, self.window = sequences, window
        self.owner = [i for i, s in enumerate(sequences) for _ in range(-(-len(s) // window))]

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        sequence = self.sequences[self.owner[i]]
        start = int(torch.randint(1 - self.window, len(sequence), ()))
        start = max(0, min(start, len(sequence) - self.window))
        return (sequence[start : start + self.window],) * 2


def train_preference(
    sequences: Sequence[Sequence[int]], histories: Sequence[Sequence[int]], targets: Sequence[int], n_leaves: int,
    settings: Settings, folder: Path) -> tuple[PreferenceModel, pd.DataFrame, Path]:
    """Trains p_ui and saves it, by the weights of the lowest validation loss, in a folder p_ui-<digest> under `folder`.
    It stops after two validations that are no better. A finished training of equal settings and data is taken as it is.

    Args:
        sequences: each user's training titles as leaf ids, oldest first. histories, targets: the validation rows.
        settings: preference_size, preference_epochs, max_history (what it reads) and seed are used.

    Returns:
        The model; the log: step, kind ("train" or "validation") and loss, nats per target; the model's folder.
    """
    rows_by_part = [[list(map(int, row)) for row in part] for part in (sequences, histories, [targets])]
    used = ("preference_size", "preference_epochs", "max_history", "seed")
    origin = {name: getattr(settings, name) for name in used}
    origin |= {"n_leaves": n_leaves, "data": store.digest(rows_by_part)}
    folder = folder / f"p_ui-{store.digest(origin)}"
    with store.at_work(folder, origin, "log") as record:
        if record:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a process that was killed as it ended
            return _trained(folder), pd.DataFrame(record["log"]), folder
        start = time.perf_counter()
        set_seed(settings.seed)
        model = PreferenceModel(GPT2Config(
            vocab_size=n_leaves + 1, n_positions=settings.max_history + 2, n_embd=settings.preference_size, n_layer=2,
            n_head=2, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, bos_token_id=n_leaves, eos_token_id=n_leaves))
        sequences, histories, [targets] = rows_by_part
        rows = _Windows([sequence for sequence in sequences if sequence], settings.max_history + 1)
        read = [history[-settings.max_history :] for history in histories]
        valid = [([*row, target], [IGNORED] * len(row) + [target]) for row, target in zip(read, targets, strict=True)]
        how = {"batch_size": BATCH, "device_batch": BATCH, "learning_rate": 3e-3, "bfloat16": False, "evaluations": 10}
        how["epochs"] = max(settings.preference_epochs, 1e-9)
        arguments = trainer_arguments(replace(settings, **how), folder / "checkpoints", len(rows))
        arguments.logging_steps = arguments.eval_steps
        logging.set_verbosity_error()
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=valid,
                          callbacks=[OneBar(), EarlyStoppingCallback(early_stopping_patience=2)],
                          data_collator=lambda batch: _collate(batch, n_leaves))
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
        log = log_table(trainer.state.log_history, arguments.max_steps)
        model.eval().save_pretrained(folder)
        source = store.provenance(asdict(settings), time.perf_counter() - start)
        store.keep(folder / "made.json", origin, source, log=json.loads(log.to_json(orient="records")))
        shutil.rmtree(folder / "checkpoints")
    return model.cpu(), log, folder


def load_preference(out: Path) -> PreferenceModel:
    """The preference model of a run; FileNotFoundError if notebook 01, which trains it, has not been run to its end."""
    made = store.read_json(require(out, "data") / "settings.json", "made")["made"]
    return _trained(out / "preference" / str(made))


def _trained(folder: Path) -> PreferenceModel:
    with store.reading(folder / "model.safetensors", folder):
        return PreferenceModel.from_pretrained(folder).eval()


def _collate(batch: Sequence[tuple[list[int], list[int]]], begin: int) -> dict[str, Tensor]:
    ids, labels = zip(*batch)
    return {"input_ids": right_padded([[begin, *row] for row in ids], begin),
            "labels": right_padded([[IGNORED, *row] for row in labels], IGNORED)}


# Plain recommenders: scores of a history are the sum of its titles' rows of an (L, L) matrix


def cooccurrence(sequences: Sequence[Sequence[int]], n_leaves: int) -> Floats:
    """(L, L) how many users chose both; on the diagonal, how many chose each."""
    together = np.zeros((n_leaves, n_leaves))
    for sequence in sequences:
        own = np.unique(np.asarray(sequence, dtype=int))
        together[own[:, None], own] += 1
    return together


def item_knn(together: Floats, n_neighbours: int) -> Floats:
    """(L, L) cosine of the titles' users, in each column (a title to recommend) the nearest ones alone; diagonal 0.
    Source: Sarwar et al., *Item-based collaborative filtering recommendation algorithms*, WWW 2001."""
    norm = np.sqrt(np.maximum(together.diagonal(), 1))
    cosine = together / norm / norm[:, None]
    np.fill_diagonal(cosine, 0)
    if n_neighbours < len(cosine):
        cosine[cosine < np.partition(cosine, -n_neighbours, axis=0)[-n_neighbours]] = 0
    return cosine


def ease(together: Floats, strength: float) -> Floats:
    """(L, L) the linear autoencoder without a diagonal that reconstructs the users' choices, L2 penalty `strength`.
    Source: Steck, *Embarrassingly Shallow Autoencoders for Sparse Data*, WWW 2019, eq. 8."""
    inverse = np.linalg.inv(together + strength * np.eye(len(together)))
    weights = inverse / -inverse.diagonal()
    np.fill_diagonal(weights, 0)
    return weights


def sum_of_rows(matrix: Floats, histories: Sequence[Sequence[int]]) -> Floats:
    """(U, L) scores after each history of leaf ids."""
    return np.stack([matrix[list(dict.fromkeys(history))].sum(axis=0) for history in histories])


def top_titles(scores: Floats | Tensor, seen: Sequence[Sequence[int]], k: int) -> NDArray[np.int64]:
    """(U, L) scores → (U, k) leaf ids, best first, ties by id, none of those seen, -1 where none is left."""
    scores = np.pad(np.array(scores, dtype=float), ((0, 0), (0, k)), constant_values=-np.inf)
    for row, leaves in zip(scores, seen, strict=True):
        row[list(leaves)] = -np.inf
    lists = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.isfinite(np.take_along_axis(scores, lists, 1)), lists, -1)


def fair_weights(catalogue: Catalogue, tables: data.Tables, n_groups: int = 8) -> Tensor:
    """(n_leaves,) IFairLRS' weight of each target: its popularity group's share in the training rows' histories, which
    make the groups, over its share in their targets (1 if it has none). For one-target rows.

    Source: Jiang et al., WWW 2024. Deviation: the official code multiplies a loss that is averaged already, so that
    the weights cancel out of the comparison between targets.
    """
    leaf, n_leaves = catalogue.trie.item_leaf.numpy(force=True), len(catalogue.trie.leaves)
    target = pd.Index(tables.items.item_id).get_indexer(tables.train.target)
    targets = np.bincount(leaf[target], minlength=n_leaves)
    histories = np.bincount(leaf, weights=data.item_counts(tables, "windowed"), minlength=n_leaves)
    groups = metrics.popularity_groups(histories, min(n_groups, np.count_nonzero(histories)))
    before, after = metrics.group_shares(histories, groups), metrics.group_shares(targets, groups)
    return torch.from_numpy(np.divide(before, after, out=np.ones_like(before), where=after > 0)[groups])
