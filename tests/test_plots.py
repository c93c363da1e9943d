"""Every picture draws what it is given, says so in title and labels, and leaves matplotlib's settings alone."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flowerlib import plots

COUNTS = np.array([9, 40, 3, 0, 20, 1, 12, 5, 2, 8])
LOGS = pd.DataFrame({
    "step": [1, 2, 3, 2, 3, 4],
    "loss": [3.0, 2.5, 2.2, 2.75, 2.25, 2.5],
    "kind": ["train"] * 3 + ["validation"] * 3,
})
SHARES = {"history": [0.7, 0.3], "SFT": [0.9, 0.1], "Flower": [0.75, 0.25]}
ROWS = [
    {"method": method, "decoding": decoding, "hr@10": value, "hr@10_lo": value - 0.01, "hr@10_hi": value + 0.02}
    for method, value in (("SFT", 0.06), ("Flower", 0.08)) for decoding in ("beam", "beam_normalised")
]
TREE = ([-1, 0, 0, 1, 1], ["root", "Star", "Alien", "Wars", "Trek"], [10, 8, 2, 6, 2])

FITS = [{"label": "SFT", "kl_target_model": 0.01}, {"label": "SFT", "kl_target_model": 0.02},
        {"label": "DPO", "kl_target_model": 1.3}]
CURVES = {"SFT": ([0, 100, 200], [1.0, 0.3, 0.2]), "Flower (SubTB)": ([0, 90, 210], [1.0, 0.2, 0.03])}

RATIOS = [{"name": "a / b", "ratio": 0.5, "bound": 1.0, "least": 0.4, "most": 0.6}, {"name": "c / d", "ratio": 2, "bound": 1},
          {"name": "e / f", "ratio": 1.5, "bound": None}]

PICTURES = {
    "fitted": lambda axes: plots.fitted(axes, np.log([0.5, 0.3, 0.2]), np.log([0.8, 0.15, 0.05]), "SFT"),
    "fit_curves": lambda axes: plots.fit_curves(axes, CURVES, "forward tokens", floor=0.05),
    "fit_summary": lambda axes: plots.fit_summary(axes, FITS, limit=0.05),
    "node_choice": lambda axes: plots.node_choice(axes, ["a", "b", "c"], {"r": [0.6, 0.3, 0.1], "π": [0.2, 0.2, 0.6]}, "here", n=2),
    "popularity_curve": lambda axes: plots.popularity_curve(axes, {"SFT": COUNTS**2, "Flower": COUNTS}, COUNTS, mark=1),
    "group_bars": lambda axes: plots.group_bars(axes, SHARES),
    "long_tail": lambda axes: plots.long_tail(axes, COUNTS),
    "training_curves": lambda axes: plots.training_curves(axes, LOGS),
    "flow_tree": lambda axes: plots.flow_tree(axes, *TREE),
    "metric_intervals": lambda axes: plots.metric_intervals(axes, ROWS, "hr@10"),
    "frontier": lambda axes: plots.frontier(axes, [row | {"dgu": 0.9 - row["hr@10"]} for row in ROWS], "hr@10"),
    "ratios": lambda axes: plots.ratios(axes, RATIOS),
}


@pytest.fixture
def axes():
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure.add_subplot()


@pytest.mark.parametrize("name", PICTURES)
def test_draws_with_title_and_labels_and_changes_no_setting(name, axes):
    before = dict(mpl.rcParams)
    assert PICTURES[name](axes) is axes
    axes.figure.canvas.draw()
    assert axes.get_title() and axes.get_xlabel()
    named = {"flow_tree", "fit_summary", "node_choice", "ratios"}  # a tree's height means nothing, and words stand for themselves
    assert axes.get_ylabel() or name in named
    assert dict(mpl.rcParams) == before


def test_theme_is_legible_and_is_the_only_one_to_change_settings():
    with mpl.rc_context():
        plots.theme()
        keys = ("axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
        assert min(mpl.rcParams[key] for key in keys) >= 11 and mpl.rcParams["figure.figsize"][0] == 8


@pytest.mark.parametrize("name, said", [
    ("popularity_curve", "history 40%, SFT 69%, Flower 40%"),
    ("group_bars", "SFT +20.0, Flower +5.0"),
    ("long_tail", "2 of 10 titles (20%)"),
    ("training_curves", "2.25 (step 3)"),
    ("flow_tree", "3 titles"),
    ("metric_intervals", "0.06 (SFT, beam) to 0.08 (Flower, beam)"),
    ("frontier", "Most accurate: Flower (HR@10 0.080, DGU 0.82); fairest: Flower"),
    ("ratios", "1 of 2 ratios keep their bound"),
])
def test_titles_read_the_data(name, said, axes):
    assert said in PICTURES[name](axes).get_title().replace("\n", " ")


def test_a_given_title_is_kept(axes):
    assert plots.metric_intervals(axes, ROWS, "hr@10", title="mine").get_title() == "mine"


def test_popularity_curve_is_cumulative_in_order_of_popularity(axes):
    plots.popularity_curve(axes, {"SFT": np.ones(10)}, COUNTS, mark=2)
    history, sft = (next(line for line in axes.lines if line.get_label() == name) for name in ("history", "SFT"))
    np.testing.assert_allclose(history.get_ydata()[:2], [0.4, 0.6])
    np.testing.assert_allclose(sft.get_ydata(), np.arange(1, 11) / 10)


def test_flow_tree_shows_probabilities_and_widths_that_follow_the_flow(axes):
    plots.flow_tree(axes, *TREE)
    texts = [text.get_text() for text in axes.texts]
    assert {"0.8", "0.2", "0.75", "0.25"} <= set(texts) and "Star\n8" in texts
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths[0] > widths[2] > widths[1] == widths[3]


@pytest.mark.parametrize("parent, labels, values", [
    ([0, 0], ["a", "b"], [1, 1]),
    ([-1, 2, 0], ["a", "b", "c"], [1, 1, 1]),
    ([-1, 0], ["a"], [1, 1]),
    ([-1, 0], ["a", "b"], [1, 0]),
    ([-1] + [0] * 40, ["a"] * 41, [1] * 41),
])
def test_flow_tree_refuses_what_is_no_small_tree(parent, labels, values, axes):
    with pytest.raises(ValueError, match="1 to 40 nodes"):
        plots.flow_tree(axes, parent, labels, values)


def test_styles_are_distinct_in_colour_line_marker_and_hatch():
    names = ["history", "SFT", "Flower", "popularity", "co-occurrence", "D3", "IFairLRS"]
    for column in zip(*plots.styles(names).values()):
        assert len(set(column)) == len(names)
    assert plots.styles(["Flower"])["Flower"] == plots.styles(names)["Flower"]
    with pytest.raises(ValueError, match="at most 4"):
        plots.styles([f"method {i}" for i in range(5)])


def test_neighbouring_colours_differ_in_grey():
    def grey(colour: str) -> float:
        return float(np.dot(mpl.colors.to_rgb(colour), [0.299, 0.587, 0.114]))

    history, sft, flower = (grey(style[0]) for style in plots.STYLES[:3])
    assert min(abs(history - sft), abs(sft - flower), abs(flower - history)) > 0.15


def test_curves_of_several_methods_and_without_validation(axes):
    logs = pd.concat([LOGS.assign(method="SFT"), LOGS.assign(method="Flower", loss=LOGS.loss + 1)])
    assert "Flower 3.25 (step 3)" in plots.training_curves(axes, logs).get_title().replace("\n", " ")
    axes.clear()
    columns = {name: LOGS[name].to_numpy()[:3] for name in LOGS}  # a plain mapping will do
    assert plots.training_curves(axes, columns).get_title() == "Training loss"


def test_fits_say_who_is_closest(axes):
    assert plots.fit_curves(axes, CURVES, "seconds").get_title() == "Closest in the end: Flower (SubTB), KL 0.03 nats"
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["Flower (SubTB)"].get_color() == plots.STYLES[plots.FIXED["Flower"]][0]


def test_fit_summary_counts_methods_not_runs(axes):
    assert plots.fit_summary(axes, FITS, 0.05).get_title().startswith("1 of 2 ways end within 0.05 nats")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["SFT", "DPO"]


def test_node_choice_adds_up_the_rest(axes):
    plots.node_choice(axes, ["a", "b", "c"], {"r": [0.6, 0.3, 0.1], "π": [0.2, 0.2, 0.6]}, "here", n=2)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "c", "1 others"]
    assert [bar.get_width() for bar in axes.patches] == [0.6, 0.1, 0.3, 0.2, 0.6, 0.2]


def test_flow_tree_shows_a_model_beside_the_rewards(axes):
    plots.flow_tree(axes, *TREE, model=[1, 0.5, 0.5, 0.9, 0.1])
    assert {"0.80 | 0.50", "0.75 | 0.90"} <= {text.get_text() for text in axes.texts}
