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


@pytest.mark.parametrize("flow", ["divergence", "subtb"])
def test_two_processes_have_the_losses_of_one(smoke, tmp_path, flow):
    """Each process has its own rows and paths; a mean over the tokens of both is what one process would take."""
    one, two = (prepared(smoke, tmp_path / name) for name in ("one", "two"))
    made = launch("Flower", "smoke", str(one), PARAMETERS | {"flow": flow})
    assert made.parent == one / "flower" and (made / "model").is_dir()
    command = ["-m", "flowerlib.lab.launch", "Flower", "--profile", "smoke", "--out", str(two)]
    given = PARAMETERS | {"flow": flow}
    run([*command, *(part for key, value in given.items() for part in ("-p", f"{key}={value}"))])
    [by_two] = (two / "flower").glob("*/made.json")
    assert by_two.parent.name == made.name  # the same work
    one, two = training_log(one), training_log(two)
    assert list(one.step) == list(two.step) and len(one) > 3
    for part in ("loss", "sft", "flow"):
        np.testing.assert_allclose(two[part], one[part], atol=1e-4, rtol=1e-5)


WATCH = """
import json, os, sys
from pathlib import Path
from flowerlib import train
from flowerlib.lab.launch import launch

draw, drawn = train.Objective.draw_leaves, []
def watched(self, *args):
    leaves = draw(self, *args)
    drawn.append(leaves.flatten().tolist())
    return leaves
train.Objective.draw_leaves = watched
folder = Path(sys.argv[1])
launch("Flower", "smoke", str(folder), {"paths": "reward", "n_paths": 4, "epochs": 0.5, "frozen_layers": 0,
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
