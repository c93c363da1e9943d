"""Explorers for a notebook: widgets that hand their values to the library and `plots`, and show what comes back.

Every figure here can be drawn without widgets as well, so that a notebook reads without a kernel.
"""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import backbone, fit, metrics, plots, policy, readers, rewards, runs
from .trie import TitleTrie

WIDE = {"width": "34em"}


def live(
    draw: Callable[..., pd.DataFrame | None], controls: Mapping[str, widgets.Widget], size: tuple[float, float]
) -> widgets.VBox:
    """Controls above a figure that `draw(figure, **values)` draws anew whenever a value changes.

    The table that `draw` returns stands below; a ValueError's message takes the figure's place in words.
    """
    picture, below = widgets.Image(format="png", layout={"max_width": "100%"}), widgets.HTML()
    figure = Figure(figsize=size, dpi=80, layout="none")

    def show(_: Any = None) -> None:
        figure.clear()
        figure.subplots_adjust(left=0.06, right=0.98, bottom=0.19, top=0.86, wspace=0.2)  # an engine would draw twice
        try:
            table = draw(figure, **{name: control.value for name, control in controls.items()})
        except ValueError as error:
            picture.layout.display, below.value = "none", f"<b>{html.escape(str(error))}</b>"
            return
        picture.value, picture.layout.display = _png(figure), None
        below.value = "" if table is None else table.to_html(border=0)

    for control in controls.values():
        control.observe(show, "value")
    show()
    return widgets.VBox([widgets.VBox(list(controls.values())), picture, below])


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _slider(kind: type[widgets.Widget], text: str, value: float, low: float, high: float, step: float) -> widgets.Widget:
    return kind(value=value, min=low, max=high, step=step, description=text, style={"description_width": "initial"},
                layout=WIDE)


@dataclass(frozen=True)
class Branches:
    """A tree of titles, one user, and what models make of it.

    Attributes:
        labels: (n_nodes,) text of each node's token. titles: (n_items,). counts: (n_items,) interactions.
        log_p: (n_leaves,) log preference of the user, nats.
        log_edges: model → (n_nodes,) log π of each edge for this user, nats.
    """

    trie: TitleTrie
    labels: Sequence[str]
    titles: Sequence[str]
    counts: Tensor
    log_p: Tensor
    log_edges: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, catalogue: policy.Catalogue,
        history: Sequence[int], counts: Tensor, log_p: Tensor,
    ) -> Branches:
        """From models by name, over one catalogue; each reads the whole tree once, for this history of item positions
        (oldest first)."""
        with torch.no_grad():
            edges = {name: policy.tree_log_probs(model, catalogue.trie, catalogue.context(history)).cpu()
                     for name, model in models.items()}
        trie = catalogue.trie.to("cpu")
        spelled = [tokenizer.decode([token]) for token in trie.token.clamp(min=0).tolist()]
        labels = ["⊤" if leaf >= 0 else text for leaf, text in zip(trie.node_leaf.tolist(), spelled)]
        return cls(trie, labels, catalogue.titles, counts, log_p, edges)

    def flows(self, alpha: float, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
        """(n_nodes,) log F with Z = 1, and log r, of the reward (count + smoothing)^α · p_u^β."""
        log_rewards = rewards.count_log_rewards(self.trie, self.counts, alpha, smoothing)
        log_rewards = rewards.preference_log_rewards(self.trie, log_rewards, self.log_p.to(log_rewards), beta)
        return self.trie.log_flows(log_rewards - log_rewards.logsumexp(0)), self.trie.log_token_rewards(log_rewards)

    def way(self, text: str, depth: int) -> list[int]:
        """The nodes from the root to `depth` tokens down the first title that begins with `text`, short of its end.

        Raises:
            ValueError: no title begins so.
        """
        item = next((i for i, title in enumerate(self.titles) if title.lower().startswith(text.strip().lower())), None)
        if item is None:
            raise ValueError(f"no title begins with {text!r}")
        path = self.trie.paths(self.trie.leaf[item : item + 1])[0]
        return [0, *path[path >= 0][:-1][:depth].tolist()]

    def children(self, node: int) -> list[int]:
        """The nodes one token further."""
        return self.trie.children(torch.tensor([node]))[1].tolist()


def draw_branch(
    figure: Figure, branches: Branches, title: str, depth: int, alpha: float, beta: float, smoothing: float, n: int = 6
) -> None:
    """Left the last steps to a node, with the flow that each takes and what turns off before; right the choice there."""
    log_flow, log_r = branches.flows(alpha, beta, smoothing)
    flow, way = log_flow.exp().tolist(), branches.way(title, depth)
    parent, labels, values = [], [], []

    def add(under: int, label: str, value: float) -> int:
        for column, entry in ((parent, under), (labels, label), (values, max(value, 1e-12))):
            column.append(entry)
        return len(parent) - 1

    def rest(under: int, node: int, shown: Sequence[int]) -> None:
        others = [child for child in branches.children(node) if child not in shown]
        if others:
            add(under, f"{len(others)} others", sum(flow[child] for child in others))

    near, node = way[-4:], way[-1]
    place = add(-1, "start" if near[0] == 0 else "…" + branches.labels[near[0]], flow[near[0]])
    for above, below in zip(near, near[1:]):
        rest(place, above, [below])
        place = add(place, branches.labels[below], flow[below])
    children = branches.children(node)
    shown = sorted(children, key=lambda child: -flow[child])[:n]
    for child in shown:
        add(place, branches.labels[child], flow[child])
    rest(place, node, shown)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    prefix = "".join(branches.labels[i] for i in way[1:]).strip()
    plots.flow_tree(left, parent, labels, values, title=f"{flow[node]:.2%} of the flow passes “{prefix}”" if prefix
                    else "All of the flow starts here")
    series = {"reward r": log_r[children].exp()}
    series |= {f"{name} (π)": edges[children].exp() for name, edges in branches.log_edges.items()}
    plots.node_choice(right, [branches.labels[child] for child in children], series,
                      title=f"What follows “{prefix}”?" if prefix else "How does a title begin?", n=n)
    right.legend(loc="center right")


def tree(branches: Branches, title: str) -> widgets.VBox:
    """The explorer of flows: a title or its beginning, how far down, and the reward's α, β and smoothing."""
    controls = {
        "title": widgets.Combobox(value=title, options=sorted(set(branches.titles)), description="title",
                                  continuous_update=False, layout=WIDE),
        "depth": _slider(widgets.IntSlider, "tokens down the title", 0, 0, branches.trie.max_depth, 1),
        "alpha": _slider(widgets.FloatSlider, "α, of the count", -0.5, -2, 2, 0.25),
        "beta": _slider(widgets.FloatSlider, "β, of the preference", 1, 0, 2, 0.25),
        "smoothing": _slider(widgets.FloatSlider, "smoothing, added to the count", 1, 0.1, 20, 0.1),
    }
    return live(lambda figure, **values: draw_branch(figure, branches, **values), controls, (14, 5))


@dataclass(frozen=True)
class Fitted:
    """A model at one moment of `fit_few`: (n,) probabilities of the titles, and the log so far."""

    titles: Sequence[str]
    target: np.ndarray
    model: np.ndarray
    loss: str
    log: pd.DataFrame


def fit_few(
    counts: Mapping[str, float], loss: str, paths: str, budget: int, watch: Callable[[Fitted], None], seed: int = 0
) -> None:
    """Tunes a tiny random model until it draws a dozen titles in proportion to their counts; `watch` is called with every
    evaluation.

    Raises:
        ValueError: as `fit.fit`.
    """
    titles = list(counts)
    model, tokenizer = backbone.tiny_model(titles, seed)
    catalogue = policy.Catalogue.build(tokenizer, titles, "title")
    tree, trie = fit.PackedTree(model, catalogue.trie, catalogue.header), catalogue.trie
    log_rewards = torch.tensor(list(counts.values())).double().log()
    target = (log_rewards - log_rewards.logsumexp(0)).exp().numpy()
    log = []

    def note(row: Mapping[str, float]) -> None:
        log.append(row)
        share = trie.log_leaf_probs(trie.renormalised(tree.log_probs())).exp()[trie.item_leaf]
        watch(Fitted(titles, target, share.numpy(), loss, pd.DataFrame(log)))

    fit.fit(tree, log_rewards, loss, budget, paths, learning_rate=3e-3, evaluations=16, seed=seed, progress=False,
            penalty=float(loss == "modified_subtb"), watch=note)


def draw_fitted(figure: Figure, now: Fitted) -> None:
    """Left what each title should get and gets, right how the divergence has fallen."""
    figure.clear()
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    off = np.abs(now.target - now.model).sum() / 2
    plots.node_choice(left, now.titles, {"target R/Z": now.target, "model": now.model}, n=len(now.titles),
                      title=f"{off:.1%} of the probability lies with the wrong titles", xlabel="probability of the title")
    left.set_xlim(0, 1.1 * max(now.target.max(), now.model.max()))
    left.legend(loc="lower right")
    plots.fit_curves(right, {plots.METHOD_NAMES[now.loss]: (now.log.forward_tokens, now.log.kl_target_model)}, "tokens through the model",
                     title=f"KL {now.log.kl_target_model.iloc[-1]:.2g} nats after {now.log.step.iloc[-1]} steps")


def training(counts: Mapping[str, float]) -> widgets.VBox:
    """The explorer of training: choose a loss and where it looks, press run, watch."""
    loss = widgets.Dropdown(value="subtb", options=[(plots.METHOD_NAMES[name], name) for name in runs.LOSSES],
                            description="loss")
    paths = widgets.Dropdown(options=fit.PATHS, description="titles from")
    budget = _slider(widgets.IntSlider, "tokens through the model", 6_000, 1_000, 30_000, 1_000)
    button, said = widgets.Button(description="run", button_style="primary", icon="play"), widgets.HTML()
    picture, figure = widgets.Image(format="png", layout={"max_width": "100%"}), Figure(figsize=(14, 5), dpi=80, layout="constrained")

    def watch(now: Fitted) -> None:
        draw_fitted(figure, now)
        picture.value = _png(figure)

    def run(_: Any) -> None:
        button.disabled, said.value = True, "training …"
        try:
            fit_few(counts, loss.value, paths.value, budget.value, watch)
            said.value = ""
        except ValueError as error:
            said.value = f"<b>{html.escape(str(error))}</b>"
        finally:
            button.disabled = False

    button.on_click(run)
    return widgets.VBox([widgets.HBox([loss, paths]), budget, button, said, picture])


def draw_popularity(
    figure: Figure, slots: pd.DataFrame, counts: pd.Series, methods: Sequence[str], decoding: str, k: int,
    own: Mapping[str, pd.Series] | None = None,
) -> pd.DataFrame:
    """Popularity curve and group shares of the first k places of the lists of some methods.

    Args:
        slots: columns method, decoding, user, place, title, hit, as notebooks 04 and 07 keep them; methods without a
            language model have the decoding "top" and stand beside every other.
        counts: title → interactions, of the whole catalogue.
        own: name → titles that other systems recommended.

    Returns:
        Metrics, a line a method.

    Raises:
        ValueError: nothing is chosen, or a title is not of the catalogue.
    """
    shown = slots[slots.method.isin(methods) & slots.decoding.isin([decoding, "top"]) & (slots.place <= k)]
    names, popularity = counts.index.tolist(), counts.to_numpy()
    groups, n_users = metrics.popularity_groups(popularity), slots.user.nunique()
    recommended = {name: own_slots.title for name, own_slots in shown.groupby("method", sort=False)} | (own or {})
    if not recommended:
        raise ValueError("choose a method that has lists under this decoding")
    exposure = {name: metrics.exposure_by_name(titles.tolist(), names) for name, titles in recommended.items()}
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    plots.popularity_curve(left, exposure, popularity)
    shares = {name: metrics.group_shares(e, groups) for name, e in ({"history": popularity} | exposure).items()}
    plots.group_bars(right, shares)
    lines = {}
    for name, e in exposure.items():
        gu, words = metrics.group_unfairness(e, popularity, groups), metrics.word_counts(e, names)
        lines[name] = {"dgu": metrics.dgu(gu), "mgu": metrics.mgu(gu), "h_bits": metrics.word_entropy_bits(words),
                       "distinct": metrics.distinct(e), "gini": metrics.gini(e)}
        place = shown.place[(shown.method == name) & shown.hit]
        if name not in (own or {}):
            lines[name] |= {f"hr@{k}": len(place) / n_users, f"ndcg@{k}": float((1 / np.log2(place + 1)).sum() / n_users)}
    return pd.DataFrame(lines).T.round(3)


def popularity(slots: pd.DataFrame, counts: pd.Series) -> widgets.VBox:
    """The explorer of popularity: methods, decoding, places of a list, and files of one's own recommendations."""
    methods = slots.method.unique().tolist()
    decodings = [name for name in slots.decoding.unique() if name != "top"]
    controls = {
        "methods": widgets.SelectMultiple(value=methods[:2], options=methods, description="methods", rows=min(8, len(methods))),
        "decoding": widgets.Dropdown(options=decodings, description="decoding"),
        "k": _slider(widgets.IntSlider, "places of a list", int(slots.place.max()), 1, int(slots.place.max()), 1),
        "own": widgets.FileUpload(accept=".csv,.json,.parquet", multiple=True, description="your lists"),
    }

    def draw(figure: Figure, own: Sequence[Mapping[str, Any]], **values: Any) -> pd.DataFrame:
        return draw_popularity(figure, slots, counts, own={f["name"]: _uploaded(f) for f in own}, **values)

    return live(draw, controls, (14, 5))


def _uploaded(file: Mapping[str, Any]) -> pd.Series:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file["name"]).name
        path.write_bytes(file["content"])
        return readers.read_recommendations(path)
