"""Every picture draws what it is given, says so in title and labels, and leaves matplotlib's settings alone."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flowerlib.lab import plots
from flowerlib.lab.runs import METHOD_NAMES

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
CURVES = {"SFT": ([0, 100, 200], [1.0, 0.3, 0.2]), "Flower's SubTB": ([0, 90, 210], [1.0, 0.2, 0.03])}

RATIOS = [{"name": "a / b", "ratio": 0.5, "bound": 1.0, "least": 0.4, "most": 0.6},
          {"name": "c / d", "ratio": 2, "bound": 1}, {"name": "e / f", "ratio": 1.5, "bound": None}]
NEXT = {"r": [0.6, 0.3, 0.1], "π": [0.2, 0.2, 0.6]}

PICTURES = {
    "fitted": lambda axes: plots.fitted(axes, np.log([0.5, 0.3, 0.2]), np.log([0.8, 0.15, 0.05]), "SFT"),
    "fit_curves": lambda axes: plots.fit_curves(axes, CURVES, "forward tokens", floor=0.05),
    "fit_summary": lambda axes: plots.fit_summary(axes, FITS, limit=0.05),
    "node_choice": lambda axes: plots.node_choice(axes, ["a", "b", "c"], NEXT, "here", n=2),
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


def title_of(axes):
    """The title in one line, with plain spaces."""
    return axes.get_title().replace("\n", " ").replace("\xa0", " ")


@pytest.mark.parametrize("name", PICTURES)
def test_draws_with_title_and_labels_and_changes_no_setting(name, axes):
    before = dict(mpl.rcParams)
    assert PICTURES[name](axes) is axes
    axes.figure.canvas.draw()
    assert axes.get_title() and axes.get_xlabel()
    named = {"flow_tree", "fit_summary", "node_choice", "ratios"}  # a tree's height means nothing, words need no label
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
    ("frontier", "Most accurate: Flower (HR@10 0.080, DGU 0.820); fairest: Flower"),
    ("ratios", "1 of 2 ratios keep their bound"),
])
def test_titles_read_the_data(name, said, axes):
    assert said in title_of(PICTURES[name](axes))


def test_a_given_title_stands(axes):
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
    names = ["history", "SFT", "Flower-KL", "Flower", "popularity", "co-occurrence", "D3", "IFairLRS"]
    for column in zip(*plots.styles(names).values()):
        assert len(set(column)) == len(names)
    for name in plots.FIXED:
        assert plots.styles([name])[name] == plots.styles(names[::-1])[name] == plots.STYLES[plots.FIXED[name]]
    with pytest.raises(ValueError, match="at most 4"):
        plots.styles([f"method {i}" for i in range(5)])
    assert len(plots.styles(["D3"] * 9)) == 1  # rows of one method are one series


@pytest.mark.parametrize("name, known", [
    ("SFT (π)", "SFT"), ("Flower-KL (π)", "Flower-KL"), (METHOD_NAMES["sft"], "SFT"), (METHOD_NAMES["subtb"], "Flower"),
    (METHOD_NAMES["divergence"], "Flower-KL"),
])
def test_a_method_looks_the_same_whatever_follows_its_name(name, known):
    assert plots.styles([name])[name] == plots.STYLES[plots.FIXED[known]]


def test_one_target_is_another_method():
    style = plots.styles(["SFT", "SFT, one target"])
    assert style["SFT"] != style["SFT, one target"]


def test_neighbouring_and_fixed_colours_differ_in_grey():
    grey = [float(np.dot(mpl.colors.to_rgb(style[0]), [0.299, 0.587, 0.114])) for style in plots.STYLES]
    assert np.abs(np.diff(grey)).min() > 0.15
    assert np.diff(sorted(grey[i] for i in plots.FIXED.values())).min() > 0.15


@pytest.mark.parametrize("layout", [None, "constrained"])
def test_lines_of_a_title_are_as_long_as_the_axes_are_wide(layout):
    figure = Figure(figsize=(14, 5), layout=layout)
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    exposure = {name: COUNTS + i for i, name in enumerate(["SFT", "Flower-KL", "Flower", "popularity", "D3", "Random"])}
    plots.popularity_curve(left, exposure, COUNTS, mark=1)
    plots.metric_intervals(right, ROWS, "hr@10")
    canvas.draw()
    for axes in (left, right):
        title = axes.title
        text, drawn = title.get_text(), title.get_window_extent().width
        title.set_wrap(False)

        def width(words):
            title.set_text(words)
            return title.get_window_extent().width

        lines = [""]
        for word in text.split(" "):
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if width(longer) <= axes.bbox.width else [*lines, word]
        assert len(lines) > 1 and drawn == pytest.approx(max(map(width, lines)), abs=2)
        title.set_text(text)
    assert all(f"{name}\xa0" in left.title.get_text() for name in exposure)  # no line ends between name and number


def test_bars_of_the_groups_stand_side_by_side_around_their_tick(axes):
    plots.group_bars(axes, SHARES)
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [*SHARES["SFT"], *SHARES["Flower"]]
    first, *_, last = axes.patches
    assert first.get_x() == pytest.approx(-0.4) and last.get_x() + last.get_width() == pytest.approx(1.4)
    hatches = [hatch for *_, hatch in plots.styles(["SFT", "Flower"]).values()]
    assert [bar.get_hatch() for bar in axes.patches[::2]] == hatches
    axes.clear()
    plots.group_bars(axes, {"history": [0.7, 0.3]})
    assert axes.collections and not axes.patches


def test_intervals_end_where_the_rows_say_from_the_top(axes):
    plots.metric_intervals(axes, ROWS, "hr@10")
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "SFT, beam", "SFT, beam normalised", "Flower, beam", "Flower, beam normalised"]
    ends = [container.lines[2][0].get_segments()[0] for container in axes.containers]
    np.testing.assert_allclose([end[:, 0] for end in ends], [[r["hr@10_lo"], r["hr@10_hi"]] for r in ROWS])
    assert [end[0, 1] for end in ends] == [0, 1, 2, 3] and axes.yaxis_inverted()
    faces = [container.lines[0].get_markerfacecolor() for container in axes.containers]
    assert faces[1] == faces[3] == "white" and faces[0] != "white"
    assert not axes.texts


def test_a_line_shows_what_people_chose_next(axes):
    plots.metric_intervals(axes, [row | {"dgu": 0.3} for row in ROWS], "dgu", of_next=0.1)
    assert axes.lines[-1].get_xdata() == [0.1, 0.1] and axes.texts[-1].get_text().strip() == "next choices"
    axes.clear()
    plots.metric_intervals(axes, [row | {"top_vs_next": 0.3} for row in ROWS], "top_vs_next")
    assert axes.lines[-1].get_xdata() == [0, 0] and axes.texts[-1].get_text().strip() == "next choices"


def test_the_frontier_joins_points_that_differ_in_one_setting(axes):
    rows = [{"method": "Flower", "hr@10": hr, "dgu": dgu, "alpha": 1.0, "theta": theta, "reward": "div"}
            for hr, dgu, theta in ((0.3, 0.1, 0.995), (0.2, 0.2, 0.9))]
    rows += [{"method": "Flower-KL", "hr@10": 0.1, "dgu": 0.3, "alpha": alpha, "theta": theta}
             for alpha, theta in ((-0.5, 0.1), (0, 0.9))]
    rows.append({"method": "SFT", "hr@10": 0.1, "dgu": 0.4})
    plots.frontier(axes, rows, "hr@10")
    assert {text.get_text() for text in axes.texts} == {"θ 0.995", "θ 0.9", "α -0.5, θ 0.1", "α 0, θ 0.9"}
    joined, *apart = axes.lines
    assert joined.get_xdata().tolist() == [0.2, 0.1] and joined.get_linestyle() != "None"
    assert {line.get_linestyle() for line in apart} == {"None"}
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["Flower", "Flower-KL", "SFT"]


def test_ratios_beyond_their_bound_look_different(axes):
    plots.ratios(axes, RATIOS)
    colours = [container.lines[0].get_color() for container in axes.containers]
    assert len(set(colours)) == 3  # within, beyond, unbounded
    strokes = [line for line in axes.lines if line.get_marker() == "|" and line.get_markersize() > 9]
    assert [line.get_xdata()[0] for line in strokes] == [1, 1]


def test_curves_of_several_methods_and_without_validation(axes):
    logs = pd.concat([LOGS.assign(method="SFT"), LOGS.assign(method="Flower", loss=LOGS.loss + 1)])
    assert "SFT 2.25 (step 3), Flower 3.25 (step 3)" in title_of(plots.training_curves(axes, logs))
    axes.clear()
    columns = {name: LOGS[name].to_numpy()[:3] for name in LOGS}  # a plain mapping will do
    assert plots.training_curves(axes, columns).get_title() == "Training loss"


def test_fits_say_who_is_closest(axes):
    said = title_of(plots.fit_curves(axes, CURVES, "seconds"))
    assert said == "Closest in the end: Flower's SubTB, KL 0.03 nats"
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["Flower's SubTB"].get_color() == plots.STYLES[plots.FIXED["Flower"]][0]


def test_equal_rewards_can_be_drawn(axes):
    plots.fitted(axes, np.log([0.5, 0.5]), np.log([0.8, 0.1]), "SFT").figure.canvas.draw()


def test_fit_summary_counts_methods_not_runs(axes):
    assert plots.fit_summary(axes, FITS, 0.05).get_title().startswith("1 of 2 ways end within 0.05 nats")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["SFT", "DPO"]


def test_node_choice_adds_up_the_rest(axes):
    plots.node_choice(axes, ["a", "b", "c"], NEXT, "here", n=2)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "c", "1 others"]
    assert [bar.get_width() for bar in axes.patches] == [0.6, 0.1, 0.3, 0.2, 0.6, 0.2]
    assert axes.yaxis_inverted() and axes.patches[0].get_y() < axes.patches[3].get_y()  # the first stands on top


def test_flow_tree_shows_a_model_beside_the_rewards(axes):
    plots.flow_tree(axes, *TREE, model=[1, 0.5, 0.5, 0.9, 0.1])
    assert {"0.80 | 0.50", "0.75 | 0.90"} <= {text.get_text() for text in axes.texts}
