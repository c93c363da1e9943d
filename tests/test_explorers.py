"""The explorers draw what the library computes, answer to every control, and say what cannot be."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import explorers
from flowerlib.model import Catalogue, prompt_texts, tiny_model
from flowerlib.tree import PackedTree
from tiny_world import TITLES


@pytest.fixture(scope="module")
def branches():
    models = {}
    for seed, name in enumerate(["SFT", "Flower-KL"]):
        models[name], tokenizer = tiny_model([*TITLES, *prompt_texts("movie", "sequence")], seed)
    catalogue = Catalogue.build(tokenizer, TITLES, "movie")
    counts, log_p = torch.arange(1.0, 1 + len(TITLES)), torch.zeros(len(catalogue.trie.leaves))
    made = explorers.Branches(models, tokenizer, catalogue, [0], counts, log_p)
    for name, model in models.items():
        edges = PackedTree(model, catalogue.trie, catalogue.context([0])).log_probs()
        torch.testing.assert_close(made.log_edges[name], edges)
    return made


def boxes(axes):
    """What stands in the boxes of the tree: label and flow."""
    return [text.get_text().split("\n") for text in axes.texts if "\n" in text.get_text()]


def test_labels_are_the_titles_token_by_token(branches):
    for item, title in enumerate(TITLES):
        path = branches.trie.paths(branches.trie.leaf[item : item + 1])[0]
        assert "".join(branches.labels[node] for node in path[path >= 0]) == title + "⊤"


def test_what_the_branch_leaves_out_stands_as_others(branches):
    figure = Figure()
    explorers.draw_branch(figure, branches, TITLES[0], 1, alpha=1, beta=1, smoothing=1, n=1)
    tree, choice = figure.axes
    flows = {label: float(flow) for label, flow in boxes(tree)}
    first = branches.way(TITLES[0], 1)[1]
    log_flow, _ = branches.flows(1, 1, 1)
    assert flows[branches.labels[first]] == pytest.approx(float(log_flow[first].exp()), rel=0.01)
    assert sum(flow for label, flow in flows.items() if "others" in label) < 1
    assert {text.get_text() for text in choice.get_legend().get_texts()} == {"reward r", "SFT (π)", "Flower-KL (π)"}


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_flows_into_a_node_of_the_branch_flows_out(branches, depth, monkeypatch):
    seen = []
    monkeypatch.setattr(explorers.plots, "flow_tree", lambda *args, **more: seen.extend(args[1:4]))
    explorers.draw_branch(Figure(), branches, TITLES[1], depth, alpha=1, beta=1, smoothing=1, n=1)
    parent, labels, flow = map(np.array, seen)
    assert labels[0] == "start" and flow[0] == pytest.approx(1)
    inner = sorted(set(parent[1:]))
    assert len(inner) == depth + 1
    assert {"start", *(branches.labels[node] for node in branches.way(TITLES[1], depth)[1:])} == set(labels[inner])
    np.testing.assert_allclose([flow[parent == node].sum() for node in inner], flow[inner], rtol=1e-6)


def test_rewards_of_the_sliders_are_the_librarys(branches):
    log_flow, log_r = branches.flows(alpha=2, beta=0, smoothing=3)
    leaves = branches.trie.leaves
    by_leaf = torch.zeros(len(leaves)).index_add(0, branches.trie.item_leaf, branches.counts)
    share = (by_leaf + 3) ** 2  # equal titles are one: their counts add up before the power
    torch.testing.assert_close(log_flow[leaves].exp().float(), share / share.sum())
    assert log_flow[0] == pytest.approx(0)
    torch.testing.assert_close(log_r[1:], (log_flow - log_flow[branches.trie.parent])[1:])


def test_a_beginning_is_enough_and_a_wrong_one_is_said(branches):
    assert branches.way(TITLES[0][:3].upper(), 2) == branches.way(TITLES[0], 2)
    assert len(branches.way(TITLES[0], 99)) == int(branches.trie.depth[branches.trie.leaf[0]])
    box = explorers.tree(branches, TITLES[0])
    title = box.children[0].children[0]
    title.value = "no such title"
    assert "no title begins with" in box.children[2].value and box.children[1].layout.display == "none"
    title.value = TITLES[0]
    assert not box.children[2].value and box.children[1].layout.display is None


@pytest.mark.parametrize("place, name", [(1, "depth"), (2, "alpha"), (3, "beta"), (4, "smoothing")])
def test_every_slider_changes_the_picture(branches, place, name):
    picky = copy.copy(branches)
    picky.log_p = torch.linspace(-3, 0, len(branches.trie.leaves))
    box = explorers.tree(picky, TITLES[0])
    before, slider = box.children[1].value, box.children[0].children[place]
    slider.value = slider.value + 1
    assert box.children[1].value != before, name


COUNTS = {"Heat": 6, "Heat Wave": 1, "Fargo": 3}


def test_a_few_titles_are_learnt_before_ones_eyes():
    logs = []
    explorers.fit_few(COUNTS, "exact_ce", "reward", 1_500, logs.append)
    assert len(logs) > 5 and [log.step.iloc[-1] for log in logs] == logs[-1].step.tolist()
    target, first, last = np.array([0.6, 0.1, 0.3]), logs[0].model.iloc[-1], logs[-1].model.iloc[-1]
    assert np.abs(last - target).max() < 0.05 < np.abs(first - target).max()
    assert last.sum() == pytest.approx(1)
    explorers.draw_fitted(figure := Figure(), COUNTS, "exact_ce", logs[-1])
    left, right = figure.axes
    widths = [bar.get_width() for bar in left.patches]
    np.testing.assert_allclose(widths, [0.6, 0.3, 0.1, *last[[0, 2, 1]]])
    np.testing.assert_allclose(right.lines[0].get_ydata(), logs[-1].kl_target_model)


def test_the_button_trains_and_says_what_cannot_be():
    box = explorers.training(COUNTS)
    loss, paths, budget, button = box.children[0].children
    picture, said = box.children[1:]
    loss.value, paths.value = "sft", "policy"
    assert not picture.value and not said.value  # values alone do not train
    button.click()
    assert "would not aim at the reward" in said.value and not button.disabled and not picture.value
    paths.value, budget.value = "reward", 1_000
    button.click()
    assert said.value == "" and bytes(picture.value[:4]) == b"\x89PNG" and picture.layout.display is None
    assert not button.disabled and button.description == "run"


@pytest.fixture
def slots():
    rows = [("SFT", "beam", 0, 1, "a", True), ("SFT", "beam", 0, 2, "b", False), ("SFT", "beam", 1, 1, "a", False),
            ("SFT", "beam", 1, 2, "c", True), ("Popularity", "top", 0, 1, "a", True),
            ("Popularity", "top", 1, 1, "a", False), ("SFT", "beam_normalised", 0, 1, "c", False)]
    return pd.DataFrame(rows, columns=["method", "decoding", "user", "place", "title", "hit"])


def test_popularity_by_hand(slots):
    counts = pd.Series({"a": 8, "b": 4, "c": 2, **{letter: 1 for letter in "defgh"}})
    table = explorers.draw_popularity(Figure(), slots, counts, ["SFT", "Popularity"], "beam", 2)
    assert table.loc["SFT", ["hr@2", "ndcg@2", "distinct"]].tolist() == [1.0, round((1 + 1 / np.log2(3)) / 2, 3), 3]
    assert table.loc["Popularity", ["hr@2", "distinct"]].tolist() == [0.5, 1]
    gu = np.array([1, 0, 0, 0, 0, 0, 0, 0]) - counts.to_numpy() / counts.sum()  # a title a group
    assert table.loc["Popularity", ["dgu", "mgu"]].tolist() == [round(np.ptp(gu), 3), round(np.abs(gu).mean(), 3)]
    first = explorers.draw_popularity(Figure(), slots, counts, ["SFT"], "beam", 1)
    assert first.loc["SFT", "hr@1"] == 0.5
    own = explorers.draw_popularity(Figure(), slots, counts, [], "beam", 2, {"shop": pd.Series(["d", "d", "a"])})
    assert own.loc["shop", "distinct"] == 2 and "hr@2" not in own
    with pytest.raises(ValueError, match="choose a method"):
        explorers.draw_popularity(Figure(), slots, counts, [], "beam", 2)


def test_lists_of_ones_own_are_uploaded(slots):
    counts = pd.Series({"a": 8, "b": 4, "c": 2, **{letter: 1 for letter in "defgh"}})
    box = explorers.popularity(slots, counts)
    own = box.children[0].children[3]
    file = {"name": "shop.csv", "type": "text/csv", "size": 8, "last_modified": pd.Timestamp("2026-01-01", tz="UTC")}
    own.value = ({**file, "content": memoryview(b"title\nd\na\n")},)
    assert "shop.csv" in box.children[2].value
    own.value = ({**file, "content": memoryview(b"title\nnobody's\n")},)
    assert "not in the catalogue" in box.children[2].value
    own.value = ({**file, "name": "/etc/SHOP.PARQUET", "content": memoryview(b"no table")},)
    assert "SHOP.PARQUET is damaged" in box.children[2].value
