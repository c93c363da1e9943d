from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from flowerlib import backbone, losses, policy, rewards, runs, train

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
        own = [t for n, t in enumerate(targets[row]) if sum(len(catalogue.sequences[u]) for u in targets[row][: n + 1]) <= behind]
        expected, _ = naive(model, catalogue, own, made.log_r, history, item)
        torch.testing.assert_close(packed_log_pf, expected, atol=1e-4, rtol=1e-4)


def test_padding_and_batch_order_do_not_matter(tmp_path):
    model, _, catalogue = world()
    made = trainer(model.eval(), catalogue, tmp_path)
    rows = train.make_rows(catalogue, HISTORIES, TARGETS)
    forth, back = (made.compute_loss(model, train.collate([rows[i] for i in order])) for order in ([0, 1, 2], [2, 1, 0]))
    torch.testing.assert_close(forth, back)


def test_the_cached_trunk_gives_the_loss_of_the_whole_model(tmp_path):
    model, _, catalogue = world()
    trunk, upper = backbone.split_layers(model.eval(), 1)
    rows = train.make_rows(catalogue, HISTORIES, TARGETS)
    whole = trainer(model, catalogue, tmp_path).compute_loss(model, train.collate([rows[i] for i in range(3)]))
    rows.run_trunk(trunk, tmp_path / "cache.npy", batch_size=2)
    batch = train.collate([rows[i] for i in range(3)])
    assert batch["inputs_embeds"].dtype == torch.float32
    cached = trainer(upper, catalogue, tmp_path).compute_loss(upper, batch)
    torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-3)


def test_sampled_paths_need_every_layer():
    with pytest.raises(ValueError, match="set frozen_layers to 0"):
        train.train(None, None, None, None, None, replace(runs.PROFILES["smoke"], paths="policy"), None, None, 0, 0.9)


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
