"""The real SmolLM2-135M-Instruct: our reading of its GGUF file against transformers' own."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from memzoo.models.checkpoints.fetch import MEMBER, cache_folder
from memzoo.models.checkpoints.folder import export_llama_folder, load_model, read_model_config
from memzoo.models.checkpoints.tokenizers import tokenizer_from_gguf
from memzoo.models.hf import MemoryForCausalLM
from memzoo.train.data.texts import load_text

FILE = cache_folder() / Path(MEMBER).name
pytestmark = [
    pytest.mark.checkpoint,
    pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is absent; `make checkpoint` brings it"),
]
TEXTS = [
    "The capital of France is",
    "Wörter, ça va?  漢字 😀\n\n\tindented  text   with blanks ",
    "<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n",
    "don't stop; they'll say \"it's\" -- isn't it?",
]
DIGITS = ["a  12 b   3.14", "in 1851 and   1999", "x = 10 ** 2  # 100", "  7", "No. 5,000.50 (3%)"]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return tokenizer_from_gguf(FILE)


@pytest.fixture(scope="module")
def model() -> MemoryForCausalLM:
    config = read_model_config(FILE)
    assert (config.depth, config.d_model, config.vocab_size, config.tie_embeddings) == (30, 576, 49152, True)
    wrapped = MemoryForCausalLM.from_model(load_model(FILE), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    assert wrapped.model.num_parameters() == 134_515_008
    return wrapped.eval()


@pytest.fixture(scope="module")
def peer() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent,
        gguf_file=FILE.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()


@pytest.fixture(scope="module")
def ids(tokenizer) -> torch.Tensor:
    """(1, 400), from the middle of Moby-Dick."""
    return torch.tensor([tokenizer(load_text("moby_dick")[0].text[300_000:304_000]).input_ids[:400]])


@torch.no_grad()
def test_logits(model, peer, ids):
    ours, theirs = model(ids).logits, peer(ids).logits
    assert (ours - theirs).abs().max() <= 1e-3
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert same >= 0.999


def test_weights_are_those_of_transformers_to_the_bit(model, peer, tmp_path):
    export_llama_folder(model.model, tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = peer.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_greedy_tokens(model, peer, ids):
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    prompt = ids[:, :24]
    mask = torch.ones_like(prompt)
    ours = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(ours, peer.generate(prompt, attention_mask=mask, **options))


def test_unequal_left_padded_prompts(model, tokenizer):
    tokenizer.padding_side = "left"
    texts = [TEXTS[0], "Call me"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)
    for row, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert torch.equal(together[row, -8:], alone[0, -8:])
    assert tokenizer.decode(together[0, -8:]).startswith(" Paris.")


def test_tokenizer_equals_that_of_transformers(tokenizer):
    peer = transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    book = load_text("moby_dick")[0].text[50_000:80_000]
    letters = "".join(letter for letter in book if not letter.isdigit())
    for text in (*TEXTS, letters):
        assert tokenizer(text).input_ids == peer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "Hi"}]
    for add_prompt in (False, True):
        ours, theirs = (
            one.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_prompt)
            for one in (tokenizer, peer)
        )
        assert ours == theirs
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(tokenizer, name) == getattr(peer, name)

    # a GGUF file does not hold the rule that the model was trained with: one digit at a time, blanks apart
    peer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in (*TEXTS, *DIGITS, book):
        assert tokenizer(text).input_ids == peer(text).input_ids
    blanks = tokenizer.convert_tokens_to_ids("\u0120\u0120")
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "12"]
    assert tokenizer("a  12").input_ids[1:] == [blanks, *digits]
