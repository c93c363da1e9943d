"""One solution to each exercise of notebook 08; names that are not defined here are the notebook's."""


def packed_over_rows(p, t, n):
    return (p + n * t) / (n * (p + t))


def tree_over_rows(trie, lengths, p):
    return (p + trie.n_nodes - 1) / sum(p + length for length in lengths)
