"""The paper's second question, which title next: every method tuned alike and decoded alike, nothing done twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .. import data, metrics, rewards
from ..model import Catalogue
from ..train import Rows, training_rows
from ..tree import Beams, PackedTree, beam_search
from . import sources, store, training
from .preference import fair_weights, load_preference
from .runs import require
from .settings import Settings, settings

Lists = NDArray[np.int64]


@dataclass(frozen=True)
class Users:
    """Rows of a part of the split: item positions in histories and seen, leaf ids in targets, (U, L) log p_ui."""

    histories: list[list[int]]
    seen: list[list[int]]
    targets: NDArray[np.int64]
    log_p: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def sample(self, n: int, seed: int) -> Users:
        """n of them by the seed (0: all), in their order."""
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[: n or None])
        return Users([self.histories[i] for i in rows], [self.seen[i] for i in rows], self.targets[rows], self.log_p[rows])


@dataclass(frozen=True)
class Contender:
    """One language model to tune: its name in the results ("SFT", "Flower", "Flower-KL", "IFairLRS", "SFT, one target") and
    its settings, seed among them."""

    method: str
    settings: Settings
    n_rows: int = 0  # rows of train.parquet, drawn by the seed (0: all)


class Comparison:
    """The data and the preference model of a run's notebook 01, and what is done on them: trainings, lists, distributions.

    Attributes:
        settings: of the run. titles: (L,) by leaf. counts: (L,) training interactions. users: Users of "valid" and "test".
        sources: provenance of all work that was asked for.
    """

    def __init__(self, out: Path, **overrides: Any):
        profile = store.read_json(require(out, "data") / "settings.json")["settings"]["profile"]
        self.out, self.settings = out, settings(profile, after=out / "data", **overrides)
        self.tables = sources.read_processed(out / "data")
        self.item_leaf = data.item_leaves(self.tables.items.title)
        self.titles = self.tables.items.title.drop_duplicates().tolist()
        self.item_counts = data.item_counts(self.tables, self.settings.counts)
        self.counts = np.bincount(self.item_leaf, weights=self.item_counts)
        self.preference = load_preference(out)
        self.users = {part: self._users(part) for part in ("valid", "test")}
        self.sources: list[Mapping[str, Any]] = []
        self._open: tuple[Contender, PreTrainedModel, Catalogue] | None = None

    def _users(self, part: str) -> Users:
        histories, targets = data.row_positions(self.tables, getattr(self.tables, part))
        seen = data.seen_positions(self.tables, part)
        log_p = self.preference.after([self.item_leaf[history].tolist() for history in histories])
        return Users(histories, seen, self.item_leaf[targets], log_p)

    def seen_leaves(self, users: Users) -> list[list[int]]:
        """Leaf ids that each user has seen."""
        return [self.item_leaf[items].tolist() for items in users.seen]

    def contender(self, seed: int, method: str = "", **overrides: Any) -> Contender:
        """A language model to tune with the run's settings but for these; without a name it is called by its method."""
        own = replace(self.settings, seed=seed, **overrides)
        return Contender(method or own.method, own)

    def one_target(self, method: str, n_tokens: int) -> Contender:
        """A contender on one-target rows that sends about n_tokens forward: "IFairLRS", or SFT beside it.

        Where one pass over all rows would send more, it is one pass over a part of them, drawn by the seed.
        """
        one_pass = self.contender(self.settings.seed, method, theta=1.0, rows="target", epochs=1.0,
                                  reweight=method == "IFairLRS")
        tokens = np.diff(self._rows(one_pass).start)[self._order(one_pass)].cumsum()
        if n_tokens >= tokens[-1]:
            return replace(one_pass, settings=replace(one_pass.settings, epochs=n_tokens / tokens[-1]))
        return replace(one_pass, n_rows=1 + int(np.searchsorted(tokens, n_tokens)))

    def forward_tokens(self, contender: Contender) -> int:
        """Tokens that training sends through the tuned layers."""
        return round(contender.settings.epochs * self._rows(contender).start[-1])

    def _order(self, contender: Contender) -> NDArray[np.int64]:
        return np.random.default_rng(contender.settings.seed).permutation(len(self.tables.train))

    def _tables(self, contender: Contender) -> data.Tables:
        """The tables that the contender is trained on."""
        if not contender.n_rows:
            return self.tables
        rows = np.sort(self._order(contender)[: contender.n_rows])
        return replace(self.tables, train=self.tables.train.iloc[rows])

    def _rows(self, contender: Contender) -> Rows:
        backbone = sources.open_backbone(contender.settings, self.tables.items.title.tolist())
        return training_rows(backbone.catalogue, self._tables(contender), contender.settings)

    def _log_item_rewards(self, contender: Contender, catalogue: Catalogue) -> Tensor | None:
        own = contender.settings
        if own.theta == 1:
            return None
        return rewards.count_log_rewards(catalogue.trie, torch.from_numpy(self.item_counts), own.alpha)

    def train(self, contender: Contender) -> tuple[PreTrainedModel, Catalogue]:
        """The contender, tuned: now, or read where that was done before; the last one stays in memory."""
        if self._open is None or self._open[0] != contender:
            self._open, own, tables = None, contender.settings, self._tables(contender)
            backbone = sources.open_backbone(own, self.tables.items.title.tolist())
            weights = fair_weights(backbone.catalogue, tables) if own.reweight else None
            print(f"{contender.method}, seed {own.seed}:", flush=True)
            folder = self.out / ("sft" if own.theta == 1 else "flower")
            training.finetune(backbone, tables, own, folder, self.out / "cache",
                           self._log_item_rewards(contender, backbone.catalogue), self.preference, weights)
            self._open = contender, backbone.model, backbone.catalogue
        return self._open[1:]

    @cached_property
    def _catalogue(self) -> Catalogue:
        return sources.open_backbone(self.settings, self.tables.items.title.tolist()).catalogue

    def origin(self, contender: Contender) -> dict[str, Any]:
        """What the contender's training depends on, as `training.finetune` knows it by."""
        own, tables = contender.settings, self._tables(contender)
        weights = fair_weights(self._catalogue, tables) if own.reweight else None
        log_item_rewards = self._log_item_rewards(contender, self._catalogue)
        return training.made_from(own, tables, log_item_rewards, self.preference, weights)

    def lists(
        self, contender: Contender, part: str, searches: Mapping[str, Beams], n_users: int = 0, draw: int = 0
    ) -> dict[str, Lists]:
        """Recommended lists, (U, n) leaf ids each, of a contender under these searches; those made before are read.

        Args:
            n_users: users of the part, drawn by the run's seed (0: all).
            draw: of the stochastic searches; another number, another draw.
        """
        users, origin = self.users[part].sample(n_users, self.settings.seed), self.origin(contender)
        lists, missing = {}, {}
        for name, search in searches.items():
            made_from = {"model": origin, "users": store.digest(users.histories, users.seen), "search": asdict(search),
                         "preference": store.digest(*self.preference.parameters()) if search.guide else None, "draw": draw}
            path = self.out / "lists" / f"{contender.settings.method}-{store.digest(made_from)}.json"
            if record := store.find(path, made_from):
                lists[name] = np.array(record["lists"])
                self.sources.append(record["provenance"])
            else:
                missing[name] = made_from, path
        if missing:
            lm, catalogue = self.train(contender)
            results = beam_search(lm, catalogue, users.histories, [searches[name] for name in missing], users.seen,
                                  self.settings.decode_batch, contender.method, users.log_p, contender.settings.seed + draw)
            trained = store.read_json(self._trained(contender, origin) / "made.json")["provenance"]
            for (name, (made_from, path)), (leaves, _) in zip(missing.items(), results, strict=True):
                store.keep(path, made_from, trained, lists=leaves.tolist())
                lists[name] = leaves
                self.sources.append(trained)
        return {name: lists[name] for name in searches}

    def _trained(self, contender: Contender, origin: Mapping[str, Any]) -> Path:
        folder = self.out / ("sft" if contender.settings.theta == 1 else "flower")
        return folder / f"{contender.settings.method}-{store.digest(origin)}"

    def mean_share(self, contender: Contender, n_users: int) -> NDArray[np.float64]:
        """(L,) exact probability of each title, averaged over test users; seen titles may be drawn again. No sampling:
        the whole tree goes through the model once a user."""
        users, origin = self.users["test"].sample(n_users, self.settings.seed), self.origin(contender)
        made_from = {"model": origin, "exact": store.digest(users.histories)}
        path = self.out / "exact" / f"{contender.settings.method}-{store.digest(made_from)}.json"
        record = store.find(path, made_from)
        if record is None:
            lm, catalogue = self.train(contender)
            total = torch.zeros(len(self.titles), dtype=torch.float64)
            for history in users.histories:
                tree = PackedTree(lm, catalogue.trie, catalogue.context(history), nodes_at_a_time=2048)
                total += tree.trie.log_leaf_probs(tree.trie.renormalised(tree.log_probs())).exp().cpu().double()
            trained = store.read_json(self._trained(contender, origin) / "made.json")["provenance"]
            record = store.keep(path, made_from, trained, share=(total / len(users)).tolist())
        self.sources.append(record["provenance"])
        return np.array(record["share"])

    def row(
        self, method: str, lists: Lists, part: str, users: Users, n_bootstrap: int = 1000, **labels: Any
    ) -> dict[str, Any]:
        """A line of the results: labels, and every metric of these lists with its interval."""
        ks = [k for k in (1, 3, 5, 10, 20) if k <= lists.shape[1]]
        values = metrics.evaluate(lists, users.targets, self.counts, self.titles, ks, n_bootstrap, self.settings.seed)
        return {"method": method, **labels, "part": part, "n_users": len(users)} | values


def select(rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], accuracy: str) -> Mapping[str, Any]:
    """The lowest DGU among the rows at least as accurate as the reference; without any, the most accurate."""
    able = [row for row in rows if row[accuracy] >= reference[accuracy]]
    return min(able, key=lambda row: row["dgu"]) if able else max(rows, key=lambda row: row[accuracy])
