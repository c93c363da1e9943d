"""How much a user likes each title: a small sequential model p_ui, and plain recommenders to hold it against.

Everything is by leaf (equal titles are one, see `data.item_leaves`): U users, L leaves. No language model is in here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments, logging

from . import runs
from .progress import OneBar, log_table
from .runs import Settings

Floats = NDArray[np.float64]
IGNORED = -100  # labels that transformers leaves out of a loss
BATCH = 64


# The sequential model


class PreferenceModel(GPT2LMHeadModel):
    """A causal transformer over leaf ids with a softmax over all leaves: SASRec (Kang & McAuley 2018) with the full
    cross-entropy in the place of a sampled one. Two layers of transformers' GPT-2, which, like SASRec, has learned
    positions and dropout; one more id, L, begins every sequence.

    Deviation: SASRec was published with one drawn negative a target; the full softmax is the stronger loss, and p_ui is
    its own output.
    """

    @property
    def n_leaves(self) -> int:
        return self.config.vocab_size - 1

    @property
    def window(self) -> int:
        """Titles that it reads at most. Training windows hold one more, the target of the last place."""
        return self.config.n_positions - 2

    def log_p(self, leaves: Tensor) -> Tensor:
        """log p of each leaf after the first 0, 1, …, T titles: (B, T) leaf ids, -1 after a row's end → (B, T + 1, L) nats.

        Raises:
            ValueError: a row is longer than the window, so that a place would be read that no training has seen.
        """
        if leaves.shape[1] > self.window:
            raise ValueError(f"{leaves.shape[1]} titles, and the preference model reads {self.window}: cut the history")
        ids = torch.nn.functional.pad(leaves, (1, 0), value=-1)
        ids = torch.where(ids < 0, self.n_leaves, ids)
        return self(input_ids=ids, use_cache=False).logits[..., : self.n_leaves].float().log_softmax(-1)

    @torch.no_grad()
    def after(self, histories: Sequence[Sequence[int]], batch_size: int = 256) -> Tensor:
        """log p_ui after each history of leaf ids, oldest first, the last window of it: (U, L) nats."""
        found = []
        for first in range(0, len(histories), batch_size):
            batch = [list(history)[-self.window :] for history in histories[first : first + batch_size]]
            leaves = right_padded(batch, -1).to(self.device)
            last = torch.tensor([len(history) for history in batch], device=self.device)
            found.append(self.log_p(leaves)[torch.arange(len(batch), device=self.device), last])
        return torch.cat(found)


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Lists of ids → (B, T) int64, padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), pad)
    for row, ids in zip(padded, rows):
        row[: len(ids)] = torch.as_tensor(ids, dtype=torch.long)
    return padded


class _Windows(Dataset):
    """A random window of a user's sequence at each call, as often as the sequence holds windows: every title a target."""

    def __init__(self, sequences: Sequence[Sequence[int]], window: int):
        self.sequences, self.window = sequences, window
        self.owner = [i for i, s in enumerate(sequences) for _ in range(-(-len(s) // window))]

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, i: int) -> tuple[list[int], bool]:
        sequence = self.sequences[self.owner[i]]
        start = int(torch.randint(1 - self.window, len(sequence), ()))
        start = max(0, min(start, len(sequence) - self.window))
        return sequence[start : start + self.window], False


class _NextTitles(Dataset):
    """Histories, each with the title that came next as the only target."""

    def __init__(self, histories: Sequence[Sequence[int]], targets: Sequence[int], window: int):
        self.rows = [([*map(int, history), int(target)][-window:], True) for history, target in zip(histories, targets, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[int], bool]:
        return self.rows[i]


def train_preference(
    sequences: Sequence[Sequence[int]], histories: Sequence[Sequence[int]], targets: Sequence[int], n_leaves: int,
    chosen: Settings, folder: Path,
) -> tuple[PreferenceModel, pd.DataFrame]:
    """Trains p_ui and saves it under `folder`, by the weights of the lowest validation loss.

    A finished training of the same settings, data and code is taken as it is.

    Args:
        sequences: each user's training titles as leaf ids, oldest first. histories, targets: the validation rows.
        chosen: preference_size, preference_epochs, max_history (what it reads) and seed are used.

    Returns:
        The model; and the log: step, kind ("train" or "validation") and loss, nats per target.
    """
    used = {name: asdict(chosen)[name] for name in ("preference_size", "preference_epochs", "max_history", "seed")}
    told = repr([[list(map(int, row)) for row in rows] for rows in (sequences, histories, [targets])])
    plan = used | {"data": hashlib.sha256(told.encode()).hexdigest(), "code": runs.code_digest("preference")}
    done = folder / "plan.json"
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == plan:
        return PreferenceModel.from_pretrained(folder).eval(), pd.read_json(folder / "log.json", orient="records")
    done.unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    runs.seed_everything(chosen.seed)
    model = PreferenceModel(GPT2Config(
        vocab_size=n_leaves + 1, n_positions=chosen.max_history + 2, n_embd=chosen.preference_size, n_layer=2, n_head=2,
        resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, bos_token_id=n_leaves, eos_token_id=n_leaves,
    ))
    window = chosen.max_history + 1
    rows = _Windows([list(map(int, s)) for s in sequences if len(s)], window)
    valid = _NextTitles(histories, targets, window)
    logging.set_verbosity_error()
    trainer = Trainer(
        model, _arguments(chosen, folder / "checkpoints", len(rows)), train_dataset=rows, eval_dataset=valid,
        data_collator=lambda batch: _collate(batch, n_leaves), callbacks=[OneBar()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = log_table(trainer.state.log_history)
    shutil.rmtree(folder / "checkpoints")
    model.eval().save_pretrained(folder)
    log.to_json(folder / "log.json", orient="records")
    runs.write_json(done, plan)
    return model.cpu(), log


def _collate(batch: Sequence[tuple[list[int], bool]], n_leaves: int) -> dict[str, Tensor]:
    leaves = right_padded([[n_leaves, *row] for row, _ in batch], IGNORED)
    labels = leaves.clone()
    labels[:, 0] = IGNORED
    for label, (row, last_only) in zip(labels, batch):
        if last_only:
            label[: len(row)] = IGNORED
    return {"input_ids": leaves.masked_fill(leaves == IGNORED, n_leaves), "labels": labels}


def _arguments(chosen: Settings, folder: Path, n_rows: int) -> TrainingArguments:
    steps = max(1, round(chosen.preference_epochs * n_rows / BATCH))
    every = -(-steps // 10)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, per_device_eval_batch_size=4 * BATCH,
        learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=steps // 20, max_steps=steps, seed=chosen.seed,
        eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", logging_steps=every, report_to="none",
        prediction_loss_only=True, remove_unused_columns=False, disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # transformers would put a batch on each device that it sees
    return arguments


# Plain recommenders: scores of a history are the sum of its titles' rows of an (L, L) matrix


def cooccurrence(sequences: Sequence[Sequence[int]], n_leaves: int) -> Floats:
    """(L, L) how many users chose both; on the diagonal, how many chose each."""
    together = np.zeros((n_leaves, n_leaves))
    for first in range(0, len(sequences), 1024):  # users at a time: so many rows of L numbers are held
        part = sequences[first : first + 1024]
        chose = np.zeros((len(part), n_leaves))
        for row, sequence in zip(chose, part):
            row[np.asarray(sequence, dtype=int)] = 1
        together += chose.T @ chose
    return together


def item_knn(together: Floats, n_neighbours: int) -> Floats:
    """(L, L) cosine of the titles' users, in each column (a title to recommend) the nearest ones alone; diagonal 0.

    Source: Sarwar et al., *Item-based collaborative filtering recommendation algorithms*, WWW 2001.
    """
    norm = np.sqrt(np.maximum(together.diagonal(), 1))
    cosine = together / norm / norm[:, None]
    np.fill_diagonal(cosine, 0)
    if n_neighbours < len(cosine):
        cosine[cosine < np.partition(cosine, -n_neighbours, axis=0)[-n_neighbours]] = 0
    return cosine


def ease(together: Floats, strength: float) -> Floats:
    """(L, L) the linear autoencoder without a diagonal that reconstructs the users' choices, L2 penalty `strength`.

    Source: Steck, *Embarrassingly Shallow Autoencoders for Sparse Data*, WWW 2019, eq. 8.
    """
    inverse = np.linalg.inv(together + strength * np.eye(len(together)))
    weights = inverse / -inverse.diagonal()
    np.fill_diagonal(weights, 0)
    return weights


def sum_of_rows(matrix: Floats, histories: Sequence[Sequence[int]]) -> Floats:
    """(U, L) scores after each history of leaf ids."""
    return np.stack([matrix[list(dict.fromkeys(history))].sum(axis=0) for history in histories])


def top_titles(scores: Floats | Tensor, seen: Sequence[Sequence[int]], k: int) -> NDArray[np.int64]:
    """(U, L) scores → (U, k) leaf ids, best first, ties by id, none of those seen, -1 where none is left."""
    scores = np.array(scores, dtype=float)
    for row, leaves in zip(scores, seen, strict=True):
        row[list(leaves)] = -np.inf
    lists = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.isfinite(np.take_along_axis(scores, lists, 1)), lists, -1)
