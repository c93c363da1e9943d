"""One solution to each exercise of notebook 00; names that are not defined here are the notebook's."""


def flow_of_star():
    F = (31 + 9 + 1) + (11 + 1) + (0 + 1)  # Star Wars, Star Trek, Star Maps
    return F, F / (119 + 9 + 1)


def tamed_alpha():
    low, high = 0.0, 1.0
    while high - low > 1e-6:  # the favourite's share grows with α
        middle = (low + high) / 2
        low, high = (middle, high) if alpha_by_hand(middle).max() < 0.25 else (low, middle)
    return low


def trajectory_balance(log_pi, log_r, mask):
    return torch.where(mask, log_pi - log_r, 0).sum(-1).square().mean()


def draw_list(p, k, rng):
    return np.argsort(-(np.log(p) + rng.gumbel(size=len(p))))[:k]
