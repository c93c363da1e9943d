"""Several processes on one machine (gloo) train as one process does on the same batches."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from flowerlib import launch, runs

PARAMETERS = {"epochs": 0.9, "batch_size": 8}  # an epoch's last batch is filled up where several processes share it


def prepared(smoke, folder):
    for name in ("data", "preference", "sft"):
        shutil.copytree(smoke / name, folder / name)
    return folder


def training_log(folder):
    log = pd.DataFrame(json.loads((folder / "flower" / "log.json").read_text()))
    return log[log.kind == "train"]


def run(command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    done = subprocess.run(command, cwd=runs.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("flow", ["children", "subtb"])
def test_two_processes_have_the_losses_of_one(smoke, tmp_path, flow):
    """Each process has its own rows and paths; a mean over the tokens of both is what one process would take."""
    one, two = (prepared(smoke, tmp_path / name) for name in ("one", "two"))
    launch.launch("Flower", "smoke", str(one), PARAMETERS | {"flow": flow})
    command = ["-m", "flowerlib.launch", "Flower", "--profile", "smoke", "--out", str(two)]
    given = PARAMETERS | {"flow": flow}
    run([*command, *(part for key, value in given.items() for part in ("-p", f"{key}={value}"))])
    one, two = training_log(one), training_log(two)
    assert list(one.step) == list(two.step) and len(one) > 3
    for part in ("loss", "sft", "flow"):
        np.testing.assert_allclose(two[part], one[part], atol=1e-4, rtol=1e-5)


WATCH = """
import json, os, sys
from pathlib import Path
from flowerlib import launch, train

draw, drawn = train.FlowerTrainer._draw_leaves, []
def watched(self, *args):
    leaves = draw(self, *args)
    drawn.append(leaves.flatten().tolist())
    return leaves
train.FlowerTrainer._draw_leaves = watched
folder = Path(sys.argv[1])
launch.launch("Flower", "smoke", str(folder), {"paths": "reward", "n_paths": 4, "epochs": 0.5, "frozen_layers": 0,
                                              "tuned_layers": 0, "batch_size": 8})
(folder / f"drawn_{os.environ['RANK']}.json").write_text(json.dumps(drawn))
"""


def test_every_process_draws_paths_of_its_own(smoke, tmp_path):
    folder, script = prepared(smoke, tmp_path / "run"), tmp_path / "watch.py"
    script.write_text(WATCH)
    run([str(script), str(folder)])
    first, second = (json.loads((folder / f"drawn_{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) > 2
    assert all(a != b for a, b in zip(first, second))
