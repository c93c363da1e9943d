"""The pictures: data in, Axes out. Nothing here saves or trains, and only `theme` changes matplotlib's settings.

Every function draws on the Axes it is given, composes the title from the data unless `title` is given, and returns
the Axes. Metrics and groups are by leaf (items with equal titles merged), as in `metrics`.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import ArrayLike

Series = Mapping[str, ArrayLike]  # by name, one a method
Rows = Sequence[Mapping[str, Any]]  # of a results file

# colour (safe for the colour-blind: Okabe and Ito's, the blue darker, and a brown; any two of FIXED and all neighbours
# differ in grey as well), line, marker, hatch
STYLES = (
    ("#222222", "-", "o", ""),
    ("#E69F00", "--", "s", "//"),
    ("#0063A0", "-.", "D", ".."),
    ("#D55E00", ":", "^", "xx"),
    ("#56B4E9", (0, (8, 2)), "v", "\\\\"),
    ("#009E73", (0, (3, 1, 1, 1, 1, 1)), "P", "++"),
    ("#CC79A7", (0, (1, 3)), "X", "--"),
    ("#7B3F00", (0, (5, 5)), "<", "||"),
)
FIXED = {"history": 0, "SFT": 1, "Flower-KL": 2, "Flower": 3}  # these names look the same in every picture
SYMBOLS = {"alpha": "α {:g}", "theta": "θ {:g}", "reward": "{}"}  # settings beside the marks of `frontier`
LEAST_KL = 1e-6  # where the axes of the fits end

METRIC_LABELS = {
    "dgu": "DGU (share of slots; 0 = as in the history)",
    "mgu": "MGU (share of slots; 0 = as in the history)",
    "mgu_next": "MGU against the next choices (share of slots; 0 = as chosen next)",
    "top_vs_history": "excess over the history (most popular eighth: share of slots − of interactions)",
    "top_vs_next": "excess (most popular eighth: share of slots − of next choices)",
    "arp": "ARP (interactions per slot's title)",
    "aplt": "APLT (tail's share of slots; 0.2 = as in the history)",
    "h_bits": "H (bits per word)",
    "ttr": "TTR (distinct words per word)",
    "distinct": "distinct titles recommended",
    "coverage": "coverage (share of the catalogue)",
    "gini": "Gini of the exposure (0 = equal)"}


def theme() -> None:
    """The look of every notebook; call it once at the top. Text of 11 points or more on figures 8 inches wide."""
    sns.set_theme(context="notebook", style="whitegrid", palette=[s[0] for s in STYLES], rc={
        "figure.figsize": (8, 4.5), "figure.dpi": 100, "figure.constrained_layout.use": True,
        "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "xtick.labelsize": 12,
        "ytick.labelsize": 12, "legend.fontsize": 12, "lines.linewidth": 2.2, "hatch.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False})


def styles(names: Iterable[str]) -> dict[str, tuple[Any, Any, str, str]]:
    """Colour, line style, marker and hatch of each distinct name: fixed ones for FIXED (what follows in brackets or
    after "'s" does not matter), the others in order. Raises ValueError for more names than distinguishable styles."""
    places = {name: FIXED.get(name.split(" (")[0].split("'s ")[0]) for name in names}
    others, free = [name for name, place in places.items() if place is None], range(len(FIXED), len(STYLES))
    if len(others) > len(free):
        raise ValueError(f"at most {len(free)} series besides {', '.join(FIXED)}: {', '.join(others)}")
    places |= dict(zip(others, free))
    return {name: STYLES[place] for name, place in places.items()}


def _dressed(axes: Axes, title: str, x: str = "", y: str = "", rows: Sequence[str] = (), **settings: Any) -> Axes:
    """Sets limits and labels, number formats x and y, names of rows (at 0, 1, … from the top), and the title, in lines
    as long as the axes are wide in the end; no line breaks at "\xa0"."""
    if rows:
        axes.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.4, -0.6))
        axes.grid(False, axis="y")
    axes.set(**settings)
    for axis, numbers in ((axes.xaxis, x), (axes.yaxis, y)):
        if numbers:
            axis.set_major_formatter(numbers)
    text = axes.set_title(title, wrap=True)
    text._get_wrap_line_width = lambda: axes.bbox.width  # matplotlib would wrap at the edge of the figure
    return axes


def popularity_curve(axes: Axes, exposure: Series, counts: ArrayLike, mark: int | None = None, title: str = "") -> Axes:
    """Share of the recommended slots that the n most popular titles fill, against n, with the history as reference.

    exposure: slots per leaf (L,) of each method; counts: training interactions per leaf (L,). A curve above the
    history's gives popular titles more than they had. Marks and title read the curves at n = `mark` (default: an eighth
    of the titles with a count, popularity group 1).
    """
    series = {name: np.asarray(slots, dtype=float) for name, slots in {"history": counts, **exposure}.items()}
    counts, read = series["history"], []
    order = np.argsort(-counts, kind="stable")
    mark = min(mark or -(-np.count_nonzero(counts) // 8), len(counts))
    for name, (colour, line, marker, _) in styles(series).items():
        share = np.cumsum(series[name][order]) / series[name].sum()
        axes.plot(np.arange(1, len(share) + 1), share, color=colour, linestyle=line, label=name, marker=marker,
                  markevery=[mark - 1], markersize=8, markeredgecolor="white")
        read.append(f"{name}\xa0{share[mark - 1]:.0%}")
    axes.axvline(mark, color="0.5", linewidth=1, zorder=1)
    axes.legend(loc="best")
    return _dressed(axes, title or f"The {mark:,} most popular titles: {', '.join(read)}", "{x:,.0f}", "{x:.0%}",
                    xscale="log", xlim=(1, len(counts)), ylim=(0, 1.02), ylabel="cumulative share of slots",
                    xlabel="titles, most popular first (rank by interactions, log scale)")


def group_bars(axes: Axes, shares: Series, title: str = "") -> Axes:
    """Share of the recommended slots per popularity group (G,) of each method; "history" is drawn as black lines."""
    series, head = dict(shares), "Share of each popularity group"
    history, place = series.pop("history", None), np.arange(len(next(iter(shares.values()))))
    if series:
        colours, _, _, hatches = zip(*styles(series).values())
        axes.grouped_bar(series, group_spacing=len(series) / 4, colors=colours, hatch=hatches, edgecolor="white")
    if history is not None:
        axes.hlines(history, place - 0.46, place + 0.46, color=STYLES[0][0], linewidth=3, label="history", zorder=5)
        more = ", ".join(f"{name}\xa0{100 * (share[0] - history[0]):+.1f}" for name, share in series.items())
        head = f"Group 1 minus its history, in points: {more}"
    ends = {0: "\nmost popular", place[-1]: "\nleast popular"}
    axes.set_xticks(place, [f"{g + 1}{ends.get(g, '')}" for g in place])
    axes.grid(False, axis="x")
    axes.legend()
    return _dressed(axes, title or head, y="{x:.0%}", xlabel="popularity group (equal numbers of titles)",
                    ylabel="share of slots or interactions")


def long_tail(axes: Axes, counts: ArrayLike, title: str = "") -> Axes:
    """Interactions per title (L,) by popularity rank, with marks where 50% and 80% of the interactions are reached."""
    counts = np.sort(np.asarray(counts, dtype=float))[::-1]
    positive, n_titles = counts[counts > 0], len(counts)
    rank, bottom = np.arange(1, len(positive) + 1), positive[-1] * 0.8
    axes.plot(rank, positive, color=STYLES[2][0])
    axes.fill_between(rank, positive, bottom, color=STYLES[2][0], alpha=0.15)
    half, most = np.searchsorted(np.cumsum(counts) / counts.sum(), np.array([0.5, 0.8]) - 1e-12) + 1
    for level, n, top, line in (("50%", half, 0.97, "--"), ("80%", most, 0.85, ":")):
        axes.axvline(n, ymax=top, color=STYLES[0][0], linestyle=line, linewidth=1.5)
        axes.text(n, top, f" {level} of the interactions: {n:,} titles", va="top", transform=axes.get_xaxis_transform())
    head = f"{half:,} of {n_titles:,} titles ({half / n_titles:.0%}) hold half of the interactions"
    head += f"; {n_titles - len(positive):,} without any" if len(positive) < n_titles else ""
    return _dressed(axes, title or head, "{x:,.0f}", "{x:,g}", yscale="log", xlim=(1, n_titles),
                    ylim=(bottom, positive[0] * 2), xlabel="titles, most popular first (rank)",
                    ylabel="interactions per title (log scale)")


def training_curves(axes: Axes, logs: Mapping[str, ArrayLike], unit: str = "nats per target", title: str = "") -> Axes:
    """Training (thin) and validation (marked) loss against steps.

    logs: columns by name: step, loss, kind ("train" or "validation"), and method if several are drawn. A star marks the
    lowest validation loss of each method.
    """
    logs, best = pd.DataFrame({"method": "", **logs}), []
    for name, (colour, line, marker, _) in styles(logs.method).items():
        looks = {"train": {"linewidth": 1, "alpha": 0.6}, "validation": {"linestyle": line, "marker": marker}}
        for kind, rows in logs[logs.method == name].groupby("kind"):
            axes.plot(rows.step, rows.loss, color=colour, label=f"{name}, {kind}".removeprefix(", "), **looks[kind])
            if kind == "validation":
                step, loss = rows.nsmallest(1, "loss")[["step", "loss"]].to_numpy()[0]
                axes.plot(step, loss, "*", color=colour, markersize=20, markeredgecolor="white", zorder=5)
                best.append(f"{name}\xa0{loss:.2f}\xa0(step\xa0{step:,.0f})".strip())
    axes.legend()
    head = f"Lowest validation loss: {', '.join(best)}" if best else "Training loss"
    return _dressed(axes, title or head, xlabel="training step", ylabel=f"loss ({unit})")


def flow_tree(
    axes: Axes, parent: ArrayLike, labels: Sequence[str], values: ArrayLike, title: str = "",
    model: ArrayLike | None = None) -> Axes:
    """A small title tree from left to right: lines as wide as their flow, each with its share.

    parent (N,): node 0 is the root (parent -1), parents stand before their children; labels: each node's token; values
    (N,): flows F. An edge's share is the token reward r = F(child) / F(parent). model (N,): a model's probability of
    each edge, written after r; the root's is ignored. Raises ValueError for what is not such a tree, a flow that is not
    positive, or more than 40 nodes.
    """
    parent, values, n = np.asarray(parent), np.asarray(values, dtype=float), len(values)
    if not (0 < n <= 40 and len(labels) == len(parent) == n and parent[0] == -1
            and all(0 <= parent[i] < i for i in range(1, n)) and (values > 0).all()):
        raise ValueError("need 1 to 40 nodes, parents before children from root 0, and a label and flow > 0 each")
    ways = [(0,)]
    for i in range(1, n):
        ways.append((*ways[parent[i]], i))
    depth, height = np.array([len(way) - 1 for way in ways]), np.zeros(n)
    leaves = sorted(set(range(n)) - set(parent.tolist()), key=ways.__getitem__)
    height[leaves] = np.arange(len(leaves))
    for i in sorted(set(parent[1:].tolist()), reverse=True):
        height[i] = height[parent == i].mean()
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "0.3"}
    for i, a in enumerate(parent):
        axes.text(depth[i], height[i], f"{labels[i]}\n{values[i]:.3g}", ha="center", va="center", fontsize=11, bbox=box)
        if i:
            r, width = values[i] / values[a], 1 + 13 * values[i] / values[0]
            axes.plot(depth[a] + np.array([0, 0.2, 0.45, 1]), height[[a, a, i, i]], color=STYLES[4][0], linewidth=width,
                      zorder=1, solid_joinstyle="round", solid_capstyle="butt")
            axes.annotate(f"{r:.2g}" if model is None else f"{r:.2f} | {model[i]:.2f}", (depth[a] + 0.56, height[i]),
                          xytext=(0, width / 2 + 1), textcoords="offset points", ha="center", va="bottom", fontsize=11)
    axes.grid(False)
    line = "share r of the flow" if model is None else "token reward r | model's π"
    return _dressed(axes, title or f"A flow of {values[0]:.3g} leaves the root and ends in {len(leaves)} titles",
                    xlim=(-0.35, depth.max() + 0.4), ylim=(len(leaves) - 0.4, -0.6), xticks=range(depth.max() + 1),
                    yticks=[], xlabel=f"tokens so far (box: token and flow, ⊤ ends a title; line: {line})")


def fitted(axes: Axes, log_target: ArrayLike, log_model: ArrayLike, name: str, title: str = "") -> Axes:
    """Each title's probability under a model against its target's, both from their logarithms (L,), on log axes. Titles
    below a thirtieth of the rarest target stand at the bottom, as triangles."""
    log_target, log_model = np.asarray(log_target), np.asarray(log_model)
    target, model = np.exp(log_target), np.exp(log_model)
    least, most, bottom = target.min(), target.max(), target.min() / 30
    axes.axline((least, least), (max(most, 1.01 * least),) * 2, color=STYLES[0][0], linewidth=1.2, zorder=1)
    for which, marker in ((model >= bottom, "o"), (model < bottom, "v")):
        axes.plot(target[which], model[which].clip(bottom), marker, color=STYLES[2][0], markersize=6, alpha=0.6,
                  markeredgewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="target R/Z (log scale)", ylabel="model, exact (log scale)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
    return _dressed(axes, title or f"{name}: KL\xa0{target @ (log_target - log_model):.1g}", "{x:g}", "{x:g}")


def fit_curves(axes: Axes, curves: Series, xlabel: str, floor: float | None = None, title: str = "") -> Axes:
    """KL(target‖model) against what it cost, one line a method: name → (cost, KL in nats). `floor` is drawn dotted."""
    for name, (colour, line, marker, _) in styles(curves).items():
        axes.plot(*curves[name], color=colour, linestyle=line, marker=marker, label=name)
    if floor is not None:
        axes.axhline(floor, color="0.4", linestyle=":", linewidth=1.5)
        axes.text(0, floor * 0.9, " a perfect model, measured by draws", va="top", transform=axes.get_yaxis_transform())
    axes.legend(fontsize=11)
    axes.set(yscale="log", xlabel=xlabel, ylabel="KL(target‖model), nats (log scale)")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], LEAST_KL))
    kl, best = min((np.asarray(kl)[-1], name) for name, (_, kl) in curves.items())
    return _dressed(axes, title or f"Closest in the end: {best}, KL\xa0{kl:.1g}\xa0nats", "{x:,g}")


def fit_summary(axes: Axes, rows: Rows, limit: float, title: str = "") -> Axes:
    """Where each method ended, best first: rows hold label (equal ones are repetitions) and kl_target_model (nats)."""
    ends = pd.DataFrame(rows).groupby("label", sort=False).kl_target_model
    median = ends.median().sort_values(kind="stable")
    order, within = median.index.tolist(), (median <= limit).sum()
    for i, label in enumerate(order):
        marker, colour = ("o", STYLES[2][0]) if i < within else ("X", STYLES[3][0])
        kl = ends.get_group(label).clip(LEAST_KL)
        axes.plot(kl, [i] * len(kl), marker, color=colour, markersize=9, alpha=0.8, markeredgecolor="white")
    axes.axvline(limit, color=STYLES[0][0], linestyle=":", linewidth=1.5)
    xlabel = f"KL(target‖model), nats (log scale; what is below {LEAST_KL:g} stands there)"
    head = f"{within} of {len(order)} ways end within {limit:g} nats (dotted) of the target"
    return _dressed(axes, title or head, rows=order, xscale="log", xlabel=xlabel)


def node_choice(
    axes: Axes, labels: Sequence[str], series: Series, title: str, n: int = 5, xlabel: str = "next token's probability"
) -> Axes:
    """Bars of the probabilities of what follows one node of the tree: the n likeliest children, and the rest together;
    one bar for each of the series, such as token reward r and a model's π."""
    values = np.array([np.asarray(bars, dtype=float) for bars in series.values()])
    order = np.argsort(-values.max(axis=0), kind="stable")
    bars, rest, names = values[:, order[:n]], values[:, order[n:]], [str(labels[i]) for i in order[:n]]
    if rest.size:
        bars, names = np.column_stack([bars, rest.sum(axis=1)]), [*names, f"{rest.shape[1]} others"]
    colours, _, _, hatches = zip(STYLES[0], *styles(list(series)[1:]).values())
    axes.grouped_bar(dict(zip(series, bars)), group_spacing=len(series) / 4, orientation="horizontal", colors=colours,
                     hatch=hatches, edgecolor="white")
    return _dressed(axes, title, rows=names, xlim=(0, 1), xlabel=xlabel)


def frontier(axes: Axes, rows: Rows, accuracy: str, unfairness: str = "dgu", title: str = "") -> Axes:
    """Accuracy against unfairness: rows hold both, method, decoding, and the settings in which a method's points differ
    (SYMBOLS), which are written beside the marks; a line joins the points of a method that differ in one of them."""
    for name, (colour, line, marker, _) in styles(row["method"] for row in rows).items():
        own = [row for row in rows if row["method"] == name]
        varying = [key for key in SYMBOLS if len({row.get(key) for row in own}) > 1]
        own.sort(key=lambda row: [row.get(key, 0) for key in varying])
        axes.plot([row[unfairness] for row in own], [row[accuracy] for row in own], marker=marker, color=colour,
                  linestyle=line if len(varying) == 1 else "", label=name, markersize=9,
                  zorder=2.5 if len(own) == 1 else 2)
        for row in own if varying else ():
            axes.annotate(", ".join(SYMBOLS[key].format(row[key]) for key in varying), (row[unfairness], row[accuracy]),
                          xytext=(0, 9), textcoords="offset points", ha="center", va="bottom", fontsize=11,
                          bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0})
    axes.margins(y=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    best, fairest = max(rows, key=lambda row: row[accuracy]), min(rows, key=lambda row: row[unfairness])
    head = (f"Most accurate: {best['method']} ({accuracy.upper()}\xa0{best[accuracy]:.3f}, "
            f"{METRIC_LABELS[unfairness].split()[0]}\xa0{best[unfairness]:.3f}); fairest: {fairest['method']} "
            f"({fairest[accuracy]:.3f}, {fairest[unfairness]:.3f})")
    return _dressed(axes, title or head, xlabel=METRIC_LABELS[unfairness], ylabel=accuracy.upper(), xlim=(0, None))


def metric_intervals(axes: Axes, rows: Rows, metric: str, title: str = "", of_next: float | None = None) -> Axes:
    """One metric as point and 95% interval (over users, and trainings where a row holds several), one line a row: rows
    hold `metric`, `<metric>_lo`, `<metric>_hi`, method, and decoding and seen where they differ. of_next: the metric of
    the users' next choices."""
    varying = [key for key in ("method", "decoding", "seen") if len({row.get(key) for row in rows}) > 1] or ["method"]
    names = [", ".join("seen " * (key == "seen") + row.get(key, "") for key in varying) for row in rows]
    names = [name.replace("_", " ").replace(", seen", ",\nseen") for name in names]
    families = [row["method"].split(", α")[0] for row in rows]
    style, values = styles(families), [row[metric] for row in rows]
    decodings = list(dict.fromkeys(row.get("decoding") for row in rows))
    for i, (row, value) in enumerate(zip(rows, values)):
        colour, _, marker, _ = style[families[i]]
        hollow = decodings.index(row.get("decoding")) % 2 == 1
        spread = [[value - row.get(f"{metric}_lo", value)], [row.get(f"{metric}_hi", value) - value]]
        axes.errorbar(value, i, xerr=spread, color=colour, fmt=marker, markerfacecolor="white" if hollow else colour,
                      capsize=5, markersize=9, elinewidth=2.2, markeredgewidth=2)
    if (of_next := 0.0 if metric == "top_vs_next" else of_next) is not None:
        axes.axvline(of_next, color=STYLES[0][0], linestyle="--", linewidth=1.5)
        axes.text(of_next, 0.02, " next choices", fontsize=11, transform=axes.get_xaxis_transform())
    label = METRIC_LABELS.get(metric, metric.upper())
    low, high = (f"{values[i]:.3g} ({names[i]})" for i in (np.argmin(values), np.argmax(values)))
    head = f"{label.split(' (')[0]} from {low} to {high}".replace("\n", " ")
    return _dressed(axes, title or head, rows=names, xlabel=f"{label},\n95% interval", ylabel=", ".join(varying))


def bias_steps(axes: Axes, rows: Rows, title: str = "") -> Axes:
    """What each step of a decoder adds to a model's popularity bias: rows hold model, step, and top_vs_next, the most
    popular group's share of the slots minus its share of the next choices; one line of points a model."""
    steps = list(dict.fromkeys(row["step"] for row in rows))
    for name, (colour, line, marker, _) in styles(row["model"] for row in rows).items():
        own = [(row["top_vs_next"], steps.index(row["step"])) for row in rows if row["model"] == name]
        axes.plot(*zip(*own), color=colour, linestyle=line, marker=marker, markersize=9, label=name)
    axes.axvline(0, color=STYLES[0][0], linewidth=1)
    axes.legend()
    return _dressed(axes, title, rows=steps, xlabel="most popular eighth's share: slots − next choices (0: as chosen)")


def ratios(axes: Axes, rows: Rows, title: str = "") -> Axes:
    """Times of one way over another's, on a log axis: rows hold name, ratio, bound (or None), maybe least and most."""
    bounded = [row for row in rows if row["bound"] is not None]
    missed = [row for row in bounded if row["ratio"] > row["bound"]]
    for i, row in enumerate(rows):
        colour, _, marker, _ = STYLES[3 if row in missed else 2 if row in bounded else 0]
        spread = [[row["ratio"] - row.get("least", row["ratio"])], [row.get("most", row["ratio"]) - row["ratio"]]]
        axes.errorbar(row["ratio"], i, xerr=spread, color=colour, fmt=marker, capsize=4, markersize=5)
        if row in bounded:
            axes.plot(row["bound"], i, "|", color=STYLES[0][0], markersize=18, markeredgewidth=2.5)
    axes.axvline(1, color=STYLES[0][0], linewidth=1)
    head = f"{len(bounded) - len(missed)} of {len(bounded)} ratios keep their bound (upright strokes)"
    return _dressed(axes, title or head, rows=[textwrap.fill(row["name"], 52) for row in rows],
                    xscale="log", xlabel="ours / the other way (log scale; black: no bound)")
