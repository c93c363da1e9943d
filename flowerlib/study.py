"""The study of notebook 05: which way of tuning fits a known distribution, case by case, each kept when it is done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from . import assets, backbone, baselines, fit, policy, readers, runs
from .trie import TitleTrie

MODULES = ("backbone", "fit", "losses", "metrics", "policy", "study", "trie")  # the code that a kept case depends on


@dataclass(frozen=True)
class FitSettings:
    """Every setting of notebook 05, apart from those of the other notebooks: no user, no history, one prompt."""

    profile: str = "laptop"
    seed: int = 0
    n_seeds: int = 3  # repetitions of every method on the small catalogue
    counts_path: str = ""  # table title → count (CSV, JSON, Parquet); "" takes the ratings of MovieLens-100K
    prompt: str = "Recommend a movie. Title:\n"
    alpha: float = 1.0  # the reward is count^alpha
    n_titles: int = 100  # the most frequent titles: the small catalogue, for every method (0: all)
    min_count: int = 10  # all titles with this count: the large catalogue, for large_method (0: none)
    model: str = "smollm2-135m"  # "smollm2-135m", "tiny", or any causal LM by path or hub id
    frozen_layers: int = 26  # lower layers that stay as they are and run once
    methods: str = "exact_ce, subtree_ce, sft, subtb, dpo, rloo"
    paths: str = "reward"  # where SubTB, TB and DB look: reward, policy, schedule
    budget: int = 24_000  # tokens through the tuned layers
    longer: int = 3  # SubTB once more with so many times the budget (0: not)
    n_paths: int = 32  # titles a step
    large_method: str = "subtree_ce"
    large_budget: int = 150_000
    large_paths: int = 128
    learning_rate: float = 1e-3
    penalty: float = 1.0  # on the mass off the tree, for modified_subtb, which does not see it
    beta: float = 0.1  # DPO's and RLOO's KL to their reference
    preference_titles: int = 8  # titles a step of DPO (in pairs) and RLOO
    preference_learning_rate: float = 1e-4
    n_draws: int = 2000  # titles drawn from the models of the first seed on the small catalogue (0: none)

    def __post_init__(self) -> None:
        """Raises ValueError where a value is out of its range."""
        for name, allowed in (("methods", runs.LOSSES + runs.PREFERENCES), ("large_method", runs.LOSSES), ("paths", fit.PATHS)):
            unknown = set(listed(getattr(self, name))) - set(allowed)
            if unknown:
                raise ValueError(f"{name} has {', '.join(sorted(unknown))}: choose of {', '.join(allowed)}")
        positive = ("n_seeds", "budget", "n_paths", "large_budget", "large_paths", "learning_rate", "beta",
                    "preference_titles", "preference_learning_rate")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.preference_titles < 2:
            raise ValueError("preference_titles is 1: preferences compare two titles at least")


def listed(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


PROFILES = {
    "smoke": FitSettings(
        profile="smoke", n_seeds=1, alpha=4.0, n_titles=12, min_count=250, model="tiny", frozen_layers=1,
        methods=", ".join(runs.LOSSES + runs.PREFERENCES), paths="reward, policy, schedule", budget=6_000, longer=0,
        n_paths=32, large_budget=10_000, large_paths=32, learning_rate=3e-3, preference_learning_rate=3e-3,
    ),
    "laptop": FitSettings(),
    "paper": FitSettings(
        profile="paper", model="Qwen/Qwen2.5-1.5B", frozen_layers=0, min_count=1, budget=320_000, large_budget=3_000_000,
        learning_rate=1e-5, preference_learning_rate=1e-6,
    ),
}


def settings(profile: str, **overrides: Any) -> FitSettings:
    """The profile's settings of the study, then every override that is not None.

    Raises:
        ValueError: as `runs.settings`.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    return runs.override(PROFILES[profile], **overrides)


def title_counts(chosen: FitSettings) -> pd.Series:
    """Title → count, most frequent first: the user's table, or all ratings of MovieLens-100K (no split: nothing here
    is predicted)."""
    if chosen.counts_path:
        return readers.read_counts(runs.ROOT / Path(chosen.counts_path).expanduser())
    items, interactions = readers.read_recbole(assets.movielens_100k())
    title = interactions.item_id.map(items.set_index("item_id").title)
    return title.value_counts(sort=False).astype(float).sort_values(ascending=False, kind="stable")


@dataclass(frozen=True)
class Case:
    """One model tuned in one way on one target. `name` is its file's."""

    titles: tuple[str, ...]
    log_rewards: tuple[float, ...]  # log R
    target: str
    method: str
    paths: str
    seed: int
    budget: int
    n_paths: int
    n_draws: int

    @property
    def name(self) -> str:
        return f"{len(self.titles)}_{self.target}_{self.method}_{self.paths}_{self.budget}_{self.seed}"


def cases(chosen: FitSettings, counts: pd.Series) -> list[Case]:
    """All cases: every method on the most frequent titles, one on permuted counts, one on the large catalogue.

    Permuted counts belong to other titles than their own, so that what the model has read about fame is of no help:
    another permutation for each seed. The exact losses draw nothing, and a pretrained model starts where it starts, so
    that on the true counts one seed tells all.
    """
    small = counts.head(chosen.n_titles or len(counts))
    large = counts[counts >= chosen.min_count] if chosen.min_count else counts[:0]
    seeds = range(chosen.seed, chosen.seed + chosen.n_seeds)

    def case(of: pd.Series, method: str, paths: str, seed: int, **more: Any) -> Case:
        n_draws = chosen.n_draws if seed == chosen.seed else 0
        given = {"target": "counts", "budget": chosen.budget, "n_paths": chosen.n_paths, "n_draws": n_draws}
        return Case(tuple(of.index), tuple(chosen.alpha * np.log(of)), method=method, paths=paths, seed=seed, **given | more)

    found = [case(small, method, paths, seed) for method in listed(chosen.methods)
             for paths in _paths(method, chosen) for seed in (seeds[:1] if method.startswith("exact") else seeds)]
    if chosen.longer > 1 and "subtb" in listed(chosen.methods):
        found.append(case(small, "subtb", "reward", chosen.seed, budget=chosen.longer * chosen.budget))
    if "exact_ce" in listed(chosen.methods):
        shuffled = {seed: pd.Series(np.random.default_rng(seed).permutation(small), small.index) for seed in seeds}
        found += [case(shuffled[seed], "exact_ce", "all", seed, target="permuted", n_draws=0) for seed in seeds]
    if len(large) > len(small):
        found.append(case(large, chosen.large_method, _paths(chosen.large_method, chosen)[0], chosen.seed,
                          budget=chosen.large_budget, n_paths=chosen.large_paths, n_draws=0))
    return found


def _paths(method: str, chosen: FitSettings) -> list[str]:
    """Where a method looks: "all" edges, "pairs" of titles, or one or more of `fit.PATHS`."""
    fixed = {"exact_ce": "all", "exact_squared": "all", "subtree_ce": "reward", "sft": "reward", "dpo": "pairs",
             "rloo": "policy"}
    return [fixed[method]] if method in fixed else listed(chosen.paths)


def run(case: Case, chosen: FitSettings, folder: Path) -> dict[str, Any]:
    """Tunes and measures one case, or reads folder/<name>.json if the same code and settings have written it.

    Returns:
        row: the case and its figures, `fit.measure` and the tokens and seconds of training among them.
        curve: one record an evaluation. log_edges: (n_nodes,) log π over the whole vocabulary. draws: (n_leaves,)
        titles drawn by the decoder, or empty. Nodes and leaves are
        those of the tree that `load` gives.
    """
    preference = case.method in runs.PREFERENCES
    used = ["prompt", "model", "frozen_layers", "learning_rate"] + ["penalty"] * (case.method == "modified_subtb")
    used += ["beta", "preference_titles", "preference_learning_rate"] * preference
    made_from = {name: getattr(chosen, name) for name in used}
    made_from |= asdict(case) | {"titles": list(case.titles), "log_rewards": list(case.log_rewards)}
    made_from["code"] = runs.code_digest(*MODULES, *["baselines"] * preference)
    path = folder / f"{case.name}.json"
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["made_from"] == made_from:
        return kept
    model, tokenizer, trie, context = load(case, chosen)
    log_rewards = torch.tensor(case.log_rewards, dtype=torch.float64, device=model.device)
    tree = fit.PackedTree(model, trie, context, chosen.frozen_layers)
    log = fit.fit(
        tree, log_rewards, "sft" if preference else case.method, case.budget // (2 if preference else 1),
        case.paths if case.paths in fit.PATHS and not preference else "reward", case.n_paths, chosen.learning_rate,
        chosen.penalty if case.method == "modified_subtb" else 0.0, seed=case.seed,
    ).drop(columns="loss")
    if preference:
        before = log.iloc[-1]
        after = baselines.prefer(
            tree, model, tokenizer, log_rewards, case.method, case.budget - int(before.forward_tokens), chosen.beta,
            chosen.preference_titles, chosen.preference_learning_rate, seed=case.seed,
        )
        for column in ("step", "forward_tokens", "seconds"):
            after[column] += before[column]
        log = pd.concat([log, after], ignore_index=True)
    draws = drawn(model.eval(), trie, context, case.n_draws, case.seed) if case.n_draws else []
    row = {"n_titles": len(case.titles), "target": case.target, "method": case.method, "paths": case.paths,
           "seed": case.seed, "budget": case.budget} | log.iloc[-1].to_dict()
    row |= {name: int(row[name]) for name in ("step", "forward_tokens")}
    result = {"made_from": made_from, "row": row, "curve": log.to_dict("records"),
              "log_edges": tree.log_probs().tolist(), "draws": list(draws)}
    runs.write_json(path, result)
    return json.loads(path.read_text(encoding="utf-8"))


def load(case: Case, chosen: FitSettings) -> tuple[PreTrainedModel, Any, TitleTrie, list[int]]:
    """Untuned model, tokenizer, the titles' tree, and the prompt's tokens as the tokenizer gives them."""
    of_model = runs.Settings(model=chosen.model, seed=case.seed, frozen_layers=chosen.frozen_layers, tuned_layers=0,
                             cut_vocabulary=False)
    model, tokenizer = backbone.load_backbone(of_model, [*case.titles, chosen.prompt])
    trie = policy.Catalogue.build(tokenizer, case.titles, "title").trie
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer, trie.to(device), tokenizer(chosen.prompt).input_ids


def drawn(model: PreTrainedModel, trie: TitleTrie, context: list[int], n: int, seed: int, batch: int = 250) -> list[int]:
    """(n_leaves,) how often each title comes up in n draws, token by token under the tree's mask."""
    torch.manual_seed(seed)
    counts = torch.zeros(len(trie.leaves), dtype=torch.long, device=model.device)
    for start in range(0, n, batch):
        prompts = torch.tensor([context] * min(batch, n - start), device=model.device)
        ends = torch.full((len(prompts), 1), len(context), device=model.device)
        leaves = policy.sample_leaves(model, trie, prompts, torch.ones_like(prompts), ends)
        counts += torch.bincount(trie.node_leaf[leaves.flatten()], minlength=len(counts))
    return counts.tolist()
