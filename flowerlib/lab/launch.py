"""Training without a notebook, for several devices: `accelerate launch -m flowerlib.lab.launch SFT --profile paper`.
Run notebook 01 first, then this for SFT and for Flower. Notebooks 02 and 03 take up the finished training, if they get
the same profile and parameters."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import runs, sources, store, training
from .compare import inputs
from .preference import load_preference
from .settings import PROFILES, literal, settings


def launch(method: str, profile: str, out: str | None, overrides: dict[str, Any]) -> Path:
    """Trains "SFT" on what notebook 01 has prepared, or "Flower" (Flower-KL, by the settings) with the settings of SFT;
    returns its folder. FileNotFoundError: no step before it. ValueError: unknown profile or setting, or another run."""
    folder, step = runs.output_dir(profile, out), method.lower()
    own = settings(profile, after=runs.require(folder, "data" if method == "SFT" else "sft"), **overrides)
    first = os.environ.get("RANK", "0") == "0"
    with store.alone(folder):
        if first:
            runs.begin(folder, step)
        tables = sources.read_processed(folder / "data")
        backbone = sources.open_backbone(own, tables.items.title.tolist())
        used = replace(own, theta=1.0) if method == "SFT" else own
        given = inputs(backbone.catalogue, tables, used, load_preference(folder))
        made = training.finetune(backbone, folder=folder / step, cache=folder / "cache", **given)[1]
        if first:
            runs.finish(folder, step, own, made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=("SFT", "Flower"))
    parser.add_argument("--profile", default="paper", help=f"one of {', '.join(PROFILES)}")
    parser.add_argument("--out", help="folder of the run (default: runs/<profile>)")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", type=literal)
    args = parser.parse_args()
    try:
        launch(args.method, args.profile, args.out, dict(args.parameter))
    except (ValueError, OSError, sources.FetchError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
