"""Runs the numbered notebooks in order with papermill: `python -m flowerlib.reproduce --profile laptop`."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import report, runs

try:
    import resource
except ImportError:  # Windows
    resource = None

NOTEBOOKS = (
    "01_prepare_the_data.ipynb", "02_train_sft.ipynb", "03_train_flower.ipynb", "04_bias_and_diversity.ipynb",
)
FIT, CURVES = "05_fit_a_known_distribution.ipynb", "06_popularity_curves.ipynb"  # stand by themselves
BY_HAND = "00_follow_the_flow.ipynb"
COMPARISON = "07_which_title_next.ipynb"  # needs 01 alone
SPEED = "08_how_fast.ipynb"  # draws what `make bench` has measured
EXPLORERS = "09_explore.ipynb"  # looks at what 01 to 04 have left
STUDIES = (FIT, CURVES, COMPARISON, SPEED, EXPLORERS)  # `make study`: 05 and 07 take long
READS = {  # whose results a notebook takes; 02 and 03 begin anew by the marks in the run's folder
    NOTEBOOKS[3]: NOTEBOOKS[:3], COMPARISON: NOTEBOOKS[:1], EXPLORERS: (*NOTEBOOKS, COMPARISON),
}
OWN_SETTINGS = (FIT, COMPARISON)  # what their parameters may be, they say themselves
FOLDER = runs.ROOT / "notebooks"
BENCH = runs.ROOT / "runs" / "bench.json"  # what `make bench` writes and notebook 08 reads


class NotebookError(RuntimeError):
    """A notebook stopped with an error; the message names both."""


def parameters(notebook: Path) -> list[str]:
    """Names in the notebook's cell tagged `parameters`."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    return [node.target.id for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]


def reproduce(profile: str, out: str | None, overrides: Mapping[str, Any], only: Sequence[str] = NOTEBOOKS) -> Path:
    """Runs the notebooks whose settings, code or inputs have changed since their last complete run.

    Executed notebooks, results and figures lie in the folder that is returned. Each override goes to every notebook
    that has a parameter of its name; the notebooks after it take it over from the run's folder.

    Raises:
        ValueError: unknown profile, or a parameter that no notebook has.
        NotebookError: a notebook stopped with an error.
    """
    runs.settings(profile)
    known = {name: parameters(FOLDER / name) for name in only}
    for key in overrides:
        if key in ("PROFILE", "OUT") or not any(key in names for names in known.values()):
            everything = sorted({name for names in known.values() for name in names} - {"PROFILE", "OUT"})
            raise ValueError(f"no notebook has a parameter {key!r}: there are {', '.join(everything)}")
    folder = runs.output_dir(profile, out)
    checked = {key for name in only if name not in OWN_SETTINGS for key in known[name]}
    shared = {f.name for f in fields(runs.Settings)} & overrides.keys() & checked
    chosen = runs.settings(profile, **{name: overrides[name] for name in shared})
    paths = [value for key, value in overrides.items() if key.endswith("_path")]
    brought = [chosen.data_path, overrides.get("model", chosen.model), *paths]
    chain = _hash(runs.code_digest(), *(_state(path) for path in brought if path))
    for name in only:
        given = {"PROFILE": profile, "OUT": str(folder)} | {k: v for k, v in overrides.items() if k in known[name]}
        inputs = [_outputs(folder, other) for other in READS.get(name, ())] + [_state(str(BENCH))] * (name == SPEED)
        chain = _hash(chain, json.dumps(given, sort_keys=True), _code(FOLDER / name), *inputs)
        stamp = folder / "notebooks" / f"{Path(name).stem}.done"
        if stamp.exists() and stamp.read_text() == _hash(chain, _outputs(folder, name)):
            print(f"{name}: unchanged since its last complete run, skipped", flush=True)
            continue
        stamp.unlink(missing_ok=True)
        print(f"\n{name}", flush=True)
        _run(name, given, folder)
        stamp.write_text(_hash(chain, _outputs(folder, name)))
    return folder


def _state(path: str) -> str:
    """What tells whether a file, or the files in a folder, have changed: names, sizes and times; nothing for others."""
    place = runs.ROOT / Path(path).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*"))
    return repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _outputs(folder: Path, name: str) -> str:
    """A name for what a notebook left: itself, its results and, of 01 to 03, the mark of the finished step."""
    paths = [*sorted((folder / "results").glob(f"{name[:2]}_*.json")), folder / "notebooks" / name]
    paths += [folder / step / "settings.json" for step, notebook in runs.STEPS.items() if notebook == name]
    return _hash(*(path.read_text(encoding="utf-8") if path.exists() else "" for path in paths))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _code(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return json.dumps([c["source"] for c in cells if c["cell_type"] == "code"])


def _run(name: str, given: Mapping[str, Any], folder: Path) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("papermill").addHandler(logging.NullHandler())  # the streams below show it already
    done = folder / "notebooks" / name
    done.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        papermill.execute_notebook(
            FOLDER / name, done, parameters=dict(given), kernel_name="python3", cwd=FOLDER, log_output=True,
            stdout_file=sys.stdout, stderr_file=sys.stderr, progress_bar=False, extra_arguments=["--log-level=ERROR"],
        )
    except papermill.PapermillExecutionError as error:
        raise NotebookError(f"{name} stopped with {error.ename}: {error.evalue} (see {done})") from None
    except DeadKernelError:
        raise NotebookError(f"{name} died without a word, as it does when memory or the disk is full") from None
    seconds = time.perf_counter() - start
    path = folder / "timings.json"
    timings = json.loads(path.read_text()) if path.exists() else {}
    timings[name] = {"seconds": round(seconds, 1), "matmul_1024_seconds": runs.matmul_seconds()}
    if resource:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**(2 if sys.platform == "darwin" else 1)
        timings[name]["peak_mb_so_far"] = round(peak)
    runs.write_json(path, timings)
    print(f"{name}: {seconds:.0f} s", flush=True)


def literal(text: str) -> tuple[str, Any]:
    """NAME=VALUE of the command line as name and Python literal; what is no literal stays text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="laptop", help=f"one of {', '.join(runs.PROFILES)}")
    parser.add_argument("--out", help="folder of the run, from the project's root (default: runs/<profile>)")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", type=literal,
                        help="a notebook parameter, as often as needed")
    stems = [Path(name).stem for name in (*NOTEBOOKS, *STUDIES)]
    parser.add_argument("--only", action="append", choices=stems, metavar="NOTEBOOK",
                        help=f"one notebook alone, as often as needed: {', '.join(stems)}")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    names = tuple(f"{name}.ipynb" for name in given.only) if given.only else NOTEBOOKS
    try:
        folder = reproduce(given.profile, given.out, dict(given.parameter), names)
    except (ValueError, NotebookError) as error:
        raise SystemExit(f"error: {error}") from None
    if NOTEBOOKS[-1] in names:
        print(f"\nSFT against Flower. {report.headline(folder)}\n\n{report.comparison(folder).to_string()}\n")
    print(f"report: {report.report(folder)}\nexecuted notebooks: {folder / 'notebooks'}")
    print(f"figures: {folder / 'figures'}\nresults: {folder / 'results'}")


if __name__ == "__main__":
    main()
