"""Preference baselines through TRL: what DPO and a policy gradient make of the same rewards.

| baseline | learns from | optimum |
|---|---|---|
| dpo | pairs of titles, the more frequent one preferred | none: a preference without doubt drives the ratio on and on |
| rloo | log R/Z of its own completions, FLOOR_LOG_REWARD for those that are no title | π_ref · exp(r/β) |

Both tune the model of a `PackedTree`, which is their reference π_ref as it comes.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback, TrainerControl,
)
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from .fit import PackedTree, measure
from .losses import FLOOR_LOG_REWARD
from .runs import PREFERENCES
from .trie import TitleTrie


def tilted(log_reference: Tensor, log_reward: Tensor, beta: float) -> Tensor:
    """(n_leaves,) log of π_ref · exp(r/β), normalised: what a policy gradient with KL penalty β converges to.

    With r = log R and a uniform reference, β = 1 gives R/Z itself, the target of Flower; a smaller β sharpens it.
    """
    return (log_reference + log_reward / beta).log_softmax(-1)


def completion_rewards(trie: TitleTrie, completions: list[list[int]], log_shares: Tensor) -> Tensor:
    """(B,) the log share of the title that each completion spells, ⊤ included; FLOOR_LOG_REWARD where it spells none.

    Args:
        log_shares: (n_leaves,) log R/Z.
    """
    nodes = torch.zeros(len(completions), dtype=torch.long, device=trie.token.device)
    ids = pad_sequence([torch.tensor(c) for c in completions], padding_value=-1).to(nodes.device)
    for column in ids:
        nodes = torch.where(column < 0, nodes, trie.advance(nodes, column))
    leaf = torch.where(nodes >= 0, trie.node_leaf[nodes.clamp(min=0)], -1)
    return torch.where(leaf >= 0, log_shares[leaf.clamp(min=0)], FLOOR_LOG_REWARD)


def prefer(
    tree: PackedTree, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, log_item_rewards: Tensor,
    method: str, budget: int, beta: float = 0.1, n: int = 16, learning_rate: float = 1e-5, evaluations: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Tunes with one of PREFERENCES until `budget` tokens have gone through the policy and its reference.

    Args:
        model: the whole model that `tree` was built on; they share their weights.
        tokenizer: its tokenizer, which must read the tree's prompt back as it is: RLOO takes the prompt as text.
        log_item_rewards: (n_items,) log R in nats.
        n: titles a step: n/2 pairs for DPO, n completions for RLOO.
        beta: weight of the KL to the reference.

    Returns:
        One row an evaluation: step, forward_tokens, seconds, and `fit.measure`.

    Raises:
        ValueError: unknown method; no two titles differ in reward, so that DPO has no pair; the tokenizer changes the
            prompt.
    """
    if method not in PREFERENCES:
        raise ValueError(f"{method!r} is none of {', '.join(PREFERENCES)}")
    trie, context = tree.trie, tree.context.tolist()
    prompt = tokenizer.decode(context, skip_special_tokens=True)
    if tokenizer(prompt).input_ids != context:
        raise ValueError(f"the tokenizer does not read the prompt {prompt!r} back as it was: use another prompt")
    log_shares = trie.log_flows(log_item_rewards)[trie.leaves] - log_item_rewards.logsumexp(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's own names for options of transformers
        common: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": n, "learning_rate": learning_rate, "beta": beta,
            "seed": seed, "use_cpu": model.device.type == "cpu", "bf16": False, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "max_steps": max(1, budget // n),
            "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "gradient_checkpointing": False,
        }
        if method == "dpo":
            reference = copy.deepcopy(model)
            pairs = _pairs(trie, log_shares.cpu(), context, budget // (2 * len(context)) + n, seed)
            options = DPOConfig(**common | {"per_device_train_batch_size": max(1, n // 2)}, max_length=None)
            trainer: Any = _TokenDPO(model, reference, options, train_dataset=pairs, processing_class=tokenizer)
        else:
            reference_folder = f"{folder}/reference"  # TRL loads its own copy of the reference, by name
            model.save_pretrained(reference_folder)
            name, model.config._name_or_path = model.config._name_or_path, reference_folder
            model.generation_config.eos_token_id = int(trie.token[trie.leaves[0]])

            def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
                return completion_rewards(trie, completion_ids, log_shares).tolist()

            options = RLOOConfig(**common, num_generations=n, max_completion_length=trie.max_depth)
            prompts = Dataset.from_dict({"prompt": [prompt] * n})
            trainer = RLOOTrainer(model, reward, options, train_dataset=prompts, processing_class=tokenizer)
            reference, model.config._name_or_path = trainer.ref_model, name
        meter = _Meter(tree, log_item_rewards, budget, evaluations)
        trainer.add_callback(meter)
        trainer.remove_callback(PrinterCallback)
        hooks = [meter.watch(part) for part in (model, reference)]
        trainer.train()
        for hook in hooks:
            hook.remove()
    return pd.DataFrame(meter.rows)


class _TokenDPO(DPOTrainer):
    """DPO on token ids as they are: titles and ⊤ were encoded apart, and no eos follows."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class _Meter(TrainerCallback):
    """Counts the tokens that policy and reference read, measures the tree on the way, and stops at the budget."""

    def __init__(self, tree: PackedTree, log_item_rewards: Tensor, budget: int, evaluations: int):
        self.tree, self.log_item_rewards = tree, log_item_rewards
        self.budget, self.evaluations = budget, evaluations
        self.tokens, self.seconds, self.rows = 0, 0.0, []

    def watch(self, model: PreTrainedModel) -> Any:
        def count(_module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            self.tokens += (args[0] if args else kwargs["input_ids"]).numel()

        return model.register_forward_pre_hook(count, with_kwargs=True)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> TrainerControl:
        self.seconds += time.perf_counter() - self.start
        control.should_training_stop = self.tokens >= self.budget
        if control.should_training_stop or self.tokens * self.evaluations >= self.budget * (len(self.rows) + 1):
            row = {"step": state.global_step, "forward_tokens": self.tokens, "seconds": self.seconds}
            tokens = self.tokens  # measuring may run the watched model
            self.rows.append(row | measure(self.tree, self.log_item_rewards))
            self.tokens = tokens
        return control


def _pairs(trie: TitleTrie, log_shares: Tensor, context: list[int], n: int, seed: int) -> Dataset:
    """n pairs of titles drawn uniformly, of different shares, as token ids."""
    if log_shares.unique().numel() < 2:
        raise ValueError("no two titles differ in reward: DPO has no pair to prefer in")
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(log_shares), (n, 2), generator=rng)
    while (tied := log_shares[drawn[:, 0]] == log_shares[drawn[:, 1]]).any():
        drawn[tied] = torch.randint(len(log_shares), (int(tied.sum()), 2), generator=rng)
    swap = log_shares[drawn[:, 0]] < log_shares[drawn[:, 1]]
    drawn[swap] = drawn[swap].flip(1)
    paths = trie.paths(trie.leaves)
    titles = [trie.token[path[path >= 0]].tolist() for path in paths]
    chosen, rejected = ([titles[leaf] for leaf in column] for column in drawn.T.tolist())
    return Dataset.from_dict({"prompt_ids": [context] * n, "chosen_ids": chosen, "rejected_ids": rejected})
