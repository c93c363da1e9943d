"""The language model cut to size and split, and the catalogue in its tokens."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
    PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM,
)

from flowerlib import data, model
from flowerlib.lab import store, training
from flowerlib.train import TrainSettings

from tiny_world import TITLES, finished_training, tiny_world

TEXTS = ["Toy Story", "Amélie", "日本の夏", "🎬 Heat", "Good, Bad and Ugly", "\n"]


@pytest.fixture
def bpe():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [*TEXTS * 3, "story stories storm toying heated heating goods badly uglier", "other words entirely"] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unused>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def llama(vocab_size, n_layers=4):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=n_layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=1, pad_token_id=1,
    )).eval()


# cut and split


@torch.no_grad()
def test_cut_vocabulary_keeps_every_text_and_its_logits(bpe):
    lm = llama(len(bpe))
    before = {text: bpe.encode(text) for text in TEXTS}
    logits = {text: lm(torch.tensor([ids])).logits[0] for text, ids in before.items()}
    cut = model.cut_vocabulary(lm, bpe, TEXTS)
    assert len(cut) < len(bpe) and lm.config.vocab_size == len(cut)
    old = bpe.convert_tokens_to_ids(cut.convert_ids_to_tokens(list(range(len(cut)))))
    for text, ids in before.items():
        new = cut.encode(text)
        assert [old[i] for i in new] == ids and cut.decode(new) == text
        torch.testing.assert_close(lm(torch.tensor([new])).logits[0], logits[text][:, old])
    assert cut.decode(cut.encode("Züge nobody saw")) == "Züge nobody saw"
    assert lm.config.eos_token_id == cut.eos_token_id


@torch.no_grad()
def test_trunk_and_upper_layers_make_the_whole_model():
    lm, ids = llama(50), torch.randint(0, 50, (2, 7))
    trunk, upper = model.split_layers(lm, 3)
    hidden = trunk(input_ids=ids).last_hidden_state
    torch.testing.assert_close(upper(inputs_embeds=hidden).logits, lm(ids).logits)
    upper.get_decoder().layers[0].mlp.up_proj.weight.add_(1)
    torch.testing.assert_close(upper(inputs_embeds=hidden).logits, lm(ids).logits)


@torch.no_grad()
def test_keep_layers_keeps_both_ends():
    lm = llama(50)
    first, last = lm.model.layers[0], lm.model.layers[3]
    model.keep_layers(lm, 1, 1)
    assert list(lm.model.layers) == [first, last] and lm.config.num_hidden_layers == 2
    ids = torch.randint(0, 50, (1, 6))
    out = lm(ids[:, :5], use_cache=True)
    step = lm(ids[:, 5:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(step[:, -1], lm(ids).logits[:, -1])
    with pytest.raises(ValueError, match="the model has 2 layers"):
        model.keep_layers(lm, 2, 1)


def test_tiny_model_is_the_same_for_a_seed():
    a, b, c = (model.tiny_model(TEXTS, seed)[0] for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_a_model_of_another_build_is_refused_in_one_sentence():
    from transformers import GPT2Config, GPT2LMHeadModel

    lm = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    for cut in (lambda: model.keep_layers(lm, 1, 1), lambda: model.split_layers(lm, 1)):
        with pytest.raises(ValueError, match="set frozen_layers and tuned_layers to 0"):
            cut()


# the catalogue


@pytest.mark.parametrize("form", ["sequence", "target"])
def test_title_and_terminator_are_encoded_once(form):
    _, catalogue = tiny_world(form)
    assert catalogue.leaf_titles == list(dict.fromkeys(TITLES))
    start = len(catalogue.header)
    assert catalogue.context([0])[start : start + len(catalogue.sequences[0]) - 1] == catalogue.sequences[0][:-1]
    assert {sequence[-1] for sequence in catalogue.sequences} == {catalogue.terminator}


@pytest.mark.parametrize("form", ["sequence", "target"])
def test_a_prompt_reads_as_its_texts_say(form):
    header, separator, footer = model.prompt_texts("movie", form)
    _, tokenizer = model.tiny_model([*TITLES, header, separator, footer], seed=0)
    catalogue = model.Catalogue.build(tokenizer, TITLES, "movie", form)
    expected = f"{header}Heat{separator}Toy Story{separator}{footer}"
    assert tokenizer.decode(catalogue.context([3, 0])) == expected
    assert catalogue.context([]) == [*catalogue.header, *catalogue.footer]
    assert catalogue.eos == (tokenizer.eos_token_id if form == "target" else None)
    assert (catalogue.separator == [catalogue.terminator]) == (form == "sequence")


def test_unknown_rows_are_refused():
    with pytest.raises(ValueError, match="rows is 'row': choose sequence or target"):
        model.prompt_texts("movie", "row")


@pytest.mark.parametrize("title", ["", "two\nlines"])
def test_a_title_that_is_empty_or_holds_a_newline_is_named(title):
    _, tokenizer = model.tiny_model(["a", "two lines"], seed=0)
    with pytest.raises(ValueError, match="item 1 has the title"):
        model.Catalogue.build(tokenizer, ["a", title], "movie")


@pytest.mark.parametrize("form", ["sequence", "target"])
def test_a_tokenizer_without_a_newline_of_its_own_ends_titles_by_its_end_of_text(bpe, form):
    bpe.backend_tokenizer.normalizer = normalizers.Replace("\n", "  ")
    catalogue = model.Catalogue.build(bpe, ["Heat", "Heat Ugly"], "movie", form)
    assert catalogue.terminator == bpe.eos_token_id and catalogue.eos is None
    assert [bpe.decode(sequence[:-1]) for sequence in catalogue.sequences] == ["Heat", "Heat Ugly"]
    assert (catalogue.separator == [bpe.eos_token_id]) == (form == "sequence")  # as in training's rows of titles
    with pytest.raises(ValueError, match="item 0 has the title 'He<eos>at'"):
        model.Catalogue.build(bpe, ["He<eos>at"], "movie", form)
    bpe.eos_token = None
    with pytest.raises(ValueError, match="no token for the newline nor for the end of a text: take another model"):
        model.Catalogue.build(bpe, ["Heat"], "movie", form)


@torch.no_grad()
def test_what_scales_embeddings_goes_on_scaling_them(bpe, tmp_path):
    """Gemma multiplies what it looks up; cut, or split from the output embeddings, it still does."""
    torch.manual_seed(0)
    lm = GemmaForCausalLM(GemmaConfig(
        vocab_size=len(bpe), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=1, pad_token_id=1, bos_token_id=1,
    )).eval()
    lm.save_pretrained(tmp_path)
    bpe.save_pretrained(tmp_path)
    for cut in (False, True):
        used = TrainSettings(frozen_layers=2, tuned_layers=1, cut_vocabulary=cut)
        opened, tokenizer, catalogue = model.open_backbone(used, TEXTS[:5], path=tmp_path)
        old = bpe.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        row = catalogue.context([1]) + catalogue.sequences[0]
        expected = lm(torch.tensor([[old[i] for i in row]])).logits[..., old]
        torch.testing.assert_close(opened(torch.tensor([row])).logits, expected)
        assert not opened.config.tie_word_embeddings


def test_a_bias_of_the_output_is_cut_with_it():
    lm = llama(50)
    lm.lm_head = torch.nn.Linear(32, 50)
    ids = torch.tensor([3, 1, 40])
    expected = lm(ids[None]).logits[..., ids]
    model._set_embeddings(lm, ids)
    torch.testing.assert_close(lm(torch.arange(3)[None]).logits, expected)


def test_lists_with_an_entry_a_layer_are_cut_with_the_layers():
    torch.manual_seed(0)
    lm = SmolLM3ForCausalLM(SmolLM3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, no_rope_layers=[1, 0, 1, 0], pad_token_id=1, bos_token_id=1, eos_token_id=[1, 2, 3, 4],
    ))
    model.keep_layers(lm, 1, 2)
    assert lm.config.no_rope_layers == [1, 1, 0] and len(lm.config.layer_types) == 3
    assert lm.config.eos_token_id == [1, 2, 3, 4]


def test_the_shortest_of_context_and_windows_is_what_a_model_reads():
    assert model.context_limit(llama(50)) == 2048
    for window, expected in ((16, 16), (None, 2048), (4096, 2048)):
        config = MistralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=window, max_position_embeddings=2048,
        )
        assert model.context_limit(MistralForCausalLM(config)) == expected


def lower_casing():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "\n": 1, "heat": 2, "fargo": 3}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")


def test_titles_that_a_tokenizer_cannot_tell_apart_are_both_named():
    """Else they would be leaves 0, 0, 1 in the tree and 0, 1, 2 by title, and Fargo would get HEAT's preference."""
    with pytest.raises(ValueError, match="reads item 1, 'HEAT', and 'Heat' as the same tokens: give both one title"):
        model.Catalogue.build(lower_casing(), ["Heat", "HEAT", "Fargo"], "movie")
    with pytest.raises(ValueError, match="reads item 3, 'FARGO', and 'Fargo'"):
        model.Catalogue.build(lower_casing(), ["Heat", "Heat", "Fargo", "FARGO"], "movie")
    catalogue = model.Catalogue.build(lower_casing(), ["HEAT", "Fargo", "HEAT"], "movie")
    assert catalogue.trie.item_leaf.tolist() == [0, 1, 0]


few_words = st.lists(st.sampled_from("a A b é".split()), min_size=1, max_size=3).map(" ".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(few_words, min_size=1, max_size=12))
def test_leaf_ids_are_those_of_the_titles(titles):
    """One definition: data.item_leaves, whatever stands in the tree above and below the titles."""
    _, tokenizer = model.tiny_model([*titles, *model.prompt_texts("movie", "sequence")], seed=0)
    catalogue = model.Catalogue.build(tokenizer, titles, "movie")
    leaves = data.item_leaves(titles)
    np.testing.assert_array_equal(catalogue.trie.item_leaf, leaves)
    assert [catalogue.leaf_titles[leaf] for leaf in leaves] == titles
    assert len(catalogue.leaf_titles) == len(catalogue.trie.leaves)


# opened


TINY = TrainSettings(model="tiny", frozen_layers=1, tuned_layers=1, seed=5)


def test_open_backbone_gives_model_tokenizer_and_catalogue_of_one_vocabulary():
    lm, tokenizer, catalogue = model.open_backbone(TINY, TITLES)
    assert not lm.training and lm.dtype == torch.float32
    assert lm.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(catalogue.sequences[0]) == "Toy Story\n"
    again = model.open_backbone(TINY, TITLES).model.state_dict()
    assert all(torch.equal(x, again[name]) for name, x in lm.state_dict().items())


def test_a_prompt_of_ones_own_replaces_header_and_footer():
    lm, tokenizer, catalogue = model.open_backbone(TINY, TITLES, prompt="Name a movie:\n")
    assert tokenizer.decode(catalogue.context([])) == "Name a movie:\n"
    assert catalogue.footer == [] and catalogue.eos is None
    np.testing.assert_array_equal(catalogue.trie.item_leaf, data.item_leaves(TITLES))
    assert lm.config.vocab_size == len(tokenizer)


def test_what_a_tokenizer_puts_around_a_text_stays_out_of_a_prompt(tmp_path, bpe):
    llama(len(bpe)).save_pretrained(tmp_path)
    bpe.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", bpe.eos_token_id)])
    bpe.save_pretrained(tmp_path)
    for cut in (False, True):
        own = TrainSettings(frozen_layers=0, tuned_layers=0, cut_vocabulary=cut)
        _, tokenizer, catalogue = model.open_backbone(own, TEXTS[:5], path=tmp_path, prompt="Toy Story\n")
        assert tokenizer.decode(catalogue.context([])) == "Toy Story\n"


def test_open_backbone_cuts_layers_and_vocabulary_of_a_folder(tmp_path, bpe):
    lm = llama(len(bpe))
    lm.save_pretrained(tmp_path)
    bpe.save_pretrained(tmp_path)
    used = TrainSettings(model="elsewhere", frozen_layers=1, tuned_layers=2)
    cut, tokenizer, catalogue = model.open_backbone(used, TEXTS[:5], path=tmp_path)
    assert cut.config.num_hidden_layers == 3 and cut.config.vocab_size == len(tokenizer) < len(bpe)
    assert tokenizer.pad_token_id is not None
    assert not cut.config.tie_word_embeddings  # what is frozen stays out of what is trained
    assert cut.get_input_embeddings().weight is not cut.get_output_embeddings().weight
    whole = model.open_backbone(
        TrainSettings(frozen_layers=0, tuned_layers=0, cut_vocabulary=False), TEXTS[:5], path=str(tmp_path)
    )
    assert whole.model.config.num_hidden_layers == 4 and len(whole.tokenizer) == len(bpe)
    for name, x in lm.state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], x)


def test_base_digest_names_weights_by_content_and_ids_by_themselves(tmp_path):
    assert training.base_digest("tiny") == "tiny" and training.base_digest("Org/Model-1B") == "Org/Model-1B"
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(b"other" if folder == "c" else b"weights")
    (tmp_path / "b" / "README.md").write_text("no weights in here")
    names = [training.base_digest(str(tmp_path / folder)) for folder in "abc"]
    assert names[0] == names[1] != names[2]


# trained


@torch.no_grad()
@pytest.mark.parametrize("rows", ["sequence", "target"])
def test_load_trained_opens_what_was_saved(tmp_path, rows):
    lm = finished_training(tmp_path / "flower" / "Flower-1", rows=rows)
    store.write_json(tmp_path / "flower" / "settings.json", {"settings": {}, "made": "Flower-1"})
    used = TrainSettings(model="tiny", frozen_layers=0, tuned_layers=0, rows=rows)
    expected = model.open_backbone(used, TITLES).catalogue
    for folder in (tmp_path / "flower" / "Flower-1", tmp_path / "flower", str(tmp_path / "flower")):
        loaded, tokenizer, catalogue = model.load_trained(folder)
        for name in ("titles", "sequences", "header", "separator", "footer", "eos"):
            assert getattr(catalogue, name) == getattr(expected, name)
        ids = torch.tensor([catalogue.context([3, 0])]).to(loaded.device)
        torch.testing.assert_close(loaded(ids).logits.cpu(), lm(ids.cpu()).logits)
        assert not loaded.training and loaded.dtype == torch.float32
    assert model.load_trained(tmp_path / "flower")[0] is loaded  # in memory: read once


def test_a_training_that_was_made_again_is_read_again(tmp_path):
    finished_training(tmp_path)
    first = model.load_trained(tmp_path)[0]
    finished_training(tmp_path, TITLES[:4])
    made = tmp_path / "made.json"
    stamp = made.stat().st_mtime_ns + 10**9
    os.utime(made, ns=(stamp, stamp))
    second, _, catalogue = model.load_trained(tmp_path)
    assert second is not first and len(catalogue.titles) == 4


def test_trained_folder_follows_a_steps_settings_and_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "ROOT", tmp_path)
    step = tmp_path / "runs" / "smoke" / "flower"
    with pytest.raises(FileNotFoundError, match="flower holds no finished training: run notebook 02 or 03 first"):
        model.trained_folder("runs/smoke/flower")
    step.mkdir(parents=True)
    store.write_json(step / "settings.json", {"settings": {}, "made": "Flower-1"})
    with pytest.raises(FileNotFoundError, match="Flower-1 holds no finished training"):
        model.trained_folder("runs/smoke/flower")
    store.write_json(step / "Flower-1" / "made.json", {})
    store.write_json(step / "Flower-2" / "made.json", {})
    assert model.trained_folder("runs/smoke/flower") == model.trained_folder(step) == step / "Flower-1"
    assert model.trained_folder(step / "Flower-2") == step / "Flower-2"
    store.write_json(step / "settings.json", {"settings": {}, "made": None})  # no training
    with pytest.raises(FileNotFoundError, match="no finished training"):
        model.trained_folder(step)


def test_frozen_layers_leave_one_to_tune():
    lm, _ = model.tiny_model(["Heat"], 0)
    for n_frozen in (2, 3):
        with pytest.raises(ValueError, match=f"the model has 2 layers: frozen_layers = {n_frozen} leaves none to tune"):
            model.split_layers(lm, n_frozen)
