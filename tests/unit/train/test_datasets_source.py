"""Data sets of the library `datasets`: local files, saved folders, streams; what can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from memzoo.train.data.batches import TokenBatch
from memzoo.train.data.datasets_source import DatasetSource, open_dataset, stream_dataset
from memzoo.train.data.stream_module import StreamDataModule
from memzoo.train.data.streaming import StreamLoader
from memzoo.train.data.text import TextDataModule

TEXTS = [f"{number}: " + "word " * (number % 7) for number in range(40)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the same rows in several forms; nothing is read from or written outside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for part in range(3):
        lines = [json.dumps({"number": n, "text": TEXTS[n]}) for n in range(part, 40, 3)]
        (tmp_path / f"part{part}.jsonl").write_text("\n".join(lines))
    rows = datasets.Dataset.from_dict({"number": range(40), "text": TEXTS})
    rows.to_parquet(tmp_path / "rows.parquet", batch_size=6)
    rows.to_csv(tmp_path / "rows.csv")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, few=rows.select(range(5))).save_to_disk(tmp_path / "splits")
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    return tmp_path


SOURCES: dict[str, dict[str, Any]] = {
    "json": {"path": "json", "data_files": "part*.jsonl"},
    "parquet": {"path": "parquet", "data_files": ["rows.parquet"]},
    "csv": {"path": "csv", "data_files": "rows.csv"},
    "arrow": {"path": "arrow", "data_files": "saved/*.arrow"},
    "lines": {"path": "text", "data_files": "lines.txt"},
    "saved": {"path": "saved"},
    "splits": {"path": "splits"},
}


@pytest.mark.parametrize("name", SOURCES)
def test_stored_and_streamed_rows_are_the_same(name: str, folder: Path) -> None:
    source = DatasetSource(**SOURCES[name])
    stored = [row["text"] for row in open_dataset(source, "text")]
    assert [row["text"] for row in stream_dataset(source, "text")] == stored
    assert sorted(stored) == sorted(TEXTS) if name != "lines" else len(stored) == 40
    part = DatasetSource(**SOURCES[name], skip_rows=7, max_rows=20)
    assert [row["text"] for row in open_dataset(part, "text")] == stored[7:27]
    assert [row["text"] for row in stream_dataset(part, "text")] == stored[7:27]


def test_a_folder_of_files_and_a_split_are_read(folder: Path) -> None:
    (folder / "files").mkdir()
    (folder / "rows.parquet").rename(folder / "files" / "train.parquet")
    assert len(open_dataset(DatasetSource(path="files"), "text")) == 40
    assert len(open_dataset(DatasetSource(path="splits", split="few"), "text")) == 5


def test_text_data_reads_a_dataset_like_documents(folder: Path) -> None:
    settings: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "shuffle": False}
    from_rows = TextDataModule(dataset=DatasetSource(path="saved"), **settings)
    (folder / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    from_file = TextDataModule(files="all.jsonl", **settings)
    for module in (from_rows, from_file):
        module.setup()
    for ours, theirs in zip(from_rows.train_dataloader(), from_file.train_dataloader(), strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
    val = DatasetSource(path="splits", split="few")
    module = TextDataModule(dataset=DatasetSource(path="saved"), val_dataset=val, **settings)
    module.setup()
    text = bytes(t for t in torch.cat([b.input_ids.flatten() for b in module.val_dataloader()]) if t < 256)
    assert text.decode().startswith("0: 1: word 2: word word ")


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"path": "json", "data_files": "missing.jsonl"}, r"cannot read .*missing\.jsonl.*Unable to find"),
    ({"path": "someone/something"}, "not on this machine and the hub cannot be reached"),
    ({"path": "./nowhere"}, "nowhere"),
    ({"path": "saved", "split": "test"}, "single split"),
    ({"path": "splits", "split": "test"}, "no split 'test', only train, few"),
    ({"path": "json", "data_files": "part0.jsonl", "split": "test"}, "test.*train"),
    ({"path": "json", "data_files": "part0.jsonl", "skip_rows": 100}, "holds no row"),
    ({"path": "json", "data_files": "empty.jsonl"}, "holds no row"),
    ({"path": "json", "data_files": "broken.jsonl"}, "cannot read .*JSON"),
    ({"path": "csv", "data_files": "rows.csv"}, r"no field 'body' \(it has: number, text\)"),
]


@pytest.mark.parametrize("settings, message", ERRORS, ids=[message for _, message in ERRORS])
@pytest.mark.parametrize("opened", [open_dataset, stream_dataset])
def test_what_is_wrong_with_a_source_is_said(opened, settings, message: str, folder: Path) -> None:
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "x"}\n{')
    with pytest.raises(ValueError, match=f"(?s){message}"):
        opened(DatasetSource(**settings), "body")


def test_a_gated_data_set_says_how_to_get_access(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(ValueError, match="access to the data set 'a/b' has to be granted"):
        open_dataset(DatasetSource(path="a/b"), "text")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path": ""}, "needs a path"),
        ({"path": "json"}, "needs files"),
        ({"path": "json", "data_files": "a.jsonl", "revision": "main"}, "revision has no effect"),
        ({"path": "saved", "data_files": "a.jsonl"}, "data_files has no effect"),
        ({"path": "a/b", "max_rows": 0}, "max_rows at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(DatasetSource(**settings), "text")


# ---------------------------------------------------------------- streams


def streamed(source: dict[str, Any] = SOURCES["json"], **settings: Any) -> StreamLoader:
    small = {"seq_len": 16, "batch_size": 3, "batches_per_epoch": 5, "shuffle_buffer": 4}
    module = StreamDataModule(
        dataset=DatasetSource(**source), val_texts="state_of_the_union_heldout", **small | settings
    )
    module.setup()
    return module.train_dataloader()


def same(ours: list[TokenBatch], theirs: list[TokenBatch]) -> bool:
    assert len(ours) == len(theirs)
    return all(
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and (a.cu_seqlens is None) == (b.cu_seqlens is None)
        and (a.cu_seqlens is None or torch.equal(a.cu_seqlens, b.cu_seqlens))
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_stream_in_order_reads_every_token_once_a_pass(folder: Path) -> None:
    loader = streamed(SOURCES["saved"], shuffle_buffer=1, batch_size=1, reset_at_documents=False)
    epochs = [list(loader) for _ in range(20)]
    ids = torch.cat([batch.input_ids[0] for read in epochs for batch in read]).tolist()
    one_pass = [token for text in TEXTS for token in [*text.encode(), 256]]
    assert len(ids) == 20 * 5 * 16
    assert ids == (one_pass * 3)[: len(ids)]
    assert len(ids) > 2 * len(one_pass)
    labels = torch.cat([batch.labels[0] for read in epochs for batch in read]).tolist()
    assert labels == (one_pass * 3)[1 : len(ids) + 1]


def test_a_stream_is_cut_at_documents_like_stored_text(folder: Path) -> None:
    stored = TextDataModule(dataset=DatasetSource(path="saved"), seq_len=16, batch_size=3, shuffle=False)
    stored.setup()
    loader = streamed(SOURCES["saved"], shuffle_buffer=1)
    assert same(list(loader), list(stored.train_dataloader())[:5])


def test_the_buffer_shuffles_by_its_seed(folder: Path) -> None:
    first = list(streamed())
    assert same(first, list(streamed()))
    assert not same(first, list(streamed(seed=1)))
    assert not same(first, list(streamed(shuffle_buffer=1)))


@pytest.mark.parametrize("name", ["json", "parquet", "saved"])
@pytest.mark.parametrize("done", [1, 5, 13])
def test_a_restored_stream_goes_on_with_the_same_bits(name: str, done: int, folder: Path) -> None:
    """Also at the end of an epoch, and in the second pass over the data."""

    def batches(loader: StreamLoader, number: int) -> list[TokenBatch]:
        read: list[TokenBatch] = []
        while len(read) < number:
            for batch in loader:
                read.append(batch)
                if len(read) == number:
                    break
        return read

    expected = batches(streamed(SOURCES[name]), 40)
    loader = streamed(SOURCES[name])
    batches(loader, done)
    torch.save(loader.state_dict(), "state.pt")
    batches(loader, 1)  # what happens after the checkpoint does not matter
    restored = streamed(SOURCES[name])
    restored.load_state_dict(torch.load("state.pt", weights_only=True))
    rest = batches(restored, 40 - done)
    assert same(rest, expected[done:])
    assert restored.state_dict()["windows"]["pass"] > 0


def test_a_restored_epoch_has_its_remaining_batches(folder: Path) -> None:
    loader = streamed()
    reader = iter(loader)
    next(reader), next(reader)
    restored = streamed()
    restored.load_state_dict(loader.state_dict())
    assert len(list(restored)) == 3
    assert len(list(restored)) == len(restored) == 5


def test_a_stream_takes_nothing_from_the_global_generator(folder: Path) -> None:
    before = torch.random.get_rng_state()
    list(streamed())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_stream_of_other_settings_is_not_restored(folder: Path) -> None:
    loader = streamed()
    next(iter(loader))
    for settings in ({"seq_len": 8}, {"shuffle_buffer": 5}):
        with pytest.raises(ValueError, match="seq_len=16 and a shuffle_buffer of 4"):
            streamed(**settings).load_state_dict(loader.state_dict())


def test_streams_refuse_what_they_cannot_do(folder: Path) -> None:
    source = DatasetSource(**SOURCES["json"])
    with pytest.raises(ValueError, match="no end to hold out"):
        StreamDataModule(dataset=source)
    with pytest.raises(ValueError, match="shuffle_buffer must be at least 1"):
        StreamDataModule(dataset=source, val_texts="emma", shuffle_buffer=0)
    (folder / "mixed.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    loader = streamed({"path": "json", "data_files": "mixed.jsonl"})
    with pytest.raises(
        ValueError, match=r"row 2 of the split 'train' of the data set 'mixed\.jsonl' has no text"
    ):
        list(loader)
    (folder / "blank.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(ValueError, match="holds no text"):
        list(streamed({"path": "json", "data_files": "blank.jsonl"}, append_eos=False))


def test_a_stream_validates_on_the_first_rows(folder: Path) -> None:
    val = DatasetSource(**SOURCES["saved"], max_rows=5)
    module = StreamDataModule(
        dataset=DatasetSource(**SOURCES["saved"], skip_rows=5),
        val_dataset=val,
        seq_len=8,
        max_val_windows=3,
        batch_size=2,
    )
    module.setup()
    assert sum(batch.num_tokens for batch in module.val_dataloader()) == 24
    assert module.vocab_size == 257
