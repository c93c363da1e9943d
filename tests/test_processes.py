"""Several processes on one machine (gloo) train as one process does on the same batches."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from flowerlib.lab import store
from flowerlib.lab.launch import launch

PARAMETERS = {"epochs": 0.9, "batch_size": 8}  # an epoch's last batch is filled up where several processes share it


def prepared(smoke, folder):
    for name in ("data", "preference", "sft"):
        shutil.copytree(smoke / name, folder / name)
    return folder


def training_log(folder):
    """What the one training in flower/ has left: its log is in its made.json."""
    [made] = (folder / "flower").glob("*/made.json")
    log = pd.DataFrame(store.read_json(made)["log"])
    return log[log.kind == "train"]


def run(command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    done = subprocess.run(command, cwd=store.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def assert_losses_of_one(smoke, folder, by_two, flow):
    """What two processes have trained in by_two/flower is what this one trains in the folder."""
    made = launch("Flower", "smoke", str(prepared(smoke, folder)), PARAMETERS | {"flow": flow})
    assert made.parent == folder / "flower" and (made / "model").is_dir()
    [record] = (by_two / "flower").glob("*/made.json")
    assert record.parent.name == made.name  # the same work
    one, two = training_log(folder), training_log(by_two)
    assert list(one.step) == list(two.step) and len(one) > 3
    for part in ("loss", "sft", "flow"):
        np.testing.assert_allclose(two[part], one[part], atol=1e-4, rtol=1e-5)


def test_two_processes_have_the_losses_of_one(smoke, tmp_path):
    """Each process has its own rows and paths; a mean over the tokens of both is what one process would take."""
    by_two, given = prepared(smoke, tmp_path / "two"), PARAMETERS | {"flow": "subtb"}
    command = ["-m", "flowerlib.lab.launch", "Flower", "--profile", "smoke", "--out", str(by_two)]
    run([*command, *(part for key, value in given.items() for part in ("-p", f"{key}={value}"))])
    assert_losses_of_one(smoke, tmp_path / "one", by_two, "subtb")


TWO_TRAININGS = """
import json, os, sys
from pathlib import Path
from flowerlib import train
from flowerlib.lab.launch import launch

by_two, folder = map(Path, sys.argv[1:3])
launch("Flower", "smoke", str(by_two), json.loads(sys.argv[3]))

draw, drawn = train.Objective.draw_leaves, []
def watched(self, *args):
    leaves = draw(self, *args)
    drawn.append(leaves.flatten().tolist())
    return leaves
train.Objective.draw_leaves = watched
launch("Flower", "smoke", str(folder), {"paths": "reward", "n_paths": 4, "epochs": 0.5, "frozen_layers": 0,
                                       "tuned_layers": 0, "batch_size": 8})
(folder / f"drawn_{os.environ['RANK']}.json").write_text(json.dumps(drawn))
"""


def test_two_trainings_one_after_the_other_and_every_process_draws_paths_of_its_own(smoke, tmp_path):
    by_two, folder = (prepared(smoke, tmp_path / name) for name in ("two", "drawn"))
    (script := tmp_path / "trainings.py").write_text(TWO_TRAININGS)
    run([str(script), str(by_two), str(folder), json.dumps(PARAMETERS | {"flow": "divergence"})])
    first, second = (json.loads((folder / f"drawn_{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) > 2
    assert all(a != b for a, b in zip(first, second))
    assert_losses_of_one(smoke, tmp_path / "one", by_two, "divergence")


def test_a_launched_sft_is_the_notebooks(smoke, tmp_path, capsys):
    """Notebook 02 and the launch have one name for one training: what is finished is taken."""
    folder = prepared(smoke, tmp_path / "run")
    notebook = store.read_json(folder / "sft" / "settings.json")["made"]
    assert launch("SFT", "smoke", str(folder), {}) == folder / "sft" / notebook
    assert f"{notebook}: trained already" in capsys.readouterr().out


def test_a_launch_without_the_step_before_names_the_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebooks/01_prepare_the_data.ipynb"):
        launch("SFT", "smoke", str(tmp_path), {})
    with pytest.raises(FileNotFoundError, match="run notebooks/02_train_sft.ipynb"):
        launch("Flower", "smoke", str(tmp_path), {})
    command = [sys.executable, "-m", "flowerlib.lab.launch", "SFT", "--profile", "smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=store.ROOT, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
