"""How a training tells how it goes: one bar while it runs, one table afterwards."""

from __future__ import annotations

from typing import Any

import pandas as pd
from tqdm import tqdm
from transformers import TrainerCallback


class OneBar(TrainerCallback):
    """One tqdm bar over the steps, with the last losses beside it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in (logs or {}).items() if k in ("loss", "eval_loss")})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def log_table(history: list[dict[str, float]]) -> pd.DataFrame:
    """transformers' record of a training as columns step, kind ("train" or "validation"), loss, and sft and flow."""
    records = []
    for entry in history:
        for kind, prefix in (("train", ""), ("validation", "eval_")):
            if f"{prefix}loss" in entry:
                record = {"step": entry["step"], "kind": kind, "loss": entry[f"{prefix}loss"]}
                records.append(record | {k: entry[prefix + k] for k in ("sft", "flow") if prefix + k in entry})
    return pd.DataFrame(records)
