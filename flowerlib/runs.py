"""Profiles, seeds, provenance and atomic results: what every notebook starts and ends with."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")

METHODS = (
    "Popularity", "ItemKNN", "EASE", "Preference", "SFT", "Temperature", "D3", "IFairLRS", "SFT, one target", "Flower",
)
DECODINGS = ("top", "beam", "beam_normalised", "stochastic")  # top: the highest scores of the whole catalogue
SEEN = ("excluded", "allowed")
LOSSES = ("exact_ce", "exact_squared", "subtree_ce", "sft", "subtb", "tb", "db", "modified_subtb")  # of a known target
PREFERENCES = ("dpo", "rloo")
STEPS = {  # folder that holds a step's settings.json → the notebook that writes it
    "data": "01_prepare_the_data.ipynb", "sft": "02_train_sft.ipynb", "flower": "03_train_flower.ipynb",
}


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. `PROFILES` gives the values; a notebook parameter may replace any but the first."""

    profile: str = "laptop"
    seed: int = 0  # of everything random
    # data (notebook 01)
    dataset: str = "movielens-100k"  # "movielens-100k", or the name to print for the data under data_path
    data_path: str = ""  # folder with the user's own data; "" fetches MovieLens-100K
    category: str = "movie"  # what the prompt calls an item
    split: str = "leave-one-out"  # or "time": a global 8:1:1 split by time
    max_history: int = 24  # titles a model sees before the one it predicts
    max_items: int = 0  # keep the most interacted items only (0: all)
    max_users: int = 0  # keep the first users only (0: all)
    preference_size: int = 64  # width of the preference model p_ui
    preference_epochs: float = 30.0  # passes over the sequences that train it
    # backbone (notebook 02)
    model: str = "smollm2-135m"  # "smollm2-135m", "tiny", or any causal LM by path or hub id
    frozen_layers: int = 8  # lower layers that run once and are cached (0: none)
    tuned_layers: int = 4  # layers trained above them (0: all of the model's)
    cut_vocabulary: bool = True  # keep only the tokens that the catalogue and the prompt use
    lora_rank: int = 0  # LoRA on all linear layers of this rank (0: all trained weights)
    # training (notebooks 02 and 03)
    rows: str = "sequence"  # "sequence": every title of a user is a target; "target": one target per prompt
    reweight: bool = False  # IFairLRS: targets weigh in by their popularity group; meant for rows="target"
    learning_rate: float = 2e-3
    batch_size: int = 8  # rows a step
    device_batch: int = 8  # rows that a device takes at a time; gradients add up to batch_size
    bfloat16: bool = True  # train in bfloat16 where the processor computes in it (GPUs; CPUs with AVX512_BF16 or AMX)
    epochs: float = 1.0
    evaluations: int = 4  # validations (and checkpoints) during training
    validation_rows: int = 256  # rows of valid.parquet that choose the checkpoint (0: all)
    # Flower (notebook 03)
    counts: str = "true"  # or "windowed": counts of the official code
    reward: str = "exact"  # "none": counts alone; "exact": counts^alpha * p_ui^beta; "div", "add": the paper's tilts
    alpha: float = -0.5  # of (count + 1)^alpha in the reward: 1 is the paper's, below 0 it falls with popularity
    beta: float = 1.0  # of p_ui^beta in the reward "exact"; strength of "add"
    flow: str = "children"  # "subtb", the paper's, or "children": KL to the token rewards at every node of a path
    theta: float = 0.1  # loss = theta * SFT + (1 - theta) * flow
    lam: float = 1.0  # SubTB's lambda
    n_paths: int = 1  # drawn titles a row, where paths are drawn
    paths: str = "logged"  # "logged": the data's own titles; "reward": drawn from the flow; "policy": from the model
    # decoding (notebook 04)
    n_beams: int = 10
    test_rows: int = 0  # test rows to recommend for (0: all)
    decode_batch: int = 16  # prompts decoded at a time

    def __post_init__(self) -> None:
        """Raises ValueError where a value is out of its range."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), _RANGES.get(f.name, (0, math.inf))
            if f.type in ("int", "float") and not low <= value <= high:
                raise ValueError(f"{f.name} is {value}: it must lie between {low} and {high}")
        if self.epochs <= 0 or math.isinf(self.alpha):
            raise ValueError(f"epochs is {self.epochs} and alpha {self.alpha}: the first must be positive, both finite")
        if self.flow == "children" and self.reward in ("div", "add"):
            raise ValueError(f"reward {self.reward!r} is of one path, not of a node's children: set flow to subtb")
        if self.tuned_layers and not self.frozen_layers:
            raise ValueError("tuned_layers without frozen_layers would throw the lower layers away: set both or neither")


_CHOICES = {
    "split": ("leave-one-out", "time"), "rows": ("sequence", "target"), "counts": ("true", "windowed"),
    "paths": ("logged", "reward", "policy"), "reward": ("none", "exact", "div", "add"), "flow": ("subtb", "children"),
}
_RANGES = {  # all other numbers are 0 or more
    "max_history": (1, math.inf), "batch_size": (1, math.inf), "device_batch": (1, math.inf),
    "evaluations": (1, math.inf), "n_paths": (1, math.inf), "n_beams": (1, math.inf), "decode_batch": (1, math.inf),
    "alpha": (-math.inf, math.inf), "preference_size": (2, math.inf), "theta": (0, 1), "lam": (0, 1),
}

PROFILES: dict[str, Settings] = {
    "smoke": Settings(
        profile="smoke", max_items=80, max_users=60, max_history=8, preference_size=16, model="tiny", frozen_layers=1,
        tuned_layers=1, bfloat16=False, learning_rate=3e-3, epochs=6.0, evaluations=2,
    ),
    "laptop": Settings(),
    "paper": Settings(
        profile="paper", dataset="video_games", data_path="data/video_games", category="video game", split="time",
        max_history=10, model="Qwen/Qwen2.5-1.5B", frozen_layers=0, tuned_layers=0, cut_vocabulary=False,
        rows="target", learning_rate=3e-4, batch_size=256, epochs=7.0, evaluations=7, counts="windowed",
        reward="div", alpha=1.0, flow="subtb", theta=0.9995, paths="policy",
    ),
}


def settings(profile: str, after: str | Path | None = None, **overrides: Any) -> Settings:
    """The settings of one notebook: the profile's, or those of the step before, then every override that is not None.

    Args:
        after: folder that the step before wrote; its settings.json stands in for the profile's values, so that what
            notebook 01 was told still holds in notebook 04.

    Raises:
        ValueError: unknown profile, or not that of the step before; unknown setting, or a value of the wrong type. The
            message lists what is allowed.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    base = PROFILES[profile] if after is None else _read_settings(Path(after) / "settings.json", profile)
    return override(base, **overrides)


def override(base: T, **overrides: Any) -> T:
    """A settings dataclass with every override that is not None in the place of its value.

    Raises:
        ValueError: unknown setting, or a value of the wrong type.
    """
    types = {f.name: type(getattr(base, f.name)) for f in fields(base) if f.name != "profile"}
    given = {}
    for name, value in overrides.items():
        if name not in types:
            raise ValueError(f"unknown setting {name!r}: the settings are {', '.join(types)}")
        if value is None:
            continue
        if types[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not types[name]:
            raise ValueError(f"setting {name} takes a {types[name].__name__}, not {value!r}")
        given[name] = value
    return replace(base, **given)


def _read_settings(path: Path, profile: str) -> Settings:
    try:
        base = Settings(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is damaged or of another version of this project: start at notebook 01") from None
    if base.profile != profile:
        raise ValueError(f"{path.parent} was made with PROFILE {base.profile!r}, not {profile!r}: give another OUT")
    return base


def write_settings(folder: str | Path, chosen: Settings) -> None:
    """Writes folder/settings.json, which `settings(after=folder)` reads: write it last, as the mark of a whole step."""
    write_json(Path(folder) / "settings.json", asdict(chosen))


def output_dir(profile: str, out: str | None) -> Path:
    """The folder of a run: `out`, or runs/<profile>; a relative path counts from the project's root.

    Raises:
        ValueError: unknown profile.
    """
    settings(profile)
    path = ROOT / (out or f"runs/{profile}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def require(out: Path, step: str) -> Path:
    """The folder of a finished step ("data", "sft" or "flower") of a run.

    Raises:
        FileNotFoundError: it has not come to its end; the message names the notebook to run.
    """
    if not (out / step / "settings.json").exists():
        raise FileNotFoundError(
            f"{out / step} is missing, or an earlier notebook ran after it: run notebooks/{STEPS[step]} with this PROFILE "
            "and OUT first (a training that is done already is kept)"
        )
    return out / step


def begin(out: Path, step: str) -> Path:
    """The folder of a step that begins anew: it and the steps after it count as unfinished until they end again."""
    names = list(STEPS)
    for name in names[names.index(step) :]:
        (out / name / "settings.json").unlink(missing_ok=True)
    return out / step


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write (a file, or a folder that the caller makes).

    It replaces `path` when the block ends well; after an error it is removed and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        yield new
        if path.is_dir():  # a folder cannot be replaced in one step: move the old one aside first
            os.replace(path, Path(folder) / "old")
        os.replace(new, path)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def computes_in_bfloat16() -> bool:
    """Whether this machine's GPU, or without one its CPU, has instructions for bfloat16; elsewhere it would be slow."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def matmul_seconds(n: int = 1024, repeats: int = 5) -> float:
    """Median seconds of one float32 (n, n) matrix product: how fast this machine was at that moment."""
    import torch

    a = torch.ones(n, n)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def code_digest(*modules: str) -> str:
    """A name for the library's code as it is (of all modules, or these): what was made by other code is made again."""
    sha = hashlib.sha256()
    paths = [Path(__file__).parent / f"{name}.py" for name in modules] or Path(__file__).parent.glob("*.py")
    for path in sorted(paths):
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(chosen: Settings, seconds: float) -> dict[str, Any]:
    """Where a result comes from: settings (profile and seed among them), package versions, machine, commit, times.

    `bfloat16` says how language models are trained with these settings on this machine; nothing else is in bfloat16.
    """
    import torch

    packages = ("torch", "transformers", "peft", "accelerate", "numpy", "pandas")
    return {
        "settings": asdict(chosen),
        "bfloat16": getattr(chosen, "bfloat16", False) and computes_in_bfloat16(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "seconds": round(seconds, 1),
        "matmul_1024_seconds": matmul_seconds(),
    }


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON atomically, NaN and infinity refused."""
    with atomic(path) as new:
        new.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_results(path: str | Path, rows: Sequence[Mapping[str, Any]], source: Mapping[str, Any]) -> None:
    """Writes `{"provenance": source, "rows": rows}` atomically, floats rounded to 6 significant digits.

    Raises:
        ValueError: a row's method, decoding or seen is unknown (METHODS, LOSSES, PREFERENCES; DECODINGS; SEEN); a value
            is not finite.
    """
    allowed = {"method": METHODS + LOSSES + PREFERENCES, "decoding": DECODINGS, "seen": SEEN}
    clean = []
    for i, row in enumerate(rows):
        for key, values in allowed.items():
            if key in row and row[key] not in values:
                raise ValueError(f"row {i}: {key} {row[key]!r} is not one of {', '.join(values)}")
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"row {i}: {key} is {value}")
        clean.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
    write_json(path, {"provenance": dict(source), "rows": clean})


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return read_document(path)["rows"]


def read_document(path: str | Path) -> dict[str, Any]:
    """A results file as `write_results` writes it: rows and provenance.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    if not {"rows", "provenance"} <= found.keys():
        raise ValueError(f"{path} is damaged: remove it and run its notebook again")
    return found


def save_figure(figure: Any, path: str | Path) -> None:
    """Saves a matplotlib figure atomically as PNG, its axes' titles with it; without a date, so that equal figures are
    equal files."""
    titles = (axes.get_title() or axes.get_title("left") for axes in figure.axes)
    said = "; ".join(" ".join(title.split()) for title in titles if title)
    with atomic(path) as new:
        figure.savefig(new, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None, "Title": said})
