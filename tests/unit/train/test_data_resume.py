"""Every kind of text data goes on after a resume with the batches that an uninterrupted run reads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import LightningDataModule

from memzoo.models.config import ModelConfig
from memzoo.train.data.batches import TokenBatch
from memzoo.train.data.chat import ChatDataModule
from memzoo.train.data.datasets_source import DatasetSource
from memzoo.train.data.stream_module import StreamDataModule
from memzoo.train.data.text import TextDataModule
from memzoo.train.modules import LanguageModelModule

from .run_toys import Book, SaveAlways, toy_trainer

ROWS = DatasetSource(path="json", data_files="rows.jsonl")
TEMPLATE = (
    "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
KINDS: dict[str, Any] = {
    "text": lambda: TextDataModule(files="rows.jsonl", seq_len=16, batch_size=6, num_workers=2),
    "contiguous": lambda: TextDataModule(
        dataset=ROWS, contiguous=True, seq_len=16, batch_size=5, num_workers=2
    ),
    "chat": lambda: ChatDataModule(
        "bytes", TEMPLATE, files="rows.jsonl", seq_len=40, batch_size=2, num_workers=2
    ),
    "stream": lambda: StreamDataModule(
        ROWS, val_files="rows.jsonl", seq_len=16, batch_size=2, batches_per_epoch=7, shuffle_buffer=5
    ),
}


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    lines = []
    for number in range(24):
        text = f"{number} " * (3 + 5 * (number % 4))
        talk = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": text[:20]}]
        lines.append(json.dumps({"text": text, "messages": talk}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))


class Watched(LanguageModelModule):
    """Remembers the batches that it is trained on."""

    def __init__(self, *, carry_state: bool, vocab_size: int = 257) -> None:
        torch.manual_seed(0)
        layers = [{"type": "base_conv"}, {"type": "based", "num_heads": 1, "feature_dim": 4}]
        super().__init__(
            ModelConfig(vocab_size=vocab_size, d_model=8, layers=layers), carry_state=carry_state
        )
        self.batches: list[TokenBatch] = []

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


def fit(data: LightningDataModule, *callbacks: Any, path: Path | None = None, **settings: Any) -> Watched:
    module = Watched(carry_state=getattr(data, "contiguous", False))
    toy_trainer(Book(), *callbacks, **settings).fit(module, data, ckpt_path=path)
    return module


def assert_same(ours: list[TokenBatch], theirs: list[TokenBatch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("input_ids", "labels", "cu_seqlens", "mask", "resets"):
            mine, other = getattr(a, name), getattr(b, name)
            assert (mine is None) == (other is None), name
            assert mine is None or torch.equal(mine, other), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_reads_the_batches_that_are_left(kind: str, tmp_path: Path) -> None:
    saver = SaveAlways(tmp_path / "kept", Book())
    whole = fit(KINDS[kind](), saver)
    per_epoch = len(whole.batches) // 2
    assert len(whole.batches) == 2 * per_epoch >= 10
    taken = [path for path in saver.logged if path.name.endswith("batch")]
    for done in (2, per_epoch, per_epoch + 3):  # inside both epochs, and where one ends
        rest = fit(KINDS[kind](), path=taken[done - 1])
        assert_same(rest.batches, whole.batches[done:])
        assert all(map(torch.equal, rest.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize("kind", ["text", "contiguous", "chat"])
def test_workers_read_what_the_main_process_reads(kind: str) -> None:
    read = []
    for num_workers in (0, 2):
        data = KINDS[kind]()
        data.num_workers = num_workers
        data.setup()
        loader = data.train_dataloader()
        loader.load_state_dict({"num_yielded": 3})
        read.append([*loader, *loader])
    assert_same(*read)
    assert len(read[0]) == 2 * len(loader) - 3


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_the_model_does_not_have_are_found_before_the_training(kind: str) -> None:
    module = Watched(carry_state=False, vocab_size=256)
    with pytest.raises(ValueError, match="the token 256, but the model has the ids 0 to 255"):
        toy_trainer(Book()).fit(module, KINDS[kind]())
    assert not module.batches


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_that_ends_before_its_data_does_is_followed_by_a_new_one(kind: str) -> None:
    # Trainer(limit_train_batches=2), and a checkpoint behind the last of the two
    def loader() -> Any:
        data = KINDS[kind]()
        data.setup()
        return data.train_dataloader()

    whole, resumed = loader(), loader()
    first = list(itertools.islice(whole, 2))
    saved = whole.state_dict()
    whole.sampler.set_epoch(1)
    resumed.load_state_dict(saved)
    assert kind == "stream" or resumed.state_dict() == saved
    resumed.sampler.set_epoch(1)
    assert_same(list(itertools.islice(resumed, 2)), list(itertools.islice(whole, 2)))
    again = loader()  # the same checkpoint, but the epoch goes on
    again.load_state_dict(saved)
    rest = list(itertools.islice(again, 1))
    assert_same([*first, *rest], list(itertools.islice(loader(), 3)))


def test_other_data_than_that_of_the_checkpoint_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def loader(batch_size: int) -> Any:
        data = TextDataModule(files="rows.jsonl", seq_len=16, batch_size=batch_size)
        data.setup()
        return data.train_dataloader()

    saved = loader(6).state_dict()
    loader(6).load_state_dict(saved)
    assert not caplog.messages
    loader(2).load_state_dict(saved)
    assert "it is not the same text, seq_len or batch_size" in caplog.text
