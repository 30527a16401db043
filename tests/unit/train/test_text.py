"""Text windows, document borders, files and tokenizers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model
from memzoo.train.data.batches import ResumableLoader
from memzoo.train.data.documents import read_documents
from memzoo.train.data.text import TextDataModule
from memzoo.train.data.tokenizers import byte_tokenizer, load_tokenizer
from memzoo.train.data.windows import TokenStream, WindowBatches, held_out_start


def stream_of(*lengths: int) -> TokenStream:
    """Documents of these lengths whose tokens count up from 0 through all of them."""
    ends = np.cumsum(lengths)
    return TokenStream.join([np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)])


def test_every_token_is_predicted_once_from_its_predecessor() -> None:
    batches = WindowBatches(stream_of(50), seq_len=7, batch_size=3)
    pairs = []
    for index in range(batches.num_batches):
        batch = batches.batch(0, index)
        pairs += list(zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True))
    assert pairs == [(token, token + 1) for token in range(49)]


def test_borders_of_documents_pack_the_batch() -> None:
    batches = WindowBatches(stream_of(5, 9, 20), seq_len=8, batch_size=2)
    batch = batches.batch(0, 0)
    assert batch.input_ids.tolist() == [list(range(16))]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 14, 16]
    expected = [token + 1 for token in range(16)]
    expected[4] = expected[13] = -100
    assert batch.labels.tolist() == [expected]
    later = batches.batch(0, 1)
    assert later.cu_seqlens is None, "no border inside: a plain batch"
    assert later.input_ids.shape == (2, 8)


def test_a_border_at_the_window_edge_only_masks_the_label() -> None:
    batch = WindowBatches(stream_of(8, 20), seq_len=8, batch_size=1).batch(0, 0)
    assert batch.cu_seqlens is None
    assert batch.labels[0].tolist() == [1, 2, 3, 4, 5, 6, 7, -100]


def test_documents_may_be_read_through() -> None:
    batches = WindowBatches(stream_of(5, 9, 20), seq_len=8, batch_size=2, reset_at_documents=False)
    batch = batches.batch(0, 0)
    assert batch.cu_seqlens is None
    assert (batch.labels == batch.input_ids + 1).all()


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = WindowBatches(stream_of(400), seq_len=4, batch_size=1, shuffle=True, seed=seed)
        return [int(batches.batch(epoch, index).input_ids[0, 0]) for index in range(batches.num_batches)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 3)) == list(range(0, 396, 4))


@pytest.mark.parametrize(
    "lengths, position", [((50, 30, 20), 80), ((100,), 95), ((10, 90), 95), ((30, 30, 40), 60)]
)
def test_whole_documents_are_held_out_where_possible(lengths: tuple[int, ...], position: int) -> None:
    stream = stream_of(*lengths)
    assert held_out_start(stream, 0.05) == position
    train, val = stream.cut(position)
    assert torch.equal(torch.cat([train.tokens, val.tokens]), stream.tokens)
    assert val.starts[0] == 0


def test_data_module_reads_files_and_splits_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Call me Ishmael. " * 40)
    lines = [json.dumps({"body": f"line {n}\u2028 and more"}, ensure_ascii=False) for n in range(20)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    module = TextDataModule(files=files, text_field="body", seq_len=32, batch_size=4, val_fraction=0.1)
    module.setup()
    batches = list(module.train_dataloader())
    assert module.vocab_size == 257
    assert all(batch.num_tokens % 32 == 0 for batch in batches)
    assert any(batch.cu_seqlens is not None for batch in batches)
    val = list(module.val_dataloader())
    assert val
    assert all(batch.labels.max() < 257 for batch in val)
    text = bytes(int(t) for batch in batches for t in batch.input_ids.flatten() if t < 256).decode(
        "utf-8", "ignore"
    )
    assert "Ishmael" in text


def test_an_end_of_text_token_closes_every_document(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ab" * 20}) for _ in range(10)))
    module = TextDataModule(files=str(path), seq_len=41, batch_size=1, shuffle=False, val_fraction=0.3)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch.input_ids[0, -1] == 256
    assert batch.input_ids[0, :2].tolist() == [97, 98]
    assert batch.labels[0, -1] == -100
    assert batch.labels[0, -2] == 256


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pdf", b"x", r"neither a \.txt nor a \.jsonl"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "no text in the field 'text'"),
        ("a.jsonl", b'["x"]', "no JSON object with fields, got list"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "ab\\ud800"}',
            r"line 2: character 2 of the text is \\ud800, half a",
        ),
        (
            "a.jsonl",
            b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
            "line 1 cannot be read: maximum recursion",
        ),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "line 1 cannot be read: Exceeds the limit"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(path))


@pytest.mark.parametrize("name, content", [("a.txt", b"one"), ("a.jsonl", b'{"text": "one"}')])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert read_documents(str(path)) == ["one"]


def test_the_cached_model_has_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("memzoo.models.checkpoints.fetch.fetch_smollm2", lambda: tmp_path)
    assert load_tokenizer("smollm2-135m").get_vocab() == byte_tokenizer().get_vocab()


def test_the_tokenizer_of_our_own_folders_loads_without_a_word(tmp_path: Path) -> None:
    model = MemoryLM(ModelConfig(vocab_size=257, d_model=8, layers=[{"type": "based", "num_heads": 1}]))
    save_model(model, tmp_path, byte_tokenizer())
    code = f"from memzoo.train.data.tokenizers import load_tokenizer; load_tokenizer({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "model of type" not in done.stderr


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(ValueError, match="no text to train on"):
        TextDataModule()
    with pytest.raises(ValueError, match="no file"):
        TextDataModule(files=["missing.txt"])
    with pytest.raises(ValueError, match="moby_dick"):
        TextDataModule(texts=["moby_dck"]).setup()
    with pytest.raises(ValueError, match="a window needs 513"):
        TextDataModule(files=[str(short)]).setup()
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        TextDataModule(files=[str(short)], seed=-1)
    with pytest.raises(ValueError, match="no tokenizer at"):
        TextDataModule(files=[str(short)], tokenizer="nowhere")
    with pytest.raises(ValueError, match="holds neither"):
        TextDataModule(files=[str(short)], tokenizer=str(tmp_path))


def test_byte_tokenizer_round_trips_any_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "Zoë  1 23\n\t\x00 ☃ 🙂 " + "".join(map(chr, range(1, 600)))
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token_id == 256


def test_bundled_texts_give_windows() -> None:
    module = TextDataModule(texts=["state_of_the_union_heldout"], seq_len=64, batch_size=2)
    module.setup()
    assert next(iter(module.train_dataloader())).num_tokens == 128


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_an_epoch_takes_nothing_from_the_global_generator(num_workers: int) -> None:
    loader = ResumableLoader(WindowBatches(stream_of(50), seq_len=7, batch_size=3), num_workers=num_workers)
    before = torch.random.get_rng_state()
    assert len(list(loader)) == len(list(loader)) == 3
    assert torch.equal(torch.random.get_rng_state(), before)
