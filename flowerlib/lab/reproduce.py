"""Runs the numbered notebooks in order with papermill: `python -m flowerlib.lab.reproduce --profile laptop`."""

import argparse
import logging
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
from nbclient.exceptions import DeadKernelError

from ..train import checked
from . import report, runs, store
from .settings import PROFILES, Settings, literal, settings
from .training import computes_in_bfloat16

try:
    import resource
except ImportError:  # Windows
    resource = None

NOTEBOOKS = (*runs.STEPS.values(), "04_bias_and_diversity.ipynb")
BY_HAND = "00_follow_the_flow.ipynb"
FIT, CURVES = "05_fit_a_known_distribution.ipynb", "06_popularity_curves.ipynb"  # stand by themselves
COMPARISON = "07_which_title_next.ipynb"  # needs 01 alone, and takes the settings of 02 and 03
SPEED = "08_how_fast.ipynb"  # draws what `make bench` has measured
EXPLORERS = "09_explore.ipynb"  # looks at what 01 to 04 have left
STUDIES = (FIT, CURVES, COMPARISON, SPEED, EXPLORERS)  # `make study`: 05 and 07 take long
READS = {name: NOTEBOOKS[:i] for i, name in enumerate(NOTEBOOKS)}  # notebooks whose results a notebook reads
READS |= {COMPARISON: NOTEBOOKS[:3], EXPLORERS: (*NOTEBOOKS, COMPARISON)}
FOLDER = store.ROOT / "notebooks"
BENCH = store.ROOT / "runs" / "bench.json"  # what `make bench` writes and notebook 08 reads
TIMES = store.ROOT / "figures"  # holds the times of published runs
BESIDE = {SPEED: (BENCH, TIMES / "08_bench.json"), EXPLORERS: (FOLDER / "explorers.py",)}  # files that a notebook reads


class NotebookError(RuntimeError):
    """A notebook stopped with an error; the message names both, in one line."""


class Screen:
    """Where a notebook's progress bars go: stderr, with what is left of the whole run before each."""

    def __init__(self, place: str, here: float, later: float):
        """Seconds that this notebook and those after it will take, NaN where nobody knows."""
        self.place, self.here, self.later, self.start = place, here, later, time.perf_counter()

    def __str__(self) -> str:
        here = max(self.here - (time.perf_counter() - self.start), self.here / 20)  # it may take longer than expected
        left = here + self.later
        return f"{self.place}, {minutes(left):>6} left" if left == left else self.place

    def write(self, text: str) -> None:
        sys.stderr.write(text.replace("\r", f"\r[{self}] "))

    def flush(self) -> None:
        sys.stderr.flush()


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def times_file(own: Settings) -> str:
    """Name of the file in figures/ that holds the times of a published run like one on this machine."""
    kind = "_smoke" if own.profile == "smoke" else "" if own.bfloat16 and computes_in_bfloat16() else "_float32"
    return f"timings{kind}.json"


def expected_seconds(profile: str, overrides: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Seconds that each notebook will take here, NaN where nobody knows: those of the profile's published run, times
    the ratio of both machines' times for one product of float32 matrices, measured for a second."""
    path = TIMES / times_file(settings(profile, bfloat16=overrides.get("bfloat16")))
    other = profile not in ("smoke", "laptop") or {*overrides} - {"bfloat16"} or torch.cuda.is_available()
    if other or not path.exists():
        return [math.nan] * len(names)
    times = store.read_json(path)
    slower = store.matmul_seconds(1.0) / statistics.median(entry["matmul_1024_seconds"] for entry in times.values())
    return [times[name]["seconds"] * slower if name in times else math.nan for name in names]


def parameters(notebook: Path) -> dict[str, Any]:
    """Name → default in the notebook's cell tagged `parameters`."""
    return dict(literal(f"{name}={p['default']}") for name, p in papermill.inspect_notebook(notebook).items())


def reproduce(profile: str, out: str | None, overrides: Mapping[str, Any], only: Sequence[str] = NOTEBOOKS,
              fresh: bool = False) -> Path:
    """Runs the notebooks whose parameters, code or inputs have changed since their last complete run.

    Executed notebooks, results and figures lie in the folder that is returned. Each override goes to every notebook
    that has a parameter of its name; the notebooks after it read it from the run's folder. fresh: make anew all work
    that these notebooks find from before.

    Raises:
        ValueError: unknown profile, a parameter that no notebook has, or a value out of its range; another run there.
        NotebookError: a notebook stopped with an error.
    """
    names = {name: parameters(FOLDER / name) for name in only}
    for key in overrides:
        if key in ("PROFILE", "OUT") or not any(key in known for known in names.values()):
            everything = sorted({key for known in names.values() for key in known} - {"PROFILE", "OUT"})
            raise ValueError(f"no notebook has a parameter {key!r}: there are {', '.join(everything)}")
        for default in [known[key] for known in names.values() if key in known and not hasattr(Settings, key)]:
            if overrides[key] is not default:  # None, which stands for no text
                checked(key, overrides[key], "" if default is None else default, low=int(bool(default)))
    for fit in {name == FIT for name in only}:
        known = {key for name in only for key in names[name] if (name == FIT) == fit and hasattr(Settings, key)}
        settings(profile, fit=fit, **{key: value for key, value in overrides.items() if key in known})
    folder = runs.output_dir(profile, out)
    moment = folder / "fresh.json"  # of --fresh, until a run comes to its end: a killed one resumes where it was
    with store.alone(folder):
        store.sweep(lock for below in ("", "*/", "*/*/") for lock in list(folder.glob(below + store.LEFT)))
        if fresh and not moment.exists():
            store.write_json(moment, time.time())
        if moment.exists():
            os.environ[store.FRESH] = str(store.read_json(moment))
        try:
            _run_all(profile, folder, overrides, names)
        finally:
            if moment.exists():
                del os.environ[store.FRESH]
        moment.unlink(missing_ok=True)
    return folder


def _run_all(profile: str, folder: Path, overrides: Mapping[str, Any], names: Mapping[str, Mapping[str, Any]]) -> None:
    library = store.digest(*(path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py"))))
    expected: list[float] = []
    for i, name in enumerate(names):
        given = {"PROFILE": profile, "OUT": str(folder)} | {k: v for k, v in overrides.items() if k in names[name]}
        own = settings(profile, fit=name == FIT, **{k: v for k, v in given.items() if hasattr(Settings, k)})
        brought = [own.data_path, own.counts_path, own.model, *(v for k, v in given.items() if k.endswith("_path"))]
        code = [cell.source for cell in nbformat.read(FOLDER / name, 4).cells if cell.cell_type == "code"]
        origin = {"given": given, "library": library, "cells": code,
                  "inputs": [_outputs(folder, other) for other in READS.get(name, ())],
                  "files": [_state(path) for path in (*brought, *BESIDE.get(name, ())) if path]}
        record = folder / "notebooks" / f"{Path(name).stem}.json"
        if (done := store.find(record, origin, "outputs")) and done["outputs"] == _outputs(folder, name):
            print(f"{name}: unchanged since its last complete run, skipped", flush=True)
            continue
        if not expected:
            expected = [0.0] * i + expected_seconds(profile, overrides, list(names)[i:])
            if (total := sum(expected)) == total:
                print(f"{profile}: about {minutes(total)} from scratch on this machine; figures appear in "
                      f"{folder / 'figures'} as they are made", flush=True)
        screen = Screen(f"{i + 1} of {len(names)}", expected[i], sum(expected[i + 1 :]))
        print(f"\n{name} ({screen})", flush=True)
        seconds = _run(name, given, folder, screen)
        source = {"commit": store.commit(), "seconds": round(seconds, 1)}
        store.keep(record, origin, source, outputs=_outputs(folder, name))


def _state(path: str | Path) -> list[Any]:
    """What tells whether a file, or the files in a folder, have changed: names, sizes and times; nothing for others."""
    place = store.ROOT / Path(path).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _outputs(folder: Path, name: str) -> str:
    """A name for what a notebook left: itself, results, figures; of 01 to 03, mark, tables and training of the step."""
    paths = [*sorted(folder.glob(f"results/{name[:2]}_*")), *sorted(folder.glob(f"figures/{name[:2]}_*.png"))]
    paths.append(folder / "notebooks" / name)
    for mark in (folder / step / "settings.json" for step, notebook in runs.STEPS.items() if notebook == name):
        paths += [mark, *sorted(mark.parent.glob("*.parquet"))]
        text = mark.read_bytes() if mark.exists() else b""
        paths += [made for made in folder.glob("*/*/made.json") if made.parent.name.encode() in text]
    return store.digest(*(path.read_bytes() if path.exists() else b"" for path in paths))


def _run(name: str, given: Mapping[str, Any], folder: Path, screen: Screen) -> float:
    """Executes a notebook into the run's folder → its seconds, which timings.json gets as well."""
    logging.getLogger("papermill").addHandler(logging.NullHandler())  # the streams below show it already
    executed = folder / "notebooks" / name
    executed.parent.mkdir(parents=True, exist_ok=True)
    start, fault = time.perf_counter(), ""
    try:
        papermill.execute_notebook(
            FOLDER / name, executed, parameters=dict(given), kernel_name="python3", cwd=FOLDER, log_output=True,
            stdout_file=sys.stdout, stderr_file=screen, progress_bar=False, extra_arguments=["--log-level=ERROR"])
    except papermill.PapermillExecutionError as error:
        fault = f"stopped with {error.ename}: {error.evalue} (see {executed})"
    except DeadKernelError:
        fault = "died without a word, as it does when memory or the disk is full"
    except OSError as error:
        fault = f"cannot be written ({error})"
    if fault:  # few errors of a full disk say so
        free = shutil.disk_usage(folder).free >> 20
        fault += f"; {folder} has {free} MB of room left: make room" if free < 100 else ""
        raise NotebookError(f"{name} {' '.join(fault.split())}")
    seconds = time.perf_counter() - start
    path, entry = folder / "timings.json", {"seconds": round(seconds, 1), "matmul_1024_seconds": store.matmul_seconds()}
    if resource:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**(2 if sys.platform == "darwin" else 1)
        entry["peak_mb_so_far"] = round(peak)
    store.write_json(path, (store.read_json(path) if path.exists() else {}) | {name: entry})
    print(f"{name}: {seconds:.0f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="laptop", help=f"one of {', '.join(PROFILES)}")
    parser.add_argument("--out", help="folder of the run, from the project's root (default: runs/<profile>)")
    parser.add_argument("-p", "--parameter", action="extend", nargs="+", default=[], metavar="NAME=VALUE", type=literal,
                        help="notebook parameters")
    parser.add_argument("--fresh", action="store_true", help="make anew what was made before by the same settings")
    stems = [Path(name).stem for name in (BY_HAND, *NOTEBOOKS, *STUDIES)]
    parser.add_argument("--only", action="append", choices=stems, metavar="NOTEBOOK",
                        help=f"one notebook alone, as often as needed: {', '.join(stems)}")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # of the notebooks: waiting threads soon sleep
    names = [f"{name}.ipynb" for name in stems if name in (args.only or ())] or NOTEBOOKS
    try:
        folder = reproduce(args.profile, args.out, dict(args.parameter), names, args.fresh)
        if NOTEBOOKS[-1] in names:
            rows = runs.read_results(folder / "results" / f"{Path(NOTEBOOKS[-1]).stem}.json")
            print(f"\n{report.headline(folder)}\n\n{report.lists_table(rows)}\n")
        print(f"report: {report.report(folder)}\nexecuted notebooks: {folder / 'notebooks'}")
    except (ValueError, OSError, NotebookError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from here") from None
    print(f"figures: {folder / 'figures'}\nresults: {folder / 'results'}")


if __name__ == "__main__":
    main()
