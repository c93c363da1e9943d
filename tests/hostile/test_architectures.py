"""Every architecture under every setting is right or refused before training: a random model of each is trained.

What is right is computed here, by plain forward passes of the model that transformers reads from the folder, and with
no code of the dry run. A quick part runs always, all with FLOWERLIB_HARD=1; the table of outcomes goes to stdout (-s).
"""

import json
import os
from dataclasses import replace
from functools import lru_cache
from itertools import product

import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flowerlib import data, model as models_of_flowerlib
from flowerlib.lab import training
from flowerlib.model import Catalogue, load_trained, open_backbone, prompt_texts
from flowerlib.train import TrainSettings, training_rows, validation_rows
from flowerlib.tree import Beams, PackedTree, beam_search

HARD = bool(os.environ.get("FLOWERLIB_HARD"))
WORDS = "red blue green sea moon star house of the and"
TITLES = [f"{a} {b}" for a, b in product(("Red", "Blue Moon", "The Sea"), ("", "II", "of Stars", "House"))]
TITLES = [" ".join(title.split()) for title in TITLES]
BASE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
LLAMA = BASE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
TIED = {"tie_word_embeddings": True}
ARCHITECTURES = {  # name: config class of transformers, its values
    "Llama": ("LlamaConfig", LLAMA),
    "Qwen2": ("Qwen2Config", LLAMA | TIED),
    "Qwen3": ("Qwen3Config", LLAMA | TIED),
    "Phi3": ("Phi3Config", LLAMA),
    "Mistral": ("MistralConfig", LLAMA | {"sliding_window": 64}),
    "Mistral, short window": ("MistralConfig", LLAMA | {"sliding_window": 16}),
    "OLMo2": ("Olmo2Config", LLAMA),
    "Cohere": ("CohereConfig", LLAMA | {"logit_scale": 0.5}),
    "Gemma": ("GemmaConfig", LLAMA | TIED),
    "Gemma 2": ("Gemma2Config", LLAMA | TIED | {"sliding_window": 64, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("Gemma3TextConfig", LLAMA | TIED | {
        "sliding_window": 64, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    "Gemma 3, short window": ("Gemma3TextConfig", LLAMA | TIED | {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "Granite": ("GraniteConfig", LLAMA | TIED | {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    }),
    "SmolLM3": ("SmolLM3Config", LLAMA | TIED | {"no_rope_layers": [1, 0, 1, 0]}),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}),
    "GPT-NeoX": ("GPTNeoXConfig", BASE | {"intermediate_size": 48}),
    "OPT": ("OPTConfig", BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "Mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}),
    "GPT-Neo": ("GPTNeoConfig", BASE | {
        "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 256,
    }),
    "GPT-J": ("GPTJConfig", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "rotary_dim": 4}),
    "Phi": ("PhiConfig", BASE | {"intermediate_size": 48}),
    "Falcon": ("FalconConfig", BASE | {"new_decoder_architecture": False}),
    "MPT": ("MptConfig", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 512}),
    "StableLM": ("StableLmConfig", LLAMA),
    "Starcoder2": ("Starcoder2Config", LLAMA | TIED),
    "Cohere 2": ("Cohere2Config", LLAMA | {"sliding_window": 64, "logit_scale": 0.5}),
    "OLMo": ("OlmoConfig", LLAMA),
    "OLMo3": ("Olmo3Config", LLAMA | {"sliding_window": 64}),
    "GLM": ("GlmConfig", LLAMA),
    "Helium": ("HeliumConfig", LLAMA),
    "EXAONE 4": ("Exaone4Config", LLAMA | {"sliding_window": 64}),
    "Mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 4}),
    "Qwen3-MoE": ("Qwen3MoeConfig", LLAMA | {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}),
    "Mamba 2": ("Mamba2Config", {
        "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4, "head_dim": 8, "num_heads": 8, "n_groups": 1,
    }),
    "AFMoE": ("AfmoeConfig", LLAMA | {
        "mup_enabled": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "num_dense_layers": 2, "sliding_window": 64, "num_shared_experts": 1,
    }),
    "GraniteMoE": ("GraniteMoeConfig", LLAMA | {"embedding_multiplier": 3.0, "num_local_experts": 4}),
    "Llama 4": ("Llama4TextConfig", LLAMA | {
        "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 64, "no_rope_layers": [1, 0, 1, 0],
    }),
    "GPT-OSS": ("GptOssConfig", LLAMA | {"num_local_experts": 4, "sliding_window": 64, "num_experts_per_tok": 2}),
    "Nemotron": ("NemotronConfig", LLAMA),
    "Qwen3-Next": ("Qwen3NextConfig", LLAMA | {
        "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }),
    "RecurrentGemma": ("RecurrentGemmaConfig", BASE | {
        "intermediate_size": 48, "num_key_value_heads": 1, "lru_width": 32,
    }),
    "XGLM": ("XGLMConfig", {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48}),
    "CodeGen": ("CodeGenConfig", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "rotary_dim": 4}),
    "BioGPT": ("BioGptConfig", BASE | {"intermediate_size": 48}),
    "DeepSeek-V3": ("DeepseekV3Config", BASE | {
        "intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    }),
    "LFM2": ("Lfm2Config", LLAMA | {"layer_types": ["conv", "full_attention"] * 2}),
}
QUICK = ("Gemma", "Gemma 3, short window", "Granite", "SmolLM3", "Bloom")
CUT = {"frozen_layers": 1, "tuned_layers": 2}
WHOLE = {"frozen_layers": 0, "tuned_layers": 0}
COLUMNS = {
    "whole": WHOLE | {"cut_vocabulary": False},
    "frozen": CUT | {"cut_vocabulary": False},
    "cut": WHOLE | {"cut_vocabulary": True},
    "frozen, cut": CUT | {"cut_vocabulary": True},
    "LoRA": WHOLE | {"cut_vocabulary": False, "lora_rank": 2},
    "LoRA, frozen, cut": CUT | {"cut_vocabulary": True, "lora_rank": 2},
}
SETTINGS = TrainSettings(
    model="tiny", max_history=4, learning_rate=3e-3, epochs=1.0, batch_size=8, evaluations=1, bfloat16=False,
    validation_rows=12,
)


@lru_cache
def bpe(byte_fallback=False):
    """A tokenizer with more tokens than the titles need; with byte_fallback it is built like Llama-2's."""
    backend = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>" if byte_fallback else None))
    special = ["<unused>", "<eos>"]
    if byte_fallback:
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])
        alphabet = list("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.:#0123456789")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*TITLES, *prompt_texts("movie", "target")[:1], "unneeded words entirely elsewhere " * 3]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text.replace("\n", " ") for text in texts] * 3, trainer)
    if byte_fallback:  # bytes are tokens like others, not special ones
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(spec))
    more = {"unk_token": "<unk>"} if byte_fallback else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", **more)


def save(folder, name, tokenizer=None):
    """A random model of an architecture and a tokenizer, in a folder."""
    tokenizer = tokenizer or bpe()
    kind, values = ARCHITECTURES[name]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(len(name))
    lm = AutoModelForCausalLM.from_config(getattr(transformers, kind)(vocab_size=len(tokenizer) + 8, **ids | values))
    with torch.no_grad():
        for weights in lm.parameters():  # far from uniform, and no vector of ones or zeros
            if weights.ndim > 1:
                weights.mul_(4)
            else:
                weights.add_(0.1 * torch.randn_like(weights))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tables():
    drawn = torch.Generator().manual_seed(0)
    pairs = [(user, item) for user in range(12) for item in torch.randperm(len(TITLES), generator=drawn)[:7].tolist()]
    interactions = pd.DataFrame(pairs, columns=["user_id", "item_id"]).assign(timestamp=range(len(pairs)))
    items = pd.DataFrame({"item_id": range(len(TITLES)), "title": TITLES})
    return data.split_interactions(items, interactions, "leave-one-out", 4)


@torch.no_grad()
def check_cut(folder, settings, backbone):
    """The model that is opened is the model of the folder, on the tokens and layers kept."""
    lm, tokenizer, catalogue = backbone
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder)
    if settings.tuned_layers:
        n = settings.frozen_layers
        for layer in whole.get_decoder().layers[n : len(whole.get_decoder().layers) - settings.tuned_layers]:
            layer.register_forward_hook(lambda module, args, kwargs, output: args[0], with_kwargs=True)
    old = [words.get_vocab()[name] for name in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    for item in (0, 5):
        row = catalogue.context([item]) + catalogue.sequences[item]
        expected = whole(torch.tensor([[old[t] for t in row]])).logits[0][:, old].double().log_softmax(-1)
        found = lm(torch.tensor([row])).logits[0, :, : len(old)].double().log_softmax(-1)
        assert (found - expected).abs().max() < 1e-4


@torch.no_grad()
def plain(lm, row, first):
    """log π of row[first:], token by token: every token a forward pass of its own beginning of the row."""
    return torch.stack([lm(torch.tensor([row[:t]])).logits[0, -1].double().log_softmax(-1)[row[t]]
                        for t in range(first, len(row))])


@torch.no_grad()
def check_trained(made, backbone, log, settings):
    """The folder holds the model in memory; its validation loss, tree and beams are those of plain forward passes."""
    saved = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32).eval()
    catalogue = load_trained(made).catalogue
    assert catalogue.sequences == backbone.catalogue.sequences and catalogue.header == backbone.catalogue.header
    row = catalogue.context([0]) + catalogue.sequences[5]
    for lm in (backbone.model, load_trained(made).model):
        assert (lm(torch.tensor([row])).logits - saved(torch.tensor([row])).logits).abs().max() < 1e-4
    rows = validation_rows(catalogue, tables(), settings)
    targets = [int((nodes == -1).sum()) for nodes in rows.nodes]
    loss = -torch.cat([plain(saved, ids.tolist(), first) for ids, first in zip(rows.input_ids, targets)]).mean()
    half = 0.01 if settings.frozen_layers else 1e-4  # the frozen layers' output is kept in 16 bits
    best = log[log.kind == "validation"].loss.min()
    assert abs(best - loss) < half, f"validation loss {best} and plain forward passes {loss}"
    for history in ([], [3, 0]):
        context = catalogue.context(history)
        steps = [plain(saved, context + sequence, len(context)) for sequence in catalogue.sequences]
        edges = PackedTree(backbone.model, catalogue.trie, context, settings.frozen_layers)
        edges.model.eval()
        log_probs = edges.log_probs().double()
        for item, expected in enumerate(steps):
            path = catalogue.trie.paths(catalogue.trie.leaf[[item]])[0]
            assert (log_probs[path[path >= 0]] - expected).abs().max() < 1e-3
        totals = torch.stack([step.sum() for step in steps])
        [(leaves, scores)] = beam_search(saved, catalogue, [history, [1]], [Beams(4, seen_allowed=True)])
        [(few, _)] = beam_search(saved, catalogue, [history], [Beams(len(TITLES), seen_allowed=True)])
        order = totals.argsort(descending=True)
        assert few[0].tolist() == order.tolist()
        assert (totals[leaves[0]] - torch.from_numpy(scores[0])).abs().max() < 1e-3


def outcome(folder, name, column, tmp_path):
    """"right", or the sentence with which the settings were refused before training."""
    settings = replace(SETTINGS, model=str(folder), **COLUMNS[column])
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.FlowerTrainer, "train", lambda *a, _train=training.FlowerTrainer.train, **k: (
            begun.append(1), _train(*a, **k))[1])
        try:
            backbone = open_backbone(settings, TITLES, folder)
            before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
            log, made = training.finetune(backbone, tables(), settings, tmp_path / "sft", tmp_path / "cache")
        except ValueError as error:
            assert not begun, f"{name}, {column}: refused after training began: {error}"
            assert "\n" not in str(error)
            return str(error)
    check_trained(made, backbone, log, settings)
    assert any(not torch.equal(before[k], v) for k, v in backbone.model.state_dict().items())
    check_cut(folder, settings, open_backbone(settings, TITLES, folder))
    return "right"


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.skipif(not HARD, reason="FLOWERLIB_HARD=1 runs all"))
    for name in ARCHITECTURES
])
def test_right_or_refused(tmp_path, name):
    folder = save(tmp_path / "model", name)
    columns = COLUMNS if HARD else ("whole", "frozen, cut")
    found = {column: outcome(folder, name, column, tmp_path / column) for column in columns}
    for column, says in found.items():
        expected = "refused" if column in REFUSED.get(name, ()) else "right"
        assert (says == "right") == (expected == "right"), f"{name}, {column}: {says}"
    OUTCOMES[name] = found


OUTCOMES = {}
UNSPLIT = ("frozen", "frozen, cut", "LoRA, frozen, cut")  # no embed_tokens, layers, norm and rotary_emb
REFUSED = dict.fromkeys(
    ("GPT-2", "GPT-NeoX", "OPT", "GPT-J", "Phi", "Falcon", "AFMoE", "XGLM", "CodeGen", "BioGPT"), UNSPLIT
) | dict.fromkeys(
    ("Mistral, short window", "Gemma 3, short window", "Bloom", "Mamba", "GPT-Neo", "MPT", "Mamba 2", "Qwen3-Next",
     "RecurrentGemma", "LFM2"), tuple(COLUMNS)
) | {"Llama 4": (*UNSPLIT, "LoRA")}


@pytest.fixture(scope="module", autouse=True)
def table(tmp_path_factory):
    """The outcomes as a table in Markdown, and the sentences under it: to stdout and into a file."""
    yield
    lines = [f"| architecture | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    sentences = {}
    for name, found in OUTCOMES.items():
        cells = []
        for column in COLUMNS:
            says = found.get(column, "not run")
            if says not in ("right", "not run"):
                says = f"refused {sentences.setdefault(says, len(sentences) + 1)}"
            cells.append(says)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {says}" for says, number in sentences.items()), ""]
    path = tmp_path_factory.mktemp("architectures") / "architectures.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    print(f"\n{path}", *lines, sep="\n")


# windows


def test_a_window_longer_than_any_row_and_shorter_than_the_tree_is_right(tmp_path):
    """The nodes packed behind a prompt are more than the window; no title is further from its prompt than it."""
    folder = save(tmp_path / "model", "Mistral")
    assert outcome(folder, "Mistral", "frozen, cut", tmp_path) == "right"
    catalogue = open_backbone(replace(SETTINGS, model=str(folder), **COLUMNS["cut"]), TITLES, folder).catalogue
    assert catalogue.trie.n_nodes + len(catalogue.header) > 64


def test_a_window_between_prompt_and_row_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "window", ("MistralConfig", LLAMA | {"sliding_window": 46}))
    says = outcome(save(tmp_path / "model", "window"), "window", "whole", tmp_path)
    assert says.startswith("a row may grow to") and "the model reads 46: lower max_history, or shorten the longest" in says


def test_a_test_users_history_longer_than_the_context_is_refused_before_training(tmp_path):
    """GPT-2 has no position beyond its context: notebook 04 would stop after both trainings."""
    folder, given = save(tmp_path / "model", "GPT-2"), tables()
    settings = replace(SETTINGS, model=str(folder), **COLUMNS["whole"])
    backbone = open_backbone(settings, TITLES, folder)
    catalogue = backbone.catalogue
    rows = [ids for part in (training_rows, validation_rows) for ids in part(catalogue, given, settings).input_ids]
    item = max(range(len(TITLES)), key=lambda i: len(catalogue.sequences[i]))
    history = pd.Series([[item] * 8] * len(given.test), index=given.test.index, dtype=given.test.history.dtype)
    backbone.model.config.max_position_embeddings = max(map(len, rows)) + catalogue.trie.max_depth
    assert len(catalogue.context([item] * 8)) > max(map(len, rows))
    given = replace(given, test=given.test.assign(history=history))
    with pytest.raises(ValueError, match="lower max_history"):
        training.finetune(backbone, given, settings, tmp_path, tmp_path)


@torch.no_grad()
def test_a_new_users_history_beyond_the_window_is_refused(tmp_path):
    folder = save(tmp_path / "model", "Mistral")
    lm, _, catalogue = open_backbone(replace(SETTINGS, model=str(folder), **COLUMNS["whole"]), TITLES, folder)
    with pytest.raises(ValueError, match="the model reads 64: shorten the history"):
        beam_search(lm, catalogue, [list(range(12))], [Beams(3)])


# tokenizers


def unigram():
    """A SentencePiece-like tokenizer whose normaliser reads a newline as a blank."""
    pieces = sorted({"▁" + word for title in TITLES for word in title.split()})
    letters = sorted({letter for text in [*TITLES, *prompt_texts("movie", "target")] for letter in text} - {" ", "\n"})
    vocabulary = {"<unk>": 0.0, "</s>": 0.0, "▁": -3.0} | dict.fromkeys(pieces, -2.0) | dict.fromkeys(letters, -9.0)
    backend = Tokenizer(models.Unigram(list(vocabulary.items()), unk_id=0))
    backend.normalizer = normalizers.Replace("\n", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


@pytest.mark.parametrize(("make", "rows", "end"), [
    (unigram, "sequence", "</s>"), (unigram, "target", "</s>"),
    (lambda: bpe(True), "sequence", "<0x0A>"), (lambda: bpe(True), "target", "<0x0A>"),
], ids=["Unigram", "Unigram, target", "like Llama-2's", "like Llama-2's, target"])
def test_tokenizers_without_a_newline_of_one_token(tmp_path, make, rows, end):
    """Titles end in another token; trained, saved and read back it is the same, and all is as plain passes say."""
    tokenizer = make()
    [newline] = tokenizer(["\n"], add_special_tokens=False).input_ids
    assert len(newline) != 1 or tokenizer.decode(newline) != "\n"
    folder = save(tmp_path / "model", "Llama", tokenizer)
    settings = replace(SETTINGS, model=str(folder), rows=rows, **COLUMNS["frozen, cut"])
    backbone = open_backbone(settings, TITLES, folder)
    assert backbone.tokenizer.convert_ids_to_tokens(backbone.catalogue.terminator) == end
    assert [backbone.tokenizer.decode(sequence[:-1]).strip() for sequence in backbone.catalogue.sequences] == TITLES
    log, made = training.finetune(backbone, tables(), settings, tmp_path / "sft", tmp_path / "cache")
    check_trained(made, backbone, log, settings)
    assert load_trained(made).catalogue.terminator == backbone.catalogue.terminator


# the dry run itself


def plain_embeddings(lm, ids):
    """What was done before: a plain embedding in the place of the model's own."""
    layers = lm.get_input_embeddings(), lm.get_output_embeddings()
    inner, head = (layer.weight.detach()[ids] for layer in layers)
    lm.config.tie_word_embeddings = False
    lm.config.vocab_size = len(ids)
    lm.set_input_embeddings(torch.nn.Embedding.from_pretrained(inner, freeze=False))
    lm.get_output_embeddings().weight = torch.nn.Parameter(head)


def only_number_of_layers(config, places):
    config.num_hidden_layers, config.layer_types = len(places), [config.layer_types[i] for i in places]
    return config


def dry_run(folder, column, cache):
    settings = replace(SETTINGS, model=str(folder), **COLUMNS[column])
    training.dry_run(settings, TITLES, cache)


@pytest.mark.parametrize(("name", "column", "patch", "says"), [
    ("Gemma", "cut", ("_set_embeddings", plain_embeddings), "the original differ by .* set cut_vocabulary to False"),
    ("Gemma", "frozen, cut", ("_set_embeddings", plain_embeddings), "set frozen_layers to 0 and set tuned_layers to 0"),
    ("SmolLM3", "frozen", ("_take_layers", only_number_of_layers), "set frozen_layers to 0 and set tuned_layers to 0"),
])
def test_the_dry_run_sees_the_faults_of_before_and_names_what_works(tmp_path, monkeypatch, name, column, patch, says):
    folder = save(tmp_path / "model", name)
    with monkeypatch.context() as patched:
        patched.setattr(models_of_flowerlib, *patch)
        with pytest.raises(ValueError, match=says):
            dry_run(folder, column, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())  # nothing stays, nothing is remembered
    dry_run(folder, column, tmp_path / "cache")


def test_the_dry_run_is_paid_once_and_changes_no_number(tmp_path, monkeypatch):
    folder, ran, ways = save(tmp_path / "model", "Llama"), [], training._ways
    monkeypatch.setattr(training, "_ways", lambda *args: (ran.append(1), ways(*args))[1])
    settings, logs = replace(SETTINGS, model=str(folder), **COLUMNS["frozen, cut"]), []
    for n in range(3):
        if n == 2:
            monkeypatch.setattr(training, "dry_run", lambda *args: None)
        backbone = open_backbone(settings, TITLES, folder)
        logs.append(training.finetune(backbone, tables(), settings, tmp_path / str(n), tmp_path / "cache")[0])
    assert len(ran) == 1
    pd.testing.assert_frame_equal(logs[1], logs[0])
    pd.testing.assert_frame_equal(logs[2], logs[0])


def test_a_tokenizer_with_a_hole_in_its_numbers_is_right(tmp_path):
    folder = save(tmp_path / "model", "Llama")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<unused>"]
    hole = spec["model"]["vocab"].pop("<unused>")
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(hole) is None
    for column in COLUMNS:
        dry_run(folder, column, tmp_path / "cache")


@pytest.mark.parametrize("message", ["[enforce fail] DefaultCPUAllocator: can't allocate memory", "CUDA out of memory"])
def test_a_full_memory_is_no_fault_of_the_model(tmp_path, monkeypatch, message):
    folder = save(tmp_path / "model", "Llama")
    full = torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    def ways(*args):
        raise full

    monkeypatch.setattr(training, "_ways", ways)
    with pytest.raises(RuntimeError, match="memory") as raised:
        dry_run(folder, "whole", tmp_path / "cache")
    assert raised.value is full


def test_a_full_disk_is_no_fault_of_the_model(tmp_path, monkeypatch):
    folder, usage = save(tmp_path / "model", "Llama"), training.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="MB free: make room"):
        dry_run(folder, "whole", tmp_path / "cache")
