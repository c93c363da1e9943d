"""Steps of training, and what is read off the tree, in the shape of SmolLM2-135M."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, Trainer, TrainingArguments

from flowerlib import losses, train
from flowerlib.lab import training
from flowerlib.lab.fit import loss_parts
from flowerlib.lab.preference import PreferenceModel
from flowerlib.lab.settings import PROFILES
from flowerlib.tree import PackedTree
from flowerlib.trie import TitleTrie


@pytest.fixture(scope="module")
def batch(catalogue):
    """Eight prompts of ten titles, about 160 tokens each, and a title to learn."""
    rng = np.random.default_rng(0)
    histories = rng.integers(len(catalogue.titles), size=(8, 9)).tolist()
    rows = train.make_rows(catalogue, histories, rng.integers(len(catalogue.titles), size=(8, 1)).tolist())
    made = train.collate([rows[i] for i in range(len(rows))])
    print(f"\n{tokens_of(made):.0f} tokens a row")
    return made


def tokens_of(batch):
    """Tokens of a row, on average; its last one is a target."""
    return float((batch["nodes"] != train.NO_TARGET).cumsum(1).argmax(1).float().mean()) + 1


def step(model, catalogue, batch, folder, **used):
    """Loss and gradients of one batch, by our trainer; the preference model that every reward but "none" asks for has
    random weights."""
    settings = replace(PROFILES["paper"], **used)
    preference = PreferenceModel(GPT2Config(
        vocab_size=len(catalogue.trie.leaves) + 1, n_positions=settings.max_history + 2, n_embd=settings.preference_size,
        n_layer=2, n_head=2,
    ))
    arguments = TrainingArguments(str(folder), report_to="none")
    log_rewards = torch.zeros(catalogue.trie.n_items)
    objective = train.Objective(catalogue.trie, log_rewards, settings, preference, device=arguments.device)
    trainer = training.FlowerTrainer(model.train(), arguments, objective=objective)

    batch = {name: x.to(trainer.args.device) for name, x in batch.items()}

    def run():
        trainer.compute_loss(model, batch).backward()
        model.zero_grad()

    return run


@pytest.mark.parametrize(("flow", "paths", "reward", "bound"), [
    (flow, paths, "none", bound) for flow in ("subtb", "divergence")
    for paths, bound in (("logged", 1.25), ("reward", 1.25), ("policy", 1.5))
] + [("subtb", "policy", "div", 1.5), ("divergence", "reward", "exact", 1.25)])
def test_a_flower_step(side_by_side, model, catalogue, batch, tmp_path, flow, paths, reward, bound):
    flower = step(model, catalogue, batch, tmp_path, theta=0.995, paths=paths, flow=flow, reward=reward)
    sft = step(model, catalogue, batch, tmp_path, theta=1.0)
    more = 0 if paths == "logged" else 14 / tokens_of(batch)  # a title of 14 tokens behind the row
    more *= 4 / 3 if paths == "policy" else 1  # drawn without gradients first
    side_by_side(f"Flower step ({flow}, reward {reward}), paths {paths} / SFT step", bound, flower, sft, rounds=5,
                 predicted=float(1 + more))


def test_an_sft_step_against_transformers(side_by_side, model, catalogue, batch, tmp_path):
    trainer = Trainer(model.train(), TrainingArguments(str(tmp_path), report_to="none"))
    labels = torch.where(batch["nodes"] == train.NO_TARGET, -100, batch["input_ids"])
    padded = {"input_ids": batch["input_ids"], "labels": labels}

    def plain():
        trainer.compute_loss(model, padded).backward()
        model.zero_grad()

    sft = step(model, catalogue, batch, tmp_path, theta=1.0)
    side_by_side("SFT step / transformers' Trainer", 1.0, sft, plain, rounds=5)


@pytest.mark.parametrize("what", ["in bfloat16", "on one thread", "through torch.compile"])
def test_an_sft_step_otherwise(side_by_side, model, catalogue, batch, tmp_path, what):
    """What was tried: no bound."""
    plain, n_threads = step(model, catalogue, batch, tmp_path, theta=1.0), torch.get_num_threads()
    if what == "through torch.compile":
        compiled = copy.deepcopy(model)
        compiled.compile()
        otherwise = step(compiled, catalogue, batch, tmp_path, theta=1.0)
    elif what == "in bfloat16":
        def otherwise():
            with torch.autocast("cpu", torch.bfloat16):
                plain()
    else:
        def otherwise():
            torch.set_num_threads(1)
            plain()
            torch.set_num_threads(n_threads)

    side_by_side(f"SFT step {what} / as it is", None, otherwise, plain, rounds=3)


def test_sixteen_paths_behind_one_prompt(side_by_side, model, catalogue):
    """A step of the first question: paths packed behind their prompt, against a row for each."""
    context = catalogue.context([])
    tree = PackedTree(model.train(), catalogue.trie, context)
    log_rewards = torch.zeros(catalogue.trie.n_items)
    log_flows = catalogue.trie.log_flows(log_rewards)
    leaves = catalogue.trie.leaf[torch.randperm(catalogue.trie.n_items, generator=torch.Generator().manual_seed(0))[:16]]
    paths = catalogue.trie.paths(leaves)
    paths = paths[:, : int((paths >= 0).sum(1).max())]
    mask = paths >= 0
    tokens = catalogue.trie.token[paths.clamp(min=0)] * mask
    log_r = catalogue.trie.log_token_rewards(log_rewards)[paths.clamp(min=0)]

    def packed():
        for part in loss_parts(tree, "subtb", log_flows, leaves):
            part.backward()
        model.zero_grad()

    def rows():
        ids = torch.cat([torch.tensor(context).expand(16, -1), tokens], 1)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
        log_pf = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        losses.subtb_loss(log_pf * mask, log_r * mask, mask).backward()
        model.zero_grad()

    side_by_side(f"16 paths behind one prompt of {len(context)} tokens / 16 rows", 0.5, packed, rows, rounds=5,
                 predicted=(len(context) + int(mask.sum())) / (16 * len(context) + int(mask.sum())))


def test_the_exact_distribution_of_the_catalogue(side_by_side, model):
    """The tree of 1,659 titles behind one prompt of 100 tokens, against a row of prompt and title for each (64 of them,
    times 26)."""
    rng = np.random.default_rng(0)
    words = np.minimum(rng.zipf(1.3, (1_659, 5)), 49_000) + 1
    words[:, -1] = rng.integers(2, 30_000, size=1_659)
    titles = np.pad(words, ((0, 0), (0, 1)), constant_values=1)
    trie, context = TitleTrie.from_sequences(titles), rng.integers(2, 49_000, size=100).tolist()
    model.eval()

    @torch.no_grad()
    def rows():
        ids = torch.cat([torch.tensor(context).expand(64, -1), torch.from_numpy(titles[:64])], 1)
        model(input_ids=ids, use_cache=False, logits_to_keep=titles.shape[1] + 1).logits.log_softmax(-1)

    packed = PackedTree(model, trie, context)
    n_tokens = sum(len(context) + len(nodes) for nodes, _ in packed._chunks())  # a part of the tree repeats its prompt
    side_by_side("distribution over 1,659 titles / a row a title", 0.1, packed.log_probs, rows, rounds=3, worth=1_659 / 64,
                 predicted=n_tokens / (1_659 * 106))
