"""What a checkpoint of Lightning lacks to go on with the same bits.

Lightning restores weights, optimiser, schedule, counters and the position in the data. Missing are the
random-number generators, gradients in the middle of an accumulation, the losses of the step that a checkpoint
interrupted, and a validation that was due or running when it was written. They are added here.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from . import random_state

_KEY = "exact_resume"


class ExactResume(Callback):
    """Makes a resumed run, on one process, equal to one that was never stopped, bit for bit.

    The random numbers of training are a stream of their own: it is set aside at the end of each batch and
    taken up at the start of the next, so that validations, loaders and loggers do not shift it. A validation
    starts from a copy of it. A checkpoint written where one is due, or during one, is resumed at its start.

    For `memzoo train`, and for every Trainer of one's own: name it last among the callbacks. Not covered:
    training metrics averaged over an epoch (``on_epoch=True``), several processes, and generators that a
    module keeps for itself, which it saves in its own ``on_save_checkpoint``.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._random: dict[str, Any] | None = None
        self._gradients: dict[str, Tensor] = {}
        self._unlogged: dict[str, Any] | None = None
        self._phase = ""
        self._begins_epoch = False
        self._open_validation_at: int | None = None
        self._max_steps: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begin()  # a second fit with the same callback is another run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random is None:
            self._random = random_state.capture()
        loop = trainer.fit_loop.epoch_loop
        if self._open_validation_at is not None and self._open_validation_at == loop.max_steps:
            # A run that has made all its steps would not be entered again: it has one more until it validates
            self._max_steps = loop.max_steps
            loop.max_steps += 1
        if self._unlogged is not None:
            for logger in trainer.loggers:
                logger.log_metrics(self._unlogged["metrics"], step=self._unlogged["step"])
                logger.save()
            self._unlogged = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = {}
        if self._begins_epoch:
            trainer.fit_loop.epoch_loop.restarting = False
            self._begins_epoch = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._phase = "batch"
        if self._random is not None:
            random_state.restore(self._random)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._phase = "batch end"
        self._random = random_state.capture()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._phase = "validation"
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        if self._random is not None:
            random_state.restore(self._random)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._phase = ""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._phase = "epoch end"

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _flush(trainer)
        loop = trainer.fit_loop
        is_due = self._phase == "batch end" and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        is_running = self._phase == "validation"
        loops = checkpoint["loops"]["fit_loop"]
        if self._phase == "epoch end":
            # Lightning would read on in the old epoch where max_steps ends the run
            for progress in loops["epoch_progress"].values():
                progress["completed"] = progress["processed"]
        set_validation_progress(loops, is_due=is_due, is_running=is_running)
        checkpoint[_KEY] = {
            "random": self._random,
            "gradients": {
                name: parameter.grad
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None and loop._should_accumulate()
            },
            "unlogged": step_metrics(trainer) if self._phase == "batch end" else None,
            "begins_epoch": self._phase == "epoch end",
            "open_validation_at": trainer.global_step if is_due or is_running else None,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint.get(_KEY)
        if saved is not None and trainer.state.fn == "fit":
            self._random, self._gradients = saved["random"], saved["gradients"]
            self._unlogged, self._begins_epoch = saved["unlogged"], saved["begins_epoch"]
            self._open_validation_at = saved["open_validation_at"]


def step_metrics(trainer: Trainer) -> dict[str, Any] | None:
    """What the loggers are about to be told of the step that has just ended, or None.

    A checkpoint is written between the step and its line in the log; a resumed run writes the line.
    """
    connector = trainer._logger_connector
    if trainer.fit_loop._should_accumulate() or not connector.should_update_logs:
        return None
    metrics = {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in connector.metrics["log"].items()
    }
    metrics.setdefault("epoch", trainer.current_epoch)
    return {"metrics": metrics, "step": trainer.fit_loop.epoch_loop._batches_that_stepped}


def set_validation_progress(loops: dict[str, Any], *, is_due: bool, is_running: bool) -> None:
    """Writes into the counters of a checkpoint whether a validation stands open.

    Lightning would skip a validation that is due, and go on in the middle of a running one with the losses of
    its first half forgotten. Both are written as a validation of which nothing has been read.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``, changed in place.
        is_due: the checkpoint is written at the end of a batch after which a validation follows.
        is_running: it is written during a validation.
    """
    if is_due:  # the batch is done, as far as it will be when the validation starts
        for counts in ("total", "current"):
            progress = loops["epoch_loop.batch_progress"][counts]
            progress["completed"] = progress["processed"]
    progress = loops["epoch_loop.val_loop.batch_progress"]
    total, current = progress["total"], progress["current"]
    done = total["completed"] - (current["completed"] if is_running else 0)
    total.update(ready=done, started=done, processed=done, completed=done)
    if is_due or is_running:  # one batch begun and none done is how Lightning writes an open validation
        total.update(ready=done + 1, started=done + 1)
        current.update(ready=1, started=1, processed=0, completed=0)
        progress["is_last_batch"] = False


def _flush(trainer: Trainer) -> None:
    """What was logged before a checkpoint is on the disk when the checkpoint is."""
    for logger in trainer.loggers:
        logger.save()
        flush = getattr(getattr(logger, "experiment", None), "flush", None)
        if flush is not None:
            with suppress(OSError):  # a full disk is met again by the checkpoint, which says so
                flush()
