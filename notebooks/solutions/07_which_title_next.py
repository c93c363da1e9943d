"""One solution to each exercise of notebook 07; names that are not defined here are the notebook's."""


def undominated(rows_of, accuracy, unfairness):
    return {(row["method"], row.get("reward")) for row in rows_of
            if not any(o[accuracy] > row[accuracy] and o[unfairness] < row[unfairness] for o in rows_of)}


def changed(one, other):
    return np.mean([len(set(a) - set(b)) for a, b in zip(one.tolist(), other.tolist())])
