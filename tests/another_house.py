"""A copy of the project that a test may change, and runs of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernels

from flowerlib.lab import reproduce, store


def build(house: Path) -> None:
    shutil.copytree(store.ROOT / "flowerlib", house / "flowerlib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(reproduce.FOLDER, house / "notebooks")
    for name in ("data", "figures"):
        (house / name).symlink_to(store.ROOT / name)


def run(house: Path, out: Path, *arguments: str, how: tuple[str, ...] = (kernels.__file__,)) -> str:
    """What a run at `smoke` there prints; hashes are not those of this process."""
    done = subprocess.run([sys.executable, *how, "--profile", "smoke", "--out", str(out), *arguments], cwd=house,
                          env=os.environ | {"PYTHONPATH": str(house)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
