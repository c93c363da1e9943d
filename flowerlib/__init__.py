"""Flower: flow-guided fine-tuning of LLM recommenders (Gao et al., SIGIR 2025), small enough to read.

The names below are the ones that people import; README.md beside this file shows the rooms they come from. The bench
around the method (data sources, studies, reports) is the package `flowerlib.lab`, which nothing here imports.
"""

import gc
collecting = gc.isenabled()
gc.disable()  # what is imported stays: no collection looks through it, now or at the end (a third of a start's time)
from .losses import divergence_loss, flow_loss, sft_loss, subtb_loss
from .metrics import evaluate
from .model import Catalogue, load_trained, open_backbone
from .rewards import count_log_rewards, preference_log_rewards
from .train import Objective, TrainSettings
from .tree import Beams, PackedTree, beam_search, recommend
from .trie import TitleTrie

gc.freeze()
if collecting:
    gc.enable()

__all__ = [
    "Beams", "Catalogue", "PackedTree", "TitleTrie", "TrainSettings", "beam_search", "count_log_rewards",
    "divergence_loss", "evaluate", "Objective", "flow_loss", "load_trained", "open_backbone", "preference_log_rewards",
    "recommend", "sft_loss", "subtb_loss",
]
