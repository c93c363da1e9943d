"""Settings, rows, and Flower's loss of a batch against unpadded rows of single titles."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowerlib import data, losses, rewards, train
from flowerlib.train import Objective, TrainSettings, collate, make_rows
from flowerlib.tree import Prompts

from tiny_rows import HISTORIES, TARGETS, TITLES, batch_of, objective, preference_model, tables_of, world

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


# rows


def test_rows_hold_every_target_once():
    _, catalogue = world()
    rows = make_rows(catalogue, HISTORIES, TARGETS)
    reached = np.concatenate(rows.nodes)
    ends = catalogue.trie.node_leaf[torch.from_numpy(reached[reached >= 0])]
    assert ends[ends >= 0].tolist() == [catalogue.trie.item_leaf[t].item() for wanted in TARGETS for t in wanted]


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


def test_batches_have_few_widths_with_or_without_a_trunk():
    _, catalogue = world()
    rows = make_rows(catalogue, [[]] * 3, [[0], [1, 2, 3], [1] * 9])
    for hidden in (None, np.random.default_rng(0).standard_normal((int(rows.start[-1]), 4)).astype(np.float16)):
        rows.hidden = hidden
        batch = collate([rows[i] for i in range(3)])
        width = batch["input_ids"].shape[1]
        assert width % train.WIDTHS == 0 and width - max(map(len, rows.input_ids)) < train.WIDTHS
        assert batch["nodes"].shape == (3, width)
        for row, own in zip(batch["input_ids"], rows.input_ids):
            assert row[: len(own)].tolist() == own.tolist()
    assert batch["inputs_embeds"].shape == (3, width, 4)
    for row, ids, first in zip(batch["inputs_embeds"], rows.input_ids, rows.start):
        assert (row[: len(ids)] == torch.from_numpy(hidden[first : first + len(ids)]).float()).all()


@pytest.mark.parametrize("paths", ["logged", "reward", "policy"])
def test_no_query_sees_nothing(paths):
    """Rows padded on the left begin with such queries, of which a GPU's kernel may make NaN gradients."""
    model, catalogue = world()
    seen = []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    objective(catalogue, paths=paths, n_paths=2)(model, batch_of(catalogue))
    hook.remove()
    first, *behind = seen
    assert first is None  # causal, without a mask
    assert bool(behind) == (paths != "logged") and all(mask.any(-1).all() for mask in behind)


# the loss of a batch


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


def watched(made, function):
    """The branches and leaves that were drawn meanwhile, and what the function returns."""
    taken, draw = [], made.draw_leaves

    def draw_leaves(prompts, before, log_p):
        leaves = draw(prompts, before, log_p)
        taken.append((prompts.branch, leaves))
        return leaves

    made.draw_leaves = draw_leaves
    return taken, function()


@pytest.mark.parametrize("n_paths", [1, 3])
@pytest.mark.parametrize("paths", ["reward", "policy"])
@pytest.mark.parametrize("form", ["sequence", "target"])
def test_packed_paths_see_the_prompt_and_nothing_else(paths, form, n_paths):
    model, catalogue = world(form)
    made = objective(catalogue, paths=paths, n_paths=n_paths)
    targets = [wanted[:1] for wanted in TARGETS] if form == "target" else TARGETS
    batch = batch_of(catalogue, targets)
    nodes = batch["nodes"]
    starts = (nodes >= 0) & (catalogue.trie.depth[nodes.clamp(min=0)] == 1)
    [(branch, leaves)], (_, _, _, log_pf, passed, _) = watched(
        made, lambda: made._drawn(model.train(), batch["input_ids"], starts, torch.zeros_like(nodes), 0, None))
    assert branch.shape == leaves.shape == (3, n_paths)
    begin = 0
    for row, history in enumerate(HISTORIES):
        for column, leaf in zip(branch[row].tolist(), leaves[row]):
            item = catalogue.trie.leaf.tolist().index(int(leaf))
            own = titles_before(catalogue, targets[row], nodes[row], column)
            expected, _ = naive(model, catalogue, own, made.log_r, history, item)
            of_path = slice(begin, begin := begin + len(expected))
            assert catalogue.trie.token[passed[of_path]].tolist() == catalogue.sequences[item]
            torch.testing.assert_close(log_pf[of_path], expected, atol=1e-4, rtol=1e-4)
    assert begin == len(passed)


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
    batch = batch_of(catalogue)
    [(branch, leaves)], parts = watched(made, lambda: made(model.train(training), batch))
    assert model.training == training
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
    gradients = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                 for loss in (parts["flow"][0], expected))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)  # through the rows' cache too
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


@pytest.mark.parametrize("reward", ["exact", "div", "add"])
def test_a_reward_with_preference_needs_the_model_of_it(reward):
    _, catalogue = world()
    with pytest.raises(ValueError, match="needs a preference model"):
        objective(catalogue, reward=reward, flow="subtb")
    objective(catalogue, theta=1.0, reward=reward, flow="subtb")  # SFT reads no reward


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
    prompts = Prompts(model, catalogue.trie, batch["input_ids"], branch.expand(-1, n))
    drawn = made.draw_leaves(prompts, before, likes.log_p(batch["leaves"][:, :-1]))
    for row, (history, wanted) in enumerate(zip(HISTORIES, TARGETS)):
        log_p = likes.after([catalogue.trie.item_leaf[[*history, *wanted[:-1]]].tolist()])[0]
        share = (torch.arange(2, len(TITLES) + 2).log() + log_p).softmax(-1).double().numpy()
        found = np.bincount(catalogue.trie.node_leaf[drawn[row]], minlength=len(TITLES)) / n
        assert (np.abs(found - share) < 5 * np.sqrt(share * (1 - share) / n) + 1e-3).all()
