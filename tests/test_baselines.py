import pytest
import torch

from flowerlib import backbone, baselines, fit, policy, rewards
from flowerlib.losses import FLOOR_LOG_REWARD

TITLES = ["Heat", "Alien", "Alien Resurrection", "Fargo"]
PROMPT = "Name a movie:\n"


@pytest.fixture
def world():
    model, tokenizer = backbone.tiny_model([*TITLES, PROMPT], seed=0)
    catalogue = policy.Catalogue.build(tokenizer, TITLES, "movie")
    log_rewards = rewards.count_log_rewards(catalogue.trie, torch.tensor([60, 25, 10, 2]))
    context = tokenizer.encode(PROMPT, add_special_tokens=False)
    return model, tokenizer, catalogue, log_rewards, context


def test_a_policy_gradients_optimum_by_hand():
    log_reference, log_share = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
    torch.testing.assert_close(baselines.tilted(log_reference, log_share, 1.0).exp(), torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(baselines.tilted(log_reference, log_share, 0.5).exp(), torch.tensor([16.0, 1.0]) / 17)
    torch.testing.assert_close(baselines.tilted(log_share, log_share, 1.0).exp(), torch.tensor([16.0, 1.0]) / 17)


def test_completions_are_paid_by_the_title_they_spell(world):
    _, tokenizer, catalogue, log_rewards, _ = world
    shares = log_rewards.log_softmax(0)
    heat, alien, resurrection, _ = catalogue.sequences
    completions = [heat, alien, resurrection, alien[:-1], [*heat, heat[0]], [tokenizer.eos_token_id], resurrection[1:]]
    found = baselines.completion_rewards(catalogue.trie, completions, shares)
    torch.testing.assert_close(found[:3], shares[:3])
    assert (found[3:] == FLOOR_LOG_REWARD).all()


@pytest.mark.parametrize("n_frozen", [0, 1])
@pytest.mark.parametrize("method", ["dpo", "rloo"])
def test_preference_tuning_leaves_the_target_for_the_popular_titles(world, method, n_frozen):
    """Both start at a policy close to the target and concentrate; RLOO's way ends at the optimum that is known."""
    model, tokenizer, catalogue, log_rewards, context = world
    trie = catalogue.trie
    tree = fit.PackedTree(model, trie, context, n_frozen)
    start = fit.fit(tree, log_rewards, "exact_ce", 3000, learning_rate=3e-3, evaluations=1, progress=False).iloc[-1]
    assert start.kl_target_model < 0.01
    log = baselines.prefer(tree, model, tokenizer, log_rewards, method, 6000, beta=1.0, n=16, learning_rate=1e-3,
                           evaluations=3)
    end = log.iloc[-1]
    assert end.kl_target_model > 0.05 and end.entropy_model < end.entropy_target - 0.1
    assert 6000 <= end.forward_tokens < 9000 and len(log) == 3 and log.seconds.is_monotonic_increasing
    if method == "rloo":
        optimum = baselines.tilted(log_rewards.log_softmax(0), log_rewards, 1.0)
        found = trie.log_leaf_probs(trie.renormalised(tree.log_probs().double()))
        assert (found.exp() - optimum.exp()).abs().max() < 0.12


def test_bad_requests_are_refused(world):
    model, tokenizer, catalogue, log_rewards, context = world
    tree = fit.PackedTree(model, catalogue.trie, context)
    with pytest.raises(ValueError, match="'ppo' is none of dpo, rloo"):
        baselines.prefer(tree, model, tokenizer, log_rewards, "ppo", 10)
    with pytest.raises(ValueError, match="no two titles differ"):
        baselines.prefer(tree, model, tokenizer, torch.zeros(4).double(), "dpo", 10)
