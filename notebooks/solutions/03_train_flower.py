"""One solution to each exercise of notebook 03; names that are not defined here are the notebook's."""


def all_different(share, k, rng):
    draws = np.sort(rng.choice(len(share), size=(4000, k), p=share), axis=1)
    return (draws[:, 1:] != draws[:, :-1]).all(1).mean()


def balanced_as_a_whole(log_r):
    return torch.full_like(log_r, log_r.mean())
