import os

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests compare with was computed on a CPU

from flowerlib.lab import reproduce  # noqa: E402


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of a whole run at `smoke`; tests that change it work on a copy."""
    names = (*reproduce.NOTEBOOKS, *reproduce.STUDIES)
    return reproduce.reproduce("smoke", str(tmp_path_factory.mktemp("runs") / "smoke"), {}, names)
