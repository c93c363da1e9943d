"""How much a user likes each title: a small sequential model p_ui, and plain recommenders to hold it against.

Everything is by leaf (equal titles are one, see `data.item_leaves`): U users, L leaves. No language model is in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments, logging,
)

from . import runs
from .runs import Settings

Floats = NDArray[np.float64]
IGNORED = -100  # labels that transformers leaves out of a loss


# The sequential model


class PreferenceModel(GPT2LMHeadModel):
    """A causal transformer over leaf ids with a softmax over all leaves: SASRec (Kang & McAuley 2018) with the full
    cross-entropy in the place of a sampled one. Two layers of transformers' GPT-2, which, like SASRec, has learned
    positions and dropout; one more id, L, begins every sequence.

    Deviation: the official code's SASRec draws one negative a target; the full softmax is the stronger loss, and p_ui
    is its own output.
    """

    @property
    def n_leaves(self) -> int:
        return self.config.vocab_size - 1

    def log_p(self, leaves: Tensor) -> Tensor:
        """log p of each leaf after the first 0, 1, …, T titles: (B, T) leaf ids, -1 after a row's end → (B, T + 1, L) nats.

        What stands further back than the model's window is left to the caller to cut.
        """
        ids = torch.nn.functional.pad(leaves, (1, 0), value=-1)
        ids = torch.where(ids < 0, self.n_leaves, ids)
        return self(input_ids=ids, use_cache=False).logits[..., : self.n_leaves].float().log_softmax(-1)

    @torch.no_grad()
    def after(self, histories: Sequence[Sequence[int]], batch_size: int = 256) -> Tensor:
        """log p_ui after each history of leaf ids, oldest first, the last window of it: (U, L) nats."""
        window = self.config.n_positions - 1
        found = []
        for first in range(0, len(histories), batch_size):
            batch = [list(history)[-window:] for history in histories[first : first + batch_size]]
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

    def __getitem__(self, i: int) -> tuple[list[int], int]:
        sequence = self.sequences[self.owner[i]]
        start = int(torch.randint(1 - self.window, len(sequence), ()))
        start = max(0, min(start, len(sequence) - self.window))
        return list(sequence[start : start + self.window]), 0


class _NextTitles(Dataset):
    """Histories, each with the title that came next as the only target."""

    def __init__(self, histories: Sequence[Sequence[int]], targets: Sequence[int], window: int):
        self.rows = [([*history, target][-window:], 1) for history, target in zip(histories, targets, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[int], int]:
        return self.rows[i]


def train_preference(
    sequences: Sequence[Sequence[int]], histories: Sequence[Sequence[int]], targets: Sequence[int], n_leaves: int,
    chosen: Settings, folder: Path,
) -> tuple[PreferenceModel, list[dict[str, float]]]:
    """Trains p_ui, keeps the weights of the lowest validation loss under `folder`, and returns them.

    Args:
        sequences: each user's training titles as leaf ids, oldest first. histories, targets: the validation rows.
        chosen: preference_size, preference_epochs, max_history (the window) and seed are used.

    Returns:
        The model, and records of step, kind ("train" or "validation") and loss, nats per target.
    """
    runs.seed_everything(chosen.seed)
    model = PreferenceModel(GPT2Config(
        vocab_size=n_leaves + 1, n_positions=chosen.max_history + 1, n_embd=chosen.preference_size, n_layer=2, n_head=2,
        resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, bos_token_id=n_leaves, eos_token_id=n_leaves,
        loss_type="ForCausalLM",
    ))
    rows = _Windows([s for s in sequences if len(s)], chosen.max_history)
    valid = _NextTitles(histories, targets, chosen.max_history)

    def collate(batch: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        leaves = right_padded([[n_leaves, *row] for row, _ in batch], IGNORED)
        labels = leaves.clone()
        labels[:, 0] = IGNORED
        for label, (row, last_only) in zip(labels, batch):
            if last_only:
                label[: len(row)] = IGNORED
        return {"input_ids": leaves.masked_fill(leaves == IGNORED, n_leaves), "labels": labels}

    logging.set_verbosity_error()
    steps = max(1, round(chosen.preference_epochs * len(rows) / 64))
    every = -(-steps // 10)
    trainer = Trainer(
        model, TrainingArguments(
            output_dir=str(folder / "checkpoints"), per_device_train_batch_size=64, per_device_eval_batch_size=256,
            learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=steps // 20, max_steps=steps, seed=chosen.seed,
            eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every, save_total_limit=1,
            load_best_model_at_end=True, logging_steps=every, report_to="none", prediction_loss_only=True,
            remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
        ), data_collator=collate, train_dataset=rows, eval_dataset=valid,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval(), trainer.state.log_history
