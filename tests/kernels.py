"""Kernels forked from a process that has imported torch and the like, so that a test's notebook starts at once.

`python tests/kernels.py …` is `python -m flowerlib.lab.reproduce …` with such kernels.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import sys

import numpy as np
from jupyter_client.provisioning import local_provisioner

FORKING = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else None)
FORKING.set_forkserver_preload([
    "ipykernel.kernelapp", "matplotlib.pyplot", "seaborn", "IPython.display", "peft", "transformers.trainer",
    "transformers.integrations.hub_kernels", "transformers.models.llama", "transformers.models.gpt2",
    "transformers.models.auto", "papermill", "nbformat", "tokenizers", "pyarrow.compute",
])  # nothing of ours: a kernel imports the library that its notebook finds


def _kernel(told, arguments, env, cwd, path):
    os.setsid()  # a group of its own, which the manager of kernels can interrupt or end
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    np.random.seed()  # as a new process has it
    gc.freeze()  # what is imported: every training collects garbage
    sys.path[:] = ["", *path]
    sys.argv = ["ipykernel_launcher", *arguments]
    told.send(os.getpid())
    runpy.run_module("ipykernel_launcher", run_name="__main__")


class Forked:
    """What `subprocess.Popen` gives for a new kernel."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], *, env: dict[str, str], cwd: str = ".", **_):
        tests = os.path.dirname(__file__)
        path = [place for place in sys.path if place and not os.path.abspath(place).startswith(tests)]
        here, there = FORKING.Pipe(duplex=False)
        told = there, command[3:], env, os.path.abspath(cwd), path
        self.process = FORKING.Process(target=_kernel, args=told, daemon=True)
        self.process.start()
        there.close()  # a child that fails ends the wait
        self.pid = here.recv()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def use() -> None:
    """From now on kernels are forked, where the system can fork."""
    if hasattr(os, "fork"):
        local_provisioner.launch_kernel = Forked


if __name__ == "__main__":
    from flowerlib.lab import reproduce

    use()
    reproduce.main()
