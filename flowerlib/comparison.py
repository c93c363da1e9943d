"""The paper's second question, which title next: every method tuned alike and decoded alike, each kept once done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from . import backbone, batches, data, metrics, policy, rewards, runs, train
from .decoding import Beams, beam_search
from .preference import PreferenceModel
from .runs import Settings

Lists = NDArray[np.int64]


@dataclass(frozen=True)
class ComparisonSettings:
    """What the comparison adds to a run's own settings. `PROFILES` gives the values."""

    profile: str = "laptop"
    n_seeds: int = 2  # trainings of SFT and of the chosen Flower
    sweep: str = "0:0.5, -0.5:0.5, -0.5:0.1, -1:0.5"  # alpha:theta of Flower, tried on validation users, one seed
    rewards: str = "none, div, add"  # Flower's other rewards, at alpha and theta of their own (OTHER_REWARDS)
    guides: str = "0.3, 0.5, 0.7"  # weights of D3's preference, tried on validation users
    temperature: float = 1.5  # of the baseline "Temperature" (the paper's)
    one_target: bool = True  # IFairLRS, and SFT beside it, on one-target rows of equally many tokens
    valid_users: int = 400  # validation users that choose (0: all)
    test_users: int = 0  # test users (0: all)
    decoding_users: int = 300  # test users for all decodings of SFT and Flower (0: all)
    exact_users: int = 24  # test users whose distribution over the whole catalogue is computed (0: none)
    n_beams: int = 10  # beams, and titles a list


# reward → alpha, theta: the paper's alpha and the middle of its thetas, for SubTB on logged titles
OTHER_REWARDS = {"none": (1.0, 0.995), "div": (1.0, 0.995), "add": (1.0, 0.995)}

PROFILES = {
    "smoke": ComparisonSettings(
        profile="smoke", n_seeds=1, sweep="-0.25:0.5, -1.0:0.2", valid_users=20, test_users=30, decoding_users=20,
        exact_users=4,
    ),
    "laptop": ComparisonSettings(),
    "paper": ComparisonSettings(
        profile="paper", sweep="1:0.99, 1:0.995, 1:0.999, 1:0.9995, 1:0.9999", rewards="none, add", exact_users=200,
        valid_users=0, decoding_users=0,
    ),
}


def settings(profile: str, **overrides: Any) -> ComparisonSettings:
    """The profile's settings of the comparison, then every override that is not None.

    Raises:
        ValueError: as `runs.settings`, or a list that cannot be read.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    chosen = runs.override(PROFILES[profile], **overrides)
    sweep(chosen)
    least = {"n_seeds": 1, "n_beams": 1, "valid_users": 0, "test_users": 0, "decoding_users": 0, "exact_users": 0}
    for name, low in least.items():
        if getattr(chosen, name) < low:
            raise ValueError(f"{name} is {getattr(chosen, name)}: it must be {low} or more")
    if not chosen.temperature > 0:
        raise ValueError(f"temperature is {chosen.temperature}: it must be above 0")
    if not floats(chosen.guides):
        raise ValueError("guides is empty: name one weight at least")
    unknown = set(names(chosen.rewards)) - set(OTHER_REWARDS)
    if unknown:
        raise ValueError(f"unknown reward {sorted(unknown)[0]!r}: choose among {', '.join(OTHER_REWARDS)}")
    return chosen


def names(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def floats(text: str) -> list[float]:
    """The numbers in a list with commas."""
    try:
        return [float(part) for part in names(text)]
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers with commas between them") from None


def sweep(chosen: ComparisonSettings) -> list[tuple[float, float]]:
    """The pairs of alpha and theta to try."""
    pairs = [part.split(":") for part in names(chosen.sweep)]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"sweep is {chosen.sweep!r}: write alpha:theta, alpha:theta, …")
    return [tuple(floats(",".join(pair))) for pair in pairs]


@dataclass(frozen=True)
class Contender:
    """One language model to tune: its method, and its settings, seed among them."""

    method: str  # "SFT", "Flower", "IFairLRS" or "SFT, one target"
    settings: Settings
    n_rows: int = 0  # rows of train.parquet, drawn by the seed (0: all)

    @property
    def name(self) -> str:
        """Its folder's."""
        s = self.settings
        of_flower = f"_{s.reward}_{s.alpha:g}_{s.theta:g}" if self.method == "Flower" else ""
        return f"{self.method.replace(', ', '_').replace(' ', '_')}{of_flower}_{s.seed}"


@dataclass(frozen=True)
class Users:
    """Rows of a part of the split: item positions in histories and seen, leaf ids in targets, (U, L) log p_ui."""

    histories: list[list[int]]
    seen: list[list[int]]
    targets: NDArray[np.int64]
    log_p: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def some(self, n: int, seed: int) -> Users:
        """n of them by the seed (0: all), in their order."""
        keep = np.sort(np.random.default_rng(seed).permutation(len(self))[: n or None])
        return Users([self.histories[i] for i in keep], [self.seen[i] for i in keep], self.targets[keep], self.log_p[keep])


class Arena:
    """The data of a run's notebook 01, its preference model, and what the contenders have done on them so far.

    Attributes:
        titles: (L,) by leaf. counts: (L,) training interactions. users: Users of "valid" and "test".
    """

    def __init__(self, out: Path):
        self.base = runs.settings(_profile(out), after=runs.require(out, "data"))
        self.out, self.folder = out, out / "comparison"
        self.tables = data.read_processed(out / "data")
        self.item_leaf = data.item_leaves(self.tables.items)
        self.titles = self.tables.items.title.drop_duplicates().tolist()
        self.item_counts = data.item_counts(self.tables, self.base.counts)
        self.counts = np.bincount(self.item_leaf, weights=self.item_counts)
        self.preference = PreferenceModel.from_pretrained(out / "preference").eval()
        self.users = {part: self._users(part) for part in ("valid", "test")}
        files = [out / "data" / f"{name}.parquet" for name in ("items", *data.PARTS)]
        files += [out / "preference" / "model.safetensors"]
        self._made_of = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        self._loaded: tuple[Contender, PreTrainedModel, policy.Catalogue] | None = None

    def _users(self, part: str) -> Users:
        histories, targets = data.row_positions(self.tables, getattr(self.tables, part))
        seen = data.seen_positions(self.tables, part)
        log_p = self.preference.after([self.item_leaf[history].tolist() for history in histories])
        return Users(histories, seen, self.item_leaf[targets], log_p)

    def seen_leaves(self, users: Users) -> list[list[int]]:
        """Leaf ids that each user has seen."""
        return [self.item_leaf[items].tolist() for items in users.seen]

    def contender(self, method: str, seed: int, **overrides: Any) -> Contender:
        """A language model to tune with the run's settings but for these; Flower's own do not touch the other methods."""
        of_flower = {} if method == "Flower" else {"theta": 1.0, "alpha": 0.0, "reward": "none"}
        return Contender(method, replace(self.base, seed=seed, **of_flower, **overrides))

    def one_target(self, method: str, n_tokens: int) -> Contender:
        """A contender on one-target rows that sends about n_tokens forward: "IFairLRS", or SFT beside it.

        Where one pass over all rows would send more, it is one pass over some, drawn by the seed.
        """
        one_pass = self.contender(method, self.base.seed, rows="target", epochs=1.0, reweight=method == "IFairLRS")
        tokens = np.diff(self._rows(one_pass).start)[self._order(one_pass)].cumsum()
        if n_tokens >= tokens[-1]:
            return replace(one_pass, settings=replace(one_pass.settings, epochs=n_tokens / tokens[-1]))
        return replace(one_pass, n_rows=1 + int(np.searchsorted(tokens, n_tokens)))

    def _order(self, contender: Contender) -> NDArray[np.int64]:
        return np.random.default_rng(contender.settings.seed).permutation(len(self.tables.train))

    def _tables(self, contender: Contender) -> data.Tables:
        """The tables that the contender is trained on."""
        if not contender.n_rows:
            return self.tables
        kept = np.sort(self._order(contender)[: contender.n_rows])
        return replace(self.tables, train=self.tables.train.iloc[kept])

    def _rows(self, contender: Contender) -> batches.Rows:
        chosen, titles = contender.settings, self.tables.items.title.tolist()
        tokenizer = backbone.load_backbone(chosen, [*titles, *policy.prompt_texts(chosen.category, chosen.rows)])[1]
        catalogue = policy.Catalogue.build(tokenizer, titles, chosen.category, chosen.rows)
        return batches.training_rows(catalogue, self._tables(contender), chosen)

    def model(self, contender: Contender) -> tuple[PreTrainedModel, policy.Catalogue]:
        """The contender, tuned: now, or taken from its folder where that was done before; the last one stays in memory."""
        if self._loaded is None or self._loaded[0] != contender:
            self._loaded = None
            chosen, titles = contender.settings, self.tables.items.title.tolist()
            texts = [*titles, *policy.prompt_texts(chosen.category, chosen.rows)]
            lm, tokenizer = backbone.load_backbone(chosen, texts)
            catalogue = policy.Catalogue.build(tokenizer, titles, chosen.category, chosen.rows)
            log_rewards = None
            if contender.method == "Flower":
                log_rewards = rewards.count_log_rewards(catalogue.trie, torch.from_numpy(self.item_counts), chosen.alpha)
            print(f"{contender.name}:", flush=True)
            train.train(lm, tokenizer, catalogue, self._tables(contender), chosen, self.folder / "models" / contender.name,
                        self.folder / "cache" / chosen.rows, log_rewards, self.preference)
            self._loaded = contender, lm, catalogue
        return self._loaded[1:]

    def lists(self, contender: Contender, part: str, searches: Mapping[str, Beams], n_users: int = 0) -> dict[str, Lists]:
        """Recommended lists, (U, n) leaf ids each, of a contender under some searches; what is kept is read.

        Args:
            n_users: users of the part, drawn by the run's seed (0: all).
        """
        found, paths, missing = {}, {}, {}
        users = self.users[part].some(n_users, self.base.seed)
        for name, search in searches.items():
            made_from = self._made_from(contender) | {"part": part, "n_users": len(users), "search": asdict(search)}
            paths[name] = self.folder / "lists" / f"{contender.name}_{_digest(made_from)}.json"
            if paths[name].exists():
                found[name] = np.array(json.loads(paths[name].read_text(encoding="utf-8"))["lists"])
            else:
                missing[name] = made_from
        if missing:
            model, catalogue = self.model(contender)
            searched = [searches[name] for name in missing]
            results = beam_search(model, catalogue, users.histories, searched, users.seen, self.base.decode_batch,
                                  contender.name, users.log_p, contender.settings.seed)
            for (name, made_from), (leaves, _) in zip(missing.items(), results, strict=True):
                runs.write_json(paths[name], {"made_from": made_from, "lists": leaves.tolist()})
                found[name] = leaves
        return {name: found[name] for name in searches}

    def mean_share(self, contender: Contender, n_users: int) -> NDArray[np.float64]:
        """(L,) exact probability of each title, averaged over test users; seen titles may be drawn again. No sampling:
        the whole tree goes through the model once a user."""
        users = self.users["test"].some(n_users, self.base.seed)
        made_from = self._made_from(contender) | {"exact": len(users)}
        path = self.folder / "exact" / f"{contender.name}_{_digest(made_from)}.json"
        if not path.exists():
            model, catalogue = self.model(contender)
            total = torch.zeros(len(self.titles), dtype=torch.float64)
            with torch.no_grad():
                for history in users.histories:
                    edges = policy.tree_log_probs(model, catalogue.trie, catalogue.context(history))
                    tree = catalogue.trie.to(edges.device)
                    total += tree.log_leaf_probs(tree.renormalised(edges)).exp().cpu().double()
            runs.write_json(path, {"made_from": made_from, "share": (total / len(users)).tolist()})
        return np.array(json.loads(path.read_text(encoding="utf-8"))["share"])

    def _made_from(self, contender: Contender) -> dict[str, Any]:
        part = {"n_rows": contender.n_rows} if contender.n_rows else {}
        rounded = contender.settings.bfloat16 and runs.computes_in_bfloat16()
        return part | {"contender": contender.method, "settings": asdict(contender.settings), "bf16": rounded,
                       "data": self._made_of, "code": runs.code_digest(*train.MODULES, "decoding")}

    def forward_tokens(self, contender: Contender) -> int:
        """Tokens that training sends through the tuned layers."""
        return round(contender.settings.epochs * self._rows(contender).start[-1])

    def row(
        self, method: str, lists: Lists, part: str, users: Users, n_bootstrap: int = 1000, **told: Any
    ) -> dict[str, Any]:
        """A line of the results: what is told, and every metric of these lists with its interval."""
        ks = [k for k in (1, 3, 5, 10, 20) if k <= lists.shape[1]]
        values = metrics.evaluate(lists, users.targets, self.counts, self.titles, ks, n_bootstrap, self.base.seed)
        return {"method": method, **told, "part": part, "n_users": len(users)} | values


def choose(rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], accuracy: str) -> Mapping[str, Any]:
    """The lowest DGU among the rows at least as accurate as the reference; without any, the most accurate."""
    able = [row for row in rows if row[accuracy] >= reference[accuracy]]
    return min(able, key=lambda row: row["dgu"]) if able else max(rows, key=lambda row: row[accuracy])


def _profile(out: Path) -> str:
    return json.loads((runs.require(out, "data") / "settings.json").read_text(encoding="utf-8"))["profile"]


def _digest(made_from: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
