"""The settings of every notebook: one class, one table of profiles, one way to override."""

import argparse
import ast
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..losses import FLOW_LOSSES
from ..train import TrainSettings, setting
from . import store

FIT_LOSSES = ("exact_ce", "exact_squared", "subtree_ce", "sft", *FLOW_LOSSES)
PREFERENCE_LOSSES = ("dpo", "rloo")
FIT_PATHS = ("reward", "policy", "schedule")  # where the sampled losses of notebook 05 look


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Every setting of every notebook. `PROFILES` gives values; a notebook's parameter of that name replaces one."""

    profile: str = "laptop"
    # data (notebook 01)
    dataset: str = "movielens-100k"  # "movielens-100k", or the name to print for the data under data_path
    data_path: str = ""  # folder with the user's own data; "" fetches MovieLens-100K
    split: str = setting("leave-one-out", choices=("leave-one-out", "time"))  # "time": a global 8:1:1 split by time
    max_items: int = 0  # the most interacted items only (0: all)
    max_users: int = 0  # the first users only (0: all)
    preference_size: int = setting(64, low=2, high=10_000)  # width of the preference model p_ui
    preference_epochs: float = 30.0  # passes over the sequences that train it
    # training (notebooks 02 and 03)
    reweight: bool = False  # IFairLRS: targets weigh in by their popularity group; meant for rows="target"
    counts: str = setting("true", choices=("true", "windowed"))  # "windowed": counts of the official code
    alpha: float = setting(-0.5, low=-100, high=100)  # of (count + 1)^alpha in the reward: 1 is the paper's
    # decoding (notebook 04)
    n_beams: int = setting(10, low=1, high=10_000)
    test_rows: int = 0  # test rows to recommend for (0: all)
    decode_batch: int = setting(16, low=1)  # prompts decoded at a time
    # fits (notebook 05)
    n_seeds: int = setting(2, low=1)  # repetitions of each method there, of SFT and Flower-KL in notebook 07
    counts_path: str = ""  # table title → count (CSV, JSON, Parquet); "" takes the ratings of MovieLens-100K
    prompt: str = "Recommend a movie. Title:\n"
    target_alpha: float = setting(1.0, low=-100, high=100)  # the reward is count^target_alpha
    n_titles: int = 100  # the most frequent titles: the small catalogue, for every method (0: all)
    min_count: int = 10  # all titles with this count: the large catalogue, for large_method (0: none)
    methods: tuple[str, ...] = setting(
        ("exact_ce", "subtree_ce", "sft", "subtb", "dpo", "rloo"), low=1, choices=FIT_LOSSES + PREFERENCE_LOSSES)
    fit_paths: tuple[str, ...] = setting(("reward",), low=1, choices=FIT_PATHS)  # where SubTB, TB and DB look
    budget: int = setting(24_000, low=1)  # tokens through the tuned layers
    longer: int = 3  # SubTB once more with so many times the budget (0: not)
    fit_titles: int = setting(32, low=1, high=10_000)  # titles a step
    large_method: str = setting("subtree_ce", choices=FIT_LOSSES)
    large_budget: int = setting(150_000, low=1)
    large_titles: int = setting(128, low=1, high=10_000)
    penalty: float = 1.0  # on the mass off the tree, for modified_subtb, which does not see it
    kl_weight: float = setting(0.1, low=1e-9)  # of DPO's and RLOO's divergence from their reference
    preference_titles: int = setting(8, low=2, high=10_000)  # titles a step of DPO (in pairs) and RLOO
    preference_learning_rate: float = setting(1e-4, low=1e-12, high=1)
    n_draws: int = 2000  # titles drawn from the models of the first seed on the small catalogue (0: none)
    # comparison (notebook 07)
    sweep: tuple[tuple[float, float], ...] = ((0, 0.5), (-0.5, 0.5), (-0.5, 0.1), (-1, 0.5))  # Flower-KL's alpha, theta
    alphas: tuple[float, ...] = (0.0, -0.1, -0.25, -0.5)  # of the count while decoding, tried on validation users
    design: bool = False  # loss, reward, weight and counts one at a time, on validation users
    flower_sweep: tuple[tuple[str, float], ...] = (("div", 0.995), ("div", 0.9), ("add", 0.995))  # Flower's reward, …
    guides: tuple[float, ...] = (0.3, 0.5, 0.7)  # weights of D3's preference, tried on validation users
    temperature: float = setting(1.5, low=1e-9)  # of the baseline "Temperature" (the paper's)
    one_target: bool = True  # IFairLRS, and SFT beside it, on one-target rows of equally many tokens
    valid_users: int = 400  # validation users that select the settings (0: all)
    decoding_users: int = 300  # test users of the second exercise (0: all)
    exact_users: int = 24  # test users whose distribution over the whole catalogue is computed (0: none)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("guides", 0, 1), ("alphas", -100, 100)):
            numbers = list(getattr(self, name))
            if not numbers or not all(isinstance(x, (int, float)) and low <= x <= high for x in numbers):
                raise ValueError(f"{name} is {numbers}: name one number from {low} to {high} at least")
        for name, first, able in (("sweep", "alpha", lambda alpha: -100 <= alpha <= 100),
                                  ("flower_sweep", "reward", ("none", "div", "add").__contains__)):
            pairs = getattr(self, name)
            try:
                good = pairs and all(able(one) and 0 <= theta < 1 for one, theta in pairs)
            except (TypeError, ValueError):  # no numbers, no pairs
                good = False
            if not good:
                of = "|alpha| ≤ 100" if first == "alpha" else "reward none, div or add"
                raise ValueError(f"{name} is {[*pairs]}: write [[{first}, theta], …], {of}, theta from 0 to below 1")


PROFILES: dict[str, Settings] = {
    "smoke": Settings(
        profile="smoke", max_items=80, max_users=60, max_history=8, preference_size=16, model="tiny", frozen_layers=1,
        tuned_layers=1, bfloat16=False, learning_rate=3e-3, batch_size=16, device_batch=16, epochs=2.0, evaluations=2,
        n_seeds=2, sweep=((-0.25, 0.5), (-1.0, 0.2)), flower_sweep=(("div", 0.995), ("add", 0.9)), design=True,
        valid_users=20, decoding_users=20, exact_users=4),
    "laptop": Settings(),
    "study": Settings(
        profile="study", epochs=2.0, evaluations=4, n_seeds=5, design=True, sweep=((-0.25, 0.1), (-0.5, 0.1)),
        alphas=(0.0, -0.1, -0.25, -0.5, -1.0), flower_sweep=(("div", 0.995), ("div", 0.9)), exact_users=40),
    "paper": Settings(
        profile="paper", dataset="video_games", data_path="data/video_games", category="video game", split="time",
        max_history=10, model="Qwen/Qwen2.5-1.5B", frozen_layers=0, tuned_layers=0, cut_vocabulary=False,
        rows="target", learning_rate=3e-4, batch_size=256, epochs=7.0, evaluations=7, valid_users=0, counts="windowed",
        reward="div", alpha=1.0, flow="subtb", theta=0.9995, paths="policy",
        flower_sweep=(("div", 0.9995), ("none", 0.9995), ("add", 0.9995)),
        sweep=((1, 0.99), (1, 0.995), (1, 0.999), (1, 0.9995), (1, 0.9999)), decoding_users=0, exact_users=200)}
WHOLE_VOCABULARY = {"tuned_layers": 0, "cut_vocabulary": False}
FIT: dict[str, dict[str, Any]] = {  # where notebook 05 differs from its profile: one prompt, no user, no history
    "smoke": WHOLE_VOCABULARY | dict(
        n_seeds=1, target_alpha=4.0, n_titles=12, min_count=250, methods=FIT_LOSSES + PREFERENCE_LOSSES,
        fit_paths=FIT_PATHS, budget=6_000, longer=0, large_budget=10_000, large_titles=32,
        preference_learning_rate=3e-3),
    "laptop": (alone := WHOLE_VOCABULARY | dict(n_seeds=3, frozen_layers=26, learning_rate=1e-3)),
    "study": alone,
    "paper": WHOLE_VOCABULARY | dict(
        n_seeds=3, min_count=1, budget=320_000, large_budget=3_000_000, learning_rate=1e-5,
        preference_learning_rate=1e-6)}


def settings(profile: str, after: str | Path | None = None, fit: bool = False, **overrides: Any) -> Settings:
    """The settings of one notebook: the profile's, or those of the step before, then every override that is not None.

    Args:
        after: folder of the step before: settings given to notebook 01 carry over to notebook 04.
        fit: whether the notebook is 05, which has values of its own (`FIT`).

    Raises:
        ValueError: unknown profile, or not that of the step before; unknown setting, or a value that it cannot have.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    base = PROFILES[profile]
    if after is not None:
        path = Path(after) / "settings.json"
        try:
            base = Settings(**store.read_json(path)["settings"])
        except (TypeError, KeyError):
            raise ValueError(f"{path} is damaged or of another version of this project: start at notebook 01") from None
        if base.profile != profile:
            raise ValueError(f"{path.parent} was made with PROFILE {base.profile!r}, not {profile!r}: give another OUT")
    names = [f.name for f in fields(base) if f.name != "profile"]
    if unknown := [name for name in overrides if name not in names]:
        raise ValueError(f"unknown setting {unknown[0]!r}: the settings are {', '.join(names)}")
    own = {name: value for name, value in overrides.items() if value is not None}
    return replace(base, **(FIT[profile] if fit else {}) | own)


def literal(text: str) -> tuple[str, Any]:
    """NAME=VALUE of a command line as name and Python literal; what is no literal stays text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last three: {[]: 1} and ((((…
        return name, value
