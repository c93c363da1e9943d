"""The language model under the recommender: loaded, cut to size, and split where its lower layers are frozen."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast,
)

from . import assets
from .runs import Settings, seed_everything


def load_backbone(chosen: Settings, texts: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model (float32) and tokenizer of a run, before training, cut as the settings ask.

    Args:
        chosen: model, frozen_layers, tuned_layers, cut_vocabulary and seed are used.
        texts: everything that the model will read or write (titles, prompt); cut_vocabulary keeps its tokens.

    Raises:
        OSError: the model is neither a folder nor a known hub id, or cannot be fetched (transformers' own message).
        ValueError: more layers asked for than there are.
    """
    if chosen.model == "tiny":
        model, tokenizer = tiny_model(texts, chosen.seed)
    else:
        path = assets.smollm2() if chosen.model == "smollm2-135m" else chosen.model
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chosen.tuned_layers:
        keep_layers(model, chosen.frozen_layers, chosen.tuned_layers)
    if chosen.cut_vocabulary:
        tokenizer = cut_vocabulary(model, tokenizer, texts)
    if chosen.frozen_layers and model.config.tie_word_embeddings:
        _set_embeddings(model, torch.arange(model.config.vocab_size))
    return model.eval(), tokenizer


def tiny_model(texts: Sequence[str], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A two-layer Llama with random weights over the words of `texts`: for tests and the smoke profile."""
    pieces = pre_tokenizers.Split(Regex(r" ?[^ \n]+|\n"), "isolated")
    words = sorted({word for text in [*texts, "\n"] for word, _ in pieces.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pieces, decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    seed_everything(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config), tokenizer


def keep_layers(model: PreTrainedModel, n_lower: int, n_upper: int) -> None:
    """Keeps the lowest `n_lower` and the topmost `n_upper` decoder layers of the model, in place."""
    layers = _decoder(model).layers
    if n_lower + n_upper > len(layers):
        raise ValueError(f"the model has {len(layers)} layers, not frozen_layers + tuned_layers = {n_lower + n_upper}")
    kept = [*range(n_lower), *range(len(layers) - n_upper, len(layers))]
    model.get_decoder().layers = nn.ModuleList(layers[i] for i in kept)
    for new, layer in enumerate(model.get_decoder().layers):
        layer.self_attn.layer_idx = new
    _take_layers(model.config, kept)


def cut_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Cuts the model, in place, to the tokens that `texts` need, and returns the tokenizer that goes with it.

    A softmax over a few thousand tokens costs a fraction of one over 49,152. Every text of `texts` keeps its tokens
    (checked); any other text is still encoded, from the byte tokens up. Tokenizers other than BPE are left whole.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        return tokenizer
    spec["post_processor"] = None  # it names ids of special tokens around a text; no text here has any
    before = tokenizer(list(texts), add_special_tokens=False).input_ids
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    kept = {names[i] for ids in before for i in ids} | {name for name in names.values() if len(name) == 1}
    special = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token} - {None}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in spec["model"]["merges"]]
    n_kept = -1
    while n_kept != len(kept):  # every merge on the way to a kept token stays
        n_kept = len(kept)
        for left, right in reversed(merges):
            if left + right in kept:
                kept |= {left, right}
    old_ids = sorted(i for i, name in names.items() if name in kept | special)
    new_id = {names[old]: new for new, old in enumerate(old_ids)}
    spec["model"]["vocab"] = {name: new_id[name] for name in spec["model"]["vocab"] if name in new_id}
    spec["model"]["merges"] = [list(m) for m in merges if kept >= {*m, m[0] + m[1]}]
    spec["added_tokens"] = [t | {"id": new_id[t["content"]]} for t in spec["added_tokens"] if t["content"] in new_id]
    cut = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token, bos_token=tokenizer.bos_token, unk_token=tokenizer.unk_token,
    )
    after = cut(list(texts), add_special_tokens=False).input_ids
    if any([old_ids[i] for i in new] != old for new, old in zip(after, before, strict=True)):
        raise RuntimeError("the cut tokenizer reads a text differently: set cut_vocabulary to False for this model")
    _set_embeddings(model, torch.tensor(old_ids))
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = cut.eos_token_id, cut.pad_token_id
        config.bos_token_id = cut.bos_token_id
    return cut


def split_layers(model: PreTrainedModel, n_frozen: int) -> tuple[nn.Module, PreTrainedModel]:
    """The model in two that share its weights: (trunk, upper).

    `trunk(input_ids=…, attention_mask=…).last_hidden_state` is what leaves the lowest `n_frozen` layers, (B, T, H);
    `upper(inputs_embeds=that, …)` goes on from there to the logits. Tuning `upper` tunes `model`.

    Raises:
        ValueError: the model is not built like a Llama (embed_tokens, layers, norm, rotary_emb).
    """
    base = _decoder(model)
    n_layers = len(base.layers)
    lower, rest = range(n_frozen), range(n_frozen, n_layers)
    with torch.device("meta"):
        trunk = type(base)(_take_layers(copy.deepcopy(model.config), lower))
        upper = type(model)(_take_layers(copy.deepcopy(model.config), rest))
    for part, layers in ((trunk, lower), (upper.get_decoder(), rest)):
        part.embed_tokens, part.norm, part.rotary_emb = base.embed_tokens, base.norm, base.rotary_emb
        part.layers = nn.ModuleList(base.layers[i] for i in layers)
    trunk.norm = nn.Identity()
    trunk.config.use_cache = upper.config.use_cache = False
    upper.set_output_embeddings(model.get_output_embeddings())
    trunk.requires_grad_(False).eval()
    return trunk, upper


def _decoder(model: PreTrainedModel) -> nn.Module:
    base = model.get_decoder()
    if not all(hasattr(base, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        raise ValueError(f"a {type(model).__name__} cannot be cut or split: set frozen_layers and tuned_layers to 0")
    return base


def _take_layers(config, kept: Sequence[int]):
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    return config


def _set_embeddings(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Keeps these rows of the input and output embeddings, as two matrices of their own, in place."""
    rows_in = model.get_input_embeddings().weight.detach()[ids].clone()
    rows_out = model.get_output_embeddings().weight.detach()[ids].clone()
    head = nn.Linear(rows_out.shape[1], len(ids), bias=False)
    head.weight = nn.Parameter(rows_out)
    model.config.tie_word_embeddings = False
    model.config.vocab_size = model.vocab_size = len(ids)
    model.set_input_embeddings(nn.Embedding.from_pretrained(rows_in, freeze=False))
    model.set_output_embeddings(head)
