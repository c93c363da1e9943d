import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from flowerlib import explore, policy
from tiny_world import TITLES, tiny_world


@pytest.fixture(scope="module")
def branches():
    model, catalogue = tiny_world("sequence")
    trie = catalogue.trie
    with torch.no_grad():
        edges = policy.tree_log_probs(model, trie, catalogue.context([0]))
    labels = [f"t{token}" for token in trie.token.tolist()]
    counts = torch.arange(1.0, 1 + trie.n_items)
    return explore.Branches(trie, labels, TITLES, counts, torch.zeros(len(trie.leaves)), {"SFT": edges, "Flower": edges})


def boxes(axes):
    """What stands in the boxes of the tree: label and flow."""
    return [text.get_text().split("\n") for text in axes.texts if "\n" in text.get_text()]


def test_what_the_branch_leaves_out_stands_as_others(branches):
    figure = Figure()
    explore.draw_branch(figure, branches, TITLES[0], 1, alpha=1, beta=1, smoothing=1, n=1)
    tree, choice = figure.axes
    flows = {label: float(flow) for label, flow in boxes(tree)}
    first = branches.way(TITLES[0], 1)[1]
    log_flow, _ = branches.flows(1, 1, 1)
    assert flows[branches.labels[first]] == pytest.approx(float(log_flow[first].exp()), rel=0.01)
    assert sum(flow for label, flow in flows.items() if "others" in label) < 1
    assert {text.get_text() for text in choice.get_legend().get_texts()} == {"reward r", "SFT (π)", "Flower (π)"}


def test_rewards_of_the_sliders_are_the_librarys(branches):
    log_flow, log_r = branches.flows(alpha=2, beta=0, smoothing=3)
    share = (branches.counts + 3) ** 2
    leaves = branches.trie.leaves
    by_leaf = torch.zeros(len(leaves)).index_add(0, branches.trie.item_leaf, share)
    if len(set(TITLES)) == len(TITLES):  # equal titles share differently: (a + b) ** 2
        torch.testing.assert_close(log_flow[leaves].exp().float(), by_leaf / by_leaf.sum())
    assert log_flow[0] == pytest.approx(0)
    torch.testing.assert_close(log_r[1:], (log_flow - log_flow[branches.trie.parent])[1:])


def test_a_beginning_is_enough_and_a_wrong_one_is_told(branches):
    assert branches.way(TITLES[0][:3].upper(), 2) == branches.way(TITLES[0], 2)
    assert len(branches.way(TITLES[0], 99)) == int(branches.trie.depth[branches.trie.leaf[0]])
    box = explore.tree(branches, TITLES[0])
    title = box.children[0].children[0]
    title.value = "no such title"
    assert "no title begins with" in box.children[2].value and box.children[1].layout.display == "none"
    title.value = TITLES[0]
    assert not box.children[2].value and box.children[1].layout.display is None


@pytest.mark.parametrize("name", ["depth", "alpha", "beta", "smoothing"])
def test_every_slider_changes_the_picture(branches, name):
    liked = explore.Branches(**{**vars(branches), "log_p": torch.linspace(-3, 0, len(branches.trie.leaves))})
    box = explore.tree(liked, TITLES[0])
    before, slider = box.children[1].value, box.children[0].children[["depth", "alpha", "beta", "smoothing"].index(name) + 1]
    slider.value = slider.value + 1
    assert box.children[1].value != before


COUNTS = {"Heat": 6, "Heat Wave": 1, "Fargo": 3}


def test_a_few_titles_are_learnt_before_ones_eyes():
    moments = []
    explore.fit_few(COUNTS, "exact_ce", "reward", 1_500, moments.append)
    assert len(moments) > 5 and [m.log.step.iloc[-1] for m in moments] == moments[-1].log.step.tolist()
    np.testing.assert_allclose(moments[-1].target, [0.6, 0.1, 0.3])
    assert np.abs(moments[-1].model - moments[-1].target).max() < 0.05 < np.abs(moments[0].model - moments[0].target).max()
    explore.draw_fitted(figure := Figure(), moments[-1])
    assert len(figure.axes) == 2


def test_the_button_trains_and_says_what_cannot_be():
    box = explore.training(COUNTS)
    (loss, paths), budget, button, said, picture = box.children[0].children, *box.children[1:]
    loss.value, paths.value = "sft", "policy"
    button.click()
    assert "would not aim at the reward" in said.value and not button.disabled and not picture.value
    paths.value, budget.value = "reward", 1_000
    button.click()
    assert said.value == "" and bytes(picture.value[:4]) == b"\x89PNG"


@pytest.fixture
def slots():
    rows = [("SFT", "beam", 0, 1, "a", True), ("SFT", "beam", 0, 2, "b", False), ("SFT", "beam", 1, 1, "a", False),
            ("SFT", "beam", 1, 2, "c", True), ("Popularity", "top", 0, 1, "a", True), ("Popularity", "top", 1, 1, "a", False),
            ("SFT", "beam_normalised", 0, 1, "c", False)]
    return pd.DataFrame(rows, columns=["method", "decoding", "user", "place", "title", "hit"])


def test_popularity_by_hand(slots):
    counts = pd.Series({"a": 8, "b": 4, "c": 2, **{letter: 1 for letter in "defgh"}})
    table = explore.draw_popularity(Figure(), slots, counts, ["SFT", "Popularity"], "beam", 2)
    assert table.loc["SFT", ["hr@2", "ndcg@2", "distinct"]].tolist() == [1.0, round((1 + 1 / np.log2(3)) / 2, 3), 3]
    assert table.loc["Popularity", ["hr@2", "distinct"]].tolist() == [0.5, 1]
    first = explore.draw_popularity(Figure(), slots, counts, ["SFT"], "beam", 1)
    assert first.loc["SFT", "hr@1"] == 0.5
    own = explore.draw_popularity(Figure(), slots, counts, [], "beam", 2, {"shop": pd.Series(["d", "d", "a"])})
    assert own.loc["shop", "distinct"] == 2
    with pytest.raises(ValueError, match="choose a method"):
        explore.draw_popularity(Figure(), slots, counts, [], "beam", 2)


def test_lists_of_ones_own_are_uploaded(slots):
    counts = pd.Series({"a": 8, "b": 4, "c": 2, **{letter: 1 for letter in "defgh"}})
    box = explore.popularity(slots, counts)
    own = box.children[0].children[3]
    file = {"name": "shop.csv", "type": "text/csv", "size": 8, "last_modified": pd.Timestamp("2026-01-01", tz="UTC")}
    own.value = ({**file, "content": memoryview(b"title\nd\na\n")},)
    assert "shop.csv" in box.children[2].value
    own.value = ({**file, "content": memoryview(b"title\nnobody's\n")},)
    assert "not in the catalogue" in box.children[2].value
    own.value = ({**file, "name": "/etc/SHOP.PARQUET", "content": memoryview(b"no table")},)
    assert "SHOP.PARQUET is damaged" in box.children[2].value
