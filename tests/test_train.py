from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainingArguments

from flowerlib import backbone, batches, data, decoding, losses, policy, preference, rewards, runs, train

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "The Rock", "The Big Heat"]
HISTORIES, TARGETS = [[0, 1], [3], [2, 4, 5]], [[2, 3], [6, 0, 1], [1]]


def world(form="sequence"):
    model, tokenizer = backbone.tiny_model([*TITLES, *policy.prompt_texts("movie", form)], seed=0)
    return model, tokenizer, policy.Catalogue.build(tokenizer, TITLES, "movie", form)


def trainer(model, catalogue, folder, theta=0.7, paths="logged", reward="none", flow="subtb", n_paths=1, **more):
    counts = torch.arange(1, len(TITLES) + 1)
    chosen = replace(runs.PROFILES["smoke"], theta=theta, paths=paths, reward=reward, flow=flow, beta=0.5,
                     n_paths=n_paths)
    return train.FlowerTrainer(
        model, TrainingArguments(str(folder), report_to="none"), trie=catalogue.trie, chosen=chosen,
        log_item_rewards=rewards.count_log_rewards(catalogue.trie, counts), **more,
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
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
    loss = made.compute_loss(model, batches.collate([rows[i] for i in range(3)]))
    pairs = [
        naive(model, catalogue, wanted[:n], made.log_r, history, target)
        for history, wanted in zip(HISTORIES, TARGETS) for n, target in enumerate(wanted)
    ]
    sft = -torch.cat([p for p, _ in pairs]).mean()
    torch.testing.assert_close(loss, 0.7 * sft + 0.3 * subtb(pairs))


def test_eos_follows_the_target_in_the_papers_form(tmp_path):
    model, tokenizer, catalogue = world("target")
    rows = batches.make_rows(catalogue, [[0]], [[3]])
    made = trainer(model.eval(), catalogue, tmp_path, theta=1.0)
    loss = made.compute_loss(model, batches.collate([rows[0]]))
    ids = rows[0]["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    logits = model(torch.tensor(ids)[None]).logits[0].log_softmax(-1)
    start = len(catalogue.context([0]))
    torch.testing.assert_close(loss, -torch.stack([logits[t - 1, ids[t]] for t in range(start, len(ids))]).mean())


@pytest.mark.parametrize("n_paths", [1, 3])
@pytest.mark.parametrize("paths", ["reward", "policy"])
@pytest.mark.parametrize("form", ["sequence", "target"])
def test_packed_paths_see_the_prompt_and_nothing_else(tmp_path, paths, form, n_paths):
    model, _, catalogue = world(form)
    made = trainer(model.train(), catalogue, tmp_path, paths=paths, n_paths=n_paths)
    targets = [wanted[:1] for wanted in TARGETS] if form == "target" else TARGETS
    rows = batches.make_rows(catalogue, HISTORIES, targets)
    batch = batches.collate([rows[i] for i in range(3)])
    nodes, width = batch["nodes"], batch["nodes"].shape[1]
    starts = (nodes >= 0) & (catalogue.trie.depth[nodes.clamp(min=0)] == 1)
    branch = torch.multinomial(starts.float(), n_paths, replacement=True)
    drawn = made._draw_leaves(model, batch, branch, torch.zeros_like(nodes), None)
    packed, predictor, sampled = made._packed(batch, catalogue.trie.paths(drawn.flatten()).view(3, n_paths, -1), branch)
    logits = model(**packed, use_cache=False).logits.log_softmax(-1)
    length = (packed["input_ids"].shape[1] - width) // n_paths
    for row, history in enumerate(HISTORIES):
        for path in range(n_paths):
            begin = width + path * length
            columns = begin + sampled[row, begin : begin + length].nonzero()[:, 0]
            item = catalogue.trie.leaf.tolist().index(int(drawn[row, path]))
            packed_log_pf = logits[row, predictor[row, columns], packed["input_ids"][row, columns]]
            behind = int((nodes[row, : branch[row, path]] >= 0).sum())  # target tokens before the branch
            ends = np.cumsum([len(catalogue.sequences[t]) for t in targets[row]])
            own = [t for t, end in zip(targets[row], ends) if end <= behind]
            expected, _ = naive(model, catalogue, own, made.log_r, history, item)
            torch.testing.assert_close(packed_log_pf, expected, atol=1e-4, rtol=1e-4)


def test_padding_and_batch_order_do_not_matter(tmp_path):
    model, _, catalogue = world()
    made = trainer(model.eval(), catalogue, tmp_path)
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
    orders = [0, 1, 2], [2, 1, 0]
    forth, back = (made.compute_loss(model, batches.collate([rows[i] for i in order])) for order in orders)
    torch.testing.assert_close(forth, back)


def test_the_cached_trunk_gives_the_loss_of_the_whole_model(tmp_path):
    model, _, catalogue = world()
    trunk, upper = backbone.split_layers(model.eval(), 1)
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
    whole = trainer(model, catalogue, tmp_path).compute_loss(model, batches.collate([rows[i] for i in range(3)]))
    rows.run_trunk(trunk, tmp_path, "train", batch_size=2)
    batch = batches.collate([rows[i] for i in range(3)])
    assert batch["inputs_embeds"].dtype == torch.float32
    cached = trainer(upper, catalogue, tmp_path).compute_loss(upper, batch)
    torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-3)


def test_sampled_paths_need_every_layer():
    with pytest.raises(ValueError, match="set frozen_layers and tuned_layers to 0"):
        chosen = replace(runs.PROFILES["smoke"], paths="policy")
        train.train(None, None, None, None, chosen, None, None, torch.zeros(7))


def test_a_reward_with_preference_needs_the_model_of_it(tmp_path):
    model, _, catalogue = world()
    with pytest.raises(ValueError, match="needs a preference model"):
        trainer(model, catalogue, tmp_path, reward="exact")


def preference_model():
    torch.manual_seed(0)
    config = preference.GPT2Config(vocab_size=len(TITLES) + 1, n_positions=9, n_embd=16, n_layer=1, n_head=2)
    return preference.PreferenceModel(config).eval()


@pytest.mark.parametrize("reward", ["exact", "div", "add"])
def test_preferences_are_those_of_the_rows_own_titles(tmp_path, reward):
    """Against one unpadded row per title, with the preference after just the titles that stand before it."""
    model, _, catalogue = world()
    likes, trie = preference_model(), catalogue.trie
    made = trainer(model.eval(), catalogue, tmp_path, reward=reward, preference=likes)
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
    loss = made.compute_loss(model, batches.collate([rows[i] for i in range(3)]))
    counts = rewards.count_log_rewards(trie, torch.arange(1, len(TITLES) + 1)).float()
    pairs, sft = [], []
    for history, wanted in zip(HISTORIES, TARGETS):
        for n, target in enumerate(wanted):
            log_p = likes.after([[*history, *wanted[:n]]])[0]
            log_r = trie.log_token_rewards(counts + (0.5 * log_p[trie.item_leaf] if reward == "exact" else 0))
            log_pf, log_r = naive(model, catalogue, wanted[:n], log_r, history, target)
            if reward != "exact":
                log_r = rewards.tilted(log_r[None], log_p[None], trie.item_leaf[[target]], reward, 0.5)[0]
            pairs.append((log_pf, log_r))
            sft.append(-log_pf)
    torch.testing.assert_close(loss, 0.7 * torch.cat(sft).mean() + 0.3 * subtb(pairs))


def test_the_children_form_is_the_divergence_at_every_node_of_the_titles(tmp_path):
    model, _, catalogue = world()
    trie, likes = catalogue.trie, preference_model()
    made = trainer(model.eval(), catalogue, tmp_path, theta=0.0, reward="exact", flow="children", preference=likes)
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
    loss = made.compute_loss(model, batches.collate([rows[i] for i in range(3)]))
    counts = rewards.count_log_rewards(trie, torch.arange(1, len(TITLES) + 1)).float()
    divergences = []
    for history, wanted in zip(HISTORIES, TARGETS):
        for n, target in enumerate(wanted):
            log_p = likes.after([[*history, *wanted[:n]]])[0]
            log_r = trie.log_token_rewards(counts + 0.5 * log_p[trie.item_leaf])
            ids = [*catalogue.context(history), *(t for item in wanted[:n] for t in catalogue.sequences[item])]
            sequence, node = catalogue.sequences[target], 0
            logits = model(torch.tensor([ids + sequence])).logits[0].log_softmax(-1)
            for t, token in enumerate(sequence):
                children = range(int(trie.child_start[node]), int(trie.child_start[node + 1]))
                divergences.append(sum(log_r[c].exp() * (log_r[c] - logits[len(ids) + t - 1, trie.token[c]])
                                       for c in children))
                node = int(trie.advance(torch.tensor([node]), torch.tensor([token]))[0])
    torch.testing.assert_close(loss, torch.stack(divergences).mean())


def test_weights_of_targets_stand_inside_the_mean(tmp_path):
    model, _, catalogue = world()
    weights = torch.arange(len(TITLES)) / 3
    made = trainer(model.eval(), catalogue, tmp_path, theta=1.0, leaf_weights=weights)
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
    loss = made.compute_loss(model, batches.collate([rows[i] for i in range(3)]))
    terms = [-weights[target] * naive(model, catalogue, wanted[:n], made.log_r, history, target)[0]
             for history, wanted in zip(HISTORIES, TARGETS) for n, target in enumerate(wanted)]
    torch.testing.assert_close(loss, torch.cat(terms).mean())


@pytest.mark.parametrize("paths", ["reward", "policy"])
def test_drawn_paths_train_with_preferences(tmp_path, paths):
    model, _, catalogue = world()
    made = trainer(model.train(), catalogue, tmp_path, paths=paths, reward="exact", flow="children", n_paths=2,
                   preference=preference_model())
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
    torch.manual_seed(0)
    made.compute_loss(model, batches.collate([rows[i] for i in range(3)])).backward()
    assert torch.isfinite(model.lm_head.weight.grad).all()


def test_rows_hold_every_target_once():
    _, _, catalogue = world()
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
    reached = np.concatenate(rows.nodes)
    ends = catalogue.trie.node_leaf[torch.from_numpy(reached[reached >= 0])]
    assert ends[ends >= 0].tolist() == [catalogue.trie.item_leaf[t].item() for wanted in TARGETS for t in wanted]


def test_the_trunk_is_run_again_for_other_rows_or_weights_and_only_then(tmp_path, monkeypatch):
    model, _, catalogue = world()
    trunk, _ = backbone.split_layers(model.eval(), 1)
    ran = []
    states = batches.Rows._states
    monkeypatch.setattr(batches.Rows, "_states", lambda self, *args: ran.append(1) or states(self, *args))

    def run(targets):
        batches.make_rows(catalogue, HISTORIES, targets).run_trunk(trunk, tmp_path, "train")
        return len(ran)

    assert [run(TARGETS), run(TARGETS), run(TARGETS[::-1])] == [1, 1, 2]
    with torch.no_grad():
        trunk.get_input_embeddings().weight[5] += 1
    assert run(TARGETS[::-1]) == 3
    assert len(list(tmp_path.iterdir())) == 1


TINY = replace(
    runs.PROFILES["smoke"], max_history=3, epochs=4.0, batch_size=2, evaluations=3, frozen_layers=1, tuned_layers=1,
    reward="none", flow="subtb",
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
    return decoding.load_run(folder)[0].state_dict(), log


@pytest.mark.parametrize("half", [False, True])
def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, half):
    whole, log = run_training(tmp_path / "whole")
    one_step, first_steps = train.OneBar.on_step_end, []

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 15:
            raise KeyboardInterrupt
        one_step(self, args, state, control)

    monkeypatch.setattr(train.OneBar, "on_step_end", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "killed")
    if half:  # killed while it wrote a checkpoint
        (tmp_path / "killed" / "checkpoints" / "checkpoint-15").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        decoding.load_run(tmp_path / "killed")
    monkeypatch.setattr(train.OneBar, "on_step_end", one_step)
    begin = train.OneBar.on_train_begin

    def noted(self, args, state, control, **kwargs):
        first_steps.append(state.global_step)
        begin(self, args, state, control)

    monkeypatch.setattr(train.OneBar, "on_train_begin", noted)
    resumed, log_after = run_training(tmp_path / "killed")
    again, log_again = run_training(tmp_path / "killed")  # finished: taken as it is
    assert len(first_steps) == 1 and first_steps[0] > 0
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name])
        torch.testing.assert_close(again[name], whole[name])
    assert log_after.step.tolist() == log_again.step.tolist() == log.step.tolist()
    run_training(tmp_path / "killed", alpha=0.0)  # other rewards
    assert first_steps[1] == 0


@pytest.mark.parametrize("whole", [False, True])
def test_training_in_bfloat16_comes_close_and_leaves_a_model_in_float32(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(runs, "computes_in_bfloat16", lambda: True)
    chosen = replace(TINY, frozen_layers=0, tuned_layers=0) if whole else TINY
    weights, log = run_training(tmp_path / "32", chosen)
    rounded, log_16 = run_training(tmp_path / "16", replace(chosen, bfloat16=True))
    assert not log_16.loss.equals(log.loss)
    np.testing.assert_allclose(log_16.loss, log.loss, rtol=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values()) and rounded.keys() == weights.keys()
    assert decoding.load_run(tmp_path / "16")[0](torch.tensor([[1, 2]])).logits.dtype == torch.float32


def test_checkpoints_of_other_settings_are_not_taken_up(tmp_path):
    (tmp_path / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "checkpoint-3" / train.TRAINER_STATE_NAME).touch()
    runs.write_json(tmp_path / "plan.json", {"seed": 0})
    assert train._last_checkpoint(tmp_path, {"seed": 0}).endswith("checkpoint-3")
    assert train._last_checkpoint(tmp_path, {"seed": 1}) is None


def test_titles_and_rows_longer_than_the_context_are_refused(tmp_path):
    model, _, catalogue = world()
    rows = batches.make_rows(catalogue, HISTORIES, TARGETS)
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
        batches.make_rows(catalogue, HISTORIES, TARGETS).run_trunk(trunk, tmp_path, "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("batch_size", "processes", "parts"), [(16, 1, (16, 1)), (16, 2, (8, 1)), (24, 1, (12, 2)), (64, 2, (16, 2))])
def test_a_batch_is_shared_out_evenly(batch_size, processes, parts):
    assert train._parted(batch_size, 16, processes) == parts
    with pytest.raises(ValueError, match="batch_size 17 does not part into equal batches .* a multiple of 2"):
        train._parted(17, 16, processes)
