"""Rows of seven titles, what they are trained with, and their tables: for the tests of train and lab.training."""

import numpy as np
import pandas as pd
import torch
from transformers import GPT2Config

from flowerlib import data, model as models, rewards
from flowerlib.lab.preference import PreferenceModel
from flowerlib.train import Objective, TrainSettings, collate, make_rows

TITLES = ["Toy Story", "Toy Story 2", "Toy Soldiers", "Heat", "Fargo", "The Rock", "The Big Heat"]
HISTORIES, TARGETS = [[0, 1], [3], [2, 4, 5]], [[2, 3], [6, 0, 1], [1]]


def world(form="sequence"):
    model, tokenizer = models.tiny_model([*TITLES, *models.prompt_texts("movie", form)], seed=0)
    return model, models.Catalogue.build(tokenizer, TITLES, "movie", form)


def objective(catalogue, theta=0.7, paths="logged", reward="none", flow="subtb", n_paths=1, beta=0.5, **more):
    counts = torch.arange(1, len(TITLES) + 1)
    settings = TrainSettings(theta=theta, paths=paths, reward=reward, flow=flow, beta=beta, n_paths=n_paths)
    return Objective(catalogue.trie, rewards.count_log_rewards(catalogue.trie, counts), settings, **more)


def batch_of(catalogue, targets=TARGETS, order=(0, 1, 2)):
    rows = make_rows(catalogue, HISTORIES, targets)
    return collate([rows[i] for i in order])


def preference_model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(TITLES) + 1, n_positions=9, n_embd=16, n_layer=1, n_head=2)
    return PreferenceModel(config).eval()


def tables_of(max_history=3, n_users=8):
    pairs = [(user, item) for user in range(n_users) for item in np.random.default_rng(user).permutation(7)[:6]]
    interactions = pd.DataFrame(pairs, columns=["user_id", "item_id"]).assign(timestamp=range(len(pairs)))
    items = pd.DataFrame({"item_id": range(7), "title": TITLES})
    return data.split_interactions(items, interactions, "leave-one-out", max_history)
