"""The trunk that runs once, the trainer, and trainings that lose nothing."""

import time
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainingArguments

from flowerlib import data, model as models, rewards, train
from flowerlib.lab import store, training
from flowerlib.model import load_trained, open_backbone
from flowerlib.train import TrainSettings, collate, make_rows

from tiny_rows import HISTORIES, TARGETS, TITLES, batch_of, objective, preference_model, tables_of, world


def trainer(model, folder, its_objective):
    return training.FlowerTrainer(model, TrainingArguments(str(folder), report_to="none"), objective=its_objective)


@pytest.mark.parametrize("theta", [0.0, 0.7, 1.0])
def test_the_trainer_goes_down_the_objectives_loss(tmp_path, theta):
    """The same value and the same gradient; at θ = 1 no flow is computed."""
    model, catalogue = world()
    made, batch, gradients = objective(catalogue, theta), batch_of(catalogue), []
    assert ("flow" in made(model, batch)) == (theta < 1)
    losses_of = made.loss, trainer(model, tmp_path, made).compute_loss
    values = [loss(model, batch) for loss in losses_of]
    for value in values:
        model.zero_grad()
        value.backward()
        gradients.append([w.grad.clone() for w in model.parameters()])
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_cached_trunk_gives_the_loss_of_the_whole_model(tmp_path):
    model, catalogue = world()
    trunk, upper = models.split_layers(model.eval(), 1)
    rows, made = make_rows(catalogue, HISTORIES, TARGETS), objective(catalogue)
    whole = made.loss(model, collate([rows[i] for i in range(3)]))
    training.run_trunk(rows, trunk, tmp_path, "train", batch_size=2)
    batch = collate([rows[i] for i in range(3)])
    assert batch["inputs_embeds"].dtype == torch.float32
    torch.testing.assert_close(made.loss(upper, batch), whole, rtol=1e-3, atol=1e-3)


def test_batches_of_like_lengths_hold_every_row_and_go_on_where_they_were():
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    sampler, other = training.LikeLengths(lengths, 8, seed=1), training.LikeLengths(lengths, 8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(200)) and first == list(sampler)
    sampler.set_epoch(1)
    other.set_epoch(1)
    assert list(sampler) == list(other) != first
    assert list(training.LikeLengths(lengths, 8, seed=2)) != first
    widest = [max(lengths[i] for i in first[k : k + 8]) for k in range(0, 200, 8)]
    in_order = [max(lengths[k : k + 8]) for k in range(0, 200, 8)]
    assert sum(widest) < 0.8 * sum(in_order)  # a fifth less padding


def test_the_trunk_is_run_again_for_other_rows_or_weights_or_afresh_and_only_then(tmp_path, monkeypatch):
    model, catalogue = world()
    trunk, _ = models.split_layers(model.eval(), 1)
    ran = []
    trunk.register_forward_hook(lambda *_: ran.append(1))

    def run(targets):
        training.run_trunk(make_rows(catalogue, HISTORIES, targets), trunk, tmp_path, "train")
        return len(ran)

    assert [run(TARGETS), run(TARGETS), run(TARGETS[::-1])] == [1, 1, 2]
    with torch.no_grad():
        trunk.get_input_embeddings().weight[5] += 1
    assert run(TARGETS[::-1]) == 3
    assert len(list(tmp_path.iterdir())) == 3  # what was made stays
    monkeypatch.setenv(store.FRESH, str(time.time() + 1))
    assert run(TARGETS[::-1]) == 4


def test_a_full_disk_is_seen_before_the_trunk_runs(tmp_path, monkeypatch):
    model, catalogue = world()
    trunk, _ = models.split_layers(model.eval(), 1)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: training.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="0 MB free: make room"):
        training.run_trunk(make_rows(catalogue, HISTORIES, TARGETS), trunk, tmp_path, "train")
    assert not list(tmp_path.iterdir())


# trainings

TINY = TrainSettings(
    model="tiny", max_history=3, learning_rate=3e-3, epochs=4.0, batch_size=2, evaluations=3, frozen_layers=1,
    tuned_layers=1, bfloat16=False, reward="none", flow="subtb", theta=0.5,
)


def run_training(folder, settings=TINY, alpha=1.0):
    """Trains from the start; weights of the saved model, the log and the folder."""
    tables = tables_of(settings.max_history)
    backbone = open_backbone(settings, TITLES)
    log_r = None if alpha is None else rewards.count_log_rewards(
        backbone.catalogue.trie, torch.from_numpy(data.item_counts(tables)), alpha)
    log, made = training.finetune(backbone, tables, settings, folder, folder / "cache", log_r)
    saved = load_trained(made)[0].state_dict()
    for name, weights in backbone.model.state_dict().items():  # the model in hand is the one that was saved
        torch.testing.assert_close(saved[name].cpu(), weights.cpu())
    return saved, log, made


@pytest.fixture
def begun(monkeypatch):
    """The step at which every training begins that is run; work that is taken as it is begins none."""
    steps, begin = [], training.OneBar.on_train_begin

    def noted(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.OneBar, "on_train_begin", noted)
    return steps


def kill(folder, settings=TINY, at=15):
    """Trains until a step, then is interrupted; the folder of that training."""
    one_step = training.OneBar.on_step_end

    def killed(self, args, state, control, **kwargs):
        if state.global_step == at:
            raise KeyboardInterrupt
        one_step(self, args, state, control)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.OneBar, "on_step_end", killed)
        run_training(folder, settings)
    [made] = (path.parent for path in folder.glob("*/checkpoints") if path.parent.name.startswith(settings.method))
    return made


def test_a_training_leaves_a_model_a_log_and_where_it_comes_from(tmp_path):
    _, log, made = run_training(tmp_path)
    record = store.read_json(made / "made.json")
    assert made.parent == tmp_path and made.name == f"Flower-{store.digest(record['made_from'])}"
    assert not (made / "checkpoints").exists()
    assert record["provenance"]["settings"] == asdict(TINY)
    assert record["provenance"]["seconds"] > 0 and record["provenance"]["resumed"] is False
    assert record["provenance"]["bfloat16"] is False and record["provenance"]["commit"] == store.commit()
    pd.testing.assert_frame_equal(pd.DataFrame(record["log"]), log)
    assert set(log.kind) == {"train", "validation"} and {"step", "loss", "sft", "flow"} <= set(log.columns)
    np.testing.assert_allclose(log.loss, 0.5 * log.sft + 0.5 * log.flow, rtol=1e-3)
    train_loss = log[log.kind == "train"].loss
    assert train_loss.iloc[-1] < train_loss.iloc[0]
    assert pd.read_parquet(made / "items.parquet").title.tolist() == TITLES


@pytest.mark.parametrize("half", [False, True])
def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, begun, half):
    whole, log, _ = run_training(tmp_path / "whole")
    interrupted = kill(tmp_path / "killed")
    if half:  # killed while it wrote a checkpoint
        (interrupted / "checkpoints" / "checkpoint-15").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished training"):
        load_trained(interrupted)
    begun.clear()
    monkeypatch.setattr(store, "commit", lambda: "other+changes")  # a changed comment is no reason to begin again
    resumed, log_after, made = run_training(tmp_path / "killed")
    again, log_again, _ = run_training(tmp_path / "killed")  # finished: taken as it is
    assert made == interrupted and store.read_json(made / "made.json")["provenance"]["resumed"] is True
    assert len(begun) == 1 and begun[0] > 0
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name])
        torch.testing.assert_close(again[name], whole[name])
    assert log_after.step.tolist() == log_again.step.tolist() == log.step.tolist()
    run_training(tmp_path / "killed", alpha=0.0)  # other rewards
    assert begun[1] == 0


def test_other_settings_leave_an_interrupted_training_where_it_is(tmp_path, begun):
    interrupted = kill(tmp_path)
    _, _, other = run_training(tmp_path, replace(TINY, seed=1))
    assert other != interrupted and begun == [0, 0]
    _, _, made = run_training(tmp_path)
    assert made == interrupted and begun[2] > 0


def test_a_finished_training_survives_changed_code_and_other_settings_beside_it(tmp_path, monkeypatch, begun, capsys):
    """Work is known by settings and data. That another commit made it is said; nothing is removed."""
    monkeypatch.setattr(store, "commit", lambda: "aaaaaaaaaaaa")
    weights, log, made = run_training(tmp_path)
    files = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    capsys.readouterr()
    monkeypatch.setattr(store, "commit", lambda: "bbbbbbbbbbbb+changes")
    again, log_again, made_again = run_training(tmp_path)
    said = capsys.readouterr().out
    assert made_again == made and begun == [0]
    assert f"{made.name}: made by commit aaaaaaaaaaaa, taken as it is" in said
    pd.testing.assert_frame_equal(log_again, log)
    assert all(torch.equal(again[name], x) for name, x in weights.items())
    others = {run_training(tmp_path, replace(TINY, **change))[2] for change in ({"seed": 3}, {"learning_rate": 1e-3})}
    others.add(run_training(tmp_path, alpha=0.0)[2])
    assert len(others | {made}) == 4 and begun == [0] * 4
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == files
    run_training(tmp_path)
    assert begun == [0] * 4


def test_fresh_trains_again(tmp_path, monkeypatch, begun):
    weights, _, made = run_training(tmp_path)
    before = (made / "made.json").stat().st_mtime
    time.sleep(0.02)
    monkeypatch.setenv(store.FRESH, str(time.time()))
    again, _, made_again = run_training(tmp_path)
    assert made_again == made and begun == [0, 0] and (made / "made.json").stat().st_mtime > before
    for name, x in weights.items():
        torch.testing.assert_close(again[name], x)
    run_training(tmp_path)  # made since
    assert begun == [0, 0]


def test_fresh_begins_an_interrupted_training_anew(tmp_path, monkeypatch, begun):
    kill(tmp_path)
    monkeypatch.setenv(store.FRESH, str(time.time() + 1))
    kill(tmp_path)
    assert begun == [0, 0]


def origin(settings, log_r=None, preference=None, weights=None, tables=None):
    return training.made_from(settings, tables_of() if tables is None else tables, log_r, preference, weights)


def test_sft_is_known_by_what_touches_it():
    """Two runs of other rewards share their SFT; Flower's settings and p_ui are left out of its name."""
    sft, log_r = origin(TINY), torch.zeros(7)
    assert not set(train.OF_FLOWER) & set(sft) and not {"item_rewards", "preference", "model"} & set(sft)
    assert sft["theta"] == 1.0
    for change in ({"beta": 2.0}, {"lam": 0.5}, {"n_paths": 4}, {"paths": "policy"}, {"flow": "divergence"},
                   {"reward": "div"}, {"theta": 0.1}):
        assert origin(replace(TINY, **change)) == sft
        assert origin(replace(TINY, **{**change, "theta": 1.0}), log_r, preference_model()) == sft
    assert TINY.reward == "none" and TINY.flow == "subtb" and TINY.paths == "logged"
    for change in ({"lam": 0.5}, {"paths": "policy"}, {"flow": "divergence"}, {"theta": 0.1}):
        assert origin(replace(TINY, **change), log_r) != origin(TINY, log_r)
    for change in ({"beta": 2.0}, {"n_paths": 4}):  # nothing reads them
        assert origin(replace(TINY, **change), log_r) == origin(TINY, log_r)
    drawn, exact = replace(TINY, paths="policy"), replace(TINY, reward="exact")
    assert origin(replace(drawn, n_paths=4), log_r) != origin(drawn, log_r)
    assert origin(replace(exact, beta=2.0), log_r) != origin(exact, log_r)
    divergence = replace(TINY, flow="divergence")
    assert origin(replace(divergence, lam=0.5), log_r) == origin(divergence, log_r)
    known = {f.name for f in fields(TrainSettings)} - {"model", *train.OF_FLOWER}
    assert known <= set(sft)
    for name, value in {"seed": 9, "learning_rate": 1e-4, "rows": "target", "max_history": 2, "epochs": 1.5,
                        "frozen_layers": 2, "lora_rank": 4, "validation_rows": 7, "category": "book"}.items():
        assert origin(replace(TINY, **{name: value})) != sft
    fewer = tables_of(n_users=7)
    distinct = [sft, origin(replace(TINY, model="other")), origin(TINY, tables=fewer), origin(TINY, weights=torch.ones(7))]
    assert len({store.digest(made) for made in distinct}) == 4


def test_flower_is_known_by_its_rewards_and_its_preference_too():
    log_r, likes = torch.zeros(7), preference_model()
    exact = replace(TINY, reward="exact")
    base = origin(exact, log_r, likes)
    assert set(train.OF_FLOWER) - {"n_paths"} <= set(base) and base["theta"] == TINY.theta
    other = preference_model()
    other.transformer.ln_f.bias.data.add_(1)
    assert origin(exact, log_r, preference_model()) == base  # by its weights
    assert origin(exact, log_r, other) != base
    assert origin(exact, log_r + torch.arange(7), likes) != base
    assert origin(TINY, log_r, likes) == origin(TINY, log_r)  # reward "none" asks for none


def test_bfloat16_counts_where_the_machine_computes_in_it(monkeypatch):
    able = {}
    for answer in (False, True):
        monkeypatch.setattr(training, "computes_in_bfloat16", lambda: answer)
        able[answer] = [origin(replace(TINY, bfloat16=asked))["bfloat16"] for asked in (False, True)]
    assert able == {False: [False, False], True: [False, True]}


@pytest.mark.parametrize("instructions, seconds, answer", [("avx512_bf16", 0.5, True), ("avx512_bf16", 1.9, False),
                                                           ("amx_bf16", 0.5, True), ("avx2", 0.5, False)])
def test_a_processor_must_gain_by_bfloat16(monkeypatch, instructions, seconds, answer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    monkeypatch.setattr(store, "matmul_seconds", lambda dtype=torch.float32: seconds if dtype == torch.bfloat16 else 1.0)
    assert training.computes_in_bfloat16.__wrapped__() is answer


def test_sft_of_any_theta_is_one_training(tmp_path, begun):
    """Without item rewards it is SFT, whatever the settings say of Flower."""
    _, log, made = run_training(tmp_path, alpha=None)
    assert made.name.startswith("SFT-") and "flow" not in log and len(begun) == 1
    assert run_training(tmp_path, replace(TINY, theta=1.0, lam=0.3))[2] == made and len(begun) == 1
    assert store.read_json(made / "made.json")["provenance"]["settings"]["theta"] == 1.0


@pytest.mark.parametrize("paths", ["reward", "policy"])
def test_the_trainer_validates_the_same_twice(tmp_path, paths):
    """Whatever was drawn before, in batches of any rows; so that checkpoints can be held against each other."""
    model, catalogue = world()
    rows = train.validation_rows(catalogue, tables_of(), TrainSettings(validation_rows=0))
    made = training.FlowerTrainer(model, training.trainer_arguments(TINY, tmp_path, 8), eval_dataset=rows,
                               objective=objective(catalogue, paths=paths, n_paths=2))
    names, found = ("eval_loss", "eval_sft", "eval_flow"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values = made.evaluate()
        found.append([values[name] for name in names])
    assert found[0] == found[1] and found[0][2] > 0
    assert found[0][0] == pytest.approx(0.7 * found[0][1] + 0.3 * found[0][2], rel=1e-5)


def test_validation_is_the_mean_over_all_terms_whatever_the_batches(tmp_path):
    model, catalogue = world()
    rows, loss = train.validation_rows(catalogue, tables_of(), TrainSettings(validation_rows=0)), objective(catalogue)
    with torch.no_grad():
        whole = loss(model.eval(), train.collate([rows[i] for i in range(len(rows))]))
    for device_batch in (1, 2):
        arguments = training.trainer_arguments(replace(TINY, device_batch=device_batch), tmp_path, 8)
        found = training.FlowerTrainer(model, arguments, eval_dataset=rows, objective=loss).evaluate()
        for name, (mean, _) in whole.items():
            assert found[f"eval_{name}"] == pytest.approx(mean.item(), rel=1e-4)
        total = loss.total({name: mean for name, (mean, _) in whole.items()}).item()
        assert found["eval_loss"] == pytest.approx(total, rel=1e-4)


def test_lora_is_merged_into_the_saved_model(tmp_path):
    whole = open_backbone(TINY, TITLES).model.state_dict()
    weights, _, _ = run_training(tmp_path, replace(TINY, lora_rank=2, epochs=1.0))
    assert weights.keys() == whole.keys()
    changed = {name for name in whole if not torch.equal(weights[name].cpu(), whole[name])}
    assert changed and all("layers.1." in name and "proj" in name for name in changed)


@pytest.mark.parametrize("paths", ["reward", "policy"])
def test_drawn_paths_go_through_the_frozen_layers_and_leave_them_as_they_are(tmp_path, paths):
    whole = open_backbone(TINY, TITLES).model.state_dict()
    weights, _, _ = run_training(tmp_path, replace(TINY, paths=paths, epochs=1.0))
    changed = {name for name in whole if not torch.equal(weights[name].cpu(), whole[name])}
    assert changed == {name for name in whole if "layers.0." not in name and "embed_tokens" not in name}
    with pytest.raises(ValueError, match="set lora_rank to 0"):
        run_training(tmp_path, replace(TINY, paths=paths, lora_rank=2))


@pytest.mark.parametrize("whole", [False, True])
def test_training_in_bfloat16_comes_close_and_leaves_a_model_in_float32(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(training, "computes_in_bfloat16", lambda: True)
    settings = replace(TINY, frozen_layers=0, tuned_layers=0) if whole else TINY
    weights, log, _ = run_training(tmp_path, settings)
    rounded, log_16, made = run_training(tmp_path, replace(settings, bfloat16=True))
    assert not log_16.loss.equals(log.loss)
    np.testing.assert_allclose(log_16.loss, log.loss, rtol=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values()) and rounded.keys() == weights.keys()
    assert load_trained(made)[0](torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert store.read_json(made / "made.json")["provenance"]["bfloat16"] is True


def test_a_training_that_runs_into_nan_ends_in_a_sentence_and_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Objective, "total", lambda self, parts: parts["sft"] * torch.nan)
    with pytest.raises(ValueError, match=r"^sft is nan at step \d+: lower learning_rate, or set bfloat16 to False$"):
        run_training(tmp_path)
    assert not list(tmp_path.rglob("made.json"))


def test_half_written_checkpoints_are_passed_over(tmp_path):
    for step, whole in ((3, True), (6, False)):
        (tmp_path / f"checkpoint-{step}").mkdir(parents=True)
        if whole:
            (tmp_path / f"checkpoint-{step}" / training.TRAINER_STATE_NAME).write_text("{}")
    assert training.last_checkpoint(tmp_path).endswith("checkpoint-3")
    assert training.last_checkpoint(tmp_path / "nothing") is None


def test_titles_and_rows_longer_than_the_context_are_refused(tmp_path):
    model, catalogue = world()
    rows = make_rows(catalogue, HISTORIES, TARGETS)
    model.config.max_position_embeddings = len(catalogue.context([])) + 3
    with pytest.raises(ValueError, match="item 1, 'Toy Story 2', has 4 tokens"):
        training._check_lengths(model, catalogue, [rows])
    model.config.max_position_embeddings += 1
    with pytest.raises(ValueError, match="lower max_history"):
        training._check_lengths(model, catalogue, [rows])


@pytest.mark.parametrize(("batch_size", "processes", "parts"), [
    (16, 1, (16, 1)), (16, 2, (8, 1)), (24, 1, (12, 2)), (64, 2, (16, 2)),
])
def test_a_batch_is_shared_out_evenly(batch_size, processes, parts):
    assert training._parted(batch_size, 16, processes) == parts
    with pytest.raises(ValueError, match="batch_size 17 does not part into equal batches .* a multiple of 2"):
        training._parted(17, 16, processes)


def test_a_missing_preference_model_is_told_before_anything_is_computed(tmp_path):
    with pytest.raises(ValueError, match="run notebook 01"):
        run_training(tmp_path, replace(TINY, reward="exact"))
    assert not list(tmp_path.rglob("*.npy"))
