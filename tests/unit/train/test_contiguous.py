"""Contiguous batches: rows read whole documents through, in successive batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.data.batches import TokenBatch
from memzoo.train.data.contiguous import ContiguousBatches
from memzoo.train.data.text import TextDataModule
from memzoo.train.data.windows import TokenStream

LENGTHS = (20, 3, 17, 1, 8, 9, 33, 2, 12)


def documents() -> list[np.ndarray]:
    """Documents whose tokens count up, each from a thousand of its own."""
    return [1000 * number + np.arange(length) for number, length in enumerate(LENGTHS)]


def batches(**settings) -> ContiguousBatches:
    return ContiguousBatches(TokenStream.join(documents()), **{"seq_len": 8, "num_rows": 3, **settings})


def epoch(source: ContiguousBatches, number: int = 0) -> list[TokenBatch]:
    return [source.batch(number, index) for index in range(source.num_batches)]


def read_documents(read: list[TokenBatch]) -> list[list[list[int]]]:
    """The documents that each row reads, put together from its windows with the help of `resets`."""
    rows: list[list[list[int]]] = [[] for _ in range(len(read[0].input_ids))]
    for batch in read:
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
        for row, documents in enumerate(rows):
            kept = mask[row]
            inputs, labels = batch.input_ids[row, kept].tolist(), batch.labels[row, kept].tolist()
            assert (batch.labels[row, ~kept] == -100).all()
            if not inputs:
                continue
            if batch.resets[row]:
                documents.append(inputs[:1])
            assert inputs[0] == documents[-1][-1], "the window begins where the last one ended"
            assert inputs[1:] == labels[:-1]
            documents[-1] += labels
    return rows


@pytest.mark.parametrize("seq_len", [1, 7, 8, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_windows_of_a_document_give_the_document(seq_len: int, shuffle: bool) -> None:
    rows = read_documents(epoch(batches(seq_len=seq_len, shuffle=shuffle), 3))
    found = sorted(document for row in rows for document in row)
    assert found == [list(document) for document in documents() if len(document) > 1]


def test_rows_are_balanced_and_keep_their_documents() -> None:
    source = batches(shuffle=True)
    lengths = [sum(-(-(len(document) - 1) // 8) for document in row) for row in read_documents(epoch(source))]
    assert sum(lengths) == 3 + 1 + 2 + 1 + 1 + 4 + 1 + 2
    assert max(lengths) == source.num_batches == 5
    first, second = read_documents(epoch(source, 0)), read_documents(epoch(source, 1))
    assert first != second
    assert [sorted(row) for row in first] == [sorted(row) for row in second]
    assert read_documents(epoch(batches(shuffle=True, seed=1), 0)) != first
    assert read_documents(epoch(batches(shuffle=True), 1)) == second


def test_the_first_batch_resets_and_ended_rows_are_padding() -> None:
    read = epoch(batches(num_rows=8))
    assert read[0].resets.all()
    assert read[0].mask is not None
    assert len(read) == 4, "the longest document has a row of its own"
    last = read[-1]
    assert last.mask.sum() == 8
    assert last.mask.any(1).sum() == 1
    assert not last.resets.any()
    assert not last.input_ids[~last.mask].any()


def test_full_windows_have_no_mask() -> None:
    stream = TokenStream.join([np.arange(17), np.arange(17)])
    read = epoch(ContiguousBatches(stream, seq_len=8, num_rows=2))
    assert [batch.mask for batch in read] == [None, None]
    assert [batch.resets.tolist() for batch in read] == [[True, True], [False, False]]


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 documents do not fill 9 rows.*at most 8"):
        batches(num_rows=9)


def test_a_model_carries_its_memory_through_the_batches() -> None:
    """Rows that have ended, and documents of unequal length, do no harm to the others."""
    torch.manual_seed(0)
    layers = [
        {"type": "based", "num_heads": 2, "feature_dim": 4},
        {"type": "sliding_window", "num_heads": 2, "window_size": 5},
        {"type": "base_conv"},
    ]
    config = ModelConfig(vocab_size=40, d_model=16, layers=layers)
    model = MemoryLM(config, dtype=torch.float64).eval()
    stream = TokenStream.join([np.random.default_rng(n).integers(0, 40, n) for n in (30, 9, 14)])
    source = ContiguousBatches(stream, seq_len=8, num_rows=3)
    state, logits = None, []
    for batch in epoch(source):
        out = model(batch.input_ids, state, mask=batch.mask, return_state=True)
        state = out.state
        logits.append(out.logits)
    assert not batch.mask[1:].any(), "only the first document reaches the last batch"
    carried = torch.cat(logits, dim=1)
    for row, (start, length) in enumerate(zip(stream.starts.tolist(), stream.lengths.tolist(), strict=True)):
        (row,) = [r for r, order in enumerate(source._epoch_order(0)) if order.documents[0] == row]
        whole = model(stream.tokens[None, start : start + length - 1]).logits
        torch.testing.assert_close(carried[row, : length - 1], whole[0], atol=1e-10, rtol=0)
        assert not carried[row, length - 1 :].any()


def test_the_data_module_reads_contiguous_batches(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} " + "ab " * (10 + 3 * n)}) for n in range(12)))
    settings = {"seq_len": 16, "batch_size": 4, "val_fraction": 0.2, "contiguous": True}
    module = TextDataModule(files=str(path), **settings)
    module.setup()
    read = list(module.train_dataloader())
    texts = [bytes(document[:-1]).decode() for row in read_documents(read) for document in row]
    assert all(document[-1] == 256 for row in read_documents(read) for document in row)
    assert sorted(int(text.split()[0]) for text in texts) == list(range(10))
    val = list(module.val_dataloader())
    assert val[0].input_ids.shape == (2, 16), "as many rows as held-out documents"
    assert val[0].resets.all()
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 20)
    held_out = TextDataModule(files=str(path), val_files=str(tmp_path / "empty.jsonl"), **settings)
    held_out.setup()
    with pytest.raises(ValueError, match="no document of two tokens or more"):
        held_out.val_dataloader()
    with pytest.raises(ValueError, match="10 documents do not fill 11 rows"):
        TextDataModule(files=str(path), **settings | {"batch_size": 11}).setup()
    with pytest.raises(ValueError, match="always reset at documents"):
        TextDataModule(files=str(path), **settings, reset_at_documents=False)
