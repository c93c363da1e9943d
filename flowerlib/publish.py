"""For maintainers: puts a finished run into the repository: `python -m flowerlib.publish [notebook …]`.

The outputs go into notebooks/, results and pictures into figures/, and the README's tables are written anew, so that
what is read on the web comes from one profile. Without a name: 00–04 and 09, from scratch (`make publish`). With names:
these alone, and what is done of them already is kept: 00–04 and 09 from the last such run, the others from that of
`make study`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import nbformat

from . import runs, tables
from .report import is_noise
from .reproduce import (
    BENCH, BY_HAND, COMPARISON, EXPLORERS, FIT, FOLDER, NOTEBOOKS, SPEED, STUDIES, NotebookError, reproduce,
)

ONE_RUN = (*NOTEBOOKS, BY_HAND, EXPLORERS)  # published together, from scratch
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


def with_run_times(text: str, timings: Path) -> str:
    """`text` with the last cell of each notebook's line replaced by its seconds in a timings.json."""
    for name, entry in json.loads(timings.read_text(encoding="utf-8")).items():
        text = re.sub(rf"(?m)^(\| `{Path(name).stem}` \|.*\|) [^|]* \|$", rf"\1 {entry['seconds']:.0f} |", text)
    return text


def between(text: str, mark: str, new: str) -> str:
    """`text` with everything between <!-- mark --> and <!-- /mark --> replaced."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no place marked {mark}")
    return pattern.sub(lambda m: f"{m[1]}{new}\n{m[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", choices=[*NOTEBOOKS, BY_HAND, *STUDIES, []], metavar="notebook")
    names = parser.parse_args().notebooks or ONE_RUN
    everything = set(NOTEBOOKS) <= set(names)
    if SPEED in names and not BENCH.exists():
        parser.error(f"{SPEED} shows what this machine has measured: run `make bench` first")
    folder, quick = runs.ROOT / "runs" / ("publish" if set(names) <= set(ONE_RUN) else "laptop"), runs.ROOT / "runs" / "quick"
    FIGURES.mkdir(exist_ok=True)
    try:
        if everything:  # times are those of a first run
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(quick, ignore_errors=True)
            reproduce("smoke", str(quick), {}, (*NOTEBOOKS, BY_HAND, *STUDIES))
        reproduce("laptop", str(folder), {}, names)
    except NotebookError as error:
        parser.error(str(error))
    if SPEED in names:
        shutil.copy(BENCH, FIGURES / "08_bench.json")
    for name in names:
        copy_outputs(folder / "notebooks" / name, FOLDER / name)
        for path in (*folder.glob(f"figures/{name[:2]}_*.png"), *folder.glob(f"results/{name[:2]}_*.json")):
            shutil.copy(path, FIGURES)
    text = README.read_text(encoding="utf-8")
    if everything:
        shutil.copy(folder / "timings.json", FIGURES)
        shutil.copy(quick / "timings.json", FIGURES / "timings_smoke.json")
        text = with_run_times(text, FIGURES / "timings_smoke.json")
        text = between(text, "comparison", tables.comparison_table(FIGURES / "04_bias_and_diversity.json"))
        text = between(text, "timings", tables.timing_table(FIGURES / "timings.json", NOTEBOOKS))
    if SPEED in names:
        text = between(text, "speed", tables.speed_table(FIGURES / "08_bench.json"))
    if FIT in names:
        text = between(text, "fit", tables.fit_table(FIGURES / f"{Path(FIT).stem}.json"))
    if COMPARISON in names:
        text = between(text, "next", tables.next_table(FIGURES / f"{Path(COMPARISON).stem}.json"))
    README.write_text(text, encoding="utf-8")
    print(f"{len(names)} notebooks, {FIGURES.name}/ and README.md hold the run in {folder}")


if __name__ == "__main__":
    main()
