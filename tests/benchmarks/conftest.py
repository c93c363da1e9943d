"""Two ways of doing one thing, timed in turns in one process: `runs/bench.json` keeps the ratios."""

import statistics
import time

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flowerlib.lab import store
from flowerlib.lab.reproduce import BENCH
from flowerlib.model import Catalogue
from flowerlib.trie import TitleTrie

ROWS = []
OF_A_ROW = ("device", "threads", "versions", "matmul_1024_seconds", "commit")
TERMINATOR, VOCABULARY = 1, 49_152


@pytest.fixture
def side_by_side(benchmark, keep):
    """side_by_side(name, bound, ours, other, rounds, worth, predicted) → the median of ours / (worth · other).

    `worth` is how many of `other` ours stands for, `predicted` the ratio of the tokens that pass through the model. Both
    are called once before they are timed; what they return is freed when the clock has stopped. The ratio is written
    to runs/bench.json, and a ratio above the bound fails (None: tried only).
    """

    def measure(name, bound, ours, other, rounds=7, worth=1.0, predicted=None):
        times = [], []

        def both():
            for taken, function in zip(times, (ours, other)):
                start = time.perf_counter()
                made = function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
                del made

        benchmark.pedantic(both, rounds=rounds, warmup_rounds=1)
        pairs = [mine / (worth * its) for mine, its in list(zip(*times))[1:]]
        ratio = statistics.median(pairs)
        row = {"name": name, "ratio": ratio, "bound": bound, "least": min(pairs), "most": max(pairs), "rounds": rounds,
               "seconds": statistics.median(times[0][1:]), "predicted": predicted}
        keep(row)
        benchmark.extra_info.update(row)
        print(f"\n{name}: {ratio:.3f} (bound {bound}), {row['seconds']:.3f} s")
        assert bound is None or ratio <= bound
        return ratio

    return measure


@pytest.fixture
def keep():
    """keep(row): a line for runs/bench.json, with the machine and the code that it is of, as they are at that moment."""

    def keep_row(row):
        source = store.provenance({}, 0) | {"matmul_1024_seconds": store.matmul_seconds()}
        row = row | {name: source[name] for name in OF_A_ROW}
        ROWS.append({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()})

    return keep_row


@pytest.fixture(scope="session")
def model():
    """The shape of SmolLM2-135M with random weights: speed does not ask what they know."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    ))


@pytest.fixture(scope="session")
def catalogue():
    """3,858 titles as long as those of Video Games (14 tokens on average), in the paper's form of a prompt."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.5, 0.42, 3_858), 2, 78).astype(int)
    titles = [[*(1 + np.minimum(rng.zipf(1.3, n), VOCABULARY - 2)).tolist(), TERMINATOR] for n in lengths]
    header, separator, footer = ([2] * n for n in (20, 1, 5))
    names = [str(i) for i in range(len(titles))]
    return Catalogue(names, titles, TitleTrie.from_sequences(titles), header, separator, footer, eos=0)


def pytest_sessionfinish():
    """Rows of a run of some benchmarks take the places of their own; the others stay, each with the machine that it is of."""
    if ROWS:
        before = store.read_json(BENCH)["rows"] if BENCH.exists() else []
        before = [row for row in before if all(name in row for name in OF_A_ROW)]  # else nobody knows where it is from
        rows = {row["name"]: row for row in (*before, *ROWS)}
        store.write_json(BENCH, {"provenance": {}, "rows": list(rows.values())})  # each row has its own
