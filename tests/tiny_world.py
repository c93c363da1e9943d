"""A small catalogue, a model that is far from uniform, every title's probability the slow way, a finished training."""

import pandas as pd
import torch

from flowerlib.lab import store
from flowerlib.model import Catalogue, open_backbone, prompt_texts, tiny_model
from flowerlib.train import TrainSettings

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "Fargo", "The Rock", "The Big Heat"]


def tiny_world(form):
    model, tokenizer = tiny_model([*TITLES, *prompt_texts("movie", form)], seed=1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(3)
    return model.eval(), Catalogue.build(tokenizer, TITLES, "movie", form)


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


def allowed_mask(trie, nodes, vocab_size):
    """(B,) nodes → (B, vocab_size) bool, True where a child follows; all False at a leaf and at -1."""
    mask = torch.zeros(len(nodes), vocab_size, dtype=torch.bool, device=nodes.device)
    rows, children = trie.children(nodes)
    mask[rows, trie.token[children]] = True
    return mask


def finished_training(folder, titles=TITLES, rows="sequence", **used):
    """A folder as a training leaves it, of a model that has learned nothing; the model."""
    settings = TrainSettings(model="tiny", frozen_layers=0, tuned_layers=0, rows=rows, **used)
    model, tokenizer, *_ = open_backbone(settings, titles)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    items = pd.DataFrame({"item_id": range(100, 100 + len(titles)), "title": titles})
    items.to_parquet(folder / "items.parquet")
    store.keep(folder / "made.json", {}, {"commit": "0", "settings": vars(settings)})
    return model
