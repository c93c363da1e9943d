"""One solution to each exercise of notebook 04; names that are not defined here are the notebook's."""


def hit_rate_on_the_tail(lists, target_leaves, groups):
    rare = groups[target_leaves] > 0
    return (lists[rare] == target_leaves[rare, None]).any(1).mean()


def fair_and_useless(counts, n_users, k, rng):
    lists = []
    for _ in range(n_users):  # shares of the slots as of the history: a group by its share, a title of it by chance
        drawn = rng.choice(8, size=k, p=np.bincount(groups, weights=counts) / counts.sum())
        row = [rng.choice(np.flatnonzero(groups == g), size=n, replace=False) for g, n in enumerate(np.bincount(drawn))]
        lists.append(np.concatenate(row))
    return np.array(lists)


def ghosts_needed(a, b, n):
    return int(n * (b / a - 1)) + 1  # b / (n + ghosts) > a / n, both negative
