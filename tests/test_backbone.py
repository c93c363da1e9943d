import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flowerlib import backbone

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


@torch.no_grad()
def test_cut_vocabulary_keeps_every_text_and_its_logits(bpe):
    model = llama(len(bpe))
    before = {text: bpe.encode(text) for text in TEXTS}
    logits = {text: model(torch.tensor([ids])).logits[0] for text, ids in before.items()}
    cut = backbone.cut_vocabulary(model, bpe, TEXTS)
    assert len(cut) < len(bpe) and model.config.vocab_size == len(cut)
    old = bpe.convert_tokens_to_ids(cut.convert_ids_to_tokens(list(range(len(cut)))))
    for text, ids in before.items():
        new = cut.encode(text)
        assert [old[i] for i in new] == ids and cut.decode(new) == text
        torch.testing.assert_close(model(torch.tensor([new])).logits[0], logits[text][:, old])
    assert cut.decode(cut.encode("Züge nobody saw")) == "Züge nobody saw"
    assert model.config.eos_token_id == cut.eos_token_id


@torch.no_grad()
def test_trunk_and_upper_layers_make_the_whole_model():
    model, ids = llama(50), torch.randint(0, 50, (2, 7))
    trunk, upper = backbone.split_layers(model, 3)
    hidden = trunk(input_ids=ids).last_hidden_state
    torch.testing.assert_close(upper(inputs_embeds=hidden).logits, model(ids).logits)
    upper.get_decoder().layers[0].mlp.up_proj.weight.add_(1)
    torch.testing.assert_close(upper(inputs_embeds=hidden).logits, model(ids).logits)


@torch.no_grad()
def test_keep_layers_keeps_both_ends():
    model = llama(50)
    first, last = model.model.layers[0], model.model.layers[3]
    backbone.keep_layers(model, 1, 1)
    assert list(model.model.layers) == [first, last] and model.config.num_hidden_layers == 2
    ids = torch.randint(0, 50, (1, 6))
    out = model(ids[:, :5], use_cache=True)
    step = model(ids[:, 5:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(step[:, -1], model(ids).logits[:, -1])
    with pytest.raises(ValueError, match="the model has 2 layers"):
        backbone.keep_layers(model, 2, 1)


def test_tiny_model_is_the_same_for_a_seed():
    a, b = (backbone.tiny_model(TEXTS, seed=3)[0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_a_model_of_another_build_is_refused_in_one_sentence():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match="set frozen_layers and tuned_layers to 0"):
        backbone.keep_layers(model, 1, 1)
