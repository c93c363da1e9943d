"""Results files as Markdown tables: README's, and the report's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import runs
from .plots import METHOD_NAMES


def comparison_table(results: Path) -> str:
    """README's table: accuracy with its 95% interval, fairness, diversity; one line per method and decoding."""
    rows = runs.read_results(results)
    k = max(int(m[1]) for name in rows[0] if (m := re.fullmatch(r"ndcg@(\d+)", name)))
    lines = [
        f"| decoding, seen titles | method | HR@{k} | NDCG@{k} | DGU | MGU | H (bits) | TTR | distinct titles | Gini |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["seen"] == "allowed", r["decoding"], r["method"] != "SFT")):
        ranges = {name: f"{row[name]:.3f} [{row[name + '_lo']:.3f}, {row[name + '_hi']:.3f}]"
                  for name in (f"hr@{k}", f"ndcg@{k}", "dgu")}
        decoding = f"{row['decoding'].replace('_', ', length-')}, {row['seen']}"
        lines.append(f"| {decoding} | {row['method']} | {' | '.join(ranges.values())} | {row['mgu']:.3f} | "
                     f"{row['h_bits']:.2f} | {row['ttr']:.3f} | {row['distinct']:.0f} | {row['gini']:.3f} |")
    return "\n".join(lines)


def next_table(results: Path) -> str:
    """README's table of the whole comparison: lists of all test users without seen titles, most accurate first."""
    rows = [row for row in runs.read_results(results) if row["part"] == "test" and row["seen"] == "excluded"]
    k = max(int(m[1]) for name in rows[0] if (m := re.fullmatch(r"ndcg@(\d+)", name)))
    lines = [f"| method | decoding | seed | NDCG@{k} | HR@{k} | DGU | H (bits) | distinct titles | Gini |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["decoding"] == "beam_normalised", -r[f"ndcg@{k}"])):
        ranges = [f"{row[name]:.3f}" + (f" [{row[name + '_lo']:.3f}, {row[name + '_hi']:.3f}]" if f"{name}_lo" in row else "")
                  for name in (f"ndcg@{k}", f"hr@{k}", "dgu")]
        said = {"reward": "reward {}", "alpha": "α = {:g}", "theta": "θ = {:g}", "guide": "weight {:g}"}
        told = [said[key].format(row[key]) for key in said if key in row]
        name = f"{row['method']} ({', '.join(told)})" if told else row["method"]
        lines.append(f"| {name} | {row['decoding'].replace('_', ', length-')} | {row['seed']} | {' | '.join(ranges)} | "
                     f"{row['h_bits']:.2f} | {row['distinct']:.0f} | {row['gini']:.3f} |")
    return "\n".join(lines)


def fit_table(results: Path) -> str:
    """README's table of the fits: medians over seeds, and the range of the divergence."""
    rows = pd.DataFrame(runs.read_results(results))
    lines = ["| titles, target | method | KL(target‖model), nats | seeds: least, most | KL(model‖target) | JS | "
             "mass on the catalogue | forward tokens | seconds |", "|---|---|---|---|---|---|---|---|---|"]
    parts = []
    for (n, target, method, paths, _), same in rows.groupby(["n_titles", "target", "method", "paths", "budget"]):
        parts.append((n, target, same.kl_target_model.median(), method, paths, same))
    for n, target, kl, method, paths, same in sorted(parts, key=lambda part: part[:3]):
        name = METHOD_NAMES[method] + (f", paths {paths}" if paths in ("policy", "schedule") and method != "rloo" else "")
        values = [f"{same[key].median():.2g}" for key in ("kl_model_target", "js")]
        spread = f"{same.kl_target_model.min():.2g}, {same.kl_target_model.max():.2g}" if len(same) > 1 else "one seed"
        lines.append(f"| {n:,}, {target} | {name} | {kl:.2g} | {spread} | {' | '.join(values)} | "
                     f"{same.catalogue_mass.median():.3f} | {same.forward_tokens.median():,.0f} | {same.seconds.median():.0f} |")
    return "\n".join(lines)


def speed_table(measured: Path) -> str:
    """README's table of `make bench`: ratios of times, taken in turns in one process."""
    lines = ["| ours / the other way | predicted | measured | least, most | bound | kept |", "|---|---|---|---|---|---|"]
    for row in json.loads(measured.read_text(encoding="utf-8"))["rows"]:
        predicted = f"{row['predicted']:.2g}" if row.get("predicted") else ""
        spread = f"{row['least']:.3g}, {row['most']:.3g}" if "least" in row else ""
        bound, kept = "", "tried"
        if row["bound"] is not None:
            bound, kept = f"{row['bound']:.3g}", "yes" if row["ratio"] <= row["bound"] else "**no**"
        lines.append(f"| {row['name']} | {predicted} | {row['ratio']:.3g} | {spread} | {bound} | {kept} |")
    return "\n".join(lines)


def timing_table(timings: Path, names: Sequence[str]) -> str:
    """README's table of times and memory of some notebooks, from the run's timings.json."""
    runs_of: dict[str, Any] = json.loads(timings.read_text(encoding="utf-8"))
    lines = ["| notebook | seconds | 1024 × 1024 matrix product then, seconds |", "|---|---|---|"]
    total = 0.0
    for name in names:
        total += runs_of[name]["seconds"]
        product = runs_of[name]["matmul_1024_seconds"]
        lines.append(f"| {Path(name).stem} | {runs_of[name]['seconds']:.0f} | {product:.4f} |")
    peak = max(runs_of[name]["peak_mb_so_far"] for name in names)
    return "\n".join([*lines, f"| **together** | **{total:.0f}** | peak memory {peak / 1000:.1f} GB |"])
