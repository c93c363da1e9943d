"""The language model and its catalogue: loaded, cut to size, split, titles encoded."""

import copy
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM,
                          PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed)

from .data import item_leaves, read_json, reading
from .trie import TitleTrie

if TYPE_CHECKING:
    from .train import TrainSettings

ROOT = Path(__file__).resolve().parent.parent  # relative folders count from here


@dataclass(frozen=True)
class Catalogue:
    """The titles as the model sees them, encoded once for tree, prompts, training targets and decoding alike."""

    titles: list[str]  # one per item; equal titles share a leaf
    sequences: list[list[int]]  # one per item: its title's tokens and then the terminator ⊤
    trie: TitleTrie  # the prefix tree of `sequences`; its leaf ids are those of `data.item_leaves`
    header: list[int]  # tokens; a prompt is header, title, separator, title, separator, …, footer
    separator: list[int]
    footer: list[int]
    eos: int | None  # what follows a target in training

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerFast, titles: Sequence[str], category: str,
              rows: str = "sequence") -> Self:
        """Encodes titles and prompt. category: what the prompt calls an item ("movie"). rows: "sequence" (a list of
        titles that simply goes on) or "target" (an instruction, one title as answer).
        The terminator is the newline's token (without a blank that SentencePiece puts before it), else the end of text.
        Raises ValueError where the tokenizer has neither, a title encodes to nothing or holds the terminator, or two
        different titles have the same tokens.
        Deviation: title and terminator are encoded apart and joined, here and everywhere. The official code encodes
        them together for the target but apart for the tree; the two disagree where the tokenizer merges them."""
        texts = [*titles, "\n", *prompt_texts(category, rows)]
        *encoded, newline, header, separator, footer = tokenizer(texts, add_special_tokens=False).input_ids
        end = newline[-1] if tokenizer.decode(newline[-1:]) == "\n" else tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no token for the newline nor for the end of a text: take another model")
        separator = [end] if rows == "sequence" else separator
        sequences = [[*ids, end] for ids in encoded]
        for i, ids in enumerate(sequences):
            if len(ids) == 1 or end in ids[:-1]:
                raise ValueError(f"item {i} has the title {titles[i]!r}, which is empty or holds a newline: clean it")
        trie = TitleTrie.from_sequences(sequences)
        differs = trie.item_leaf.numpy() != item_leaves(titles)
        if differs.any():  # the first such item has joined the leaf of an earlier title
            i = int(differs.argmax())
            other = titles[int((trie.item_leaf == trie.item_leaf[i]).nonzero()[0, 0])]
            raise ValueError(f"the tokenizer reads item {i}, {titles[i]!r}, and {other!r} as the same tokens: give "
                             "both one title, or take a model whose tokenizer tells them apart")
        eos = tokenizer.eos_token_id if rows == "target" and tokenizer.eos_token_id != end else None
        return cls(list(titles), sequences, trie, header, separator, footer, eos)

    terminator = property(lambda self: self.sequences[0][-1], doc="The token ⊤ that ends every title.")
    leaf_titles = property(lambda self: list(dict.fromkeys(self.titles)), doc="(n_leaves,) the title of each leaf id.")

    def context(self, history: Sequence[int]) -> list[int]:
        """Tokens of the prompt for a history of item positions, oldest first. An empty history is allowed."""
        body = [t for item in history for t in (*self.sequences[item][:-1], *self.separator)]
        return [*self.header, *body, *self.footer]


def prompt_texts(category: str, rows: str) -> tuple[str, str, str]:
    """(header, separator, footer) of the two forms of prompt."""
    if rows == "sequence":
        return f"Titles that one person chose, one {category} after the other:\n", "\n", ""
    if rows == "target":
        return (f"### Instruction:\nRecommend the {category} that this user will like next.\n\n"
                f"### Input:\nThe user has enjoyed the following {category} titles: "), ", ", "\n\n### Response:\n"
    raise ValueError(f"rows is {rows!r}: choose sequence or target")


class Backbone(NamedTuple):
    """A language model in float32, and what goes with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    catalogue: Catalogue


def open_backbone(settings: "TrainSettings", titles: Sequence[str], path: str | Path | None = None,
                  prompt: str | None = None) -> Backbone:
    """Model, tokenizer and catalogue of a run, before training, cut as the settings ask: of them, model, frozen_layers,
    tuned_layers, cut_vocabulary, category, rows and seed are used. path: folder or hub id in the place of
    settings.model; "tiny" is `tiny_model`. prompt: what stands before a title where there is no history; None takes
    the prompt of category and rows.
    Raises OSError where the model is neither a folder nor a known hub id, or cannot be fetched (transformers' own
    message); ValueError where more layers are asked for than there are, or as `Catalogue.build`."""
    path = settings.model if path is None else path
    texts = [*titles, *(prompt_texts(settings.category, settings.rows) if prompt is None else [prompt])]
    if path == "tiny":
        model, tokenizer = tiny_model(texts, settings.seed)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.tuned_layers:
        keep_layers(model, settings.frozen_layers, settings.tuned_layers)
    if settings.cut_vocabulary:
        tokenizer = cut_vocabulary(model, tokenizer, texts)
    if settings.frozen_layers and model.config.tie_word_embeddings:
        _set_embeddings(model, torch.arange(model.config.vocab_size))
    catalogue = Catalogue.build(tokenizer, titles, settings.category, settings.rows)
    if prompt is not None:
        header = tokenizer(prompt, add_special_tokens=False).input_ids
        catalogue = replace(catalogue, header=header, footer=[], eos=None)
    return Backbone(model.eval(), tokenizer, catalogue)


def load_trained(folder: str | Path) -> Backbone:
    """Model (on the GPU if there is one), tokenizer and catalogue of the finished training that `trained_folder` finds;
    the last two opened stay in memory."""
    folder = trained_folder(folder)
    return _load_trained(folder, (folder / "made.json").stat().st_mtime_ns)


def trained_folder(folder: str | Path) -> Path:
    """The folder of a finished training: this one, or the one that a step's folder (such as runs/laptop/flower) names
    in its settings.json. A relative path counts from the project's root. FileNotFoundError where there is none."""
    folder = ROOT / str(folder)
    if (mark := folder / "settings.json").exists():
        folder = folder / (read_json(mark, "made")["made"] or "")
    if not (folder / "made.json").exists():
        finished = ", ".join(sorted(path.parent.name for path in folder.glob("*/made.json")))
        hint = f", or name the folder of one that is finished: {finished}" if finished else ""
        raise FileNotFoundError(f"{folder} holds no finished training: run notebook 02 or 03 first{hint}")
    return folder


def trained_on(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The settings and the items (item_id, title) of the training in this folder. ValueError where a file is damaged,
    or items.parquet is not the one that the training wrote (older trainings have not noted it)."""
    record, path = read_json(folder / "made.json", "provenance"), folder / "items.parquet"
    with reading(path, folder):
        if (known := record.get("items")) and hashlib.sha256(path.read_bytes()).hexdigest() != known:
            raise ValueError("of another training")
        return record["provenance"]["settings"], pd.read_parquet(path)


@lru_cache(maxsize=2)
def _load_trained(folder: Path, _written: int) -> Backbone:
    settings, items = trained_on(folder)
    with reading(folder / "model", folder):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    catalogue = Catalogue.build(tokenizer, items.title, settings["category"], settings["rows"])
    return Backbone(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, catalogue)


def tiny_model(texts: Sequence[str], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A two-layer Llama with random weights over the words of `texts`: for tests and the smoke profile."""
    pieces = pre_tokenizers.Split(Regex(r" ?[^ \n]+|\n"), "isolated")
    words = sorted({word for text in [*texts, "\n"] for word, _ in pieces.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pieces, decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    set_seed(seed)
    config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None,
                         eos_token_id=0, pad_token_id=0, tie_word_embeddings=False)
    return LlamaForCausalLM(config), tokenizer


def keep_layers(model: PreTrainedModel, n_lower: int, n_upper: int) -> None:
    """Keeps the lowest `n_lower` and the topmost `n_upper` decoder layers of the model, in place."""
    base = _decoder(model)
    if n_lower + n_upper > (n := len(base.layers)):
        raise ValueError(f"the model has {n} layers, not frozen_layers + tuned_layers = {n_lower + n_upper}")
    places = [*range(n_lower), *range(n - n_upper, n)]
    base.layers = nn.ModuleList(base.layers[i] for i in places)
    for new, layer in enumerate(base.layers):
        for part in (part for part in layer.modules() if hasattr(part, "layer_idx")):
            part.layer_idx = new
    _take_layers(model.config, places)


def cut_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast,
                   texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Cuts the model, in place, to the tokens that `texts` need, and returns the tokenizer that goes with it.
    A softmax over a few thousand tokens costs a fraction of one over 49,152. Every text of `texts` keeps its tokens
    (checked); any other text is still encoded, from the byte tokens up. Tokenizers other than BPE are left whole."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        return tokenizer
    spec["post_processor"] = None  # it names ids of special tokens around a text; no text here has any
    before = tokenizer(list(texts), add_special_tokens=False).input_ids
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    alone = {name for name in names.values() if len(name) == 1 or re.fullmatch("<0x[0-9A-F]{2}>", name)}
    needed = {names[i] for ids in before for i in ids} | alone
    special = {name: getattr(tokenizer, name) for name in ("eos_token", "pad_token", "bos_token", "unk_token")}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in spec["model"]["merges"]]
    while on_the_way := {part for pair in merges if "".join(pair) in needed for part in pair} - needed:
        needed |= on_the_way  # every merge on the way to a needed token stays
    old_ids = sorted(i for i, name in names.items() if name in needed or name in special.values())
    new_id = {names[old]: new for new, old in enumerate(old_ids)}
    spec["model"]["vocab"] = {name: new_id[name] for name in spec["model"]["vocab"] if name in new_id}
    spec["model"]["merges"] = [list(m) for m in merges if needed >= {*m, m[0] + m[1]}]
    spec["added_tokens"] = [t | {"id": new_id[t["content"]]} for t in spec["added_tokens"] if t["content"] in new_id]
    cut = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **special)
    after = cut(list(texts), add_special_tokens=False).input_ids
    if any([old_ids[i] for i in new] != old for new, old in zip(after, before, strict=True)):
        raise RuntimeError("the cut tokenizer reads a text differently: set cut_vocabulary to False for this model")
    _set_embeddings(model, torch.tensor(old_ids))
    for config in (model.config, model.generation_config):
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            setattr(config, name, getattr(cut, name))
    return cut


def context_limit(model: PreTrainedModel) -> int:
    """How many tokens the model reads so that each sees all before it: its positions, or a shorter sliding window."""
    config = model.config.get_text_config()
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return min(n for n in (getattr(config, "max_position_embeddings", None), *windows, sys.maxsize) if n)


def split_layers(model: PreTrainedModel, n_frozen: int) -> tuple[nn.Module, PreTrainedModel]:
    """The model in two that share its weights: (trunk, upper).
    `trunk(input_ids=…).last_hidden_state` is what leaves the lowest `n_frozen` layers, (B, T, H);
    `upper(inputs_embeds=that, …)` goes on from there to the logits. Tuning `upper` tunes `model`. The trunk is frozen
    and in evaluation mode; `upper` is in training mode, whatever `model` is in: call upper.eval() to measure. Raises
    ValueError where `model` isn't built like a Llama (embed_tokens, layers, norm, rotary_emb) or has too few layers."""
    base = _decoder(model)
    lower, rest = range(n_frozen), range(n_frozen, len(base.layers))
    if not rest:
        raise ValueError(f"the model has {len(base.layers)} layers: frozen_layers = {n_frozen} leaves none to tune")
    with torch.device("meta"):
        trunk = type(base)(_take_layers(copy.deepcopy(base.config), lower))
        upper = type(model)(_take_layers(copy.deepcopy(model.config), rest))
    for part, layers in ((trunk, lower), (upper.get_decoder(), rest)):
        part.embed_tokens, part.norm, part.rotary_emb = base.embed_tokens, base.norm, base.rotary_emb
        part.layers = nn.ModuleList(base.layers[i] for i in layers)
    trunk.norm, upper.get_decoder().embedding_multiplier = nn.Identity(), 1.0  # Granite's: the trunk has applied it
    trunk.config.use_cache = upper.config.use_cache = False
    upper.set_output_embeddings(model.get_output_embeddings())
    trunk.requires_grad_(False).eval()
    return trunk, upper


def _decoder(model: PreTrainedModel) -> nn.Module:
    base = model.get_decoder()
    if not all(hasattr(base, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        raise ValueError(f"a {type(model).__name__} cannot be cut or split: set frozen_layers and tuned_layers to 0")
    return base


def _take_layers(config: PreTrainedConfig, places: Sequence[int]) -> PreTrainedConfig:
    """The config of these layers alone, in place; every list with an entry a layer is cut with them."""
    own = config.get_text_config()
    n, own.num_hidden_layers = own.num_hidden_layers, len(places)
    for name, values in list(vars(own).items()):
        if isinstance(values, list) and len(values) == n and not name.endswith(("_id", "_ids")):
            setattr(own, name, [values[i] for i in places])
    return config


def _set_embeddings(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Keeps these rows of the input and output embeddings, as two matrices of their own, in place, in the modules that
    are there: Gemma's scales what it looks up."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inner, outer = (layer.weight.detach()[ids].clone() for layer in (embedding, head))
    model.config.tie_word_embeddings, embedding.padding_idx = False, None
    model.config.vocab_size = model.vocab_size = embedding.num_embeddings = head.out_features = len(ids)
    embedding.weight, head.weight = nn.Parameter(inner), nn.Parameter(outer)
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[ids])
