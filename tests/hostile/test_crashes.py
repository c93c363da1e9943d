"""Processes that are killed, neighbours in one folder, full disks, damaged files: one sentence, nothing lost.

With FLOWERLIB_HARD=1 whole runs are killed at random moments as well, and go on to the results of an unbroken run.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny_world import TITLES, finished_training

from flowerlib import data, model
from flowerlib.lab import compare, fit, launch, preference, report, reproduce, runs, store, training
from flowerlib.lab.settings import PROFILES, settings
from flowerlib.train import make_rows
from flowerlib.tree import recommend

HARD = bool(os.environ.get("FLOWERLIB_HARD"))
KILLS = int(os.environ.get("FLOWERLIB_KILLS", 20))
SMOKE = PROFILES["smoke"]


def files(folder):
    """Every file below a folder → its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(work):
    """Runs `work` in a process of its own, which is killed before it returns."""
    if not (child := os.fork()):
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def made_old(lock):
    """A while later."""
    os.utime(lock, (time.time() - 10,) * 2)


def dies_while_it_writes(path):
    with store.atomic(path) as new:
        new.mkdir()
        (new / "weights").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def main(monkeypatch, module, *arguments):
    """What the command line of a module says as it stops: one line."""
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    said = str(stopped.value)
    assert said.startswith("error: ") and "\n" not in said
    return said


# Two runs in one folder


@pytest.fixture
def another(tmp_path):
    """A process that works in a folder until it is killed."""
    code = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); " \
           "print('at work', flush=True); time.sleep(600)"
    started = []

    def begin(folder):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", code, str(folder / store.LOCK)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "at work\n"
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_is_refused_at_once_and_touches_nothing(tmp_path, another, monkeypatch):
    out = tmp_path / "run"
    process = another(out)
    store.write_json(out / "data" / "settings.json", {"settings": vars(SMOKE), "made": None})
    (out / ".model.abcdefgh").mkdir()
    (out / ".model.abcdefgh" / store.SCRATCH).touch()
    made_old(out / ".model.abcdefgh" / store.SCRATCH)
    before, start = files(out), time.monotonic()
    for fresh in ([], ["--fresh"]):
        said = main(monkeypatch, reproduce, "--profile", "smoke", "--out", str(out), *fresh)
        assert said == (f"error: another run works in {out}: wait for it or give another OUT (if there is none, remove "
                        f"{out / store.LOCK})")
    assert main(monkeypatch, launch, "SFT", "--profile", "smoke", "--out", str(out)) == said
    assert files(out) == before and time.monotonic() - start < 10
    process.kill()
    process.wait()
    ran = []
    monkeypatch.setattr(reproduce, "_run_all", lambda *args: ran.append(args))
    reproduce.reproduce("smoke", str(out), {})  # the system has let go of it
    reproduce.reproduce("smoke", str(out), {})
    assert len(ran) == 2 and not (out / ".model.abcdefgh").exists()


def test_a_run_that_failed_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "_run", lambda *args: pytest.fail("no disk"))
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception):
            reproduce.reproduce("smoke", str(tmp_path), {})


def test_two_processes_of_one_launch_share_a_folder(tmp_path, monkeypatch):
    with store.alone(tmp_path):
        with pytest.raises(ValueError, match="another run works in"), store.alone(tmp_path):
            pass
        monkeypatch.setenv("RANK", "1")
        with store.alone(tmp_path):
            pass


def test_two_trainings_of_one_kind_do_not_meet(tmp_path, monkeypatch):
    """Wherever they were started: a notebook in JupyterLab beside a headless run."""
    given = [[0, 1, 2], [2, 1, 0]], [[0]], [1], 3, SMOKE, tmp_path
    began = []

    def begins_while_another_trains(self, **_):
        began.append(self)
        if len(began) == 1:
            preference.train_preference(*given)

    monkeypatch.setattr(preference.Trainer, "train", begins_while_another_trains)
    with pytest.raises(ValueError, match=r"another run works in .*p_ui-\w+: wait for it or give another OUT"):
        preference.train_preference(*given)
    assert len(began) == 1

    own, tables = replace(SMOKE, theta=1.0), world()
    given = model.open_backbone(own, TITLES), tables, own, tmp_path, tmp_path / "cache"
    monkeypatch.setattr(training.FlowerTrainer, "train", lambda self, **_: training.finetune(*given))
    with pytest.raises(ValueError, match=r"another run works in .*SFT-\w+: wait for it"):
        training.finetune(*given)


def world():
    items = pd.DataFrame({"item_id": range(len(TITLES)), "title": TITLES})
    rows = pd.DataFrame({"history": [[0], [1]], "target": [1, 2]})
    return data.Tables(items, rows, rows, rows)


# What killed processes leave


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    for foreign in (".git", ".model.backup", ".a.b"):
        (tmp_path / foreign).mkdir()
        (tmp_path / foreign / "kept").touch()
    kept = files(tmp_path)
    killed(lambda: dies_while_it_writes(tmp_path / "model"))
    made_old(next(tmp_path.glob(store.LEFT)))
    left = files(tmp_path).keys() - kept.keys()
    assert any(path.read_text() == "half" for path in left)
    with store.atomic(tmp_path / "other.json") as new:  # of another file in that folder
        new.write_text("whole")
        assert not any(path.exists() for path in left)
        made_old(new.parent / store.SCRATCH)
        with store.atomic(tmp_path / "third.json") as third:  # the first one lives
            third.write_text("whole")
    assert files(tmp_path) == kept | {tmp_path / name: b"whole" for name in ("other.json", "third.json")}


def test_what_killed_processes_left_anywhere_in_a_run_is_removed_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "_run_all", lambda *args: None)
    places = ("report.html", "cache/train.npy", "results/04.json", "sft/SFT-1/model", "preference/p_ui-1/made.json")
    for place in places:
        killed(lambda: dies_while_it_writes(tmp_path / place))
        made_old(next((tmp_path / place).parent.glob(store.LEFT)))
    assert sum(path.name == "weights" for path in files(tmp_path)) == len(places)
    with store.atomic(tmp_path / "figures" / "a.png") as lives:  # of a notebook in JupyterLab
        lives.touch()
        made_old(lives.parent / store.SCRATCH)
        reproduce.reproduce("smoke", str(tmp_path), {})
        assert lives.exists()
    assert sorted(files(tmp_path)) == [tmp_path / store.LOCK, tmp_path / "figures" / "a.png"]


def test_many_who_write_in_one_folder_at_once_do_no_harm(tmp_path):
    def work(n):
        for i in range(100):
            store.write_json(tmp_path / f"{i % 7}.json", {"n": n})
            store.write_json(tmp_path / f"own_{n}.json", [n] * i)

    children = []
    for n in range(4):
        if not (child := os.fork()):
            try:
                work(n)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert all(store.read_json(tmp_path / f"own_{n}.json") == [n] * 99 for n in range(4))
    store.write_json(tmp_path / "0.json", {})
    assert len(list(tmp_path.iterdir())) == 7 + 4


@pytest.mark.parametrize("content", ["", '{"best_metric": 1.0, "log_hist', "[", "\0" * 64])
def test_a_checkpoint_whose_state_is_half_written_is_passed_over(tmp_path, content):
    for step, state in ((3, '{"global_step": 3}'), (6, content)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / training.TRAINER_STATE_NAME).write_text(state)
    assert training.last_checkpoint(tmp_path).endswith("checkpoint-3")
    assert not (tmp_path / "checkpoint-6").exists()


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_a_training_that_was_killed_behind_its_last_step_ends_as_an_unbroken_one(tmp_path, monkeypatch, kind):
    """Before its model was saved: by the person, or by a full disk."""
    few = replace(SMOKE, theta=1.0, rows="target", epochs=2.5, batch_size=1, preference_epochs=2.5)  # not whole epochs
    monkeypatch.setattr(preference, "BATCH", 1)

    def train(folder):
        if kind == "preference":
            return preference.train_preference([[0, 1, 2], [2, 1, 0]], [[0], [1]], [1, 2], 3, few, folder)
        backbone = model.open_backbone(few, TITLES)
        log, made = training.finetune(backbone, world(), few, folder, folder / "cache")
        return backbone.model, log, made

    def stop(*args):
        raise KeyboardInterrupt

    whole, log, _ = train(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr({"sft": training, "preference": preference}[kind], "log_table", stop)
        train(tmp_path / "killed")
    assert list((tmp_path / "killed").glob("*/checkpoints/checkpoint-*"))
    resumed, log_after, made = train(tmp_path / "killed")
    pd.testing.assert_frame_equal(log_after, log)
    for name, weights in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weights), name
    assert not (made / "checkpoints").exists()


def test_checkpoints_of_a_training_that_was_killed_as_it_ended_are_removed(tmp_path):
    made, given = kept_preference(tmp_path)
    (made / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    preference.train_preference(*given)
    assert not (made / "checkpoints").exists()
    made, given = kept_sft(tmp_path)
    (made / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    training.finetune(*given)
    assert not (made / "checkpoints").exists()


# Places that cannot be written


def test_out_that_is_no_folder_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    places = [tmp_path / "file", tmp_path / "file" / "run"]
    places += [Path("/proc/flowerlib/run")] if Path("/proc/self").exists() else []  # nobody can write there
    for place in places:
        said = main(monkeypatch, reproduce, "--profile", "smoke", "--out", str(place))
        assert said.startswith(f"error: OUT cannot be the folder {place} (") and said.endswith("): give another OUT")
        assert main(monkeypatch, launch, "SFT", "--profile", "smoke", "--out", str(place)) == said
    assert (tmp_path / "file").read_bytes() == b""


def test_out_that_is_read_only_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / store.LOCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    said = main(monkeypatch, reproduce, "--profile", "smoke", "--out", str(tmp_path))
    assert said == f"error: {tmp_path} cannot be written (Read-only file system): give another OUT"


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    """Where papermill cannot write the executed notebook, and where a cell fails with words of its own."""
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "02_train_sft.ipynb")

    def stopped(*args, **kwargs):
        raise papermill.PapermillExecutionError(1, 1, "", "RuntimeError", "inline_container.cc:6\n unexpected pos", [])

    monkeypatch.setattr(reproduce.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 3 << 20))
    room = f"; {tmp_path} has 3 MB of room left: make room"
    for fails, words in ((full, "No space left on device"), (stopped, "inline_container.cc:6 unexpected pos")):
        monkeypatch.setattr(papermill, "execute_notebook", fails)
        said = main(monkeypatch, reproduce, "--profile", "smoke", "--out", str(tmp_path))
        assert words in said and said.endswith(room)


def test_a_notebook_that_stops_is_one_line(tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise papermill.PapermillExecutionError(3, 3, "x", "ValueError", "the file\nis damaged:\n\tremove it", [])

    monkeypatch.setattr(papermill, "execute_notebook", stopped)
    said = main(monkeypatch, reproduce, "--profile", "smoke", "--out", str(tmp_path))
    assert said.startswith("error: 01_prepare_the_data.ipynb stopped with ValueError: the file is damaged: remove it (")


# Damaged files: how a file is harmed, who reads it, what is said


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path):
    path.write_bytes(random.Random(0).randbytes(300))


def empty(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


HARMS = (cut, noise, empty, gone)
OTHER_JSON = [lambda path, text=text: path.write_text(text) for text in ("{}", "[]", "null", "3", '"x"', "[" * 10**5)]


def refused(read, path, remove=None, harms=HARMS):
    """Each harm of `path` ends `read` in one sentence that names it and what to remove; then it is as it was."""
    before, around = path.read_bytes(), files(path.parent)
    named = path if path.name not in MODEL else path.parent
    for harm in harms:
        harm(path)
        model._load_trained.cache_clear()  # what is in memory needs no file
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read()
        said, remove_what = str(error.value), remove or "it"
        fault = "missing" if not named.exists() else "damaged"
        cure = f"remove {remove_what} and run its notebook again"
        if fault == "missing" and not remove:
            cure = "run its notebook again"
        said = re.sub(r" \(\w+: .*\)$", "", said)  # the cause
        assert said == f"{named} is {fault}: {cure}" or harm is gone and "run notebook" in said, (harm, said)
        assert {other: content for other, content in files(path.parent).items() if other != path} == {
            other: content for other, content in around.items() if other != path}  # nothing else was touched
        path.write_bytes(before)
    read()


MODEL = ("config.json", "tokenizer.json", "model.safetensors")


def kept_preference(tmp_path):
    """A finished preference model, as train_preference leaves it, and what it was given."""
    given = [[0, 1, 2], [2, 1, 0]], [[0]], [1], 3, SMOKE, tmp_path / "preference"
    with pytest.MonkeyPatch.context() as patch:  # what a training writes, without its steps
        patch.setattr(preference.Trainer, "train", lambda self, **_: None)
        folder = preference.train_preference(*given)[2]
    store.write_json(tmp_path / "data" / "settings.json", {"settings": vars(SMOKE), "made": folder.name})
    return folder, given


def kept_sft(tmp_path):
    """A finished SFT, as finetune leaves it, and what it was given."""
    own, tables = replace(SMOKE, theta=1.0), world()
    given = model.open_backbone(own, TITLES), tables, own, tmp_path / "sft", tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:  # what a training writes, without its steps
        patch.setattr(training.FlowerTrainer, "train", lambda self, **_: None)
        return training.finetune(*given)[1], given


def test_a_damaged_training_is_one_sentence(tmp_path):
    step = tmp_path / "sft"
    folder = step / "SFT-1"
    finished_training(folder)
    store.write_json(step / "settings.json", {"settings": {}, "made": folder.name})
    for read in (lambda: model.load_trained(step), lambda: recommend(step, ["Heat"], k=1)):
        refused(read, folder / "model" / "model.safetensors", folder)
        refused(read, folder / "items.parquet", folder)
        refused(read, folder / "made.json", harms=[*HARMS, *OTHER_JSON])
        refused(read, step / "settings.json", harms=[cut, noise, empty, *OTHER_JSON])
    refused(lambda: model.load_trained(step), folder / "model" / "config.json", folder)
    shutil.rmtree(folder / "model")
    model._load_trained.cache_clear()
    with pytest.raises(FileNotFoundError, match=rf"model is missing: remove {folder} and run its notebook again"):
        model.load_trained(folder)


def test_items_of_another_training_are_refused(tmp_path):
    """They would be read as the titles of other leaves, without an error."""
    made, _ = kept_sft(tmp_path)
    assert len(model.load_trained(made).catalogue.titles) == len(TITLES)
    items = pd.read_parquet(made / "items.parquet")
    for other in (items[:4], items[::-1], items.assign(title=items.title[::-1].to_numpy())):
        other.to_parquet(made / "items.parquet", index=False)
        model._load_trained.cache_clear()
        for read in (lambda: model.load_trained(made), lambda: recommend(made, ["Heat"], k=1)):
            with pytest.raises(ValueError, match=rf"items.parquet is damaged: remove {made} and run its notebook"):
                read()


def test_a_finished_training_that_is_damaged_is_not_trained_over(tmp_path):
    made, given = kept_sft(tmp_path)
    read = lambda: training.finetune(*given)  # noqa: E731
    refused(read, made / "model" / "model.safetensors", made)
    refused(read, made / "made.json", harms=[cut, noise, empty, *OTHER_JSON])


def test_a_damaged_preference_model_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "MODEL", ())  # its weights lie in the training's folder itself
    made, given = kept_preference(tmp_path)
    for read in (lambda: preference.load_preference(tmp_path), lambda: preference.train_preference(*given)):
        refused(read, made / "model.safetensors", made)
    refused(lambda: preference.train_preference(*given), made / "made.json", harms=[cut, noise, empty, *OTHER_JSON])
    mark = tmp_path / "data" / "settings.json"
    refused(lambda: preference.load_preference(tmp_path), mark, harms=[cut, noise, empty, *OTHER_JSON])


def test_damaged_settings_are_one_sentence(tmp_path):
    store.write_json(tmp_path / "settings.json", {"settings": vars(SMOKE), "made": None})
    refused(lambda: settings("smoke", tmp_path), tmp_path / "settings.json", harms=[cut, noise, empty])
    for harm in OTHER_JSON[:-1]:
        harm(tmp_path / "settings.json")
        with pytest.raises(ValueError, match="settings.json is damaged or of another version"):
            settings("smoke", tmp_path)
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "settings.json", tmp_path / "data")
        with pytest.raises(ValueError, match="settings.json is damaged: remove it and run its notebook again"):
            compare.Comparison(tmp_path)


def test_damaged_results_are_one_sentence(tmp_path):
    path = tmp_path / "results" / "04_bias_and_diversity.json"
    row = {"method": "SFT", "n_users": 3}
    runs.write_results(path, [row], {"settings": {"profile": "x", "dataset": "x", "model": "x"}, "seconds": 1.0})
    refused(lambda: runs.read_results(path), path, harms=[*HARMS, *OTHER_JSON])
    rows = [lambda path, rows=rows: path.write_text(json.dumps({"provenance": {}, "rows": rows}))
            for rows in ([], {}, [3], [{}])]
    refused(lambda: report.headline(tmp_path), path, harms=[*HARMS, *OTHER_JSON, *rows])


def test_records_without_their_content_are_one_sentence(tmp_path, monkeypatch):
    """The lists and distributions of notebook 07, the fits of 05, the marks of `reproduce`."""
    path, origin = tmp_path / "record.json", {"seed": 3}
    store.keep(path, origin, {"commit": store.commit()}, lists=[[1]])
    partial = [lambda path, text=text: path.write_text(text) for text in (
        '{"made_from": {"seed": 3}, "provenance": {"commit": "x"}}', '{"made_from": {"seed": 3}, "lists": [[1]]}',
        '{"made_from": {"seed": 3}, "lists": [[1]], "provenance": 3}')]
    harms = [cut, noise, empty, *OTHER_JSON, *partial]
    refused(lambda: store.find(path, origin, "lists"), path, harms=harms)

    case = fit.Case(("Heat", "Fargo"), (0.0, 0.0), "counts", "sft", "reward", 0, 100, 2, 0)
    own = replace(settings("smoke", fit=True), frozen_layers=0)
    made = fit.run_case(case, own, tmp_path / "fit")
    [kept] = (tmp_path / "fit").glob("*.json")
    monkeypatch.setattr(fit, "fit_target", lambda *args: pytest.fail("was made over what cannot be read"))
    again = lambda: fit.run_case(case, own, tmp_path / "fit")  # noqa: E731
    assert again() == made
    refused(again, kept, harms=[cut, noise, empty, *OTHER_JSON])


def test_a_damaged_cache_is_one_sentence(tmp_path):
    backbone = model.open_backbone(SMOKE, TITLES)
    trunk, _ = model.split_layers(backbone.model, 1)

    def read():
        training.run_trunk(make_rows(backbone.catalogue, [[0], [1, 2]], [[3], [4]]), trunk, tmp_path, "train")

    read()
    [path] = tmp_path.glob("*.npy")
    shorter = lambda path: np.save(path, np.load(path)[:-1])  # noqa: E731
    refused(read, path, harms=[cut, noise, empty, shorter])


def test_a_report_of_damaged_files_is_one_sentence(tmp_path, monkeypatch):
    cell = nbformat.v4.new_code_cell('figure.savefig(out / "figures" / "05_a.png")')
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), store_place(tmp_path / "notebooks" / "05_a.ipynb"))
    runs.save_figure(plt.figure(), tmp_path / "figures" / "05_a.png")
    plt.close("all")
    runs.write_results(tmp_path / "results" / "06_a.json", [{"x": 1}], {"settings": {}, "seconds": 1.0})
    read = lambda: report.report(tmp_path)  # noqa: E731
    other_kind = lambda path: Image.new("L", (1, 1)).save(path, "gif")  # noqa: E731
    refused(read, tmp_path / "figures" / "05_a.png", harms=[noise, empty, other_kind])
    refused(read, tmp_path / "results" / "06_a.json", harms=[cut, noise, empty, *OTHER_JSON])
    refused(read, tmp_path / "notebooks" / "05_a.ipynb", harms=[cut, noise, empty, *OTHER_JSON[1:]])
    empty(tmp_path / "figures" / "05_a.png")
    said = main(monkeypatch, report, "--out", str(tmp_path))
    assert said.startswith(f"error: {tmp_path}/figures/05_a.png is damaged: remove it and run its notebook again (")
    monkeypatch.setattr(reproduce, "_run_all", lambda *args: None)
    given = "--profile", "smoke", "--out", str(tmp_path), "--only", "05_fit_a_known_distribution"
    assert main(monkeypatch, reproduce, *given) == said  # after the run


def store_place(path):
    path.parent.mkdir(parents=True)
    return path


def test_damaged_times_and_marks_of_a_run_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(papermill, "execute_notebook", lambda name, executed, **_: executed.write_text("{}"))
    store.write_json(tmp_path / "timings.json", {})
    for name, mark in (("timings.json", {}), ("fresh.json", 1.0)):
        store.write_json(tmp_path / name, mark)
        for harm in (cut, noise, empty):
            harm(tmp_path / name)
            content = (tmp_path / name).read_bytes()
            said = main(monkeypatch, reproduce, "--profile", "smoke", "--out", str(tmp_path))
            assert said.startswith(f"error: {tmp_path / name} is damaged: remove it and run its notebook again (")
            assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()


def test_the_cure_works_what_was_removed_is_made_again(tmp_path):
    """A notebook whose training, tables or figures are gone does not count as done."""
    made, _ = kept_preference(tmp_path)
    for path in ("data/train.parquet", "figures/01_a.png", "results/01_a.json", "notebooks/01_prepare_the_data.ipynb"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("x")
    name = reproduce.NOTEBOOKS[0]
    before = reproduce._outputs(tmp_path, name)
    for path in [made / "made.json", *(tmp_path / "data").iterdir(), tmp_path / "figures" / "01_a.png"]:
        content = path.read_bytes()
        path.unlink()
        assert reproduce._outputs(tmp_path, name) != before, path.name
        path.write_bytes(content)
    assert reproduce._outputs(tmp_path, name) == before


# Whole runs


COMMAND = [sys.executable, "-m", "flowerlib.lab.reproduce", "--profile", "smoke", "--out"]
ENV = os.environ | {"PYTHONPATH": str(store.ROOT)}


def results(folder):
    """What a run has found, but for times and where it comes from."""
    found = {}
    for path in sorted((folder / "results").glob("*.json")):
        found[path.name] = [{key: value for key, value in row.items() if "seconds" not in key}
                            for row in runs.read_results(path)]
    for path in sorted([*folder.glob("results/*.parquet"), *folder.glob("data/*.parquet")]):
        found[f"{path.parent.name}/{path.name}"] = json.loads(pd.read_parquet(path).to_json(orient="records"))
    for path in sorted(folder.glob("*/*/made.json")):
        found[path.parent.name] = len(store.read_json(path)["log"])
    return found


def left_over(folder):
    """Temporary folders, checkpoints and marks that no finished run has."""
    return [path for path in folder.rglob("*") if path.name in ("checkpoints", "fresh.json")
            or path.is_dir() and path.name.startswith(".")]


def kill_all(process):
    """The run and every process below it, at once: kernels have sessions of their own."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.suspend()
    for member in [*family, *process.children(recursive=True)]:
        member.kill()
    psutil.wait_procs(family, timeout=30)


def last_step(folder):
    """How far a run has come, in words."""
    marks = [name[:2] for name in reproduce.NOTEBOOKS if (folder / "notebooks" / f"{name[:-6]}.json").exists()]
    at = [path.parent.name.rsplit("-", 1)[0] for path in folder.glob("*/*/checkpoints")]
    return f"after {marks[-1] if marks else 'nothing'}" + (f", in the training of {at[0]}" if at else "")


def test_a_run_in_a_folder_with_a_name_like_a_leftover_stays(tmp_path):
    out = tmp_path / ".run.1"
    with store.alone(out):
        store.write_json(out / "results.json", 1)
    made_old(out / store.LOCK)
    store.write_json(tmp_path / "other.json", 2)
    assert store.read_json(out / "results.json") == 1


def test_what_is_no_fault_of_a_file_is_not_called_damage(tmp_path):
    (tmp_path / "a").touch()
    faults = OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "Input/output error"), MemoryError(), \
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for fault in faults:
        with pytest.raises(type(fault)) as raised, store.reading(tmp_path / "a"):
            raise fault
        assert raised.value is fault


def test_a_whole_checkpoint_survives_a_read_error(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    assert training.last_checkpoint(tmp_path) == str(checkpoint)

    def busy(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(Path, "read_text", busy)
        training.last_checkpoint(tmp_path)
    assert training.last_checkpoint(tmp_path) == str(checkpoint)


def test_what_a_neighbour_finishes_first_is_taken(tmp_path, monkeypatch):
    """It is looked for again once the folder is held."""
    folder, origin = tmp_path / "SFT-1", {"seed": 0}
    hold = store.alone

    def slow(held):
        with hold(held):
            store.keep(held / "made.json", origin, {"commit": store.commit()}, log=[1])
        return hold(held)

    monkeypatch.setattr(store, "alone", slow)
    with store.at_work(folder, origin, "log") as record:
        assert record["log"] == [1]


@pytest.mark.skipif(not HARD, reason="FLOWERLIB_HARD=1 kills whole runs")
def test_runs_that_are_killed_at_random_moments_come_to_the_results_of_an_unbroken_run(tmp_path):
    chance, moments, ended, temporary = random.Random(17), [], [], 0
    start = time.monotonic()
    subprocess.run([*COMMAND, str(tmp_path / "whole")], cwd=store.ROOT, env=ENV, check=True, capture_output=True)
    whole = time.monotonic() - start
    wanted = results(tmp_path / "whole")
    assert len(wanted) > 10 and left_over(tmp_path / "whole") == []
    while len(moments) < KILLS or not ended:
        folder = tmp_path / f"killed_{len(ended)}"
        with open(tmp_path / "said.txt", "w+") as said:
            started = time.monotonic()
            process = psutil.Popen([*COMMAND, str(folder)], cwd=store.ROOT, env=ENV, stdout=said, stderr=said)
            try:
                process.wait(chance.uniform(0.1, 0.6) * whole if len(moments) < KILLS else 5 * whole)
            except psutil.TimeoutExpired:
                kill_all(process)
                moments.append(f"{time.monotonic() - started:.0f} s, {last_step(folder)}")
                temporary += len(list(folder.rglob(store.LEFT)))
                continue
            said.seek(0)
            assert process.returncode == 0, said.read()[-2000:]
        assert results(folder) == wanted and left_over(folder) == [], left_over(folder)
        ended.append(folder)
    print(f"one unbroken run of {whole:.0f} s; {len(moments)} kills ({'; '.join(moments)}); {temporary} temporary "
          f"folders left by them, none at the end; {len(ended)} runs came to their end, each with the {len(wanted)} "
          f"results of the unbroken one; {time.monotonic() - start:.0f} s together")


@pytest.mark.skipif(not HARD, reason="FLOWERLIB_HARD=1 runs out of room")
def test_a_run_that_has_no_room_ends_in_one_line(tmp_path):
    """No file may grow beyond 60 kB: as on a full disk, tables and weights cannot be written."""
    import resource

    def narrow():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run([*COMMAND, str(tmp_path)], cwd=store.ROOT, env=ENV | {"PYTHONDONTWRITEBYTECODE": "1"},
                          preexec_fn=narrow, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr[-2000:]
    subprocess.run([*COMMAND, str(tmp_path)], cwd=store.ROOT, env=ENV, check=True, capture_output=True)
    assert left_over(tmp_path) == []
    print(last)
