"""Accuracy, fairness and diversity of recommended lists (Gao et al., SIGIR 2025, RQ2): arrays in, floats out.

Everything is by leaf: items with equal titles are one leaf, and the leaves are numbered by their first item. Shapes:
U users, K places of a list, L leaves of the catalogue, G popularity groups (0 = most popular), W distinct words.

- recommendations (U, K): leaf ids, best first, -1 where a list is shorter; `evaluate` and `compare` also take
  (S, U, K), the lists of S trainings that differ in their seed alone
- targets (U,): the leaf that each user interacted with next
- counts (L,): training interactions of each leaf (true or windowed: say which beside the result)
- exposure (L,): how many recommended slots each leaf fills
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DIVERSITY = ("h_bits", "ttr", "distinct", "coverage", "gini")  # these depend on the number of users: see evaluate
UNFAIRNESS = ("dgu", "mgu", "mgu_next")  # sizes of differences: chance alone makes them larger


def ranks(recommendations: ArrayLike, targets: ArrayLike) -> Ints:
    """Place of each target in its user's list, from 0, and -1 where the list does not hold it; (U, K), (U,) -> (U,)."""
    recommendations, targets = np.asarray(recommendations), np.asarray(targets)
    if recommendations.ndim != 2 or targets.shape != recommendations.shape[:1]:
        raise ValueError(f"need (U, K) and (U,), not {recommendations.shape} and {targets.shape}")
    if (targets < 0).any():
        raise ValueError("targets are leaf ids from 0")
    hits = recommendations == targets[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1), -1)


def hit_rate(rank: ArrayLike, k: int) -> Floats:
    """HR@k of each user: 1 where the target is in the first k places, else 0; (U,) -> (U,)."""
    rank = np.asarray(rank)
    return ((rank >= 0) & (rank < k)).astype(float)


def ndcg(rank: ArrayLike, k: int) -> Floats:
    """NDCG@k of each user with one relevant item: 1 / log2(rank + 2) in the first k places, else 0; (U,) -> (U,)."""
    return hit_rate(rank, k) / np.log2(np.maximum(rank, 0) + 2)


def popularity_groups(counts: ArrayLike, n_groups: int = 8) -> Ints:
    """Popularity group of each leaf, 0 = most popular; (L,) -> (L,).

    Leaves with a count are sorted by it (ties: the lower id first) and cut into equal groups, the first ones one larger
    where it does not divide; the others join the last group. Raises ValueError if fewer than n_groups have a count.
    """
    counts = _checked_counts(counts)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if len(order) < n_groups:
        raise ValueError(f"{n_groups} popularity groups need as many titles with counts, not {len(order)}: bring more")
    groups = np.full(len(counts), n_groups - 1)
    groups[order] = np.repeat(np.arange(n_groups), list(map(len, np.array_split(order, n_groups))))
    return groups


def exposure_of(recommendations: ArrayLike, n_leaves: int) -> Ints:
    """Number of slots each leaf fills; (U, K) -> (L,). Empty slots (-1) do not count."""
    filled = np.asarray(recommendations)
    filled = filled[filled >= 0]
    if filled.size and filled.max() >= n_leaves:
        raise ValueError(f"leaf {filled.max()} is not one of {n_leaves}")
    return np.bincount(filled, minlength=n_leaves)


def slot_table(recommendations: ArrayLike, targets: ArrayLike, titles: Sequence[str]) -> pd.DataFrame:
    """Lists (U, K) as a table, a row for every filled slot: user (row of the lists), place (from 1), title, and hit,
    whether it is the user's target."""
    lists = np.asarray(recommendations)
    users, places = np.nonzero(lists >= 0)
    leaves = lists[users, places]
    hit = leaves == np.asarray(targets)[users]
    return pd.DataFrame({"user": users, "place": places + 1, "title": np.asarray(titles, object)[leaves], "hit": hit})


def exposure_by_name(recommended: Sequence[str], names: Sequence[str]) -> Ints:
    """Number of slots that each name fills, (len(names),), in a plain list of titles or ids recommended by any system.
    The names are distinct. Raises ValueError if a recommended one is not among them: it counts and shows them."""
    place = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(recommended) - place.keys())
    if unknown:
        raise ValueError(f"{len(unknown)} titles are not in the catalogue, such as {', '.join(map(repr, unknown[:3]))}")
    return np.bincount([place[name] for name in recommended], minlength=len(names))


def group_shares(amounts: ArrayLike, groups: ArrayLike) -> Floats:
    """Share of each group in an amount per leaf (exposure, or counts for the history); (L,), (L,) -> (G,), sum 1."""
    amounts, groups = np.asarray(amounts, dtype=float), np.asarray(groups)
    if amounts.shape != groups.shape or amounts.sum() <= 0:
        raise ValueError(f"need amounts > 0 and one group each: {amounts.shape}, sum {amounts.sum():g}; {groups.shape}")
    return np.bincount(groups, weights=amounts) / amounts.sum()


def group_unfairness(exposure: ArrayLike, counts: ArrayLike, groups: ArrayLike) -> Floats:
    """GU (G,): share of each group in the recommended slots minus its share in the interactions.
    Deviation: the official code types the history shares in by hand, and an unhit group shifts the others there."""
    return group_shares(exposure, groups) - group_shares(counts, groups)


def dgu(gu: ArrayLike) -> float:
    """DGU: the largest GU minus the smallest, 0 (fair) to 2."""
    return float(np.ptp(gu))


def mgu(gu: ArrayLike) -> float:
    """MGU: mean absolute GU, 0 (fair) to 2 / G."""
    return float(np.abs(gu).mean())


def arp(exposure: ArrayLike, counts: ArrayLike) -> float:
    """ARP, average recommendation popularity: mean count of a recommended slot's leaf (interactions per title)."""
    return float(np.average(counts, weights=exposure))


def tail(counts: ArrayLike, share: float = 0.2) -> NDArray[np.bool_]:
    """The least popular leaves that together hold at most this share of the interactions; (L,) -> (L,) bool."""
    counts = _checked_counts(counts)
    order = np.argsort(-counts, kind="stable")[::-1]
    least = order[np.cumsum(counts[order]) <= share * counts.sum()]
    return np.isin(np.arange(len(counts)), least)


def aplt(exposure: ArrayLike, counts: ArrayLike, share: float = 0.2) -> float:
    """APLT, average percentage of long-tail items, as a share: the slots that the `tail` fills, about `share` where
    exposure follows the interactions. Source: Abdollahpouri et al., FLAIRS 2019."""
    return float(np.asarray(exposure)[tail(counts, share)].sum() / np.sum(exposure))


def accuracy_by_group(recommendations: ArrayLike, targets: ArrayLike, counts: ArrayLike, k: int = 10,
                      n_groups: int = 8) -> pd.DataFrame:
    """HR@k by the popularity of the title that was chosen next: a row a group (0 = most popular), and one, "cold", for
    titles without a count, which are in no group here; columns group, n_users, hr, NaN where nobody chose any."""
    targets, counts = np.asarray(targets), np.asarray(counts)
    hit = hit_rate(ranks(_checked_lists(recommendations, targets, len(counts), [k]), targets), k)
    group = np.where(counts[targets] > 0, popularity_groups(counts, n_groups)[targets], n_groups)
    users = np.bincount(group, minlength=n_groups + 1)
    hits = np.bincount(group, weights=hit, minlength=n_groups + 1)
    names = [*range(n_groups), "cold"]
    return pd.DataFrame({"group": names, "n_users": users, "hr": hits / np.where(users > 0, users, np.nan)})


def distinct(exposure: ArrayLike) -> int:
    """Number of leaves recommended at least once."""
    return int(np.count_nonzero(exposure))


def coverage(exposure: ArrayLike) -> float:
    """Share of the catalogue recommended at least once, 0 to 1."""
    return distinct(exposure) / len(np.asarray(exposure))


def gini(exposure: ArrayLike) -> float:
    """Gini coefficient of the exposure over the whole catalogue: equal exposure 0, one holder (L - 1) / L."""
    x = np.sort(np.asarray(exposure, dtype=float))
    if not x.size or x[0] < 0 or x.sum() <= 0:
        raise ValueError("gini needs exposures >= 0 that are not all zero")
    n = len(x)
    return max(0.0, float((2 * np.arange(1, n + 1) - n - 1) @ x / (n * x.sum())))


def word_counts(exposure: ArrayLike, titles: Sequence[str]) -> Floats:
    """How often each distinct word of the catalogue (split at white space) stands in a recommended title; -> (W,)."""
    return _word_counter(titles)(exposure)


def word_entropy_bits(counts: ArrayLike) -> float:
    """H: entropy in bits of the words of all recommended titles, 0 to log2 W; word counts (W,) -> float."""
    p = np.asarray(counts, dtype=float)
    p = p[p > 0] / p.sum()
    return float(-(p @ np.log2(p)) + 0.0)


def type_token_ratio(counts: ArrayLike) -> float:
    """TTR: distinct words / words of all recommended titles, 0 to 1; word counts (W,) -> float."""
    return float(np.count_nonzero(counts) / np.sum(counts))


def divergences(log_target: ArrayLike, log_model: ArrayLike) -> dict[str, float]:
    """How far two distributions over the leaves are apart, in nats: KL both ways, JS (0 to log 2), both entropies.

    The logarithms (L,) are normalised here. Raises ValueError if shapes disagree, or a logarithm is not finite.
    Source: Gao et al., SIGIR 2025, RQ1. Deviation: exact distributions, where the paper counts draws.
    """
    p, q = (np.asarray(x, dtype=float) for x in (log_target, log_model))
    if p.shape != q.shape or p.ndim != 1 or not np.isfinite([p, q]).all():
        raise ValueError(f"need two vectors of finite logarithms of one shape, not {p.shape} and {q.shape}")
    p, q = (x - np.logaddexp.reduce(x) for x in (p, q))
    mixed = np.logaddexp(p, q) - np.log(2)

    def kl(a: Floats, b: Floats) -> float:
        return max(0.0, float(np.exp(a) @ (a - b)))

    return {
        "kl_target_model": kl(p, q), "kl_model_target": kl(q, p), "js": (kl(p, mixed) + kl(q, mixed)) / 2,
        "entropy_target": float(-np.exp(p) @ p), "entropy_model": float(-np.exp(q) @ q)}


def sampled_divergences(draws: ArrayLike, log_target: ArrayLike) -> dict[str, float]:
    """`divergences` of drawn titles, (L,) counts, from the target, as the paper measures (2,000 draws): a title without
    a draw counts as 2.2e-16. Even a perfect model is far from 0 by it: see `sampled_kl`."""
    draws = np.asarray(draws, dtype=float)
    return divergences(log_target, np.log(np.maximum(draws / draws.sum(), np.finfo(float).eps)))


def sampled_kl(log_model: ArrayLike, log_target: ArrayLike, n_draws: int, replicates: int = 1000,
               seed: int = 0) -> Floats:
    """(replicates,) KL(target‖draws), nats: each replicate draws n_draws titles from a known (L,) model."""
    log_model, log_target = (x - np.logaddexp.reduce(x) for x in (np.asarray(log_model), np.asarray(log_target)))
    share = np.exp(log_model)
    draws = np.random.default_rng(seed).multinomial(n_draws, share / share.sum(), size=replicates)
    q = np.maximum(draws / n_draws, np.finfo(float).eps)
    q /= q.sum(1, keepdims=True)
    return (log_target - np.log(q)) @ np.exp(log_target)


def node_divergences(log_reach: ArrayLike, log_edges: ArrayLike, parent: ArrayLike) -> Floats:
    """(n_nodes,) F(s)/Z · KL(r(·|s)‖π(·|s)), nats: what each node adds to the divergence of the whole titles.

    log_reach (n_nodes,) is log F(s)/Z; log_edges (n_nodes,) is log π of the edge into each node, the root's ignored;
    parent is the trie's. The sum is KL(target‖model) of the titles if `log_edges` are renormalised over the children,
    and this plus the loss off the tree if they are of the whole vocabulary.
    """
    reach, edges, above = np.asarray(log_reach), np.asarray(log_edges), np.asarray(parent)[1:]
    terms = np.exp(reach[1:]) * (reach[1:] - reach[above] - edges[1:])
    return np.bincount(above, terms, minlength=len(reach))


def evaluate(
    recommendations: ArrayLike, targets: ArrayLike, counts: ArrayLike, titles: Sequence[str],
    ks: Sequence[int] = (1, 3, 5, 10), n_bootstrap: int = 1000, seed: int = 0, n_groups: int = 8,
    slots: int | None = None) -> dict[str, float]:
    """Every metric, and `<metric>_lo`, `<metric>_hi`: a 95% interval over users and trainings (n_bootstrap=0: none).

    Keys: hr@k and ndcg@k for every k; dgu, mgu; top_vs_history and top_vs_next: share of the most popular group in the
    slots minus its share in the interactions, or in the users' next choices; mgu_next: MGU against these choices; arp,
    aplt, h_bits, ttr, distinct, coverage, gini. All but accuracy look at the first `slots` places of a list (None:
    all), to compare lists of 20 with lists of 10. With several trainings every value is the mean of theirs.

    Users are resampled, one resample for all trainings; to each is added the trainings' standard error times a draw of
    Student's t with S - 1 degrees of freedom, as for a mean of few; one training alone tells nothing about others. The
    interval is between percentiles (without any hit, HR's are 0). UNFAIRNESS is above 0 even if slots are fair, and
    resampling adds to that: its intervals are basic, 2 · value - percentile. DIVERSITY grows with the number of users:
    compare it at equal U. A resample holds about 63% of them, so that percentiles would miss the value: users' parts
    of the error, by the jackknife, are multiplied by normal draws (Efron and Stein 1981: errs towards too wide).

    Raises ValueError: shapes disagree, ids outside the catalogue, a leaf twice in a list, a user without
    recommendation, no counts, k above K (lists of ten have no HR@20), or one user alone and an interval.
    """
    values, replicates = _replicates(recommendations, targets, counts, titles, ks, n_bootstrap, seed, n_groups, slots)
    upper = dict.fromkeys(("hr", "ndcg", "ttr", "coverage", "aplt", "gini"), 1.0) | {"distinct": float(len(titles))}
    for name, x in replicates.items():
        lo, hi = _interval(name, values[name], x)
        lowest = -1.0 if name.startswith("top_") else 0.0
        values |= {f"{name}_lo": max(lo, lowest), f"{name}_hi": min(hi, upper.get(name.split("@")[0], np.inf))}
    return values


def compare(recommendations_a: ArrayLike, recommendations_b: ArrayLike, targets: ArrayLike, counts: ArrayLike,
            titles: Sequence[str], ks: Sequence[int] = (1, 3, 5, 10), n_bootstrap: int = 1000, seed: int = 0,
            n_groups: int = 8, slots: int | None = None) -> dict[str, tuple[float, float, float, float]]:
    """b minus a for every metric of `evaluate`: (difference, lo, hi, p), a 95% interval over users and trainings, and
    the two-sided p of "no difference" from the same resamples: at least 2 / (n_bootstrap + 1).

    a and b share resamples of users, and of trainings where both have several (the i-th are of one seed): what these
    have in common cancels. Raises ValueError also if n_bootstrap=0, or numbers of trainings differ."""
    if n_bootstrap < 1:
        raise ValueError("compare needs n_bootstrap >= 1")
    both = [x[None] if x.ndim == 2 else x for x in map(np.asarray, (recommendations_a, recommendations_b))]
    n_seeds, found = max(map(len, both)), {}
    if not {len(x) for x in both} <= {1, n_seeds}:
        raise ValueError(f"{len(both[0])} and {len(both[1])} trainings: bring equally many, or one")
    args = (targets, counts, titles, ks, n_bootstrap, seed, n_groups, slots)
    (a, many_a), (b, many_b) = (_replicates(np.broadcast_to(x, (n_seeds, *x.shape[1:])), *args) for x in both)
    for name, value in a.items():
        difference, many = b[name] - value, many_b[name] - many_a[name]
        side = 2 * difference - many if name in UNFAIRNESS else many  # as `_interval`
        p = 2 * (1 + min((side <= 0).sum(), (side >= 0).sum())) / (n_bootstrap + 1)
        found[name] = difference, *_interval(name, difference, many), min(1.0, float(p))
    return found


def holm(p: ArrayLike) -> Floats:
    """p-values of several tests, (n,), adjusted so that the chance of one false alarm or more stays below any level
    that they are held against. Source: Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, 1979."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    return np.minimum(steps, 1.0)[np.argsort(order, kind="stable")]


def _replicates(recommendations: ArrayLike, targets: ArrayLike, counts: ArrayLike, titles: Sequence[str],
                ks: Sequence[int], n_bootstrap: int, seed: int, n_groups: int,
                slots: int | None) -> tuple[dict[str, float], dict[str, Floats]]:
    """Every metric's value, and (R,) values as other users and trainings might have given them."""
    counts, lists = _checked_counts(counts), np.asarray(recommendations)
    if not len(ks) or slots is not None and slots < 1:
        raise ValueError(f"name one k at least, and slots above 0: not {tuple(ks)}, {slots}")
    if len(titles) != len(counts):
        raise ValueError(f"{len(titles)} titles for {len(counts)} counts")
    trainings = lists if lists.ndim == 3 else lists[None]
    groups, of_tail, count_words = popularity_groups(counts, n_groups), tail(counts), _word_counter(titles)
    of_history, per_user = group_shares(counts, groups), []
    for one in trainings:
        rank, one = ranks(one, targets), _checked_lists(one, targets, len(counts), ks)[:, :slots]
        shown = one >= 0
        own = {f"hr@{k}": hit_rate(rank, k) for k in ks} | {f"ndcg@{k}": ndcg(rank, k) for k in ks}
        own["arp"] = np.where(shown, counts[one], 0.0).sum(axis=1)
        own["aplt"] = (of_tail[one] & shown).sum(axis=1)
        group_slots = ((groups[one] == np.arange(n_groups)[:, None, None]) & shown).sum(axis=2).T
        per_user.append(np.column_stack([*own.values(), group_slots]))
    names, n_users = list(own), len(trainings[0])
    sums, chosen = np.stack(per_user), np.eye(n_groups)[groups[np.asarray(targets)]]

    def from_sums(weights: NDArray) -> dict[str, Floats]:
        """Metrics that are functions of sums over users, of S trainings under R weightings: (R, U) -> (S, R)."""
        total, next_choices = weights @ sums, weights @ chosen / n_users
        filled = total[..., -n_groups:].sum(-1)
        share = total[..., -n_groups:] / filled[..., None]
        gu, gu_next = share - of_history, share - next_choices
        means = {name: total[..., i] / (n_users if "@" in name else filled) for i, name in enumerate(names)}
        return means | {"dgu": np.ptp(gu, axis=-1), "mgu": np.abs(gu).mean(-1), "top_vs_history": gu[..., 0],
                        "top_vs_next": gu_next[..., 0], "mgu_next": np.abs(gu_next).mean(-1)}

    def from_exposure(exposure: Ints) -> tuple[float, ...]:
        words = count_words(exposure)
        return word_entropy_bits(words), type_token_ratio(words), distinct(exposure), coverage(exposure), gini(exposure)

    exposures = [exposure_of(one[:, :slots], len(counts)) for one in trainings]
    values = {name: float(v.mean()) for name, v in from_sums(np.ones((1, n_users))).items()}
    diversity = np.array([from_exposure(exposure) for exposure in exposures], dtype=float)  # (S, 5)
    values |= dict(zip(DIVERSITY, diversity.mean(0).tolist()))
    if n_bootstrap < 1:
        return values, {}
    if n_users < 2:
        raise ValueError("an interval needs two users at least: pass n_bootstrap=0")
    rng, n_seeds = np.random.default_rng(seed), len(trainings)
    draws = rng.multinomial(n_users, np.full(n_users, 1 / n_users), size=n_bootstrap)
    free = max(n_seeds - 1, 1)
    student = rng.normal(size=(n_bootstrap, n_seeds)) / np.sqrt(rng.chisquare(free, (n_bootstrap, 1)) / free)

    def of_trainings(x: Floats) -> Floats:
        """(R,) errors of the mean of the trainings' values, (S, R) or (S, 1)."""
        return (student * (x - x.mean(0)).T).sum(1) / np.sqrt(n_seeds * free)

    replicates = {name: x.mean(0) + of_trainings(x) for name, x in from_sums(draws).items()}
    left_out = np.array([[from_exposure(exposure - exposure_of(row[None, :slots], len(counts))) for row in one]
                         for one, exposure in zip(trainings, exposures)]).mean(0)  # (U, 5)
    normal = rng.normal(size=(n_bootstrap, n_users)) * np.sqrt((n_users - 1) / n_users)
    of_users = normal @ (left_out - left_out.mean(0))  # (R, 5)
    errors = {name: of_users[:, i] + of_trainings(diversity[:, i, None]) for i, name in enumerate(DIVERSITY)}
    return values, replicates | {name: values[name] + error for name, error in errors.items()}


def _interval(name: str, value: float, replicates: Floats) -> tuple[float, float]:
    """95% interval that holds the value itself: basic for UNFAIRNESS, else percentiles."""
    lo, hi = np.percentile(replicates, (2.5, 97.5))
    lo, hi = (2 * value - hi, 2 * value - lo) if name in UNFAIRNESS else (lo, hi)
    return min(float(lo), value), max(float(hi), value)


def _word_counter(titles: Sequence[str]) -> Callable[[ArrayLike], Floats]:
    """The function from an exposure (L,) to how often each distinct word of the catalogue is shown, (W,)."""
    words = pd.Series([title.split() for title in titles]).explode()  # one row a word, its index the leaf
    if words.hasnans:
        raise ValueError(f"leaf {words.isna().idxmax()} has an empty title")
    word, every = pd.factorize(words)
    return lambda exposure: np.bincount(word, weights=np.asarray(exposure)[words.index], minlength=len(every))


def _checked_counts(counts: ArrayLike) -> NDArray:
    counts = np.asarray(counts, dtype=float)  # -counts of unsigned numbers would be large
    if counts.ndim != 1 or not np.isfinite(counts).all() or (counts < 0).any() or not counts.sum() > 0:
        raise ValueError("counts must be a vector of numbers >= 0 with a positive sum")
    return counts


def _checked_lists(recommendations: ArrayLike, targets: ArrayLike, n_leaves: int, ks: Sequence[int]) -> Ints:
    recommendations, targets = np.asarray(recommendations), np.asarray(targets)
    for name, ids, lowest in (("recommendations", recommendations, -1), ("targets", targets, 0)):
        if not ids.size or ids.dtype.kind not in "iu" or ids.min() < lowest or ids.max() >= n_leaves:
            raise ValueError(f"{name} must be integers from {lowest} to {n_leaves - 1}")
    if min(ks) < 1 or max(ks) > recommendations.shape[1]:
        raise ValueError(f"k must lie between 1 and the lists' {recommendations.shape[1]} places, not {tuple(ks)}")
    ordered = np.sort(recommendations, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("a list holds one leaf twice: merge items by leaf before the top-K")
    if (ordered[:, -1] < 0).any():
        raise ValueError(f"user {int((ordered[:, -1] < 0).argmax())} has no recommendation")
    return recommendations.astype(np.int64)
