"""The explorers of notebook 09: widgets that hand their values to the library and `plots`, and show what comes back.
Every figure here can be drawn without widgets as well, so that a notebook reads without a kernel."""

import html
import tempfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flowerlib import metrics, rewards
from flowerlib.lab import fit, plots, runs, sources
from flowerlib.model import Catalogue, tiny_model
from flowerlib.tree import PackedTree

WIDE = {"layout": {"width": "34em"}, "style": {"description_width": "initial"}}


def live(draw: Callable[..., str | None], controls: Mapping[str, widgets.Widget],
         button: widgets.Button | None = None) -> widgets.VBox:
    """Controls above a figure that `draw(figure, paint, **values)` draws anew when a value changes or, if there is one,
    the button is clicked; `paint()` shows what is drawn so far. HTML that `draw` returns stands below the figure; the
    message of its ValueError, instead of the figure."""
    picture, below = widgets.Image(format="png", layout={"max_width": "100%"}), widgets.HTML()
    figure = Figure(figsize=(14, 5), dpi=80, layout="constrained" if button else "none")

    def paint() -> None:
        FigureCanvasAgg(figure).print_png(png := BytesIO())  # savefig would draw twice
        picture.value, picture.layout.display = png.getvalue(), None

    def show(_: Any = None) -> None:
        figure.clear()
        if not button:  # a layout engine is too slow for a slider
            figure.subplots_adjust(left=0.06, right=0.98, bottom=0.19, top=0.86, wspace=0.2)
        try:
            below.value = draw(figure, paint, **{name: control.value for name, control in controls.items()}) or ""
            paint()
        except ValueError as error:
            picture.layout.display, below.value = "none", f"<b>{html.escape(str(error))}</b>"

    if button:
        button.on_click(show)
        return widgets.VBox([widgets.VBox([*controls.values(), button]), picture, below])
    for control in controls.values():
        control.observe(show, "value")
    show()
    return widgets.VBox([widgets.VBox(list(controls.values())), picture, below])


def _slider(text: str, value: float, low: float, high: float, step: float) -> widgets.Widget:
    kind = widgets.IntSlider if isinstance(step, int) else widgets.FloatSlider
    return kind(value=value, min=low, max=high, step=step, description=text, **WIDE)


class Branches:
    """A tree of titles, one user, and what models make of it: each reads the whole tree once, behind the user's history
    of item positions (oldest first). counts: (n_items,) interactions; log_p: (n_leaves,) log preference, nats."""

    def __init__(self, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, catalogue: Catalogue,
                 history: Sequence[int], counts: torch.Tensor, log_p: torch.Tensor):
        self.trie, self.titles, self.counts, self.log_p = catalogue.trie.to("cpu"), catalogue.titles, counts, log_p
        spelled = [tokenizer.decode([token]) for token in self.trie.token.clamp(min=0).tolist()]
        self.labels = ["⊤" if leaf >= 0 else text for leaf, text in zip(self.trie.node_leaf.tolist(), spelled)]
        context = catalogue.context(history)
        self.log_edges = {name: PackedTree(m, self.trie, context).log_probs().cpu() for name, m in models.items()}

    def flows(self, alpha: float, beta: float, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(n_nodes,) log F with Z = 1, and log r, of the reward (count + smoothing)^α · p_u^β."""
        log_rewards = rewards.count_log_rewards(self.trie, self.counts, alpha, smoothing)
        log_rewards = rewards.preference_log_rewards(self.trie, log_rewards, self.log_p.to(log_rewards), beta)
        return self.trie.log_flows(log_rewards - log_rewards.logsumexp(0)), self.trie.log_token_rewards(log_rewards)

    def way(self, text: str, depth: int) -> list[int]:
        """The nodes from the root to `depth` tokens down the first title that begins with `text`, short of its end.
        Raises ValueError if no title begins so."""
        items = [i for i, title in enumerate(self.titles) if title.lower().startswith(text.strip().lower())]
        if not items:
            raise ValueError(f"no title begins with {text!r}")
        path = self.trie.paths(self.trie.leaf[items[:1]])[0]
        return [0, *path[path >= 0][:-1][:depth].tolist()]


def draw_branch(figure: Figure, branches: Branches, title: str, depth: int, alpha: float, beta: float, smoothing: float,
                n: int = 6) -> None:
    """Left the last steps to a node, with the flow of each and of what turns off before; right the choice there."""
    log_flow, log_r = branches.flows(alpha, beta, smoothing)
    flow, way, labels = log_flow.exp().tolist(), branches.way(title, depth), branches.labels
    near = way[-4:]
    nodes = [(-1, "start" if near[0] == 0 else "…" + labels[near[0]], flow[near[0]])]
    for i, node in enumerate(near):
        children = branches.trie.children(torch.tensor([node]))[1].tolist()
        shown = near[i + 1 : i + 2] or sorted(children, key=lambda child: -flow[child])[:n]
        others = [flow[child] for child in children if child not in shown]
        rest = [(len(nodes) - 1, f"{len(others)} others", sum(others))] if others else []
        named = [(len(nodes) - 1, labels[child], flow[child]) for child in shown]
        nodes += named + rest if node == near[-1] else rest + named  # the way goes on from the last of them
    prefix = "".join(labels[node] for node in way[1:]).strip()
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    parent, texts, values = zip(*nodes)
    plots.flow_tree(left, parent, texts, np.maximum(values, 1e-12), f"{flow[way[-1]]:.2%} of the flow passes “{prefix}”"
                    if prefix else "All of the flow starts here")
    series = {"reward r": log_r} | {f"{name} (π)": edges for name, edges in branches.log_edges.items()}
    plots.node_choice(right, [labels[child] for child in children],
                      {name: edges[children].exp() for name, edges in series.items()},
                      f"What follows “{prefix}”?" if prefix else "How does a title begin?", n)
    right.legend(loc="center right")


def tree(branches: Branches, title: str) -> widgets.VBox:
    """The explorer of flows: a title or its beginning, how far down, and the reward's α, β and smoothing."""
    titles = sorted(set(branches.titles))
    controls = {
        "title": widgets.Combobox(value=title, options=titles, description="title", continuous_update=False, **WIDE),
        "depth": _slider("tokens down the title", 0, 0, branches.trie.max_depth, 1),
        "alpha": _slider("α, of the count", -0.5, -2, 2, 0.25),
        "beta": _slider("β, of the preference", 1, 0, 2, 0.25),
        "smoothing": _slider("smoothing, added to the count", 1, 0.1, 20, 0.1)}
    return live(lambda figure, _, **values: draw_branch(figure, branches, **values), controls)


def fit_few(counts: Mapping[str, float], loss: str, paths: str, budget: int, watch: Callable[..., Any]) -> None:
    """Tunes a tiny random model until it draws the titles in proportion to their counts. At every evaluation `watch`
    gets the log of `fit.fit_target` so far, with the titles' (n,) probabilities in a column `model`."""
    model, tokenizer = tiny_model(list(counts), seed=0)
    catalogue = Catalogue.build(tokenizer, list(counts), "title")
    packed, trie, log = PackedTree(model, catalogue.trie, catalogue.header), catalogue.trie, []

    def note(row: Mapping[str, float]) -> None:
        share = trie.log_leaf_probs(trie.renormalised(packed.log_probs())).exp()[trie.item_leaf]
        log.append({**row, "model": share.numpy()})
        watch(pd.DataFrame(log))

    log_rewards, penalty = rewards.log_rewards(torch.tensor(list(counts.values()))), float(loss == "modified_subtb")
    fit.fit_target(packed, log_rewards, loss, budget, paths, learning_rate=3e-3, penalty=penalty, evaluations=16,
                   progress=False, watch=note)


def draw_fitted(figure: Figure, counts: Mapping[str, float], loss: str, log: pd.DataFrame) -> None:
    """Left what each title should get and gets, right how the divergence has fallen; log as of `fit_few`."""
    figure.clear()
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    target, now = np.array(list(counts.values())) / sum(counts.values()), log.iloc[-1]
    plots.node_choice(left, list(counts), {"target R/Z": target, "model": now.model},
                      f"{np.abs(target - now.model).sum() / 2:.1%} of the probability lies with the wrong titles",
                      len(counts), "title's probability")
    left.set_xlim(0, 1.1 * max(target.max(), now.model.max()))
    left.legend(loc="lower right")
    plots.fit_curves(right, {runs.METHOD_NAMES[loss]: (log.forward_tokens, log.kl_target_model)},
                     "tokens through the model", title=f"KL {now.kl_target_model:.2g} nats after {now.step} steps")


def training(counts: Mapping[str, float]) -> widgets.VBox:
    """The explorer of training: select a loss and where it looks, press run, watch."""
    losses = [(runs.METHOD_NAMES[name], name) for name in fit.FIT_LOSSES]
    controls = {
        "loss": widgets.Dropdown(value="subtb", options=losses, description="loss"),
        "paths": widgets.Dropdown(options=fit.FIT_PATHS, description="titles from"),
        "budget": _slider("tokens through the model", 6_000, 1_000, 30_000, 1_000)}
    button = widgets.Button(description="run", button_style="primary", icon="play")

    def draw(figure: Figure, paint: Callable[[], None], loss: str, **values: Any) -> None:
        def watch(log: pd.DataFrame) -> None:
            draw_fitted(figure, counts, loss, log)
            paint()

        button.disabled, button.description = True, "training …"
        try:
            fit_few(counts, loss, watch=watch, **values)
        finally:
            button.disabled, button.description = False, "run"

    return live(draw, controls, button)


def draw_popularity(figure: Figure, slots: pd.DataFrame, counts: pd.Series, methods: Sequence[str], decoding: str,
                    k: int, own: Mapping[str, pd.Series] | None = None) -> pd.DataFrame:
    """Popularity curve and group shares of the first k places of the lists of these methods; and metrics, a line each.
    slots: columns method, decoding, user, place, title, hit, as notebooks 04 and 07 write them; methods without a
    language model have the decoding "top" and stand beside every other. counts: title → interactions, of the whole
    catalogue. own: name → titles that other systems recommended. Raises ValueError for no lists and unknown titles."""
    shown = slots[slots.method.isin(methods) & slots.decoding.isin([decoding, "top"]) & (slots.place <= k)]
    recommended = {name: rows.title for name, rows in shown.groupby("method", sort=False)} | (own or {})
    if not recommended:
        raise ValueError("choose a method that has lists under this decoding")
    names, popularity, n_users = counts.index.tolist(), counts.to_numpy(), slots.user.nunique()
    series = {name: metrics.exposure_by_name(titles.tolist(), names) for name, titles in recommended.items()}
    groups = metrics.popularity_groups(popularity)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    plots.popularity_curve(left, series, popularity)
    both = {"history": popularity} | series
    plots.group_bars(right, {name: metrics.group_shares(amounts, groups) for name, amounts in both.items()})
    table = {}
    for name, exposure in series.items():
        gu, words = metrics.group_unfairness(exposure, popularity, groups), metrics.word_counts(exposure, names)
        table[name] = {"dgu": metrics.dgu(gu), "mgu": metrics.mgu(gu), "h_bits": metrics.word_entropy_bits(words),
                       "distinct": metrics.distinct(exposure), "gini": metrics.gini(exposure)}
        if name not in (own or {}):
            place = shown.place[(shown.method == name) & shown.hit]
            table[name] |= {f"hr@{k}": len(place) / n_users, f"ndcg@{k}": (1 / np.log2(place + 1)).sum() / n_users}
    return pd.DataFrame(table).T.round(3)


def popularity(slots: pd.DataFrame, counts: pd.Series) -> widgets.VBox:
    """The explorer of popularity: methods, decoding, places of a list, and files of one's own recommendations."""
    names, n = slots.method.unique().tolist(), int(slots.place.max())
    decodings = [name for name in slots.decoding.unique() if name != "top"]
    controls = {
        "methods": widgets.SelectMultiple(value=names[:2], options=names, description="methods",
                                          rows=min(8, len(names))),
        "decoding": widgets.Dropdown(options=decodings, description="decoding"),
        "k": _slider("places of a list", n, 1, n, 1),
        "own": widgets.FileUpload(accept=".csv,.json,.parquet", multiple=True, description="your lists")}

    def draw(figure: Figure, _: Any, own: Sequence[Mapping[str, Any]], **values: Any) -> str:
        lists = {}
        with tempfile.TemporaryDirectory() as folder:
            for file in own:
                path = Path(folder, Path(file["name"]).name)
                path.write_bytes(file["content"])
                lists[file["name"]] = sources.read_recommendations(path)
        return draw_popularity(figure, slots, counts, own=lists, **values).to_html(border=0)

    return live(draw, controls)
