"""For maintainers: puts a finished run into the repository: `python -m flowerlib.publish [notebook …]`.

The outputs go into notebooks/, results and pictures into figures/, and the README's tables are written anew, so that
what is read on the web comes from one profile. Without a name: all of 00–04, from scratch (`make publish`). With names:
these alone, from the run of `make study`, and what is done of them already is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from . import runs
from .plots import METHOD_NAMES
from .report import is_noise
from .reproduce import BENCH, COMPARISON, FIT, FOLDER, NOTEBOOKS, SPEED, STUDIES, reproduce

BY_HAND = "00_follow_the_flow.ipynb"
FIGURES = runs.ROOT / "figures"
README = runs.ROOT / "README.md"


def copy_outputs(executed: Path, source: Path) -> None:
    """Puts the outputs of an executed notebook into its source, without progress bars and injected parameters."""
    given, notebook = nbformat.read(executed, as_version=4), nbformat.read(source, as_version=4)
    ran = [c for c in given.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    if [c.source for c in ran] != [c.source for c in cells]:
        raise ValueError(f"{source.name} has changed since {executed} ran: run it again")
    for number, (cell, old) in enumerate(zip(cells, ran), 1):
        cell.execution_count = number
        cell.outputs = [output for output in old.outputs if not is_noise(output)]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    with runs.atomic(source) as new:
        nbformat.write(notebook, new)


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
        spread = f"{row['least']:.2g}, {row['most']:.2g}" if "least" in row else ""
        kept = "yes" if row["ratio"] <= row["bound"] else "**no**"
        lines.append(f"| {row['name']} | {predicted} | {row['ratio']:.2g} | {spread} | {row['bound']:.2g} | {kept} |")
    return "\n".join(lines)


def timing_table(timings: Path) -> str:
    """README's table of times and memory, from the run's timings.json."""
    runs_of: dict[str, Any] = json.loads(timings.read_text(encoding="utf-8"))
    lines = ["| notebook | seconds | 1024 × 1024 matrix product then, seconds |", "|---|---|---|"]
    total = 0.0
    for name in NOTEBOOKS:
        total += runs_of[name]["seconds"]
        product = runs_of[name]["matmul_1024_seconds"]
        lines.append(f"| {Path(name).stem} | {runs_of[name]['seconds']:.0f} | {product:.4f} |")
    peak = max(runs_of[name]["peak_mb_so_far"] for name in NOTEBOOKS)
    return "\n".join([*lines, f"| **together** | **{total:.0f}** | peak memory {peak / 1000:.1f} GB |"])


def between(text: str, mark: str, new: str) -> str:
    """`text` with everything between <!-- mark --> and <!-- /mark --> replaced."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no place marked {mark}")
    return pattern.sub(lambda m: f"{m[1]}{new}\n{m[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", choices=[*NOTEBOOKS, BY_HAND, *STUDIES, []], metavar="notebook")
    names = parser.parse_args().notebooks or (*NOTEBOOKS, BY_HAND)
    everything = set(NOTEBOOKS) <= set(names)
    if SPEED in names and not BENCH.exists():
        parser.error(f"{SPEED} shows what this machine has measured: run `make bench` first")
    folder = runs.ROOT / "runs" / ("publish" if everything else "laptop")
    if everything:  # times are those of a first run
        shutil.rmtree(folder, ignore_errors=True)
    reproduce("laptop", str(folder), {}, names)
    FIGURES.mkdir(exist_ok=True)
    if SPEED in names:
        shutil.copy(BENCH, FIGURES / "08_bench.json")
    for name in names:
        copy_outputs(folder / "notebooks" / name, FOLDER / name)
        for path in (*folder.glob(f"figures/{name[:2]}_*.png"), *folder.glob(f"results/{name[:2]}_*.json")):
            shutil.copy(path, FIGURES)
    text = README.read_text(encoding="utf-8")
    if everything:
        shutil.copy(folder / "timings.json", FIGURES)
        text = between(text, "comparison", comparison_table(FIGURES / "04_bias_and_diversity.json"))
        text = between(text, "timings", timing_table(FIGURES / "timings.json"))
    if SPEED in names:
        text = between(text, "speed", speed_table(FIGURES / "08_bench.json"))
    if FIT in names:
        text = between(text, "fit", fit_table(FIGURES / f"{Path(FIT).stem}.json"))
    if COMPARISON in names:
        text = between(text, "next", next_table(FIGURES / f"{Path(COMPARISON).stem}.json"))
    README.write_text(text, encoding="utf-8")
    print(f"{len(names)} notebooks, {FIGURES.name}/ and README.md hold the run in {folder}")


if __name__ == "__main__":
    main()
