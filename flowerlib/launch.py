"""Training without a notebook, for several devices: `accelerate launch -m flowerlib.launch SFT --profile paper`.

Run notebook 01 first, then this for SFT and for Flower. Notebooks 02 and 03 find the finished training and go on from
there, if they get the same profile and parameters.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from . import backbone, data, rewards, runs, train
from .policy import Catalogue, prompt_texts
from .preference import PreferenceModel
from .reproduce import literal


def launch(method: str, profile: str, out: str | None, overrides: dict[str, Any]) -> None:
    """Trains one method on what notebook 01 has prepared, and Flower with the settings of SFT.

    Raises:
        FileNotFoundError: the step before is missing. ValueError: unknown profile or setting.
    """
    folder = runs.output_dir(profile, out)
    before = runs.require(folder, "data" if method == "SFT" else "sft")
    chosen = runs.settings(profile, after=before, **overrides)
    if os.environ.get("RANK", "0") == "0":
        runs.begin(folder, method.lower())
    tables = data.read_processed(folder / "data")
    titles = tables.items.title.tolist()
    lm, tokenizer = backbone.load_backbone(chosen, [*titles, *prompt_texts(chosen.category, chosen.rows)])
    catalogue = Catalogue.build(tokenizer, titles, chosen.category, chosen.rows)
    log_rewards = liking = None
    if method == "Flower":
        counts = torch.from_numpy(data.item_counts(tables, chosen.counts))
        log_rewards = rewards.count_log_rewards(catalogue.trie, counts, chosen.alpha)
        liking = PreferenceModel.from_pretrained(folder / "preference")
    train.train(
        lm, tokenizer, catalogue, tables, chosen, folder / method.lower(), folder / "cache", log_rewards, liking
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=("SFT", "Flower"))
    parser.add_argument("--profile", default="paper", help=f"one of {', '.join(runs.PROFILES)}")
    parser.add_argument("--out", help="folder of the run (default: runs/<profile>)")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", type=literal)
    given = parser.parse_args()
    try:
        launch(given.method, given.profile, given.out, dict(given.parameter))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
