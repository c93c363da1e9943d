"""The paper's second question, which title next: every method tuned alike and decoded alike, nothing done twice."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import data, metrics, rewards
from ..model import Backbone, Catalogue
from ..train import Rows, training_rows
from ..tree import Beams, PackedTree, beam_search
from . import sources, store, training
from .preference import PreferenceModel, cooccurrence, ease, fair_weights, load_preference, sum_of_rows, top_titles
from .runs import require
from .settings import Settings, settings

Lists = NDArray[np.int64]
LEVEL = 0.95  # of SFT's accuracy counts as level with it: a few hundred validation users cannot tell them apart


@dataclass(frozen=True)
class Users:
    """A row of a split for each user: item positions in histories and seen, leaf ids in targets, (U, L) log p_ui."""

    histories: list[list[int]]
    seen: list[list[int]]
    targets: NDArray[np.int64]
    log_p: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def sample(self, n: int, seed: int) -> Self:
        """n of them by the seed (0: all), in their order."""
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[: n or None])
        histories, seen = ([lists[i] for i in rows] for lists in (self.histories, self.seen))
        return Users(histories, seen, self.targets[rows], self.log_p[rows])


@dataclass(frozen=True)
class Contender:
    """One language model to tune: its name in the results ("SFT", "Flower", "Flower-KL", "IFairLRS", "SFT, one target")
    and its settings, seed among them."""

    method: str
    settings: Settings
    n_rows: int = 0  # rows of train.parquet, drawn by the seed (0: all)


def inputs(catalogue: Catalogue, tables: data.Tables, own: Settings, preference: PreferenceModel) -> dict[str, Any]:
    """What `training.finetune` and `training.made_from` take: rewards by the counts of the tables, p_ui and IFairLRS'
    weights, as far as the settings use them."""
    log_item_rewards = None
    if own.theta < 1:
        counts = torch.from_numpy(data.item_counts(tables, own.counts))
        log_item_rewards = rewards.count_log_rewards(catalogue.trie, counts, own.alpha)
    weights = fair_weights(catalogue, tables) if own.reweight else None
    return {"tables": tables, "settings": own, "log_item_rewards": log_item_rewards, "preference": preference,
            "leaf_weights": weights}


class Comparison:
    """Data and preference model of a run's notebook 01, and what is done on them: trainings, lists, distributions.

    Attributes:
        settings: of the run. titles: (L,) by leaf. counts: (L,) training interactions.
        users: of "valid" and "test"; of a user's rows there one that the seed draws, so that users are independent.
        sources: provenance of all work that was asked for, of trainings and of what was made with their models.
    """

    def __init__(self, out: Path, **overrides: Any):
        profile = store.read_json(require(out, "data") / "settings.json", "settings")["settings"]["profile"]
        self.out, self.settings = out, settings(profile, after=out / "data", **overrides)
        self.tables = sources.read_processed(out / "data")
        self.item_leaf = data.item_leaves(self.tables.items.title)
        self.titles = self.tables.items.title.drop_duplicates().tolist()
        self.item_counts = data.item_counts(self.tables, self.settings.counts)
        self.counts = np.bincount(self.item_leaf, weights=self.item_counts)
        self.preference = load_preference(out)
        self.users: dict[str, Users] = {}
        for part in ("valid", "test"):
            rows = getattr(self.tables, part)
            owner = rows.user_id if "user_id" in rows else np.arange(len(rows))
            drawn = np.random.default_rng(self.settings.seed).permutation(len(rows))
            one_each = np.sort(drawn[~pd.Series(np.asarray(owner)[drawn]).duplicated()])
            histories, targets = data.row_positions(self.tables, rows.iloc[one_each])
            seen_by_row = data.seen_positions(self.tables, part)
            log_p = self.preference.after([self.item_leaf[history].tolist() for history in histories])
            self.users[part] = Users(histories, [seen_by_row[i] for i in one_each], self.item_leaf[targets], log_p)
        self.sources: list[Mapping[str, Any]] = []
        self._catalogues: dict[str, Catalogue] = {}
        self._open: tuple[Contender, PreTrainedModel, Catalogue, Path] | None = None

    def seen_leaves(self, users: Users) -> list[list[int]]:
        """Leaf ids that each user has seen."""
        return [self.item_leaf[items].tolist() for items in users.seen]

    @cached_property
    def best_ease(self) -> tuple[NDArray[np.float64], dict[str, int]]:
        """EASE's (L, L) matrix, and the settings that are most accurate (NDCG) on all validation users, of a few."""
        flat, first = data.sequences(self.tables.train)
        flat = self.item_leaf[pd.Index(self.tables.items.item_id).get_indexer(flat)]
        together = cooccurrence([flat[a:b] for a, b in zip(first[:-1], first[1:])], len(self.counts))
        targets, seen, k = self.users["valid"].targets, self.seen_leaves(self.users["valid"]), self.settings.n_beams
        best: tuple[Any, ...] = (-1.0,)
        for strength in (100, 500, 2000, 8000):
            matrix = ease(together, strength)
            for last in (2, 5, 20, 0):
                lists = top_titles(sum_of_rows(matrix, [leaves[-last:] for leaves in seen]), seen, k)
                accuracy = metrics.ndcg(metrics.ranks(lists, targets), k).mean()
                best = max(best, (accuracy, matrix, {"strength": strength, "last": last}), key=lambda one: one[0])
        return best[1:]

    def ease_scores(self, users: Users) -> NDArray[np.float64]:
        """(U, L) scores by `best_ease`."""
        matrix, of = self.best_ease
        return sum_of_rows(matrix, [leaves[-of["last"] :] for leaves in self.seen_leaves(users)])

    def contender(self, seed: int, method: str = "", **overrides: Any) -> Contender:
        """A language model to tune with the run's settings but for these; without a name it is called by its method."""
        own = replace(self.settings, seed=seed, **overrides)
        return Contender(method or own.method, own)

    def one_target(self, method: str, n_tokens: int) -> Contender:
        """A contender on one-target rows that sends about n_tokens forward: "IFairLRS", or SFT beside it. Where one
        pass over all rows would send more, it is one pass over a part of them, drawn by the seed."""
        own = {"theta": 1.0, "rows": "target", "epochs": 1.0, "reweight": method == "IFairLRS"}
        one_pass = self.contender(self.settings.seed, method, **own)
        tokens = np.diff(self._rows(one_pass).start)[self._order(one_pass)].cumsum()
        if n_tokens >= tokens[-1]:
            return replace(one_pass, settings=replace(one_pass.settings, epochs=float(n_tokens / tokens[-1])))
        return replace(one_pass, n_rows=1 + int(np.searchsorted(tokens, n_tokens)))

    def forward_tokens(self, contender: Contender) -> int:
        """Tokens that training sends through the tuned layers."""
        return round(contender.settings.epochs * self._rows(contender).start[-1])

    def _order(self, contender: Contender) -> NDArray[np.int64]:
        return np.random.default_rng(contender.settings.seed).permutation(len(self.tables.train))

    def _tables(self, contender: Contender) -> data.Tables:
        """The tables that the contender is trained on."""
        rows = np.sort(self._order(contender)[: contender.n_rows or None])
        return replace(self.tables, train=self.tables.train.iloc[rows])

    def _backbone(self, own: Settings) -> Backbone:
        return sources.open_backbone(own, self.tables.items.title.tolist())

    def _rows(self, contender: Contender) -> Rows:
        return training_rows(self._catalogue(contender.settings), self._tables(contender), contender.settings)

    def _catalogue(self, own: Settings) -> Catalogue:
        if own.rows not in self._catalogues:  # of which prompts and separators depend
            self._catalogues[own.rows] = self._backbone(own).catalogue
        return self._catalogues[own.rows]

    def _inputs(self, contender: Contender) -> dict[str, Any]:
        given = inputs(self._catalogue(self.settings), self.tables, contender.settings, self.preference)
        return given | {"tables": self._tables(contender)}  # weights are by all rows

    def origin(self, contender: Contender) -> dict[str, Any]:
        """What `training.finetune` knows the contender's training by."""
        return training.made_from(**self._inputs(contender))

    def train(self, contender: Contender) -> tuple[PreTrainedModel, Catalogue, Path]:
        """The contender, tuned or read where that was done before, and its folder; the last one stays in memory."""
        if self._open is None or self._open[0] != contender:
            self._open, own = None, contender.settings
            print(f"{contender.method}, seed {own.seed}:", flush=True)
            backbone, given = self._backbone(own), self._inputs(contender)
            folder = self.out / ("sft" if own.theta == 1 else "flower")
            made = training.finetune(backbone, folder=folder, cache=self.out / "cache", **given)[1]
            self._open = contender, backbone.model, backbone.catalogue, made
        return self._open[1:]

    def _records(self, contender: Contender, kind: str, content: str, origins: Mapping[str, Mapping[str, Any]],
                 make: Callable[[PreTrainedModel, Catalogue, list[str]], list[dict[str, Any]]],
                 ) -> dict[str, dict[str, Any]]:
        """By name, the records of what was made from these origins before, and of the others, made now. The provenance
        of the making stands in each, and that of the training beside it."""
        method = contender.settings.method
        paths = {name: self.out / kind / f"{method}-{store.digest(origin)}.json" for name, origin in origins.items()}
        records = {name: store.find(path, origins[name], content) for name, path in paths.items()}
        if missing := [name for name, record in records.items() if record is None]:
            lm, catalogue, folder = self.train(contender)
            trained, start = store.read_json(folder / "made.json")["provenance"], time.perf_counter()
            made = make(lm, catalogue, missing)
            source = store.provenance(asdict(contender.settings), time.perf_counter() - start, trained["bfloat16"])
            for name, content in zip(missing, made, strict=True):
                records[name] = store.keep(paths[name], origins[name], source, trained=trained, **content)
        for record in records.values():
            self.sources += [record[key] for key in ("trained", "provenance") if key in record]  # older ones have one
        return records

    def lists(self, contender: Contender, part: str, searches: Mapping[str, Beams], n_users: int = 0,
              draw: int = 0) -> dict[str, Lists]:
        """Recommended lists, (U, n) leaf ids each, of a contender under these searches, for n_users of the part, drawn
        by the run's seed (0: all); those made before are read. draw: a number for each draw of stochastic searches."""
        users, model = self.users[part].sample(n_users, self.settings.seed), self.origin(contender)
        common = {"model": model, "users": store.digest(users.histories, users.seen), "draw": draw}
        guide = store.digest(*self.preference.parameters())
        batch = self.settings.decode_batch  # of the stochastic searches: their draws depend on it
        counts = torch.from_numpy(self.item_counts)
        origins = {name: common | {"search": asdict(search), "preference": guide if search.guide else None,
                                   "counts": store.digest(counts) if search.alpha else None,
                                   "decode_batch": batch if search.stochastic else None}
                   for name, search in searches.items()}

        def make(lm: PreTrainedModel, catalogue: Catalogue, missing: list[str]) -> list[dict[str, Any]]:
            left, seed = [searches[name] for name in missing], contender.settings.seed + draw
            results = beam_search(lm, catalogue, users.histories, left, users.seen, self.settings.decode_batch,
                                  contender.method, users.log_p, seed, counts)
            return [{"lists": leaves.tolist()} for leaves, _ in results]

        records = self._records(contender, "lists", "lists", origins, make)
        return {name: np.array(record["lists"]) for name, record in records.items()}

    def log_shares(self, contender: Contender, n_users: int) -> NDArray[np.float64]:
        """(U, L) exact log π of each title, over the whole vocabulary, for test users, nats: the score by which plain
        beams rank. No sampling: the whole tree goes through the model once a user."""
        histories = self.users["test"].sample(n_users, self.settings.seed).histories

        def make(lm: PreTrainedModel, catalogue: Catalogue, missing: list[str]) -> list[dict[str, Any]]:
            log_shares = []
            for history in tqdm(histories, desc=f"{contender.method}, whole tree", unit="user"):
                tree = PackedTree(lm, catalogue.trie, catalogue.context(history), nodes_at_a_time=2048)
                log_shares.append(tree.trie.log_leaf_probs(tree.log_probs()).numpy(force=True))
            return [{"log_shares": np.round(log_shares, 4).tolist()}]

        origin = {"model": self.origin(contender), "log_shares": store.digest(histories)}
        return np.array(self._records(contender, "exact", "log_shares", {"": origin}, make)[""]["log_shares"])

    def row(self, method: str, lists: Lists, part: str, users: Users, n_bootstrap: int = 1000,
            **labels: Any) -> dict[str, Any]:
        """A line of the results: labels, and every metric of these lists, of one training or of several, with its
        interval."""
        ks = [k for k in (1, 3, 5, 10, 20) if k <= lists.shape[-1]]
        values = metrics.evaluate(lists, users.targets, self.counts, self.titles, ks, n_bootstrap, self.settings.seed)
        of = {"part": part, "n_users": len(users), "trainings": len(lists) if lists.ndim == 3 else 1}
        return {"method": method, **labels} | of | values


def select(rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], accuracy: str) -> Mapping[str, Any]:
    """Of the rows with at least LEVEL of the reference's accuracy, the one whose popularity groups are closest to the
    next choices' (lowest mgu_next); without any, the most accurate."""
    able = [row for row in rows if row[accuracy] >= LEVEL * reference[accuracy]]
    return min(able, key=lambda row: row["mgu_next"]) if able else max(rows, key=lambda row: row[accuracy])
