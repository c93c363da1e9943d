"""Work that is kept: written whole or not at all, known by what it was made from, with its origin beside it.

A kept thing is a JSON record, or a folder whose record is its made.json, written last. The record holds `made_from`,
the settings and data that it depends on, and `provenance`. Nothing here removes kept work, readable or not."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import timeit
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..data import read_json, reading
from ..model import ROOT

VERSIONS = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "numpy", "pandas")}
FRESH = "FLOWERLIB_FRESH"  # environment variable: work from before this moment (seconds since 1970) is made again
LOCK = ".flowerlib.lock"  # a file that a process holds in the folder where it works; the system lets go when it dies
SCRATCH = ".flowerlib.scratch"  # the same, in a folder of `scratch`
LEFT = f".*.*/{SCRATCH}"  # of the folders of `scratch`


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write, a file or a folder. It replaces `path` when the block ends well;
    after an error it is removed and `path` is as it was."""
    path = Path(path)
    with scratch(path) as folder:
        new = folder / path.name
        yield new
        if path.is_dir():  # a folder cannot be replaced in one step: move the old one aside first
            os.replace(path, folder / "old")
        os.replace(new, path)


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """A temporary folder beside this path. What killed processes have left there is removed."""
    (place := beside.parent).mkdir(parents=True, exist_ok=True)
    sweep(place.glob(LEFT))
    with (tempfile.TemporaryDirectory(None, f".{beside.name}.", place, ignore_cleanup_errors=True) as folder,
          FileLock(f"{folder}/{SCRATCH}")):
        yield Path(folder)


def sweep(locks: Iterable[Path]) -> None:
    """Removes the folders of `scratch` that have these locks, but for those of living processes."""
    for lock in locks:
        with suppress(OSError):  # the lock is held, or gone as its process came to its end
            if time.time() - lock.stat().st_mtime > 1:  # a younger one may be there and not be held yet
                with FileLock(lock, timeout=0):
                    shutil.rmtree(lock.parent)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process works in the folder while the block runs; of several that share one training, the first holds it
    for all. Raises ValueError, at once, where another one does, and where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / LOCK).acquire(timeout=0) if os.environ.get("RANK", "0") == "0" else nullcontext()
    except Timeout:
        raise ValueError(f"another run works in {folder}: wait for it or give another OUT (if there is none, remove "
                         f"{folder / LOCK})") from None
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): give another OUT") from None
    with held:
        yield


@contextmanager
def at_work(folder: Path, made_from: Mapping[str, Any], *content: str) -> Iterator[dict[str, Any] | None]:
    """The record of a folder's finished work, as `find` gives it; or None, and the folder is this process's `alone`."""
    record = find(folder / "made.json", made_from, *content)
    with nullcontext() if record else alone(folder):
        yield record or find(folder / "made.json", made_from, *content)  # a neighbour may have come to its end


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON atomically. Raises ValueError for NaN and infinity."""
    with atomic(path) as new:
        new.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def digest(*parts: Any) -> str:
    """12 hexadecimal digits that name these parts: bytes, arrays and tensors by content, all else by its JSON."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().numpy(force=True)
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).tobytes()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        sha.update(len(part).to_bytes(8, "big") + part)
    return sha.hexdigest()[:12]


def find(path: Path, made_from: Mapping[str, Any], *content: str) -> dict[str, Any] | None:
    """The record at `path` if it is there and made from just this, else None. Says so if another commit made it.
    Raises ValueError where it is damaged, or has not this content."""
    if outdated(path):
        return None
    with reading(path):
        record = read_json(path, "made_from", *content)
        made_by = record["provenance"]["commit"]
    if record["made_from"] != json.loads(json.dumps(made_from)):
        return None
    if made_by != commit():
        _say(path.parent.name, made_by)
    return record


def outdated(path: Path) -> bool:
    """Whether there is nothing at `path`, or only work from before the moment that FRESH names."""
    return not path.exists() or path.stat().st_mtime < float(os.environ.get(FRESH, 0))


@lru_cache
def _say(name: str, made_by: str) -> None:
    """Once for each kind of work and commit."""
    print(f"{name}: made by commit {made_by}, taken as it is (--fresh makes it again)", flush=True)


def keep(path: Path, made_from: Mapping[str, Any], source: Mapping[str, Any], **content: Any) -> dict[str, Any]:
    """Writes the record of a finished piece of work, as `find` reads it."""
    write_json(path, {"made_from": made_from, "provenance": source, **content})
    return read_json(path)


def provenance(settings: Mapping[str, Any], seconds: float, bfloat16: bool = False) -> dict[str, Any]:
    """Where a result comes from; call it when the result is computed. settings: all of them; seconds: that it took;
    bfloat16: whether a language model was trained in it. made_at is in UTC; matmul_1024_seconds is the
    machine's speed, measured once in a process."""
    return {"settings": dict(settings), "bfloat16": bfloat16, "seconds": round(seconds, 1),
            "versions": {"python": platform.python_version()} | VERSIONS,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            "threads": torch.get_num_threads(), "commit": commit(), "matmul_1024_seconds": speed(),
            "made_at": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())}


@lru_cache
def commit() -> str:
    """The commit of this code, "+changes" behind it where files differ from it; "unknown" outside a repository."""
    asked, how = ("rev-parse --short=12 HEAD", "status --porcelain"), {"cwd": ROOT, "stderr": subprocess.DEVNULL}
    with suppress(OSError, subprocess.CalledProcessError):
        head, changes = (subprocess.check_output(["git", *words.split()], text=True, **how).strip() for words in asked)
        return head + "+changes" * bool(changes)
    return "unknown"


@lru_cache
def processor() -> str:
    """The processor's model name, as far as the system tells."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def matmul_seconds(during: float = 0.05, dtype: torch.dtype = torch.float32) -> float:
    """Median seconds of one (1024, 1024) matrix product, measured for so many seconds."""
    a, times, end = torch.ones(1024, 1024, dtype=dtype), [], time.perf_counter() + during
    while len(times) < 5 or time.perf_counter() < end:
        times.append(timeit.timeit(lambda: a @ a, number=1))
    return float(np.median(times))


speed = lru_cache(matmul_seconds)
