"""Tests run side by side (pytest-xdist), each process with one thread, and share one run at `smoke`."""

import os
import shutil

import kernels
import pytest
from filelock import FileLock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests compare with was computed on a CPU
os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other make tiny models slow

from flowerlib.lab import reproduce  # noqa: E402

kernels.use()


def pytest_collection_modifyitems(items):
    """One process begins with the run that many tests share, another with the tests that do not need it."""
    items.sort(key=lambda item: ("smoke" not in item.fixturenames, not item.get_closest_marker("long")))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of a whole run at `smoke`, made once for all processes; tests that change it work on a copy."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke"
    with FileLock(f"{folder}.lock"):
        if not (folder / "whole").exists():
            reproduce.reproduce("smoke", str(folder), {}, (*reproduce.NOTEBOOKS, *reproduce.STUDIES))
            (folder / "whole").touch()
    return folder


@pytest.fixture
def alone(smoke):
    """The same folder for a test that runs notebooks in it: one at a time."""
    with FileLock(f"{smoke}.lock"):
        yield smoke


@pytest.fixture
def copy(smoke, tmp_path):
    """A run of its own, to be changed."""
    return shutil.copytree(smoke, tmp_path / "run", ignore=shutil.ignore_patterns(".*"))  # nothing half-written
