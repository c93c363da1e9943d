"""One trainer for SFT and Flower: rows of titles in, a tuned language model out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainingArguments, logging,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from . import data, metrics, runs
from .backbone import split_layers
from .batches import NO_TARGET, LikeLengths, Rows, collate, training_rows, validation_rows
from .losses import node_kl_loss, sft_loss, subpath_weights, subtb_loss
from .policy import Catalogue, positions, sample_leaves
from .preference import PreferenceModel
from .progress import OneBar, log_table
from .rewards import preference_log_rewards, tilted
from .runs import Settings
from .trie import TitleTrie

LORA_TARGETS = "all-linear"
MODULES = (  # whose code tunes a model
    "backbone", "batches", "data", "losses", "policy", "preference", "rewards", "train", "trie",
)


def fair_weights(catalogue: Catalogue, tables: data.Tables, n_groups: int = 8) -> Tensor:
    """(n_leaves,) IFairLRS' weight of each target: its popularity group's share in the training rows' histories over its
    share in their targets. Where every interaction is a target it is close to 1: it needs one-target rows.

    Source: Jiang et al., WWW 2024. Deviation: the official code multiplies a loss that is averaged already, so that
    the weights cancel out of the comparison between targets.
    """
    leaf, n_leaves = catalogue.trie.item_leaf.numpy(force=True), len(catalogue.trie.leaves)
    target = pd.Index(tables.items.item_id).get_indexer(tables.train.target)
    targets = np.bincount(leaf[target], minlength=n_leaves)
    histories = np.bincount(leaf, weights=data.item_counts(tables, "windowed"), minlength=n_leaves)
    groups = metrics.popularity_groups(targets, min(n_groups, int((targets > 0).sum())))
    share = metrics.group_shares(histories, groups) / metrics.group_shares(targets, groups)
    return torch.from_numpy(share[groups])


class FlowerTrainer(Trainer):
    """transformers' Trainer with Flower's loss θ · L_SFT + (1 − θ) · L_flow; θ = 1 is SFT.

    Args:
        trie, log_item_rewards: the flow's tree and (n_items,) log R, nats, alike for all users.
        chosen: theta, lam, flow, paths, reward and beta are used (see `runs.Settings`). Paths are the logged titles, or
            n_paths a row drawn from the flow or from the model itself under the trie's mask; log π is over the whole
            vocabulary.
        preference: p_ui, for every reward but "none". It reads the titles of the row itself.
        leaf_weights: (n_leaves,) weight of each target in the SFT loss (IFairLRS), or None.

    Deviation: where the official code samples through a switched-off cache, so that all tokens but the first ignore
    the prompt, paths here see the whole prompt. Sampled paths share one forward pass with the logged row. Preferences
    are those of the very row (the official code takes training rows' by index in validation).
    """

    def __init__(
        self, *args: Any, trie: TitleTrie, log_item_rewards: Tensor, chosen: Settings,
        preference: PreferenceModel | None = None, leaf_weights: Tensor | None = None, **kwargs: Any,
    ):
        if chosen.theta < 1 and chosen.reward != "none" and preference is None:
            raise ValueError(f"reward {chosen.reward!r} needs a preference model: run notebook 01, or set reward to none")
        super().__init__(*args, data_collator=collate, **kwargs)
        device = self.args.device
        self.trie, self.chosen, self.theta = trie.to(device), chosen, chosen.theta
        self.log_item_rewards = log_item_rewards.float().to(device)
        self.log_r = self.trie.log_token_rewards(self.log_item_rewards)
        self.leaf_weights = None if leaf_weights is None else leaf_weights.float().to(device)
        self.preference = preference.eval().to(device) if preference is not None else None
        self.model_accepts_loss_kwargs = False
        self._parts: dict[str, list[Tensor]] = {}

    def _get_train_sampler(self, train_dataset: Rows | None = None) -> Sampler[int]:
        rows = train_dataset or self.train_dataset
        together = self.args.train_batch_size * self.args.world_size
        return LikeLengths(list(map(len, rows.input_ids)), together, self.args.seed)

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        batch = dict(inputs)
        nodes, leaves, n_history = (batch.pop(name) for name in ("nodes", "leaves", "n_history"))
        mask = batch["attention_mask"]
        starts = (nodes >= 0) & (self.trie.depth[nodes.clamp(min=0)] == 1)
        before = (n_history[:, None] + starts.cumsum(-1) - 1).clamp(min=0)  # titles before the one that a token is of
        predictor = torch.arange(nodes.shape[1], device=nodes.device).expand_as(nodes) - 1
        sampled = torch.zeros_like(nodes, dtype=torch.bool)
        batch["position_ids"] = positions(mask)
        log_p = self._log_p(leaves) if self.theta < 1 else None
        if self.theta < 1 and self.chosen.paths != "logged" and model.training:
            # (B, P) columns at which rivals of a row's targets start
            branch = torch.multinomial(starts.float(), self.chosen.n_paths, replacement=True)
            leaves_drawn = self._draw_leaves(model, batch, branch, before, log_p)
            rivals = self.trie.paths(leaves_drawn.flatten()).view(*branch.shape, -1)
            rivals = rivals[..., : int((rivals >= 0).sum(-1).max())]  # the longest title drawn, not of all
            batch, predictor, sampled = self._packed(batch, rivals, branch)
            nodes = torch.cat([nodes, torch.where(rivals >= 0, rivals, NO_TARGET).flatten(1)], 1)
            before = torch.cat([before, before.gather(1, branch).repeat_interleave(rivals.shape[-1], 1)], 1)
        tokens = batch["input_ids"]
        if "inputs_embeds" in batch:
            del batch["input_ids"]
        target = nodes != NO_TARGET
        first = int(predictor[target].min())  # no logits are needed before it
        logits = model(**batch, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits
        rows = target.nonzero()[:, 0]
        chosen = logits[rows, predictor[target] - first].float()
        norm = chosen.logsumexp(-1)
        log_pf = chosen.gather(1, tokens[target][:, None])[:, 0] - norm
        drawn = sampled[target]
        sft = sft_loss(log_pf, ~drawn, self._weights(leaves, rows, before[target]))
        loss = sft = self._of_all(sft, (~drawn).sum())
        self._note("sft", sft)
        if self.theta < 1:
            use = (nodes[target] >= 0) & (drawn if drawn.any() else ~drawn)
            log_p = log_p[rows, before[target]][use] if log_p is not None else None
            flow = self._of_all(*self._flow_loss(chosen[use], norm[use], log_pf[use], nodes[target][use], log_p))
            self._note("flow", flow)
            loss = self.theta * sft + (1 - self.theta) * flow
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def _log_p(self, leaves: Tensor) -> Tensor | None:
        """(B, M, n_leaves) log p_ui after the first 0, 1, … titles of each row, or None where no reward asks."""
        return None if self.chosen.reward == "none" else self.preference.log_p(leaves[:, :-1])

    def _weights(self, leaves: Tensor, rows: Tensor, before: Tensor) -> Tensor | float:
        """Each target token's weight: its title's."""
        return 1.0 if self.leaf_weights is None else self.leaf_weights[leaves[rows, before]]

    def _of_all(self, mean: Tensor, weight: Tensor) -> Tensor:
        """A mean over terms of this weight → what, averaged over the processes, is the mean over the terms of all."""
        n = self.accelerator.num_processes
        return mean if n == 1 else mean * weight * n / self.accelerator.reduce(weight.float(), "sum")

    def _flow_loss(
        self, logits: Tensor, norm: Tensor, log_pf: Tensor, nodes: Tensor, log_p: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The flow loss over titles laid one after the other; and the weight of the terms that it is the mean of.

        Args:
            logits, norm, log_pf: of the tokens, (n, V), (n,) and (n,). nodes: (n,) the nodes that they reach.
            log_p: (n, n_leaves) preferences of the user at that place, or None.
        """
        depth = self.trie.depth[nodes] - 1
        path = (depth == 0).cumsum(0) - 1
        log_p = log_p[depth == 0] if log_p is not None else None
        if log_p is not None and self.chosen.reward == "exact":
            log_r = self.trie.log_token_rewards(
                preference_log_rewards(self.trie, self.log_item_rewards, log_p, self.chosen.beta)
            )
        else:
            log_r = self.log_r.expand(int(path[-1]) + 1, -1)
        if self.chosen.flow == "children":
            edge, children = self.trie.children(self.trie.parent[nodes])
            log_pf = logits[edge, self.trie.token[children]] - norm[edge]
            return node_kl_loss(log_pf, log_r[path[edge], children], len(nodes)), torch.tensor(len(nodes), device=nodes.device)
        shape = (int(path[-1]) + 1, int(depth.max()) + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=nodes.device)
        mask[path, depth] = True
        rows_pf, rows_r = (torch.zeros(shape, device=nodes.device) for _ in range(2))
        rows_pf = rows_pf.index_put((path, depth), log_pf)
        rows_r[path, depth] = log_r[path, nodes]
        if self.chosen.reward in ("div", "add"):
            ends = torch.cat([depth[1:] == 0, torch.ones_like(depth[:1], dtype=torch.bool)])
            rows_r = tilted(rows_r, log_p, self.trie.node_leaf[nodes[ends]], self.chosen.reward, self.chosen.beta)
        return subtb_loss(rows_pf, rows_r, mask, self.chosen.lam), subpath_weights(mask, self.chosen.lam).sum()

    def _packed(
        self, batch: dict[str, Tensor], path: Tensor, branch: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """P more titles a row, packed behind it: each sees what stands before its column `branch`, and itself.

        Args:
            path: (B, P, T) nodes of the titles, -1 after their ends. branch: (B, P).

        Returns:
            The batch with a (B, 1, L', L') mask, and predictor and sampled, (B, L') each.
        """
        length, device = path.shape[-1], path.device
        drawn = (path >= 0).flatten(1)
        ids, mask, position = batch["input_ids"], batch["attention_mask"], positions(batch["attention_mask"])
        width = ids.shape[1]
        column = torch.arange(width + drawn.shape[1], device=device)
        block = (column - width).div(length, rounding_mode="floor").clamp(min=-1)  # -1: the row as it was
        limit = torch.cat([column[:width].expand(len(ids), -1) + 1, branch.repeat_interleave(length, 1)], 1)
        own = (block[:, None] == block) | (block == -1) & (column < limit[..., None])  # (B, L', L')
        visible = own & torch.cat([mask.bool(), drawn], 1)[:, None] & (column[:, None] >= column)
        predictor = (column - 1).repeat(len(ids), 1)
        predictor[:, width::length] = branch - 1
        steps = torch.arange(length, device=device)
        packed = {
            "input_ids": torch.cat([ids, self.trie.token[path.clamp(min=0)].flatten(1) * drawn], 1),
            "attention_mask": (visible | torch.eye(len(column), dtype=torch.bool, device=device))[:, None],
            "position_ids": torch.cat([position, (position.gather(1, branch)[..., None] + steps).flatten(1)], 1),
        }
        return packed, predictor, torch.cat([torch.zeros_like(mask, dtype=torch.bool), drawn], 1)

    @torch.no_grad()
    def _draw_leaves(
        self, model: PreTrainedModel, batch: dict[str, Tensor], branch: Tensor, before: Tensor, log_p: Tensor | None
    ) -> Tensor:
        """(B, P) leaf nodes, from the flow of the user there or from the model after the columns before `branch`."""
        n, n_paths = branch.shape
        if self.chosen.paths == "reward":
            log_rewards = self.log_item_rewards.expand(n * n_paths, -1)
            if self.chosen.reward == "exact":
                rows = torch.arange(n, device=branch.device)[:, None]
                log_p = log_p[rows, before.gather(1, branch)].flatten(0, 1)
                log_rewards = preference_log_rewards(self.trie, log_rewards, log_p, self.chosen.beta)
            return self.trie.leaf[torch.multinomial(log_rewards.softmax(-1), 1)].view(n, n_paths)
        model.eval()
        ids, mask = batch["input_ids"], batch["attention_mask"]
        leaves = sample_leaves(self.accelerator.unwrap_model(model), self.trie, ids, mask, branch)
        model.train()
        return leaves

    def _note(self, name: str, value: Tensor) -> None:
        key = name if self.model.training else f"eval_{name}"
        self._parts.setdefault(key, []).append(value.detach())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss, averaged since the last log, to transformers' own record."""
        prefix = "eval_" if "eval_loss" in logs else ""
        for key in [k for k in self._parts if k.startswith("eval_") == bool(prefix)]:
            logs[key] = float(self.accelerator.reduce(torch.stack(self._parts.pop(key)).mean(), "mean"))
        super().log(logs, *args, **kwargs)


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, catalogue: Catalogue, tables: data.Tables,
    chosen: Settings, folder: Path, cache: Path, log_item_rewards: Tensor | None = None,
    preference: PreferenceModel | None = None,
) -> pd.DataFrame:
    """Tunes `model` in place and saves it, with tokenizer, items and settings, under `folder`, ready for `recommend`.

    The checkpoint of the lowest validation loss is kept. A killed run resumes from its last checkpoint, and a finished
    one is taken as it is, if settings, rows, rewards, first weights and code are the same.

    Deviation: the paper stops once two validations in a row were no better; here all `epochs` are run.

    Args:
        cache: folder in which the frozen layers' output is kept, shared by the runs on one backbone.
        log_item_rewards: (n_items,) log R in nats for Flower; None is SFT.
        preference: p_ui, needed by every reward but "none".

    Returns:
        The log: columns step, loss, kind ("train" or "validation"), sft and flow (nats per token, nats²).

    Raises:
        ValueError: a title or a row is longer than the model's context; sampled paths behind frozen layers; a reward
            that is not positive; a batch that does not part evenly over the processes.
    """
    theta = 1.0 if log_item_rewards is None else chosen.theta
    if theta < 1 and chosen.frozen_layers and chosen.paths != "logged":
        raise ValueError("paths that are drawn need every layer at hand: set frozen_layers and tuned_layers to 0 in 02")
    rows, valid = training_rows(catalogue, tables, chosen), validation_rows(catalogue, tables, chosen)
    _check_lengths(model, catalogue, (rows, valid))
    log_item_rewards = torch.zeros(catalogue.trie.n_items) if log_item_rewards is None else log_item_rewards
    checkpoints = folder / "checkpoints"
    arguments = _arguments(chosen, checkpoints, len(rows))
    tuned = model.to(arguments.device)
    leaf_weights = fair_weights(catalogue, tables) if chosen.reweight else torch.ones(0)
    of_preference = list(preference.parameters()) if preference is not None else []
    plan = {
        "settings": asdict(chosen), "bf16": arguments.bf16, "theta": theta, "code": runs.code_digest(*MODULES),
        "valid": valid.digest(), "train": rows.digest(log_item_rewards, leaf_weights, *model.parameters(), *of_preference),
    }
    finished = _finished(model, folder, plan)
    if finished is not None:
        runs.write_settings(folder, chosen)
        return finished
    runs.seed_everything(chosen.seed)
    with arguments.main_process_first():  # where several processes train
        last = _last_checkpoint(checkpoints, plan)
        if chosen.frozen_layers:
            trunk, tuned = split_layers(model, chosen.frozen_layers)
            tuned.get_input_embeddings().requires_grad_(False)
            with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
                for part, name in ((rows, "train"), (valid, "valid")):
                    part.run_trunk(trunk, cache, f"{name}_bfloat16" if arguments.bf16 else name)
    if chosen.lora_rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=chosen.lora_rank, lora_alpha=2 * chosen.lora_rank, target_modules=LORA_TARGETS)
        tuned = get_peft_model(tuned, config)
    logging.set_verbosity_error()
    trainer = FlowerTrainer(
        tuned, arguments, train_dataset=rows, eval_dataset=valid, callbacks=[OneBar()], trie=catalogue.trie,
        log_item_rewards=log_item_rewards, chosen=replace(chosen, theta=theta), preference=preference,
        leaf_weights=leaf_weights if chosen.reweight else None,
    )
    trainer.remove_callback(PrinterCallback)
    torch.manual_seed(chosen.seed + 1_000_003 * arguments.process_index)  # every process draws paths of its own
    trainer.train(resume_from_checkpoint=last)
    trainer.accelerator.unwrap_model(tuned, keep_fp32_wrapper=False)  # bfloat16 is for training alone
    if chosen.lora_rank:
        tuned.merge_and_unload()
    log = log_table(trainer.state.log_history)
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if tuned is model else None  # where it is sharded
    if trainer.is_world_process_zero():
        _save(model, whole, tokenizer, tables, log, chosen, plan, folder)
    trainer.accelerator.wait_for_everyone()
    shutil.rmtree(checkpoints, ignore_errors=True)
    return log


def _save(
    model: PreTrainedModel, weights: dict[str, Tensor] | None, tokenizer: PreTrainedTokenizerFast, tables: data.Tables,
    log: pd.DataFrame, chosen: Settings, plan: dict[str, Any], folder: Path,
) -> None:
    (folder / "plan.json").unlink(missing_ok=True)
    with runs.atomic(folder / "model") as new:
        model.eval().save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)
    tables.items.to_parquet(folder / "items.parquet", index=False)
    log.to_json(folder / "log.json", orient="records")
    runs.write_json(folder / "plan.json", plan)
    runs.write_settings(folder, chosen)


def _finished(model: PreTrainedModel, folder: Path, plan: dict[str, Any]) -> pd.DataFrame | None:
    """The log of a training that has come to its end by the same plan, its weights loaded into `model`, or None."""
    if not (folder / "plan.json").exists() or json.loads((folder / "plan.json").read_text(encoding="utf-8")) != plan:
        return None
    print(f"{folder.name}: trained already with these settings and this code, taken as it is")
    model.load_state_dict(type(model).from_pretrained(folder / "model", dtype=torch.float32).state_dict())
    return pd.read_json(folder / "log.json", orient="records")


def _check_lengths(model: PreTrainedModel, catalogue: Catalogue, parts: Sequence[Rows]) -> None:
    """Refuses a title or a row that is longer than the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    lengths = [len(sequence) for sequence in catalogue.sequences]
    item = int(np.argmax(lengths))
    if len(catalogue.context([])) + lengths[item] > limit:
        raise ValueError(
            f"item {item}, {catalogue.titles[item][:60]!r}, has {lengths[item]} tokens; prompt and title together may "
            f"have {limit}: shorten the title"
        )
    longest = max(len(ids) for rows in parts for ids in rows.input_ids) + catalogue.trie.max_depth
    if longest > limit:
        raise ValueError(f"a row may grow to {longest} tokens and the model reads {limit}: lower max_history")


def _last_checkpoint(folder: Path, plan: dict[str, Any]) -> str | None:
    """The last whole checkpoint of a killed run of the same plan; those of another plan are removed."""
    if (folder / "plan.json").exists() and json.loads((folder / "plan.json").read_text(encoding="utf-8")) != plan:
        shutil.rmtree(folder)
    for half in folder.glob("checkpoint-*"):
        if not (half / TRAINER_STATE_NAME).exists():  # written last
            shutil.rmtree(half)
    runs.write_json(folder / "plan.json", plan)
    return get_last_checkpoint(folder)


def _parted(batch_size: int, device_batch: int, processes: int) -> tuple[int, int]:
    """Rows that each process takes at once, and how often, so that all together see `batch_size` rows a step."""
    times = -(-batch_size // (device_batch * processes))
    rows, rest = divmod(batch_size, times * processes)
    if rest:
        raise ValueError(
            f"batch_size {batch_size} does not part into equal batches of at most {device_batch} rows (device_batch) for "
            f"{processes} processes: make it a multiple of {times * processes}"
        )
    return rows, times


def _arguments(chosen: Settings, folder: Path, n_rows: int) -> TrainingArguments:
    total = max(1, round(chosen.epochs * n_rows / chosen.batch_size))
    every = -(-total // chosen.evaluations)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by `accelerate launch`
    at_a_time, accumulated = _parted(chosen.batch_size, chosen.device_batch, processes)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=at_a_time, per_device_eval_batch_size=2 * at_a_time,
        gradient_accumulation_steps=accumulated,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=total // 20, max_steps=total, eval_strategy="steps",
        eval_steps=every, save_strategy="steps", save_steps=every, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", logging_steps=max(1, total // 50), report_to="none", seed=chosen.seed,
        remove_unused_columns=False, label_names=["nodes"], prediction_loss_only=True, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # else several CPU processes would not know of each other
        bf16=chosen.bfloat16 and runs.computes_in_bfloat16(), dataloader_pin_memory=torch.cuda.is_available(), max_grad_norm=1.0,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # transformers would put a batch on each device that it sees
    return arguments
