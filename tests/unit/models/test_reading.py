"""Reading in pieces, and readings on disk."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memzoo.layers import State
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import MemoryCache, MemoryForCausalLM
from memzoo.models.reading import (
    Reading,
    check_reading,
    config_fingerprint,
    load_reading,
    model_fingerprint,
    read_tokens,
    save_reading,
)

VOCAB = 41


def small_model(seed: int = 0, **changes: object) -> MemoryLM:
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "layers": [{"type": "attention"}, {"type": "based", "feature_dim": 4}],
        "mixer_defaults": {"num_heads": 2},
        "initializer_range": 0.5,
    }
    return MemoryLM(ModelConfig(**{**values, **changes})).eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: State, expected: State, tolerance: float = 0.0) -> None:
    for (name, one), (_, other) in zip(actual.named_tensors(), expected.named_tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_pieces_change_no_number(chunk_size: int) -> None:
    model, ids, seen = small_model(), tokens(2, 12), []
    reading = read_tokens(model, ids, chunk_size=chunk_size, on_chunk=lambda *done: seen.append(done))
    assert seen[-1] == (11, 11)
    assert len(seen) == -(-11 // chunk_size)
    with torch.no_grad():
        expected = model(ids[:, :11], return_state=True).state
    assert_same(reading, Reading.of(expected, ids[:, 11]), 1e-5)


def test_reading_goes_on_where_it_stopped() -> None:
    model, ids = small_model(), tokens(20)
    first = read_tokens(model, ids[:1])
    assert first.num_tokens.tolist() == [0]
    whole = read_tokens(model, ids)
    for cut in (1, 7, 19):
        part = read_tokens(model, ids[:cut])
        kept = part.clone()
        assert_same(read_tokens(model, ids[cut:], part), whole, 1e-5)
        assert_same(part, kept)
    assert_same(read_tokens(model, ids[:0], whole), whole)


def test_a_reading_generates_what_an_uninterrupted_call_does() -> None:
    model, ids = small_model(), tokens(1, 9)
    wrapped = MemoryForCausalLM.from_model(model)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        whole = wrapped.generate(ids, max_new_tokens=8, pad_token_id=0, **options)
        reading = read_tokens(model, ids, chunk_size=4)
        kept = reading.clone()
        mask = torch.ones(1, ids.shape[1], dtype=torch.int64)
        cache = MemoryCache(reading.state)
        settings = {"max_new_tokens": 8, "pad_token_id": 0, **options}
        made = wrapped.generate(reading.last, attention_mask=mask, past_key_values=cache, **settings)
        assert torch.equal(made[:, 1:], whole[:, ids.shape[1] :])
        assert_same(reading, kept)


def test_misuse_is_named() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="no token to read"):
        read_tokens(model, tokens(0))
    with pytest.raises(ValueError, match="chunk_size >= 1"):
        read_tokens(model, tokens(3), chunk_size=0)
    with pytest.raises(ValueError, match="has 1 sequences, the tokens have 2"):
        read_tokens(model, tokens(2, 3), read_tokens(model, tokens(3)))


def test_a_reading_on_disk_is_the_same(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "book.state"
    reading = read_tokens(model, tokens(9))
    save_reading(reading, path, model, notes={"book": "first"})
    assert_same(load_reading(path, model), reading)
    assert State.read_notes(path)["book"] == "first"
    assert check_reading(path, config_fingerprint(model.config))["book"] == "first"
    assert [item.name for item in tmp_path.iterdir()] == ["book.state"]


def test_copies_of_a_model_have_one_fingerprint_and_others_have_not() -> None:
    model = small_model()
    copy = small_model(seed=1)
    assert model_fingerprint(copy) != model_fingerprint(model)
    copy.load_state_dict(model.state_dict())
    assert model_fingerprint(copy) == model_fingerprint(model)
    low = small_model().to(torch.bfloat16)
    assert model_fingerprint(low)["dtype"] == "bfloat16"
    for name, weight in copy.named_parameters():
        with torch.no_grad():
            weight.mul_(1 + 2e-6)
        assert model_fingerprint(copy)["weights"] != model_fingerprint(model)["weights"], name
        copy.load_state_dict(model.state_dict())


def test_what_another_model_read_is_refused(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "book.state"
    save_reading(read_tokens(model, tokens(9)), path, model)
    with pytest.raises(ValueError, match="another model: its weights are not those here"):
        load_reading(path, small_model(seed=1))
    with pytest.raises(ValueError, match="another model: its config is not the one here"):
        load_reading(path, small_model(d_model=32))
    low = {"dtype": model_fingerprint(small_model().to(torch.bfloat16))["dtype"]}
    with pytest.raises(ValueError, match=r"its dtype \(float32, here bfloat16\)"):
        check_reading(path, low)


def test_other_files_are_refused(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "book.state"
    with pytest.raises(ValueError, match="not a readable state file"):
        load_reading(path, model)
    read_tokens(model, tokens(9)).save(path)
    with pytest.raises(ValueError, match="a state that names no model"):
        load_reading(path, model)
    read_tokens(model, tokens(9)).state.save(path, model_fingerprint(model))
    with pytest.raises(ValueError, match="holds a ModelState, expected a file written by"):
        load_reading(path, model)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="state format None"):
        load_reading(path, model)


def test_damage_is_found(tmp_path: Path) -> None:
    """A cut anywhere, and a flipped bit anywhere in the tensors, the types or the notes."""
    model, path = small_model(), tmp_path / "book.state"
    reading = read_tokens(model, tokens(9))
    save_reading(reading, path, model)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    dice = random.Random(0)
    for index in range(120):
        damaged = bytearray(whole)
        if index % 3 == 0:
            del damaged[dice.randrange(len(damaged)) :]
        else:
            damaged[dice.randrange(8 if index % 3 == 1 else header, len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        if index % 3 == 1:  # in the header a bit may meet a blank, or the name of the digest itself
            with contextlib.suppress(ValueError):
                assert_same(load_reading(path, model), reading)
        else:
            with pytest.raises(ValueError, match=r"damaged|not a readable state file"):
                load_reading(path, model)
