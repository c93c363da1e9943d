"""Tests run side by side (pytest-xdist), each process with one thread, and share runs at `smoke`."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import kernels
import pytest
from filelock import FileLock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests compare with was computed on a CPU
os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other make tiny models slow

kernels.use()


def pytest_collection_modifyitems(items):
    """One process begins with the run that many tests share, another with the tests that do not need it."""
    items.sort(key=lambda item: ("smoke" not in item.fixturenames, not item.get_closest_marker("long")))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Makes a folder once for all processes; where that failed, all say why."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(f"{base / name}.lock"):
            if (failed := base / f"{name}.failed").exists():
                pytest.fail(failed.read_text(encoding="utf-8"))
            if not (base / name / "whole").exists():
                try:
                    make(base / name)
                except BaseException as error:
                    failed.write_text(f"{name} was not made: {error}", encoding="utf-8")
                    raise
                (base / name / "whole").touch()
        return base / name

    return made


@pytest.fixture(scope="session")
def smoke(once):
    """The folder of a whole run at `smoke`; tests that change it work on a copy."""
    from flowerlib.lab import reproduce  # here: the process that hands out the tests needs no torch

    notebooks = (*reproduce.NOTEBOOKS, *reproduce.STUDIES)
    return once("smoke", lambda folder: reproduce.reproduce("smoke", str(folder), {}, notebooks))


@pytest.fixture
def alone(smoke):
    """The same folder for a test that runs notebooks in it: one at a time."""
    with FileLock(f"{smoke}.lock"):
        yield smoke


@pytest.fixture
def copy(smoke, tmp_path):
    """A run of its own, to be changed."""
    return shutil.copytree(smoke, tmp_path / "run", ignore=shutil.ignore_patterns(".*"))  # nothing half-written
