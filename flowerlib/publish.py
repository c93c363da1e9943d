"""For maintainers: puts a finished run into the repository: `python -m flowerlib.publish` (`make publish`).

The outputs go into notebooks/, results and pictures into figures/, and the README's tables are written anew, so that
what is read on the web comes from one run of one profile.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat

from . import runs
from .reproduce import FOLDER, NOTEBOOKS, is_noise, reproduce

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
    names = (*NOTEBOOKS, BY_HAND)
    shutil.rmtree(runs.ROOT / "runs" / "publish", ignore_errors=True)  # times are those of a first run
    folder = reproduce("laptop", "runs/publish", {}, names)
    for name in names:
        copy_outputs(folder / "notebooks" / name, FOLDER / name)
    FIGURES.mkdir(exist_ok=True)
    for path in (*(folder / "figures").glob("*.png"), *(folder / "results").glob("*.json"), folder / "timings.json"):
        shutil.copy(path, FIGURES)
    text = README.read_text(encoding="utf-8")
    text = between(text, "comparison", comparison_table(FIGURES / "04_bias_and_diversity.json"))
    README.write_text(between(text, "timings", timing_table(FIGURES / "timings.json")), encoding="utf-8")
    print(f"{len(names)} notebooks, {FIGURES.name}/ and README.md hold the run in {folder}")


if __name__ == "__main__":
    main()
