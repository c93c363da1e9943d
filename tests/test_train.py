"""Rows, Flower's loss of a batch against unpadded rows of single titles, and trainings that lose nothing."""

import json
import os
import shutil
import time
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, TrainingArguments

from flowerlib import data, losses, model as models, rewards, train
from flowerlib.lab import store, training
from flowerlib.lab.preference import PreferenceModel
from flowerlib.model import load_trained, open_backbone
from flowerlib.train import Objective, TrainSettings, collate, make_rows

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "The Rock", "The Big Heat"]
HISTORIES, TARGETS = [[0, 1], [3], [2, 4, 5]], [[2, 3], [6, 0, 1], [1]]


def world(form="sequence"):
    model, tokenizer = models.tiny_model([*TITLES, *models.prompt_texts("movie", form)], seed=0)
    return model, models.Catalogue.build(tokenizer, TITLES, "movie", form)


def objective(catalogue, theta=0.7, paths="logged", reward="none", flow="subtb", n_paths=1, beta=0.5, **more):
    counts = torch.arange(1, len(TITLES) + 1)
    settings = TrainSettings(theta=theta, paths=paths, reward=reward, flow=flow, beta=beta, n_paths=n_paths)
    return Objective(catalogue.trie, rewards.count_log_rewards(catalogue.trie, counts), settings, **more)


def trainer(model, folder, its_objective):
    return training.FlowerTrainer(model, TrainingArguments(str(folder), report_to="none"), objective=its_objective)


def batch_of(catalogue, targets=TARGETS, order=(0, 1, 2)):
    rows = make_rows(catalogue, HISTORIES, targets)
    return collate([rows[i] for i in order])


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
    model, catalogue = world()
    made, batch = objective(catalogue), batch_of(catalogue)
    parts = made(model.eval(), batch)
    pairs = [
        naive(model, catalogue, wanted[:n], made.log_r, history, target)
        for history, wanted in zip(HISTORIES, TARGETS) for n, target in enumerate(wanted)
    ]
    sft = -torch.cat([p for p, _ in pairs]).mean()
    torch.testing.assert_close(parts["sft"][0], sft)
    torch.testing.assert_close(parts["flow"][0], subtb(pairs))
    assert int(parts["sft"][1]) == sum(len(p) for p, _ in pairs)  # terms of each mean: tokens, and sub-paths
    assert int(parts["flow"][1]) == sum(len(p) * (len(p) + 1) // 2 for p, _ in pairs)
    torch.testing.assert_close(made.loss(model, batch), 0.7 * sft + 0.3 * subtb(pairs))


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


def test_eos_follows_the_target_in_the_papers_form():
    model, catalogue = world("target")
    rows = make_rows(catalogue, [[0]], [[3]])
    loss = objective(catalogue, theta=1.0).loss(model.eval(), collate([rows[0]]))
    ids = rows[0]["input_ids"]
    assert ids[-1] == catalogue.eos == 0
    logits = model(torch.tensor(ids)[None]).logits[0].log_softmax(-1)
    start = len(catalogue.context([0]))
    torch.testing.assert_close(loss, -torch.stack([logits[t - 1, ids[t]] for t in range(start, len(ids))]).mean())


def titles_before(catalogue, wanted, nodes, column):
    """The targets of a row that are complete before a column."""
    behind = int((nodes[:column] >= 0).sum())
    ends = np.cumsum([len(catalogue.sequences[t]) for t in wanted])
    return [t for t, end in zip(wanted, ends) if end <= behind]


@pytest.mark.parametrize("n_paths", [1, 3])
@pytest.mark.parametrize("paths", ["reward", "policy"])
@pytest.mark.parametrize("form", ["sequence", "target"])
def test_packed_paths_see_the_prompt_and_nothing_else(paths, form, n_paths):
    model, catalogue = world(form)
    made = objective(catalogue, paths=paths, n_paths=n_paths)
    targets = [wanted[:1] for wanted in TARGETS] if form == "target" else TARGETS
    batch = batch_of(catalogue, targets)
    nodes, width = batch["nodes"], batch["nodes"].shape[1]
    starts = (nodes >= 0) & (catalogue.trie.depth[nodes.clamp(min=0)] == 1)
    branch = torch.multinomial(starts.float(), n_paths, replacement=True)
    drawn = made.draw_leaves(model.train(), batch, branch, torch.zeros_like(nodes), None)
    packed, predictor = made.packed(batch, catalogue.trie.paths(drawn.flatten()).view(3, -1), branch)
    logits = model(**packed, use_cache=False).logits.log_softmax(-1)
    length = (packed["input_ids"].shape[1] - width) // n_paths
    for row, history in enumerate(HISTORIES):
        for path in range(n_paths):
            item = catalogue.trie.leaf.tolist().index(int(drawn[row, path]))
            begin = width + path * length
            columns = torch.arange(begin, begin + len(catalogue.sequences[item]))
            assert packed["input_ids"][row, columns].tolist() == catalogue.sequences[item]
            packed_log_pf = logits[row, predictor[row, columns], packed["input_ids"][row, columns]]
            own = titles_before(catalogue, targets[row], nodes[row], int(branch[row, path]))
            expected, _ = naive(model, catalogue, own, made.log_r, history, item)
            torch.testing.assert_close(packed_log_pf, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("paths", "reward", "flow"), [
    ("reward", "none", "subtb"), ("policy", "none", "subtb"), ("reward", "exact", "divergence"),
    ("policy", "add", "subtb"),
])
def test_validation_measures_the_loss_that_is_trained(paths, reward, flow, training):
    """Drawn paths in both: the flow part is that of the drawn titles, one unpadded row each, the SFT part that of the
    logged ones."""
    model, catalogue = world()
    likes, trie = preference_model(), catalogue.trie
    made = objective(catalogue, 0.4, paths, reward, flow, n_paths=2, preference=likes)
    batch, taken, draw = batch_of(catalogue), [], made.draw_leaves

    def watched(model, batch, branch, before, log_p):
        leaves = draw(model, batch, branch, before, log_p)
        taken.append((branch, leaves))
        return leaves

    made.draw_leaves = watched
    parts = made(model.train(training), batch)
    assert model.training == training
    [(branch, leaves)] = taken
    assert branch.shape == leaves.shape == (3, 2) and (trie.node_leaf[leaves] >= 0).all()
    pairs, divergences = [], []
    for row, history in enumerate(HISTORIES):
        for column, node in zip(branch[row].tolist(), leaves[row].tolist()):
            own = titles_before(catalogue, TARGETS[row], batch["nodes"][row], column)
            target = trie.leaf.tolist().index(node)
            log_r, tilt = tilts(catalogue, likes, reward, [*history, *own])
            log_pf, log_r_path = naive(model, catalogue, own, log_r, history, target)
            pairs.append((log_pf, tilt(log_r_path, target)))
            divergences += node_divergences(model, catalogue, own, log_r, history, target)
    expected = subtb(pairs) if flow == "subtb" else torch.stack(divergences).mean()
    torch.testing.assert_close(parts["flow"][0], expected, atol=1e-5, rtol=1e-4)
    logged = [-naive(model, catalogue, wanted[:n], made.log_r, history, target)[0]
              for history, wanted in zip(HISTORIES, TARGETS) for n, target in enumerate(wanted)]
    torch.testing.assert_close(parts["sft"][0], torch.cat(logged).mean())
    torch.testing.assert_close(made.total({"sft": parts["sft"][0], "flow": parts["flow"][0]}),
                               0.4 * torch.cat(logged).mean() + 0.6 * expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("paths", ["reward", "policy"])
def test_validation_draws_by_the_seed_and_leaves_training_its_own_draws(paths):
    model, catalogue = world()
    made, batch = objective(catalogue, paths=paths, n_paths=3), batch_of(catalogue)
    values, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        values.append(made.loss(model.eval(), batch).item())
        states.append(torch.equal(torch.get_rng_state(), before))
    assert values[0] == values[1] and all(states)
    other = Objective(catalogue.trie, made.log_item_rewards, replace(made.settings, seed=1))
    assert other.loss(model, batch).item() != values[0]
    torch.manual_seed(1)
    trained = [made.loss(model.train(), batch).item() for _ in range(2)]
    assert trained[0] != trained[1]


def test_padding_and_batch_order_do_not_matter():
    model, catalogue = world()
    made = objective(catalogue)
    forth, back = (made.loss(model.eval(), batch_of(catalogue, order=order)) for order in ([0, 1, 2], [2, 1, 0]))
    torch.testing.assert_close(forth, back)


def test_the_cached_trunk_gives_the_loss_of_the_whole_model(tmp_path):
    model, catalogue = world()
    trunk, upper = models.split_layers(model.eval(), 1)
    rows, made = make_rows(catalogue, HISTORIES, TARGETS), objective(catalogue)
    whole = made.loss(model, collate([rows[i] for i in range(3)]))
    training.run_trunk(rows, trunk, tmp_path, "train", batch_size=2)
    batch = collate([rows[i] for i in range(3)])
    assert batch["inputs_embeds"].dtype == torch.float32
    torch.testing.assert_close(made.loss(upper, batch), whole, rtol=1e-3, atol=1e-3)


def test_sampled_paths_need_every_layer():
    with pytest.raises(ValueError, match="set frozen_layers and tuned_layers to 0"):
        training.finetune(None, None, TrainSettings(paths="policy"), None, None, torch.zeros(7))


@pytest.mark.parametrize("reward", ["exact", "div", "add"])
def test_a_reward_with_preference_needs_the_model_of_it(reward):
    _, catalogue = world()
    with pytest.raises(ValueError, match="needs a preference model"):
        objective(catalogue, reward=reward, flow="subtb")
    objective(catalogue, theta=1.0, reward=reward, flow="subtb")  # SFT reads no reward


def preference_model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(TITLES) + 1, n_positions=9, n_embd=16, n_layer=1, n_head=2)
    return PreferenceModel(config).eval()


def tilts(catalogue, likes, reward, titles):
    """log r of every edge for a user who has read these titles; and what the paper's tilts make of a title's log r."""
    trie = catalogue.trie
    log_p = likes.after([trie.item_leaf[titles].tolist()])[0]
    counts = rewards.count_log_rewards(trie, torch.arange(1, len(TITLES) + 1)).float()
    log_r = trie.log_token_rewards(counts + (0.5 * log_p[trie.item_leaf] if reward == "exact" else 0))
    if reward in ("none", "exact"):
        return log_r, lambda path, target: path
    return log_r, lambda path, target: rewards.tilted(path[None], log_p[None], trie.item_leaf[[target]], reward, 0.5)[0]


def node_divergences(model, catalogue, own, log_r, history, target):
    """Σ r (log r − log π) over the children of every node of a title, from an unpadded row."""
    trie, node, found = catalogue.trie, 0, []
    ids = [*catalogue.context(history), *(t for item in own for t in catalogue.sequences[item])]
    sequence = catalogue.sequences[target]
    logits = model(torch.tensor([ids + sequence])).logits[0].log_softmax(-1)
    for t, token in enumerate(sequence):
        children = range(int(trie.child_start[node]), int(trie.child_start[node + 1]))
        found.append(sum(log_r[c].exp() * (log_r[c] - logits[len(ids) + t - 1, trie.token[c]]) for c in children))
        node = int(trie.advance(torch.tensor([node]), torch.tensor([token]))[0])
    return found


@pytest.mark.parametrize("reward", ["exact", "div", "add"])
def test_preferences_are_those_of_the_rows_own_titles(reward):
    """Against one unpadded row per title, with the preference after just the titles that stand before it."""
    model, catalogue = world()
    likes = preference_model()
    loss = objective(catalogue, reward=reward, preference=likes).loss(model.eval(), batch_of(catalogue))
    pairs, sft = [], []
    for history, wanted in zip(HISTORIES, TARGETS):
        for n, target in enumerate(wanted):
            log_r, tilt = tilts(catalogue, likes, reward, [*history, *wanted[:n]])
            log_pf, log_r = naive(model, catalogue, wanted[:n], log_r, history, target)
            pairs.append((log_pf, tilt(log_r, target)))
            sft.append(-log_pf)
    torch.testing.assert_close(loss, 0.7 * torch.cat(sft).mean() + 0.3 * subtb(pairs))


def test_flower_kl_is_the_divergence_at_every_node_of_the_titles():
    model, catalogue = world()
    likes = preference_model()
    made = objective(catalogue, theta=0.0, reward="exact", flow="divergence", preference=likes)
    loss = made.loss(model.eval(), batch_of(catalogue))
    divergences = []
    for history, wanted in zip(HISTORIES, TARGETS):
        for n, target in enumerate(wanted):
            log_r, _ = tilts(catalogue, likes, "exact", [*history, *wanted[:n]])
            divergences += node_divergences(model, catalogue, wanted[:n], log_r, history, target)
    torch.testing.assert_close(loss, torch.stack(divergences).mean())


def test_weights_of_targets_stand_inside_the_mean():
    model, catalogue = world()
    weights = torch.arange(len(TITLES)) / 3
    made = objective(catalogue, theta=1.0, leaf_weights=weights)
    loss = made.loss(model.eval(), batch_of(catalogue))
    terms = [-weights[target] * naive(model, catalogue, wanted[:n], made.log_r, history, target)[0]
             for history, wanted in zip(HISTORIES, TARGETS) for n, target in enumerate(wanted)]
    torch.testing.assert_close(loss, torch.cat(terms).mean())


@pytest.mark.parametrize("paths", ["reward", "policy"])
def test_drawn_paths_train_with_preferences(paths):
    model, catalogue = world()
    likes = preference_model()
    made = objective(catalogue, paths=paths, reward="exact", flow="divergence", n_paths=2, preference=likes)
    torch.manual_seed(0)
    made.loss(model.train(), batch_of(catalogue)).backward()
    assert torch.isfinite(model.lm_head.weight.grad).all() and (model.lm_head.weight.grad != 0).any()


def test_titles_are_drawn_from_the_reward_of_the_user_who_stands_there():
    """An exact reward: shares of many draws against (count + 1) · p_ui after the row's own titles."""
    model, catalogue = world()
    likes, n = preference_model(), 6000
    likes.get_output_embeddings().weight.data.mul_(40)  # users who differ
    made = objective(catalogue, paths="reward", reward="exact", preference=likes, beta=1.0)
    batch = batch_of(catalogue)
    starts = (batch["nodes"] >= 0) & (catalogue.trie.depth[batch["nodes"].clamp(min=0)] == 1)
    before = (batch["n_history"][:, None] + starts.cumsum(-1) - 1).clamp(min=0)
    branch = torch.stack([row.nonzero()[-1] for row in starts])
    torch.manual_seed(0)
    drawn = made.draw_leaves(model.train(), batch, branch.expand(-1, n), before, made._log_p(batch["leaves"]))
    for row, (history, wanted) in enumerate(zip(HISTORIES, TARGETS)):
        log_p = likes.after([catalogue.trie.item_leaf[[*history, *wanted[:-1]]].tolist()])[0]
        share = (torch.arange(2, len(TITLES) + 2).log() + log_p).softmax(-1).double().numpy()
        found = np.bincount(catalogue.trie.node_leaf[drawn[row]], minlength=len(TITLES)) / n
        assert (np.abs(found - share) < 5 * np.sqrt(share * (1 - share) / n) + 1e-3).all()


# rows


def test_rows_hold_every_target_once():
    _, catalogue = world()
    rows = make_rows(catalogue, HISTORIES, TARGETS)
    reached = np.concatenate(rows.nodes)
    ends = catalogue.trie.node_leaf[torch.from_numpy(reached[reached >= 0])]
    assert ends[ends >= 0].tolist() == [catalogue.trie.item_leaf[t].item() for wanted in TARGETS for t in wanted]


def tables_of(max_history=3, n_users=8):
    pairs = [(user, item) for user in range(n_users) for item in np.random.default_rng(user).permutation(7)[:6]]
    interactions = pd.DataFrame(pairs, columns=["user_id", "item_id"]).assign(timestamp=range(len(pairs)))
    items = pd.DataFrame({"item_id": range(7), "title": TITLES})
    return data.split_interactions(items, interactions, "leave-one-out", max_history)


@pytest.mark.parametrize("form", ["sequence", "target"])
def test_training_rows_hold_every_training_target_once(form):
    _, catalogue = world(form)
    tables, settings = tables_of(max_history=3), TrainSettings(rows=form, max_history=3)
    rows = train.training_rows(catalogue, tables, settings)
    reached = torch.from_numpy(np.concatenate(rows.nodes))
    leaves = catalogue.trie.node_leaf[reached[reached >= 0]]
    if form == "target":  # a user's first title has no history: it is no target
        expected, per_row = tables.train.target.tolist(), 1
    else:
        expected, per_row = data.sequences(tables.train)[0].tolist(), 3
    assert sorted(leaves[leaves >= 0].tolist()) == sorted(catalogue.trie.item_leaf[expected].tolist())
    assert max(len(row) - n for row, n in zip(rows.leaves, rows.n_history)) == per_row
    assert (np.concatenate(rows.nodes) == train.EOS_TARGET).sum() == (len(rows) if form == "target" else 0)


def test_validation_rows_are_drawn_by_the_seed():
    _, catalogue = world()
    tables = tables_of()
    every = train.validation_rows(catalogue, tables, TrainSettings(validation_rows=0))
    assert len(every) == len(tables.valid)
    assert sorted(row[-1] for row in every.leaves) == sorted(tables.valid.target)

    def drawn(seed):
        return train.validation_rows(catalogue, tables, TrainSettings(validation_rows=3, seed=seed)).leaves

    assert len(drawn(0)) == 3 and drawn(0) == drawn(0) != drawn(1)
    assert all(row in every.leaves for row in drawn(1))


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


def test_the_trunk_is_run_again_for_other_rows_or_weights_and_only_then(tmp_path, monkeypatch):
    model, catalogue = world()
    trunk, _ = models.split_layers(model.eval(), 1)
    ran = []
    states = training._states
    monkeypatch.setattr(training, "_states", lambda *args: ran.append(1) or states(*args))

    def run(targets):
        training.run_trunk(make_rows(catalogue, HISTORIES, targets), trunk, tmp_path, "train")
        return len(ran)

    assert [run(TARGETS), run(TARGETS), run(TARGETS[::-1])] == [1, 1, 2]
    with torch.no_grad():
        trunk.get_input_embeddings().weight[5] += 1
    assert run(TARGETS[::-1]) == 3
    assert len(list(tmp_path.iterdir())) == 3  # what was made stays


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
        if change != {"reward": "div"}:
            assert origin(replace(TINY, **change), log_r) != origin(TINY, log_r)
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
    assert set(train.OF_FLOWER) <= set(base) and base["theta"] == TINY.theta
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
    made = training.FlowerTrainer(model, training._arguments(TINY, tmp_path, 8), eval_dataset=rows,
                               objective=objective(catalogue, paths=paths, n_paths=2))
    names, found = ("eval_loss", "eval_sft", "eval_flow"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values = made.evaluate()
        found.append([values[name] for name in names])
    assert found[0] == found[1] and found[0][2] > 0
    assert found[0][0] == pytest.approx(0.7 * found[0][1] + 0.3 * found[0][2], rel=1e-5)


def test_lora_is_merged_into_the_saved_model(tmp_path):
    whole = open_backbone(TINY, TITLES).model.state_dict()
    weights, _, _ = run_training(tmp_path, replace(TINY, lora_rank=2, epochs=1.0))
    assert weights.keys() == whole.keys()
    changed = {name for name in whole if not torch.equal(weights[name].cpu(), whole[name])}
    assert changed and all("layers.1." in name and "proj" in name for name in changed)


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


def test_half_written_checkpoints_are_passed_over(tmp_path):
    for step, whole in ((3, True), (6, False)):
        (tmp_path / f"checkpoint-{step}").mkdir(parents=True)
        if whole:
            (tmp_path / f"checkpoint-{step}" / training.TRAINER_STATE_NAME).touch()
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


def test_a_full_disk_is_seen_before_the_trunk_runs(tmp_path, monkeypatch):
    model, catalogue = world()
    trunk, _ = models.split_layers(model.eval(), 1)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: training.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="0 MB free: make room"):
        training.run_trunk(make_rows(catalogue, HISTORIES, TARGETS), trunk, tmp_path, "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("batch_size", "processes", "parts"), [
    (16, 1, (16, 1)), (16, 2, (8, 1)), (24, 1, (12, 2)), (64, 2, (16, 2)),
])
def test_a_batch_is_shared_out_evenly(batch_size, processes, parts):
    assert training._parted(batch_size, 16, processes) == parts
    with pytest.raises(ValueError, match="batch_size 17 does not part into equal batches .* a multiple of 2"):
        training._parted(17, 16, processes)


# settings


@pytest.mark.parametrize(("wrong", "message"), [
    ({"paths": "loged"}, "paths is 'loged': choose one of logged, reward, policy"),
    ({"rows": "row"}, "choose one of sequence, target"),
    ({"flow": "children"}, "choose one of subtb, divergence"),
    ({"theta": 9.5}, "theta is 9.5: it must lie between 0 and 1"),
    ({"beta": float("nan")}, "beta is nan"),
    ({"epochs": 0.0}, "epochs is 0.0"),
    ({"batch_size": 0}, "batch_size is 0: it must lie between 1"),
    ({"max_history": 0}, "max_history is 0"),
    ({"validation_rows": -5}, "validation_rows is -5"),
    ({"frozen_layers": 0}, "would throw the lower layers away"),
    ({"flow": "divergence", "reward": "div"}, "set flow to subtb"),
])
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**wrong)


def test_methods_have_two_names():
    assert TrainSettings().method == "Flower-KL"
    assert TrainSettings(flow="subtb", reward="div").method == "Flower"
    assert TrainSettings(theta=1.0).method == TrainSettings(theta=1.0, flow="subtb").method == "SFT"
