"""The pictures: data in, Axes out. Nothing here saves or trains, and only `theme` changes matplotlib's settings.

Every function draws on the Axes it is given, composes the title from the data unless `title` is given, and returns
the Axes. Metrics and groups are by leaf (items with equal titles merged), as in `metrics`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from numpy.typing import ArrayLike

# colour (Okabe and Ito: safe for the colour-blind), line, marker, hatch; neighbours differ in grey as well
STYLES = (
    ("#222222", "-", "o", ""),
    ("#E69F00", "--", "s", "//"),
    ("#0072B2", "-.", "D", ".."),
    ("#D55E00", ":", "^", "xx"),
    ("#56B4E9", (0, (8, 2)), "v", "\\\\"),
    ("#009E73", (0, (3, 1, 1, 1, 1, 1)), "P", "++"),
    ("#CC79A7", (0, (1, 3)), "X", "--"),
)
WATER = "#56B4E9"  # flows
FIXED = {"history": 0, "SFT": 1, "Flower": 2}  # these names look the same in every picture
METHOD_NAMES = {
    "exact_ce": "every edge (cross-entropy)", "exact_squared": "every edge (squared)", "subtree_ce": "drawn subtrees",
    "sft": "SFT", "subtb": "Flower (SubTB)", "tb": "TB", "db": "DB", "modified_subtb": "modified SubTB", "dpo": "DPO",
    "rloo": "RLOO",
}

LEAST_KL = 1e-6  # where the axes of the fits end

METRIC_LABELS = {
    "dgu": "DGU (share of slots; 0 = as in the history)",
    "mgu": "MGU (share of slots; 0 = as in the history)",
    "average_popularity": "mean popularity (interactions per slot's title)",
    "tail_share": "slots of the tail (share; 0.2 = as in the history)",
    "h_bits": "H (bits per word)",
    "ttr": "TTR (distinct words per word)",
    "distinct": "distinct titles recommended",
    "coverage": "coverage (share of the catalogue)",
    "gini": "Gini of the exposure (0 = equal)",
}


def theme() -> None:
    """The look of every notebook; call it once at the top. Text of 11 points or more on figures 8 inches wide."""
    sns.set_theme(context="notebook", style="whitegrid", palette=[s[0] for s in STYLES], rc={
        "figure.figsize": (8, 4.5), "figure.dpi": 100, "figure.constrained_layout.use": True,
        "font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.labelsize": 12, "xtick.labelsize": 12, "ytick.labelsize": 12, "legend.fontsize": 12,
        "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2.2, "hatch.linewidth": 0.8,
    })


def styles(names: Sequence[str]) -> dict[str, tuple[Any, Any, str, str]]:
    """Colour, line style, marker and hatch of each name: fixed ones for FIXED (a bracket behind them does not matter),
    the others in order.

    Raises:
        ValueError: more names than distinguishable styles.
    """
    fixed = {name: FIXED[known] for name in names if (known := name.split(" (")[0]) in FIXED}
    others = [name for name in names if name not in fixed]
    if len(others) > len(STYLES) - len(FIXED):
        raise ValueError(f"at most {len(STYLES) - len(FIXED)} series besides {', '.join(FIXED)}: {', '.join(others)}")
    return {name: STYLES[fixed[name] if name in fixed else len(FIXED) + others.index(name)] for name in names}


def _titled(axes: Axes, text: str) -> Axes:
    """Sets the title, broken into lines of about the axes' width."""
    points = 72 * axes.bbox.width / axes.figure.dpi
    axes.set_title(textwrap.fill(text, int(points / (0.6 * axes.title.get_fontsize()))))
    return axes


def popularity_curve(
    axes: Axes, exposure: Mapping[str, ArrayLike], counts: ArrayLike, mark: int | None = None,
    title: str | None = None,
) -> Axes:
    """Share of the recommended slots that the n most popular titles fill, against n, with the history as reference.

    exposure: slots per leaf (L,) of each method; counts: training interactions per leaf (L,). A curve above the
    history's gives popular titles more than they had. The dots and the title read the curves at n = `mark`
    (default: an eighth of the titles with a count, popularity group 1).
    """
    counts = np.asarray(counts, dtype=float)
    order = np.argsort(-counts, kind="stable")
    mark = min(mark or -(-np.count_nonzero(counts) // 8), len(counts))
    series = {"history": counts} | {name: np.asarray(e, dtype=float) for name, e in exposure.items()}
    at_mark = {}
    for name, (colour, line, marker, _) in styles(list(series)).items():
        share = np.cumsum(series[name][order]) / series[name].sum()
        at_mark[name] = share[mark - 1]
        axes.plot(np.arange(1, len(share) + 1), share, color=colour, linestyle=line, label=name)
        axes.plot(mark, share[mark - 1], marker, color=colour, markersize=8, markeredgecolor="white", zorder=5)
    axes.axvline(mark, color="0.5", linewidth=1, zorder=1)
    axes.set(xscale="log", xlim=(1, len(counts)), ylim=(0, 1.02),
             xlabel="titles, most popular first (rank by interactions, log scale)",
             ylabel="cumulative share of slots")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(loc="best")
    said = ", ".join(f"{name} {share:.0%}" for name, share in at_mark.items())
    return _titled(axes, title or f"The {mark:,} most popular titles: {said}")


def group_bars(axes: Axes, shares: Mapping[str, ArrayLike], title: str | None = None) -> Axes:
    """Share of the recommended slots per popularity group (G,) of each method; "history" is drawn as black lines."""
    series = {name: np.asarray(s, dtype=float) for name, s in shares.items()}
    history = series.pop("history", None)
    n_groups, width = len(next(iter(shares.values()))), 0.8 / max(1, len(series))
    place = np.arange(n_groups)
    for i, (name, (colour, _, _, hatch)) in enumerate(styles(list(series)).items()):
        axes.bar(place - 0.4 + (i + 0.5) * width, series[name], width, color=colour, hatch=hatch, edgecolor="white",
                 label=name)
    if history is not None:
        axes.hlines(history, place - 0.46, place + 0.46, color=STYLES[0][0], linewidth=3, label="history", zorder=5)
        said = ", ".join(f"{name} {100 * (s[0] - history[0]):+.1f}" for name, s in series.items())
    ends = {0: "\nmost popular", n_groups - 1: "\nleast popular"}
    axes.set_xticks(place, [f"{g + 1}{ends.get(g, '')}" for g in place])
    axes.grid(False, axis="x")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="popularity group (equal numbers of titles)", ylabel="share of slots or interactions")
    axes.legend()
    return _titled(axes, title or (f"Group 1 minus its history, in points: {said}" if history is not None else
                                   "Share of each popularity group"))


def long_tail(axes: Axes, counts: ArrayLike, title: str | None = None) -> Axes:
    """Interactions per title (L,) by popularity rank, with marks where 50% and 80% of the interactions are reached."""
    counts = np.sort(np.asarray(counts, dtype=float))[::-1]
    n_titles, share = len(counts), np.cumsum(counts) / counts.sum()
    positive = counts[counts > 0]
    rank = np.arange(1, len(positive) + 1)
    axes.plot(rank, positive, color=STYLES[2][0])
    axes.fill_between(rank, positive, positive.min() * 0.8, color=STYLES[2][0], alpha=0.15)
    axes.set(yscale="log", xlim=(1, n_titles), ylim=(positive.min() * 0.8, positive.max() * 2),
             xlabel="titles, most popular first (rank)", ylabel="interactions per title (log scale)")
    n_at = {level: int(np.searchsorted(share, level - 1e-12)) + 1 for level in (0.5, 0.8)}
    for (level, n), height, line in zip(n_at.items(), (0.97, 0.85), ("--", ":")):
        axes.axvline(n, ymax=height, color=STYLES[0][0], linestyle=line, linewidth=1.5)
        axes.annotate(f"{level:.0%} of the interactions: {n:,} titles", (n, height), xytext=(6, 0),
                      xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="top", fontsize=12)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    unseen = f"; {n_titles - len(positive):,} without any" if len(positive) < n_titles else ""
    return _titled(axes, title or f"{n_at[0.5]:,} of {n_titles:,} titles ({n_at[0.5] / n_titles:.0%}) hold half of "
                                  f"the interactions{unseen}")


def training_curves(axes: Axes, logs: Any, unit: str = "nats per target", title: str | None = None) -> Axes:
    """Training (thin) and validation (marked) loss against steps.

    logs: a DataFrame, or anything that gives columns by name: step, loss, kind ("train" or "validation"), and
    method if several are drawn. A star marks the lowest validation loss of each method.
    """
    step, loss, kind = (np.asarray(logs[name]) for name in ("step", "loss", "kind"))
    method = np.asarray(logs["method"]) if "method" in logs else np.full(len(step), "")
    best = []
    for name, (colour, line, marker, _) in styles(list(dict.fromkeys(method.tolist()))).items():
        prefix = f"{name}, " if name else ""
        train, validation = ((method == name) & (kind == k) for k in ("train", "validation"))
        if train.any():
            axes.plot(step[train], loss[train], color=colour, linewidth=1, alpha=0.6, label=f"{prefix}train")
        if not validation.any():
            continue
        axes.plot(step[validation], loss[validation], color=colour, linestyle=line, marker=marker,
                  label=f"{prefix}validation")
        i = np.flatnonzero(validation)[loss[validation].argmin()]
        axes.plot(step[i], loss[i], "*", color=colour, markersize=20, markeredgecolor="white", zorder=5)
        best.append(f"{name} {loss[i]:.2f} (step {step[i]:,})".strip())
    axes.set(xlabel="training step", ylabel=f"loss ({unit})")
    axes.legend()
    return _titled(axes, title or (f"Lowest validation loss: {', '.join(best)}" if best else "Training loss"))


def flow_tree(
    axes: Axes, parent: ArrayLike, labels: Sequence[str], values: ArrayLike, title: str | None = None,
    model: ArrayLike | None = None,
) -> Axes:
    """A small title tree from left to right: lines as wide as their flow, each with its share.

    parent (N,): node 0 is the root (parent -1), parents stand before their children; labels: each node's token;
    values (N,): flows F. An edge's share is the token reward r = F(child) / F(parent). model (N,): a model's
    probability of each edge, written after r; the root's is ignored.

    Raises:
        ValueError: not such a tree, a flow that is not positive, or more than 40 nodes.
    """
    parent, values = np.asarray(parent), np.asarray(values, dtype=float)
    n = len(parent)
    if not (0 < n <= 40 and len(labels) == len(values) == n and parent[0] == -1
            and all(0 <= parent[i] < i for i in range(1, n)) and (values > 0).all()):
        raise ValueError("need 1 to 40 nodes, parents before children from root 0, and a label and flow > 0 each")
    children: list[list[int]] = [[] for _ in range(n)]
    depth, height = np.zeros(n), np.zeros(n)
    for i in range(1, n):
        children[parent[i]].append(i)
        depth[i] = depth[parent[i]] + 1

    def place(node: int, n_leaves: int) -> int:
        """Leaves evenly spaced from the top, inner nodes at the mean of their children; leaves placed so far."""
        if not children[node]:
            height[node] = -n_leaves
            return n_leaves + 1
        for child in children[node]:
            n_leaves = place(child, n_leaves)
        height[node] = np.mean([height[child] for child in children[node]])
        return n_leaves

    n_leaves = place(0, 0)
    for i in range(1, n):
        a, p = parent[i], values[i] / values[parent[i]]
        width = 1 + 13 * values[i] / values[0]
        axes.plot(depth[a] + np.array([0, 0.2, 0.45, 1]), height[[a, a, i, i]], color=WATER, linewidth=width, zorder=1,
                  solid_joinstyle="round", solid_capstyle="butt")
        said = f"{p:.2g}" if model is None else f"{p:.2f} | {np.asarray(model)[i]:.2f}"
        axes.annotate(said, (depth[a] + 0.56, height[i]), xytext=(0, width / 2 + 1), textcoords="offset points",
                      ha="center", va="bottom", fontsize=11)
    for i in range(n):
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "0.3"}
        axes.text(depth[i], height[i], f"{labels[i]}\n{values[i]:.3g}", ha="center", va="center", fontsize=11, bbox=box,
                  zorder=3)
    axes.set(xlim=(-0.35, depth.max() + 0.4), ylim=(-n_leaves + 0.4, 0.6), yticks=[], ylabel="",
             xticks=np.arange(depth.max() + 1),
             xlabel="tokens so far (box: token and flow; line: "
                    + ("share r of the flow)" if model is None else "token reward r | model's π)"))
    axes.grid(False)
    return _titled(axes, title or f"A flow of {values[0]:.3g} leaves the root and ends in {n_leaves} titles")


def fitted(axes: Axes, log_target: ArrayLike, log_model: ArrayLike, name: str, title: str | None = None) -> Axes:
    """Each title's probability under a model against its target's, both from their logarithms (L,), on log axes. Titles
    below a thirtieth of the rarest target stand at the bottom, as triangles."""
    log_target, log_model = np.asarray(log_target), np.asarray(log_model)
    target, model = np.exp(log_target), np.exp(log_model)
    bottom = target.min() / 30
    low = model < bottom
    axes.set(xscale="log", yscale="log", xlabel="target R/Z (log scale)", ylabel="model, exact (log scale)")
    axes.axline((target.min(), target.min()), (target.max(), target.max()), color=STYLES[0][0], linewidth=1.2, zorder=1)
    for which, values, marker in ((~low, model, "o"), (low, np.full(len(model), bottom), "v")):
        axes.plot(target[which], values[which], marker, color=STYLES[2][0], markersize=6, alpha=0.6, markeredgewidth=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    return _titled(axes, title or f"{name}: KL {target @ (log_target - log_model):.1g}")


def fit_curves(
    axes: Axes, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], xlabel: str, floor: float | None = None,
    title: str | None = None,
) -> Axes:
    """KL(target‖model) against what it cost, one line a method: name → (cost, KL in nats). `floor` is drawn dotted."""
    for name, (colour, line, marker, _) in styles(list(curves)).items():
        cost, kl = (np.asarray(x, dtype=float) for x in curves[name])
        axes.plot(cost, kl, color=colour, linestyle=line, marker=marker, label=name)
    if floor is not None:
        axes.axhline(floor, color="0.4", linestyle=":", linewidth=1.5)
        axes.annotate("a perfect model, measured by draws", (0, floor), xytext=(4, -3), ha="left", va="top",
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=11, color="0.3")
    axes.set(yscale="log", xlabel=xlabel, ylabel="KL(target‖model), nats (log scale)")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], LEAST_KL))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.legend(fontsize=11)
    best = min(curves, key=lambda name: np.asarray(curves[name][1])[-1])
    return _titled(axes, title or f"Closest in the end: {best}, KL {np.asarray(curves[best][1])[-1]:.1g} nats")


def fit_summary(axes: Axes, rows: Sequence[Mapping[str, Any]], limit: float, title: str | None = None) -> Axes:
    """Where each method ended: rows hold label and kl_target_model; rows of one label are repetitions. On a log axis,
    best first, with `limit` as a line."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["label"], []).append(row["kl_target_model"])
    order = sorted(values, key=lambda label: np.median(values[label]))
    for i, label in enumerate(order):
        good = np.median(values[label]) <= limit
        axes.plot(np.maximum(values[label], LEAST_KL), [-i] * len(values[label]), "o" if good else "X", markersize=9, alpha=0.8,
                  color=STYLES[2 if good else 3][0], markeredgecolor="white")
    axes.axvline(limit, color=STYLES[0][0], linestyle=":", linewidth=1.5)
    axes.set(xscale="log", ylim=(-len(order) + 0.4, 0.6), ylabel="",
             xlabel=f"KL(target‖model), nats (log scale; what is below {LEAST_KL:g} stands there)")
    axes.set_yticks(-np.arange(len(order)), order)
    axes.grid(False, axis="y")
    within = sum(np.median(v) <= limit for v in values.values())
    return _titled(axes, title or f"{within} of {len(order)} ways end within {limit:g} nats (dotted) of the target")


def node_choice(
    axes: Axes, labels: Sequence[str], series: Mapping[str, ArrayLike], title: str, n: int = 5,
    xlabel: str = "probability of the next token",
) -> Axes:
    """What follows one node of the tree: probabilities of its children, as bars, of the n likeliest of them and the rest
    together; one bar for each of the series, such as token reward r and a model's π."""
    values = {name: np.asarray(bars, dtype=float) for name, bars in series.items()}
    order = np.argsort(-np.max(list(values.values()), axis=0), kind="stable")
    shown, rest = order[:n], order[n:]
    names = [str(labels[i]) for i in shown] + ([f"{len(rest)} others"] if len(rest) else [])
    place, width = -np.arange(len(names)), 0.8 / len(values)
    first, *others = values
    style = {first: STYLES[0]} | styles(others)
    for i, (name, bars) in enumerate(values.items()):
        colour, _, _, hatch = style[name]
        bars = [*bars[shown], bars[rest].sum()][: len(names)]
        axes.barh(place + 0.4 - (i + 0.5) * width, bars, 0.95 * width, color=colour, hatch=hatch, edgecolor="white", label=name)
    axes.set_yticks(place, names)
    axes.set(xlim=(0, 1), xlabel=xlabel)
    axes.grid(False, axis="y")
    return _titled(axes, title)


def frontier(axes: Axes, rows: Sequence[Mapping[str, Any]], accuracy: str, title: str | None = None) -> Axes:
    """Accuracy against DGU: rows hold both, method and decoding, and what tells the points of a method apart (alpha,
    theta, guide), which is written beside filled marks. Hollow marks are length-normalised beams; a line joins the points
    of a method that differ in one of these alone."""
    style = styles(list(dict.fromkeys(row["method"] for row in rows)))
    told = {"alpha": "α {:g}", "theta": "θ {:g}", "guide": "w {:g}"}
    for name, (colour, line, marker, _) in style.items():
        for hollow in (False, True):
            own = [row for row in rows if row["method"] == name and (row["decoding"] == "beam_normalised") == hollow]
            if not own:
                continue
            known = [key for key in told if any(key in row for row in own)]
            if len(known) == 1:
                own.sort(key=lambda row: row[known[0]])
                axes.plot([r["dgu"] for r in own], [r[accuracy] for r in own], color=colour, linestyle=line, alpha=0.6)
            axes.plot([r["dgu"] for r in own], [r[accuracy] for r in own], marker, color=colour, markersize=9,
                      markeredgewidth=2, markerfacecolor="white" if hollow else colour,
                      label=None if hollow else name)
            for row in own if known and not hollow else ():
                said = ", ".join(told[key].format(row[key]) for key in known)
                axes.annotate(said, (row["dgu"], row[accuracy]), xytext=(0, -9 if len(known) > 1 else 9), ha="center",
                              va="top" if len(known) > 1 else "bottom", textcoords="offset points", fontsize=11)
    if any(row["decoding"] == "beam_normalised" for row in rows):
        axes.plot([], [], "o", color="0.4", markersize=9, markeredgewidth=2, markerfacecolor="white",
                  label="hollow: length-normalised")
    axes.set(xlabel=METRIC_LABELS["dgu"], ylabel=accuracy.upper(), xlim=(0, None))
    axes.margins(y=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    best, fairest = (pick(rows, key=lambda row: row[key]) for pick, key in ((max, accuracy), (min, "dgu")))
    return _titled(axes, title or f"Most accurate: {best['method']} ({accuracy.upper()} {best[accuracy]:.3f}, DGU "
                                  f"{best['dgu']:.2f}); fairest: {fairest['method']} ({fairest[accuracy]:.3f}, "
                                  f"{fairest['dgu']:.2f})")


def metric_intervals(
    axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str, title: str | None = None
) -> Axes:
    """One metric as point and 95% interval, one line a row: rows hold `metric`, `<metric>_lo`, `<metric>_hi`, method,
    and decoding and seen where they differ between the rows. Intervals are over test users."""
    varying = [key for key in ("method", "decoding", "seen") if len({row.get(key) for row in rows}) > 1] or ["method"]
    say = {"method": "{}", "decoding": "{}", "seen": "seen {}"}
    names = [", ".join(say[key].format(row.get(key, "")).replace("_", " ") for key in varying) for row in rows]
    style = styles(list(dict.fromkeys(str(row.get("method", "")) for row in rows)))
    decodings = list(dict.fromkeys(row.get("decoding") for row in rows))
    for i, row in enumerate(rows):
        value, colour = row[metric], style[str(row.get("method", ""))][0]
        hollow = decodings.index(row.get("decoding")) % 2 == 1
        spread = [[value - row.get(f"{metric}_lo", value)], [row.get(f"{metric}_hi", value) - value]]
        axes.errorbar(value, -i, xerr=spread, color=colour, fmt=style[str(row.get("method", ""))][2], capsize=5,
                      markersize=9, elinewidth=2.2, markeredgewidth=2, markerfacecolor="white" if hollow else colour)
    axes.set_yticks(-np.arange(len(rows)), [name.replace(", seen", "\nseen") for name in names])
    axes.set(ylim=(-len(rows) + 0.4, 0.6), ylabel=", ".join(varying))
    axes.grid(False, axis="y")
    label = METRIC_LABELS.get(metric, metric.upper())
    axes.set_xlabel(f"{label}, 95% interval over users")
    low, high = (pick(range(len(rows)), key=lambda i: rows[i][metric]) for pick in (min, max))
    return _titled(axes, title or f"{label.split(' (')[0]} from {rows[low][metric]:.3g} ({names[low]}) "
                                  f"to {rows[high][metric]:.3g} ({names[high]})")


def ratios(axes: Axes, rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Axes:
    """Times of one way over times of another, on a log axis: rows hold name, ratio, bound (None where none was set) and,
    where there were several rounds, least and most."""
    bounded = [row for row in rows if row["bound"] is not None]
    missed = [row for row in bounded if row["ratio"] > row["bound"]]
    for i, row in enumerate(rows):
        colour, _, marker, _ = STYLES[3 if row in missed else 2 if row in bounded else 0]
        spread = [[row["ratio"] - row.get("least", row["ratio"])], [row.get("most", row["ratio"]) - row["ratio"]]]
        axes.errorbar(row["ratio"], -i, xerr=spread, color=colour, fmt=marker, capsize=4, markersize=8)
        if row in bounded:
            axes.plot(row["bound"], -i, "|", color=STYLES[0][0], markersize=18, markeredgewidth=2.5)
    axes.set_yticks(-np.arange(len(rows)), [textwrap.fill(row["name"].split(" / ")[0], 46) for row in rows])
    axes.set(xscale="log", ylim=(-len(rows) + 0.4, 0.6), xlabel="time of ours / time of the other way (log scale)")
    axes.axvline(1, color=STYLES[0][0], linewidth=1)
    axes.grid(False, axis="y")
    return _titled(axes, title or f"{len(bounded) - len(missed)} of {len(bounded)} ratios keep their bound "
                                  "(upright strokes)")
