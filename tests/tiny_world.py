"""A small catalogue, a model that is far from uniform, and every title's probability the slow way."""

import torch

from flowerlib import backbone, policy

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "Fargo", "The Rock", "The Big Heat"]


def tiny_world(form):
    model, tokenizer = backbone.tiny_model([*TITLES, *policy.prompt_texts("movie", form)], seed=1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(3)
    return model.eval(), policy.Catalogue.build(tokenizer, TITLES, "movie", form)


def exact_log_probabilities(model, catalogue, history, renormalised):
    """Σ log π of every leaf, one title and one forward pass at a time, without padding or cache."""
    context, trie, scores = catalogue.context(history), catalogue.trie, {}
    for item, sequence in enumerate(catalogue.sequences):
        logits = model(torch.tensor([context + sequence])).logits[0].double().log_softmax(-1)
        total, node = 0.0, 0
        for t, token in enumerate(sequence):
            log_pi = logits[len(context) + t - 1]
            children = [int(trie.token[c]) for c in range(trie.n_nodes) if trie.parent[c] == node]
            total += log_pi[token].item() - (log_pi[children].logsumexp(0).item() if renormalised else 0)
            node = int(trie.advance(torch.tensor([node]), torch.tensor([token]))[0])
        scores[int(trie.item_leaf[item])] = (total, len(sequence))
    return scores
