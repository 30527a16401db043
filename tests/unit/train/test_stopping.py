"""Signals end a run with a checkpoint; storage that fails is met before it, or survived during it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from memzoo.models.checkpoints import files
from memzoo.train.callbacks import StopOnSignal
from memzoo.train.checkpointing import newest_checkpoint
from memzoo.train.stopping import RunEnded, check_last_save

from .run_toys import Book, Restless, toy_run


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)


class Send(Callback):
    """Sends a signal to its own process at the start of one batch."""

    def __init__(self, number: int, batch: int, times: int = 1, validating: bool = False) -> None:
        self.number, self.countdown, self.times, self.validating = number, batch, times, validating

    def act(self) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if not self.validating:
            self.act()

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.validating and not trainer.sanity_checking:
            self.act()


# (batch of the signal, steps made when the run stops): batches are accumulated in pairs, and a validation,
# after every third, is not waited for
@pytest.mark.parametrize("where, steps", [(1, 1), (3, 1), (7, 4), (12, 7), ("validation", 1)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_goes_on_with_the_same_bits(
    tmp_path: Path, number: signal.Signals, where: Any, steps: int
) -> None:
    book, whole_book = Book(), Book()
    validating = where == "validation"
    sender = Send(number, 2 if validating else where, times=2 if number == signal.SIGTERM else 1)
    sender.validating = validating
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RunEnded) as stop:
        toy_run(sender, StopOnSignal(), ModelCheckpoint(tmp_path, save_last=True), book=book)
    assert stop.value.code == 128 + number
    last = tmp_path / "last.ckpt"
    assert f"after step {steps}; no model was written. Go on from" in stop.value.line
    assert stop.value.line.endswith(f"--ckpt_path {last}")
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    resumed = toy_run(StopOnSignal(), checkpoint, book=book, path=last)
    whole = toy_run(book=whole_book)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    assert book.lines == whole_book.lines, "no line of the log is lost or differs"
    assert [path.name for path in tmp_path.glob("last*")] == ["last.ckpt"], "replaced in place"
    assert checkpoint.last_model_path == str(last)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        toy_run(
            Send(signal.SIGINT, 3, times=2),
            StopOnSignal(),
            ModelCheckpoint(tmp_path, save_last=True),
            book=Book(),
        )
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert not isinstance(stop.value, RunEnded)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from here on


def test_without_a_place_for_checkpoints_it_says_so() -> None:
    with pytest.raises(RunEnded) as stop:
        toy_run(Send(signal.SIGTERM, 3), StopOnSignal(), book=Book())
    assert stop.value.line.endswith("no model was written and there is no checkpoint to go on from")


def test_a_long_epoch_is_saved_in_between(tmp_path: Path) -> None:
    saved: list[int] = []
    keeper = ModelCheckpoint(tmp_path, save_last=True)

    class Watch(Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
            saved.append(trainer.global_step)

    book = Book()
    whole = toy_run(Watch(), StopOnSignal(save_minutes=0.0), keeper, book=book, limit_val_batches=0)
    assert set(saved) - {0} == set(range(1, 9)), "every optimiser step, and no batch in between"
    saved.clear()
    toy_run(Watch(), StopOnSignal(save_minutes=60.0), keeper, book=Book(), limit_val_batches=0)
    assert set(saved) - {0} == {4, 8}, "the ends of epochs"
    assert newest_checkpoint(tmp_path) is not None
    assert all(map(torch.equal, whole.state_dict().values(), toy_run(book=Book()).state_dict().values()))


class Full(Callback):
    """A disk that is full between two batches."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.patch = pytest.MonkeyPatch()
        self.trainer: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.trainer = trainer

        def failing(*args: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if trainer.fit_loop.epoch_loop.total_batch_idx == self.begin:
            self.patch.setattr(files.os, "fsync", failing)
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.end:
            self.patch.undo()


@pytest.mark.parametrize("end", [8, 99], ids=["for a while", "to the end"])
def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, end: int, caplog: pytest.LogCaptureFixture
) -> None:
    full = Full(3, end)
    keeper = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    try:
        with caplog.at_level(logging.WARNING):
            run = toy_run(full, StopOnSignal(), keeper, book=Book())
    finally:
        full.patch.undo()
    whole = toy_run(book=Book())
    assert all(map(torch.equal, whole.state_dict().values(), run.state_dict().values()))
    assert "CHECKPOINT NOT SAVED" in caplog.text
    left = sorted(path.name for path in tmp_path.iterdir())
    if end == 99:
        with pytest.raises(RunEnded, match="1") as stop:
            check_last_save(full.trainer)
        assert stop.value.code == 1
        assert "No space left on device" in stop.value.line
        assert f"The last complete one is {tmp_path / 'last.ckpt'}" in stop.value.line
        assert left == ["epoch=0-step=1.ckpt", "last.ckpt"], "what the failed save was to replace is kept"
    else:
        check_last_save(full.trainer)
        assert left == ["epoch=1-step=8.ckpt", "last.ckpt"]


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be written to .*file/checkpoints"):
        toy_run(StopOnSignal(), ModelCheckpoint(tmp_path / "file" / "checkpoints"), book=Book())
    assert time.monotonic() - started < 5


def test_what_cannot_be_saved_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        toy_run(StopOnSignal(), ModelCheckpoint(tmp_path), book=Book(), max_epochs=1)
        assert "LITTLE ROOM" not in caplog.text
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=5000))
        toy_run(StopOnSignal(), ModelCheckpoint(tmp_path), book=Book(), max_epochs=1)
    assert "LITTLE ROOM" in caplog.text
    save = Restless.on_save_checkpoint

    def odd(self: Restless, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)
        checkpoint["odd"] = [object()]

    monkeypatch.setattr(Restless, "on_save_checkpoint", odd)
    book = Book()
    with pytest.raises(ValueError, match=r"holds a builtins\.object at odd\.0"):
        toy_run(StopOnSignal(), ModelCheckpoint(tmp_path / "new"), book=book)
    assert not book.lines
