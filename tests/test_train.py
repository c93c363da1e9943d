from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainingArguments

from flowerlib import backbone, data, losses, policy, rewards, runs, train

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "The Rock", "The Big Heat"]
HISTORIES, TARGETS = [[0, 1], [3], [2, 4, 5]], [[2, 3], [6, 0, 1], [1]]


def world(form="sequence"):
    model, tokenizer = backbone.tiny_model([*TITLES, *policy.prompt_texts("movie", form)], seed=0)
    return model, tokenizer, policy.Catalogue.build(tokenizer, TITLES, "movie", form)


def trainer(model, catalogue, folder, theta=0.7, paths="logged"):
    counts = torch.arange(1, len(TITLES) + 1)
    return train.FlowerTrainer(
        model, TrainingArguments(str(folder), report_to="none"), trie=catalogue.trie, theta=theta, lam=1.0, paths=paths,
        log_token_rewards=catalogue.trie.log_token_rewards(rewards.count_log_rewards(catalogue.trie, counts)),
    )


def naive(model, catalogue, own, log_r, history, target):
    """(log π, log r) of a target's tokens from an unpadded row of its own."""
    context = [*catalogue.context(history), *(t for item in own for t in catalogue.sequences[item])]
    sequence = catalogue.sequences[target]
    logits = model(torch.tensor([context + sequence])).logits[0].log_softmax(-1)
    log_pf = torch.stack([logits[len(context) + t - 1, token] for t, token in enumerate(sequence)])
    path = catalogue.trie.paths(catalogue.trie.leaf[target : target + 1])[0]
    return log_pf, log_r[path[path >= 0]]


def subtb(pairs):
    width = max(len(p) for p, _ in pairs)
    pad = [torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in column]) for column in zip(*pairs)]
    mask = torch.stack([torch.arange(width) < len(p) for p, _ in pairs])
    return losses.subtb_loss(*pad, mask)


def test_loss_equals_one_unpadded_row_per_title(tmp_path):
    model, _, catalogue = world()
    made = trainer(model.eval(), catalogue, tmp_path)
    rows = train.make_rows(catalogue, HISTORIES, TARGETS)
    loss = made.compute_loss(model, train.collate([rows[i] for i in range(3)]))
    pairs = [
        naive(model, catalogue, wanted[:n], made.log_r, history, target)
        for history, wanted in zip(HISTORIES, TARGETS) for n, target in enumerate(wanted)
    ]
    sft = -torch.cat([p for p, _ in pairs]).mean()
    torch.testing.assert_close(loss, 0.7 * sft + 0.3 * subtb(pairs))


def test_eos_follows_the_target_in_the_papers_form(tmp_path):
    model, tokenizer, catalogue = world("target")
    rows = train.make_rows(catalogue, [[0]], [[3]])
    made = trainer(model.eval(), catalogue, tmp_path, theta=1.0)
    loss = made.compute_loss(model, train.collate([rows[0]]))
    ids = rows[0]["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    logits = model(torch.tensor(ids)[None]).logits[0].log_softmax(-1)
    start = len(catalogue.context([0]))
    torch.testing.assert_close(loss, -torch.stack([logits[t - 1, ids[t]] for t in range(start, len(ids))]).mean())


@pytest.mark.parametrize("paths", ["reward", "policy"])
@pytest.mark.parametrize("form", ["sequence", "target"])
def test_packed_paths_see_the_prompt_and_nothing_else(tmp_path, paths, form):
    model, _, catalogue = world(form)
    made = trainer(model.train(), catalogue, tmp_path, paths=paths)
    targets = [wanted[:1] for wanted in TARGETS] if form == "target" else TARGETS
    rows = train.make_rows(catalogue, HISTORIES, targets)
    batch = train.collate([rows[i] for i in range(3)])
    batch["position_ids"] = train.positions(batch["attention_mask"])
    nodes = batch.pop("nodes")
    packed, reached, predictor, sampled = made._with_sampled_paths(model, batch, nodes)
    logits = model(**packed, use_cache=False).logits.log_softmax(-1)
    for row, history in enumerate(HISTORIES):
        columns = sampled[row].nonzero()[:, 0]
        item = catalogue.trie.leaf.tolist().index(int(reached[row, columns[-1]]))
        packed_log_pf = logits[row, predictor[row, columns], packed["input_ids"][row, columns]]
        behind = int((nodes[row, : predictor[row, columns[0]] + 1] >= 0).sum())  # target tokens before the branch
        ends = np.cumsum([len(catalogue.sequences[t]) for t in targets[row]])
        own = [t for t, end in zip(targets[row], ends) if end <= behind]
        expected, _ = naive(model, catalogue, own, made.log_r, history, item)
        torch.testing.assert_close(packed_log_pf, expected, atol=1e-4, rtol=1e-4)


def test_padding_and_batch_order_do_not_matter(tmp_path):
    model, _, catalogue = world()
    made = trainer(model.eval(), catalogue, tmp_path)
    rows = train.make_rows(catalogue, HISTORIES, TARGETS)
    orders = [0, 1, 2], [2, 1, 0]
    forth, back = (made.compute_loss(model, train.collate([rows[i] for i in order])) for order in orders)
    torch.testing.assert_close(forth, back)


def test_the_cached_trunk_gives_the_loss_of_the_whole_model(tmp_path):
    model, _, catalogue = world()
    trunk, upper = backbone.split_layers(model.eval(), 1)
    rows = train.make_rows(catalogue, HISTORIES, TARGETS)
    whole = trainer(model, catalogue, tmp_path).compute_loss(model, train.collate([rows[i] for i in range(3)]))
    rows.run_trunk(trunk, tmp_path, "train", batch_size=2)
    batch = train.collate([rows[i] for i in range(3)])
    assert batch["inputs_embeds"].dtype == torch.float32
    cached = trainer(upper, catalogue, tmp_path).compute_loss(upper, batch)
    torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-3)


def test_sampled_paths_need_every_layer():
    with pytest.raises(ValueError, match="set frozen_layers and tuned_layers to 0"):
        chosen = replace(runs.PROFILES["smoke"], paths="policy")
        train.train(None, None, None, None, chosen, None, None, torch.zeros(7))


def test_unknown_paths_are_refused(tmp_path):
    model, _, catalogue = world()
    with pytest.raises(ValueError, match="choose logged, reward or policy"):
        trainer(model, catalogue, tmp_path, paths="off")


def test_rows_hold_every_target_once():
    _, _, catalogue = world()
    rows = train.make_rows(catalogue, HISTORIES, TARGETS)
    reached = np.concatenate(rows.nodes)
    ends = catalogue.trie.node_leaf[torch.from_numpy(reached[reached >= 0])]
    assert ends[ends >= 0].tolist() == [catalogue.trie.item_leaf[t].item() for wanted in TARGETS for t in wanted]


def test_the_trunk_is_run_again_for_other_rows_or_weights_and_only_then(tmp_path, monkeypatch):
    model, _, catalogue = world()
    trunk, _ = backbone.split_layers(model.eval(), 1)
    ran = []
    states = train.Rows._states
    monkeypatch.setattr(train.Rows, "_states", lambda self, *args: ran.append(1) or states(self, *args))

    def run(targets):
        train.make_rows(catalogue, HISTORIES, targets).run_trunk(trunk, tmp_path, "train")
        return len(ran)

    assert [run(TARGETS), run(TARGETS), run(TARGETS[::-1])] == [1, 1, 2]
    with torch.no_grad():
        trunk.get_input_embeddings().weight[5] += 1
    assert run(TARGETS[::-1]) == 3
    assert len(list(tmp_path.iterdir())) == 1


TINY = replace(
    runs.PROFILES["smoke"], max_history=3, epochs=4.0, batch_size=2, evaluations=3, frozen_layers=1, tuned_layers=1
)


def run_training(folder, chosen=TINY, alpha=1.0):
    """Trains from the start; weights of the saved model and the log."""
    pairs = [(user, item) for user in range(8) for item in np.random.default_rng(user).permutation(7)[:6]]
    interactions = pd.DataFrame(pairs, columns=["user_id", "item_id"]).assign(timestamp=range(len(pairs)))
    items = pd.DataFrame({"item_id": range(7), "title": TITLES})
    tables = data.split_interactions(items, interactions, "leave-one-out", chosen.max_history)
    texts = [*TITLES, *policy.prompt_texts("movie", "sequence")]
    model, tokenizer = backbone.load_backbone(chosen, texts)
    catalogue = policy.Catalogue.build(tokenizer, TITLES, "movie")
    log_r = rewards.count_log_rewards(catalogue.trie, torch.from_numpy(data.item_counts(tables)), alpha)
    log = train.train(model, tokenizer, catalogue, tables, chosen, folder, folder / "cache", log_r)
    return policy.load_run(folder)[0].state_dict(), log


@pytest.mark.parametrize("half", [False, True])
def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, half):
    whole, log = run_training(tmp_path / "whole")
    one_step, first_steps = train._OneBar.on_step_end, []

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 15:
            raise KeyboardInterrupt
        one_step(self, args, state, control)

    monkeypatch.setattr(train._OneBar, "on_step_end", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "killed")
    if half:  # killed while it wrote a checkpoint
        (tmp_path / "killed" / "checkpoints" / "checkpoint-15").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        policy.load_run(tmp_path / "killed")
    monkeypatch.setattr(train._OneBar, "on_step_end", one_step)
    begin = train._OneBar.on_train_begin

    def noted(self, args, state, control, **kwargs):
        first_steps.append(state.global_step)
        begin(self, args, state, control)

    monkeypatch.setattr(train._OneBar, "on_train_begin", noted)
    resumed, log_after = run_training(tmp_path / "killed")
    again, log_again = run_training(tmp_path / "killed")  # finished: taken as it is
    assert len(first_steps) == 1 and first_steps[0] > 0
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name])
        torch.testing.assert_close(again[name], whole[name])
    assert log_after.step.tolist() == log_again.step.tolist() == log.step.tolist()
    run_training(tmp_path / "killed", alpha=0.0)  # other rewards
    assert first_steps[1] == 0


def test_checkpoints_of_other_settings_are_not_taken_up(tmp_path):
    (tmp_path / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "checkpoint-3" / train.TRAINER_STATE_NAME).touch()
    runs.write_json(tmp_path / "plan.json", {"seed": 0})
    assert train._last_checkpoint(tmp_path, {"seed": 0}).endswith("checkpoint-3")
    assert train._last_checkpoint(tmp_path, {"seed": 1}) is None


def test_titles_and_rows_longer_than_the_context_are_refused(tmp_path):
    model, _, catalogue = world()
    rows = train.make_rows(catalogue, HISTORIES, TARGETS)
    model.config.max_position_embeddings = len(catalogue.context([])) + 3
    with pytest.raises(ValueError, match="item 1, 'Toy Story 2', has 4 tokens"):
        train._check_lengths(model, catalogue, [rows])
    model.config.max_position_embeddings += 1
    with pytest.raises(ValueError, match="lower max_history"):
        train._check_lengths(model, catalogue, [rows])


def test_a_full_disk_is_seen_before_the_trunk_runs(tmp_path, monkeypatch):
    model, _, catalogue = world()
    trunk, _ = backbone.split_layers(model.eval(), 1)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: train.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="0 MB free: make room"):
        train.make_rows(catalogue, HISTORIES, TARGETS).run_trunk(trunk, tmp_path, "train")
    assert not list(tmp_path.iterdir())
