"""One solution to each exercise of notebook 02; names that are not defined here are the notebook's."""


def bits_of_the_title(log_pf):
    return -log_pf.sum().item() / math.log(2)


def share_of_decisions(log_pf, children):
    return log_pf[children > 1].sum() / log_pf.sum()
