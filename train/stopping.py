"""Stopping a run without losing it: signals, regular saves, storage that cannot be written."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..records import results_folder
from .checkpoint_codec import Encoder
from .checkpointing import FolderCheckpointIO

logger = logging.getLogger(__name__)

NUM_CHECKPOINTS = 3  # `last`, the newest besides, and the one being written
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunEnded(SystemExit):
    """A run that ended before its time, or without its last checkpoint.

    Args:
        line: what to tell the user.
        status: exit status of the process.
    """

    def __init__(self, line: str, status: int) -> None:
        super().__init__(status)
        self.line = line


class StopOnSignal(Callback):
    """On SIGTERM or Ctrl-C finish the optimiser step, write ``last.ckpt``, and end with status 143 or 130.

    A second Ctrl-C stops at once. During a validation nothing is waited for: the resumed run validates again
    from the start. Name it after `ExactResume` and before a ModelCheckpoint, in whose folder it saves;
    without one there is nothing to save to. With several processes signals and the clock are left to
    Lightning.

    Args:
        save_minutes: also write ``last.ckpt`` when that long has passed without a checkpoint; None never.

    Raises:
        ValueError: the folder of the checkpoints cannot be written, or something in them has no place there;
            found before the first step. A disk with little room left is a warning.
    """

    def __init__(self, save_minutes: float | None = None) -> None:
        self.save_minutes = save_minutes
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._saved_at = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callback = _keeper(trainer)
        if callback is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            results_folder(callback.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        self.received = signal.SIGTERM if trainer.received_sigterm else None
        _try_checkpoint(trainer)
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            self._handlers[number] = signal.getsignal(number)
            signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        if self.received is not None:
            self._stop(trainer, log_step=True)
        if self.save_minutes is None or _keeper(trainer) is None or trainer.world_size > 1:
            return
        io = trainer.strategy.checkpoint_io
        saved_at = getattr(io, "saved_at", None) or 0.0
        if time.monotonic() - max(self._saved_at, saved_at) >= 60 * self.save_minutes:
            self._saved_at = time.monotonic()
            save_last(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.received is not None and not trainer.sanity_checking:
            self._stop(trainer, log_step=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            self._give_back()
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            # not through a logger or a stream, which this signal may have interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _stop(self, trainer: Trainer, *, log_step: bool) -> None:
        assert self.received is not None
        place = save_last(trainer)
        if log_step:
            # Lightning logs a step after this hook, which is not left in the usual way
            trainer._logger_connector.update_train_step_metrics()
        word = "interrupted" if self.received == signal.SIGINT else "stopped by SIGTERM"
        raise RunEnded(
            f"{word} after step {trainer.global_step}; no model was written{way_on(trainer, place)}",
            128 + self.received,
        )


def save_last(trainer: Trainer) -> Path | None:
    """Writes ``last.ckpt`` into the folder of the ModelCheckpoint, or over the one that it keeps there.

    Returns:
        the checkpoint; None without a ModelCheckpoint, or when it could not be written.
    """
    callback = _keeper(trainer)
    if callback is None:
        return None
    name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
    # the path is part of what is saved: the run that goes on replaces this checkpoint
    callback.last_model_path = callback.last_model_path or str(Path(callback.dirpath) / name)
    trainer.save_checkpoint(callback.last_model_path)
    if getattr(trainer.strategy.checkpoint_io, "failure", None) is not None:
        return None
    return Path(callback.last_model_path)


def way_on(trainer: Trainer, place: Path | None) -> str:
    """How to go on with a run that has stopped: the rest of a sentence."""
    io = trainer.strategy.checkpoint_io
    place = place or getattr(io, "last_saved", None)
    failure = getattr(io, "failure", None)
    lost = f". The last save failed: {failure}" if failure else ""
    if place is None:
        return f"{lost} and there is no checkpoint to go on from"
    return f"{lost}. Go on from the last checkpoint with --ckpt_path {place}"


def check_last_save(trainer: Trainer) -> None:
    """Ends the process with status 1 when the last checkpoint of a run could not be written.

    Raises:
        RunEnded: with the reason and the last complete checkpoint.
    """
    io = trainer.strategy.checkpoint_io
    if isinstance(io, FolderCheckpointIO) and io.failure is not None:
        kept = f"The last complete one is {io.last_saved}." if io.last_saved else "No checkpoint is there."
        raise RunEnded(f"error: the last checkpoint is missing: {io.failure}. {kept}", 1)


def _try_checkpoint(trainer: Trainer) -> None:
    """Makes a checkpoint without writing it, and looks whether there is room for the run's."""
    callback = _keeper(trainer)
    if (
        callback is None
        or trainer.fast_dev_run
        or not isinstance(trainer.strategy.checkpoint_io, FolderCheckpointIO)
    ):
        return
    encoder = Encoder()
    encoder.encode(trainer._checkpoint_connector.dump_checkpoint(callback.save_weights_only))
    if not trainer.is_global_zero:
        return
    num_bytes = sum(tensor.nbytes for tensor in encoder.tensors.values())
    if not any(optimizer.state for optimizer in trainer.optimizers):
        num_bytes *= 3  # two running means of every weight are still to come
    free = shutil.disk_usage(callback.dirpath).free
    if free < NUM_CHECKPOINTS * num_bytes:
        logger.warning(
            "LITTLE ROOM: a checkpoint takes about %.3g GiB, and %s has %.3g GiB left. Replacing one takes "
            "room for two; make room before the first save.",
            num_bytes / 2**30,
            callback.dirpath,
            free / 2**30,
        )


def _keeper(trainer: Trainer) -> ModelCheckpoint | None:
    """The ModelCheckpoint whose folder takes ``last.ckpt``: one that keeps it, else the first."""
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return next((each for each in callbacks if each.save_last), callbacks[0] if callbacks else None)
