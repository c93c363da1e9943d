import pytest

from flowerlib import reproduce


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of a whole run at `smoke`; tests that change it work on a copy."""
    names = (*reproduce.NOTEBOOKS, *reproduce.STUDIES)
    return reproduce.reproduce("smoke", str(tmp_path_factory.mktemp("runs") / "smoke"), {}, names)
