"""What a training step goes down: settings, rows of titles, and the loss of a batch for SFT, Flower and Flower-KL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad as padded
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from . import data, losses
from .losses import sft_loss, subpath_weights
from .model import Catalogue
from .rewards import preference_log_rewards, tilted
from .tree import Prompts, right_padded, sample_leaves
from .trie import TitleTrie

NO_TARGET, EOS_TARGET = -1, -2  # values in a row's `nodes` where there is no node of the tree
WIDTHS = 8  # logged rows are as wide as a multiple of this: for every width, bfloat16 on a CPU keeps memory
LINE = r"[^\0-\x08\n-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,4000}"  # of text: no control character


def setting(default: Any, **limits: Any) -> Any:
    """A field of settings: its default, and the limits of `checked` that its value must keep to."""
    return field(default=default, metadata=limits)


def checked(name: str, value: Any, default: Any, low: float = 0, high: float = 10**9, choices: Sequence = ()) -> Any:
    """The value of a setting, of its default's type: a list becomes a tuple, a whole number may stand for a float.

    Raises ValueError for another type, a number that is not from low to high (as infinity and NaN never are), fewer
    than low choices, what is none of the choices, and text that is blank or of several lines, unless the default is.
    """
    kind, many = type(default), type(default) is tuple
    if many and isinstance(value, (list, tuple)):  # lists in JSON and notebooks
        value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    elif kind is float and type(value) is int and abs(value) < 2.0**1000:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"setting {name} takes a {kind.__name__.replace('tuple', 'list')}, not {value!r}")
    if kind in (int, float) and not low <= value <= high:
        raise ValueError(f"{name} is {value}: it must lie between {low:,} and {high:,}")
    wrong = [v for v in (value if many else [value]) if v not in choices] or ["nothing"] * (many and len(value) < low)
    if choices and wrong:
        verb, of = ("has", "of") if many else ("is", "one of")
        raise ValueError(f"{name} {verb} {wrong[0]!r}: choose {of} {', '.join(choices)}")
    line = value.replace("\n", " ") if "\n" in str(default) else value
    if kind is str and value != default and not (line.strip() and re.fullmatch(LINE, line)):
        raise ValueError(f"{name} is {value[:40]!r}: it must be a line of text, not blank, 4,000 characters at most")
    return value


@dataclass(frozen=True)
class TrainSettings:
    """What model and training ask. Raises ValueError, as `checked`, for a value of another type or out of its range."""

    seed: int = setting(0, high=2**32 - 1)  # of everything random
    category: str = "movie"  # what the prompt calls an item
    max_history: int = setting(24, low=1)  # titles a model sees before the one it predicts
    # backbone (notebook 02)
    model: str = "smollm2-135m"  # "smollm2-135m", "tiny", or any causal LM by path or hub id
    frozen_layers: int = 2  # lower layers that run once and are cached (0: none)
    tuned_layers: int = 3  # layers trained above them (0: all of the model's)
    cut_vocabulary: bool = True  # keep only the tokens that the catalogue and the prompt use
    lora_rank: int = setting(0, high=10_000)  # LoRA on all linear layers of this rank (0: all trained weights)
    # training (notebooks 02 and 03)
    rows: str = setting("sequence", choices=("sequence", "target"))  # every title of a user a target, or one a prompt
    learning_rate: float = setting(2e-3, low=1e-12, high=1)
    batch_size: int = setting(4, low=1)  # rows a step
    device_batch: int = setting(8, low=1)  # rows that a device takes at a time; gradients add up to batch_size
    bfloat16: bool = True  # train in bfloat16 where the processor gains by it (GPUs; most CPUs with AVX512_BF16, AMX)
    epochs: float = setting(1.0, low=1e-9)
    evaluations: int = setting(3, low=1)  # validations (and checkpoints) during training
    validation_rows: int = 256  # rows of valid.parquet that select the checkpoint (0: all)
    # Flower (notebook 03)
    reward: str = setting("exact", choices=("none", "exact", "div", "add"))  # "exact": item reward * p_ui^beta
    beta: float = setting(1.0, high=100)  # of p_ui^beta in the reward "exact"; strength of "add"
    flow: str = setting("divergence", choices=("subtb", "divergence"))  # the paper's loss, or Flower-KL's
    theta: float = setting(0.1, high=1)  # loss = theta * SFT + (1 - theta) * flow
    lam: float = setting(1.0, high=1)  # SubTB's lambda
    n_paths: int = setting(1, low=1, high=10_000)  # drawn titles a row, where paths are drawn
    paths: str = setting("logged", choices=("logged", "reward", "policy"))  # the data's titles, or drawn ones

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, checked(f.name, getattr(self, f.name), f.default, **f.metadata))
        if self.flow == "divergence" and self.reward in ("div", "add"):
            raise ValueError(f"reward {self.reward!r} is of one path, not of a node's children: set flow to subtb")
        if self.tuned_layers and not self.frozen_layers:
            raise ValueError("tuned_layers but no frozen_layers would throw the lower layers away: set both or neither")

    @property
    def method(self) -> str:
        """ "SFT"; "Flower", the paper's (SubTB; reward none, div or add); "Flower-KL" (divergence at every node; reward
        exact). Another reward stands behind the name of the loss: "Flower, reward exact"."""
        if self.theta == 1:
            return "SFT"
        name, own = ("Flower", ("none", "div", "add")) if self.flow == "subtb" else ("Flower-KL", ("exact",))
        return name if self.reward in own else f"{name}, reward {self.reward}"


OF_FLOWER = ("reward", "beta", "flow", "lam", "n_paths", "paths")  # settings that do not touch SFT


@dataclass
class Rows(Dataset):
    """Training or validation rows: token ids and, for each, the node of the tree that it reaches if it is a target.

    Attributes:
        input_ids, nodes: lists of (L,) int64 arrays; nodes is NO_TARGET on the prompt and EOS_TARGET on an eos.
        leaves: lists of leaf ids, the history's and then the targets'. n_history: how many are the history's.
        hidden: the frozen trunk's output for all rows' tokens, (Σ L, H) float16, anything that is sliced; or None.
    """

    input_ids: list[np.ndarray]
    nodes: list[np.ndarray]
    leaves: list[list[int]]
    n_history: list[int]
    hidden: Any = None

    @cached_property
    def start(self) -> np.ndarray:
        """(n + 1,) where each row begins among all rows' tokens."""
        return np.r_[0, np.cumsum([len(ids) for ids in self.input_ids])]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {name: getattr(self, name)[i] for name in ("input_ids", "nodes", "leaves", "n_history")}
        if self.hidden is not None:
            row["hidden"] = self.hidden[self.start[i] : self.start[i + 1]]
        return row


def make_rows(catalogue: Catalogue, histories: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Rows:
    """Rows of prompt, then targets one after the other, each ending in ⊤, then eos if the catalogue has one. Histories
    and targets are lists of item positions, one a row (a row's targets are one title in the paper's form)."""
    item_paths = [path[path >= 0].numpy() for path in catalogue.trie.paths(catalogue.trie.leaf)]
    item_leaf = catalogue.trie.item_leaf.tolist()
    ids, nodes = [], []
    for history, wanted in zip(histories, targets, strict=True):
        prompt = catalogue.context(history)
        tail = [] if catalogue.eos is None else [catalogue.eos]
        ids.append(np.array(prompt + [t for i in wanted for t in catalogue.sequences[i]] + tail))
        own = np.full(len(prompt), NO_TARGET), *(item_paths[i] for i in wanted), np.full(len(tail), EOS_TARGET)
        nodes.append(np.concatenate(own).astype(np.int64))
    leaves = [[item_leaf[i] for i in (*history, *wanted)] for history, wanted in zip(histories, targets)]
    return Rows(ids, nodes, leaves, list(map(len, histories)))


def training_rows(catalogue: Catalogue, tables: data.Tables, settings: TrainSettings) -> Rows:
    """Every training target once: in rows of up to max_history titles ("sequence"), or one a prompt ("target")."""
    if settings.rows == "target":
        histories, targets = data.row_positions(tables, tables.train)
        return make_rows(catalogue, histories, [[t] for t in targets])
    flat, start = data.sequences(tables.train)
    flat = pd.Index(tables.items.item_id).get_indexer(flat).tolist()
    windows = [flat[i : min(i + settings.max_history, stop)] for first, stop in zip(start[:-1], start[1:])
               for i in range(first, stop, settings.max_history)]
    return make_rows(catalogue, [[]] * len(windows), windows)


def validation_rows(catalogue: Catalogue, tables: data.Tables, settings: TrainSettings) -> Rows:
    """Rows of valid.parquet, one target each; `settings.validation_rows` of them, drawn by the seed."""
    histories, targets = data.row_positions(tables, tables.valid)
    drawn = np.random.default_rng(settings.seed).permutation(len(targets))[: settings.validation_rows or None]
    return make_rows(catalogue, [histories[i] for i in drawn], [[targets[i]] for i in drawn])


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows → input_ids, nodes (B, L) and, with a trunk, inputs_embeds (B, L, H); leaves (B, M), all padded on the
    right, leaves with -1; and n_history (B,)."""
    ids = right_padded([row["input_ids"] for row in rows], multiple=WIDTHS)
    batch = {"input_ids": ids, "nodes": right_padded([row["nodes"] for row in rows], NO_TARGET, WIDTHS),
             "leaves": right_padded([row["leaves"] for row in rows], -1),
             "n_history": torch.tensor([row["n_history"] for row in rows])}
    if "hidden" in rows[0]:
        hidden = pad_sequence([torch.from_numpy(np.asarray(row["hidden"], np.float32)) for row in rows],
                              batch_first=True)
        batch["inputs_embeds"] = padded(hidden, (0, 0, 0, ids.shape[1] - hidden.shape[1]))
    return batch


class Preference(Protocol):
    """A model of p_ui. `log_p`: (B, M) leaf ids, -1 after a row's end → (B, M + 1, n_leaves) nats, after the first 0,
    1, …, M titles."""

    def log_p(self, leaves: Tensor) -> Tensor: ...


class Objective:
    """Flower's loss of a batch, θ · L_SFT + (1 − θ) · L_flow; θ = 1 is SFT.

    log π is over the whole vocabulary. The paths of the flow loss are the logged titles, or `n_paths` a row drawn from
    the flow or from the model under the tree's mask; drawn ones go through it behind the row's cache.

    Deviation: the official code samples through a switched-off cache, so that all tokens but the first ignore the
    prompt; paths here see the whole prompt. Preferences are those of the very row (the official code takes training
    rows' by index in validation).

    Args:
        trie, log_item_rewards: the tree, and (n_items,) log R, nats, alike for all users; positive, else ValueError.
        settings: theta, lam, flow, paths, n_paths, reward, beta and seed are used.
        preference: p_ui, for every reward but "none", else ValueError. It reads the titles of the row itself.
        leaf_weights: (n_leaves,) weight of each target in the SFT loss (IFairLRS), or None.
    """

    def __init__(
        self, trie: TitleTrie, log_item_rewards: Tensor, settings: TrainSettings, preference: Preference | None = None,
        leaf_weights: Tensor | None = None, device: torch.device | str = "cpu"):
        if settings.theta < 1 and settings.reward != "none" and preference is None:
            raise ValueError(f"reward {settings.reward!r} needs a preference model: run notebook 01 or set reward none")
        self.trie, self.settings, self.theta = trie.to(device), settings, settings.theta
        self.log_item_rewards = log_item_rewards.float().to(device)
        self.log_r = self.trie.log_token_rewards(self.log_item_rewards)
        self.leaf_weights = None if leaf_weights is None else leaf_weights.float().to(device)
        self.preference = preference.eval().to(device) if preference is not None else None

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """"sft" and, where θ < 1, "flow" of a batch from `collate`: each a mean and the weight of the terms in it."""
        nodes, leaves, log_p = batch["nodes"], batch["leaves"], None
        starts = (nodes >= 0) & (self.trie.depth[nodes.clamp(min=0)] == 1)
        before = batch["n_history"][:, None] + starts.cumsum(-1) - 1  # titles before the one that a token is of
        before = before.clamp(min=0)
        target = nodes != NO_TARGET
        rows, columns = target.nonzero().T
        first = (int(columns.min()) - 1) // WIDTHS * WIDTHS  # no logits are needed before it
        if self.theta < 1 and self.settings.reward != "none":
            with torch.no_grad():
                log_p = self.preference.log_p(leaves[:, :-1])
        drawn = None
        if self.theta < 1 and self.settings.paths != "logged":
            kept, *drawn = self._drawn(model, batch["input_ids"], starts, before, first, log_p)
        else:
            read = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
            kept = model(**{read: batch[read]}, use_cache=False, logits_to_keep=nodes.shape[1] - first).logits
        logits, nodes = kept[rows, columns - 1 - first].float(), nodes[target]
        norm = logits.logsumexp(-1)
        log_pf = logits.gather(1, batch["input_ids"][target][:, None])[:, 0] - norm
        weight = 1.0 if self.leaf_weights is None else self.leaf_weights[leaves[rows, before[target]]]
        parts = {"sft": (sft_loss(log_pf, torch.ones_like(rows, dtype=torch.bool), weight), rows.new_tensor(len(rows)))}
        if drawn:
            parts["flow"] = self._flow(*drawn)
        elif self.theta < 1:
            use = nodes >= 0
            log_p = log_p[rows, before[target]][use] if log_p is not None else None
            parts["flow"] = self._flow(logits[use], norm[use], log_pf[use], nodes[use], log_p)
        return parts

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, a scalar: what a training step goes down."""
        return self.total({name: mean for name, (mean, _) in self(model, batch).items()})

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """θ · sft + (1 − θ) · flow."""
        return self.theta * parts["sft"] + (1 - self.theta) * parts["flow"] if "flow" in parts else parts["sft"]

    def _flow(self, logits: Tensor, norm: Tensor, log_pf: Tensor, nodes: Tensor,
              log_p: Tensor | None) -> tuple[Tensor, Tensor]:
        """The flow loss over titles laid one after the other, and the weight of its terms: logits (n, V), their
        logsumexp, log π of the tokens and the nodes that they reach, (n,), preferences of the users there,
        (n, n_leaves) or None."""
        settings, depth = self.settings, self.trie.depth[nodes] - 1
        begins = depth == 0
        path = begins.cumsum(0) - 1
        log_r = self.log_r.expand(int(path[-1]) + 1, -1)
        if settings.reward == "exact":
            own = preference_log_rewards(self.trie, self.log_item_rewards, log_p[begins], settings.beta)
            log_r = self.trie.log_token_rewards(own)
        if settings.flow == "divergence":
            state, children = self.trie.children(self.trie.parent[nodes])
            edge_log_pf = logits[state, self.trie.token[children]] - norm[state]
            value = losses.divergence_loss(edge_log_pf, log_r[path[state], children], len(nodes))
            return value, torch.tensor(len(nodes), device=nodes.device)
        mask = torch.zeros(len(log_r), int(depth.max()) + 1, dtype=torch.bool, device=nodes.device)
        mask[path, depth] = True
        rows = torch.zeros(mask.shape, device=nodes.device)
        rows_pf, rows_r = rows.masked_scatter(mask, log_pf), rows.masked_scatter(mask, log_r[path, nodes])
        if settings.reward in ("div", "add"):
            ends = self.trie.node_leaf[nodes[begins.roll(-1)]]
            rows_r = tilted(rows_r, log_p[begins], ends, settings.reward, settings.beta)
        weight = subpath_weights(mask, settings.lam).sum()
        return losses.flow_loss(settings.flow, rows_pf, rows_r, mask, settings.lam), weight

    def _drawn(self, model: PreTrainedModel, input_ids: Tensor, starts: Tensor, before: Tensor, first: int,
               log_p: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """P more titles a row, behind columns where logged ones begin: each sees what stands before it there, and
        itself. The rows are read once, for the loss and for the draws. Returns the rows' logits, (B, L - first, V), and
        what `_flow` takes of the drawn titles."""
        gpus, width = [input_ids.device] if input_ids.is_cuda else [], input_ids.shape[1]
        with torch.random.fork_rng(gpus, enabled=not model.training):
            if not model.training:  # validations draw by the seed alone, so that they compare
                torch.manual_seed(self.settings.seed)
            branch = torch.multinomial(starts.float(), self.settings.n_paths, replacement=True)  # (B, P) starts
            prompts = Prompts(model, self.trie, input_ids, branch, torch.arange(first, width, device=branch.device))
            paths = self.trie.paths(self.draw_leaves(prompts, before, log_p).flatten())
        paths = paths[:, : int((paths >= 0).sum(-1).max())].view(*branch.shape, -1)  # (B, P, T)
        group = torch.arange(branch.shape[1], device=paths.device).repeat_interleave(paths.shape[2] - 1)
        behind = prompts.extend(paths[:, :, :-1].flatten(1), group).unflatten(1, (branch.shape[1], -1))
        rows, p, t = (paths >= 0).nonzero().T
        nodes, logits = paths[rows, p, t], torch.cat([prompts.logits[:, :, None], behind], 2)[rows, p, t].float()
        norm = logits.logsumexp(-1)
        log_pf = logits.gather(1, self.trie.token[nodes][:, None])[:, 0] - norm
        log_p = log_p[rows, before.gather(1, branch)[rows, p]] if log_p is not None else None
        return prompts.kept, logits, norm, log_pf, nodes, log_p

    @torch.no_grad()
    def draw_leaves(self, prompts: Prompts, before: Tensor, log_p: Tensor | None) -> Tensor:
        """(B, P) leaf nodes, from the flow of the user there or from the model behind the prompts' branches, without
        dropout but for that with which the row was read."""
        branch = prompts.branch
        if self.settings.paths == "reward":
            log_rewards = self.log_item_rewards.expand(branch.numel(), -1)
            if self.settings.reward == "exact":
                rows = torch.arange(len(branch), device=branch.device)[:, None]
                log_p = log_p[rows, before.gather(1, branch)].flatten(0, 1)
                log_rewards = preference_log_rewards(self.trie, log_rewards, log_p, self.settings.beta)
            return self.trie.leaf[torch.multinomial(log_rewards.softmax(-1), 1)].view_as(branch)
        model, was_training = prompts.plain, prompts.plain.training
        model.eval()
        leaves = sample_leaves(prompts.detached())
        model.train(was_training)
        return leaves
