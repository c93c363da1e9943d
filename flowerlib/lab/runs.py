"""A run's folder, what every notebook starts and ends with: finished steps, results with their provenance, figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import store
from .settings import FIT_LOSSES, PREFERENCE_LOSSES, Settings, settings

METHODS = ("Popularity", "ItemKNN", "EASE", "Preference", "SFT", "Temperature", "D3", "IFairLRS", "SFT, one target",
           *(of_flower := ("Flower", "Flower-KL", "Flower, reward exact", "Flower-KL, reward none")), "Next choices",
           *(f"{name}, α while decoding" for name in ("SFT", "D3", "Preference", *of_flower)))
DECODINGS = ("top", "beam", "beam_normalised", "stochastic", "none")  # top: the whole catalogue's highest scores
SEEN = ("excluded", "allowed")
METHOD_NAMES = {
    "exact_ce": "every edge (cross-entropy)", "exact_squared": "every edge (squared)", "subtree_ce": "drawn subtrees",
    "sft": "SFT", "subtb": "Flower's SubTB", "tb": "TB", "db": "DB", "modified_subtb": "modified SubTB",
    "divergence": "Flower-KL's divergence", "dpo": "DPO", "rloo": "RLOO"}
# folder that holds a step's settings.json → the notebook that writes it
STEPS = {"data": "01_prepare_the_data.ipynb", "sft": "02_train_sft.ipynb", "flower": "03_train_flower.ipynb"}


def output_dir(profile: str, out: str | None) -> Path:
    """The folder of a run: `out`, or runs/<profile>; a relative path counts from the project's root. Raises ValueError:
    unknown profile; the root itself (such as ""), where other notebooks and data lie; a folder that cannot be made."""
    settings(profile)
    path = store.ROOT / Path(f"runs/{profile}" if out is None else str(out)).expanduser()
    if path.resolve() == store.ROOT.resolve():
        raise ValueError(f"OUT is {str(out)!r}, the project's own folder: name another, or leave it out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"OUT cannot be the folder {path} ({error.strerror}): give another OUT") from None
    return path


def require(out: Path, step: str) -> Path:
    """The folder of a finished step ("data", "sft" or "flower") of a run.
    Raises FileNotFoundError, which names the notebook to run, if the step is not finished."""
    if not (out / step / "settings.json").exists():
        raise FileNotFoundError(f"{out / step} is missing, or an earlier notebook ran after it: run notebooks/"
                                f"{STEPS[step]} with this PROFILE and OUT first (no finished training is done again)")
    return out / step


def begin(out: Path, step: str) -> Path:
    """The folder of a step that begins anew: it and the steps after it count as unfinished until they end again."""
    names = list(STEPS)
    for name in names[names.index(step) :]:
        (out / name / "settings.json").unlink(missing_ok=True)
    return out / step


def finish(out: Path, step: str, used: Settings, made: Path | None = None) -> None:
    """Marks a step as done: the last thing that its notebook does. made: folder inside the step's, of its training."""
    store.write_json(out / step / "settings.json", {"settings": asdict(used), "made": made.name if made else None})


def write_results(path: str | Path, rows: Sequence[Mapping[str, Any]],
                  sources: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Writes `{"provenance": …, "rows": rows}` atomically, floats rounded to 6 significant digits.
    sources: provenance of the work behind the rows, written when that was done, or several (see `joint_provenance`).
    Raises ValueError if a row's method, decoding or seen is unknown, or a value is not finite."""
    allowed = {"method": METHODS + FIT_LOSSES + PREFERENCE_LOSSES, "decoding": DECODINGS, "seen": SEEN}
    rounded = []
    for i, row in enumerate(rows):
        for key, value in row.items():
            if value not in allowed.get(key, [value]):
                raise ValueError(f"row {i}: {key} {value!r} is not one of {', '.join(allowed[key])}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"row {i}: {key} is {value}")
        rounded.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
    source = joint_provenance([sources] if isinstance(sources, Mapping) else sources)
    store.write_json(path, {"provenance": source, "rows": rounded})


def joint_provenance(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several pieces of work as one, equal ones once: the last's settings, all seconds, lists where they differ."""
    sources = [source for i, source in enumerate(sources) if source not in sources[:i]]
    joint = dict(sources[-1])
    for key in {key for source in sources for key in source} - {"settings", "seconds", "matmul_1024_seconds"}:
        values = [source.get(key) for source in sources]
        values = [value for i, value in enumerate(values) if value not in values[:i]]
        joint[key] = values[0] if len(values) == 1 else values
    return joint | {"seconds": round(sum(source["seconds"] for source in sources), 1)}


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a results file; errors as in `read_document`."""
    return read_document(path)["rows"]


def read_document(path: str | Path) -> dict[str, Any]:
    """What `write_results` wrote: rows and provenance. Raises ValueError, naming the file, if it is damaged."""
    return store.read_json(path, "rows", "provenance")


def save_figure(figure: Any, path: str | Path) -> None:
    """Saves a matplotlib figure atomically as PNG, its axes' titles with it; without a date, so that equal figures are
    equal files."""
    titles = (axes.get_title() or axes.get_title("left") for axes in figure.axes)
    text = "; ".join(" ".join(title.split()) for title in titles if title)
    with store.atomic(path) as new:
        figure.savefig(new, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None, "Title": text})
