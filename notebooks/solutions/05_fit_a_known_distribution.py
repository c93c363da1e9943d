"""One solution to each exercise of notebook 05."""


def node_share(reach, r, pi):
    return reach * float((r * np.log(r / pi)).sum())


def mended_reward(log_target, log_reference, beta):
    return beta * (log_target - log_reference)
