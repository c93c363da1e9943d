"""One solution to each exercise of notebook 06; names that are not defined here are the notebook's."""


def titles_for_half(slots):
    ordered = np.sort(slots)[::-1].cumsum()
    return int(np.searchsorted(ordered, ordered[-1] / 2) + 1)


def fair_with_few(counts, groups, n_slots):
    slots = np.zeros(len(counts), dtype=int)
    first = [np.flatnonzero(groups == group)[0] for group in range(groups.max() + 1)]
    slots[first] = np.round(n_slots * metrics.group_shares(counts, groups))
    return slots
