"""Whole checkpoints: toy GGUF models and tokenizers, and damaged files of every kind of checkpoint."""

import dataclasses

import pytest
import torch
import transformers

from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.checkpoints.folder import load_model, read_model_config, read_token_ids, read_weights
from memzoo.models.checkpoints.tokenizers import tokenizer_from_gguf
from memzoo.models.decoder import MemoryLM

from .damage import damaged_copies
from .gguf_toys import toy_model, vocabulary, write_gguf


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
    ids=["llama", "llama tied, grouped", "llama biases", "qwen2", "qwen3"],
)
def test_gguf_models_compute_the_same_function(tmp_path, family, changes):
    source = toy_model(family, **changes)
    write_gguf(tmp_path / "m.gguf", source)
    model = load_model(tmp_path / "m.gguf")
    assert model.config.norm_eps == 1e-5
    assert model.config.tie_embeddings == source.config.tie_word_embeddings
    ids = torch.randint(source.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(ids).logits - source(ids).logits).abs().max() <= 1e-4
    assert read_token_ids(tmp_path / "m.gguf") == {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}


def test_gguf_windows_and_linear_scaling(tmp_path):
    source = toy_model()
    extra = {
        "llama__attention__sliding_window": 6,
        "llama__rope__scaling__type": "linear",
        "llama__rope__scaling__factor": 2.0,
    }
    write_gguf(tmp_path / "m.gguf", source, **extra)
    config = read_model_config(tmp_path / "m.gguf")
    assert {mixer.type for mixer in config.mixers} == {"sliding_window"}
    assert config.mixers[0].window_size == 6
    assert config.mixers[0].rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "RoPE scaling 'yarn'"),
        ({"llama__attention__value_length": 8}, "same size"),
        ({"llama__attention__key_length": 8}, "same size"),
    ],
)
def test_gguf_features_that_we_lack_are_named(tmp_path, extra, message):
    write_gguf(tmp_path / "m.gguf", toy_model(), **extra)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.gguf")


def test_gguf_of_another_architecture(tmp_path):
    model = toy_model()
    model.config.model_type = "gemma"
    write_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(CheckpointError, match="'gemma'; llama"):
        read_model_config(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_model_config(tmp_path / "none.gguf")


def test_tokenizer_from_gguf(tmp_path):
    write_gguf(tmp_path / "m.gguf", toy_model())
    tokenizer = tokenizer_from_gguf(tmp_path / "m.gguf")
    tokens, _ = vocabulary()
    expected = ["<|start|>", "abc", "\u0120ab", "\u0120\u0120", "1", "2", "<think>", "c"]
    ids = tokenizer("<|start|>abc ab  12<think>c").input_ids
    assert [tokens[index] for index in ids] == expected
    text = "Zwölf  12 3.5\n\t☃ <think> 7"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token == "<|end|>"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"gpt2", b"bert", "kind 'bert'"),
        (b"smollm", b"smolln", "rule 'smolln'"),
        (b"ab c", b"ab d", "merge 'ab d'"),
        (b"<|start|>", b"<|start||", None),
    ],
)
def test_tokenizers_that_we_cannot_build_are_named(tmp_path, old, new, message):
    path = tmp_path / "m.gguf"
    write_gguf(path, toy_model())
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    if message is None:
        assert tokenizer_from_gguf(path).bos_token == new.decode()
        return
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_gguf(path)


def specification(path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    weights = read_weights(path, read_model_config(path))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", ["gguf", "gguf header", "folder weights", "folder config"])
def test_500_damaged_checkpoints(tmp_path, kind):
    """Each is a CheckpointError, or a load with the right names, shapes and dtypes."""
    source = toy_model()
    if kind.startswith("gguf"):
        whole = path = tmp_path / "m.gguf"
        write_gguf(path, source)
    else:
        whole = tmp_path
        source.save_pretrained(tmp_path)
        path = tmp_path / ("config.json" if kind == "folder config" else "model.safetensors")
    content, expected = path.read_bytes(), specification(whole)
    header_bytes = None
    if kind == "gguf header":
        header_bytes = 4000
        assert header_bytes < content.index(b"blk.0") < len(content)
    if kind == "folder weights":
        header_bytes = 8 + int.from_bytes(content[:8], "little")
    outcomes = {"refused": 0, "loaded": 0}
    for index, broken in enumerate(damaged_copies(content, 500, seed=11, header_bytes=header_bytes)):
        path.unlink()
        path.write_bytes(broken)
        try:
            found = specification(whole)
        except CheckpointError as error:
            outcomes["refused"] += 1
            described = str(error)
            if str(tmp_path) not in described:
                pytest.fail(f"copy {index}: the error does not name the file: {described}")
        else:
            assert found == expected, f"copy {index}"
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 150
    assert outcomes["loaded"] > 20


def test_500_damaged_tokenizers(tmp_path):
    """Each is a CheckpointError or a tokenizer of the right size."""
    path = tmp_path / "m.gguf"
    write_gguf(path, toy_model())
    content = path.read_bytes()
    size, outcomes = len(vocabulary()[0]), {"refused": 0, "loaded": 0}
    for broken in damaged_copies(content[:6000], 500, seed=12, header_bytes=6000):
        path.write_bytes(broken + content[6000:] if len(broken) == 6000 else broken)
        try:
            tokenizer = tokenizer_from_gguf(path)
            tokenizer("ab  12 <|start|> c")
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            assert len(tokenizer) == size
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 150
    assert outcomes["loaded"] > 20


def test_a_loaded_model_has_every_weight_and_its_tags(tmp_path):
    toy_model().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    twin = MemoryLM(dataclasses.replace(model.config))
    assert {name: vars(value) for name, value in model.named_parameters()} == {
        name: vars(value) for name, value in twin.named_parameters()
    }
    model.embed_tokens.weight.data.zero_()  # mapped from the file, yet private to this process
    assert load_model(tmp_path).embed_tokens.weight.abs().sum() > 0
