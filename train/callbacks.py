"""Lightning callbacks: one progress line, and the trained model as an ordinary folder."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..layers import probe
from ..records import results_folder
from .checkpointing import STORAGE_ERRORS
from .data.batches import TokenBatch
from .exact_resume import ExactResume
from .stopping import RunEnded, StopOnSignal, way_on

__all__ = [
    "ExactResume",
    "LogProbes",
    "SaveModelFolder",
    "StopOnSignal",
    "TrainingProgress",
    "peak_memory_gib",
]


class TrainingProgress(ProgressBar):
    """One line for the whole run: step, loss, tokens per second, time left, peak memory.

    A validation or test that takes longer than ``refresh_seconds`` has a line of its own while it lasts.

    Args:
        refresh_rate: optimiser steps between two updates of the line, where these come sooner than
            ``refresh_seconds`` after the last one.
        leave: keep the line after the run.
        name: what the line begins with.
        refresh_seconds: after this time any step updates the line, so that slow ones are seen as well.
    """

    def __init__(
        self,
        refresh_rate: int = 10,
        leave: bool = True,
        name: str = "train",
        refresh_seconds: float = 2.0,
    ) -> None:
        super().__init__()
        self.name = name
        self.refresh_rate = max(refresh_rate, 1)
        self.refresh_seconds = refresh_seconds
        self.leave = leave
        self._enabled = True
        self._line: tqdm | None = None
        self._measured: tqdm | None = None
        self._tokens = 0
        self._clock = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self._line = tqdm(
            total=int(steps) if steps != float("inf") else None,
            initial=trainer.global_step,
            desc=self.name,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.0,
            leave=self.leave,
            disable=not self._enabled or not trainer.is_global_zero,
            file=sys.stderr,
        )
        self._tokens, self._clock = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TokenBatch, batch_idx: int
    ) -> None:
        self._tokens += batch.num_tokens * trainer.world_size
        line = self._line
        if line is None or trainer.global_step == line.n:
            return
        elapsed = max(time.monotonic() - self._clock, 1e-9)
        is_due = trainer.global_step % self.refresh_rate == 0 or elapsed >= self.refresh_seconds
        if not is_due and trainer.global_step != line.total:
            return
        rate, self._tokens, self._clock = self._tokens / elapsed, 0, time.monotonic()
        facts = {
            name: f"{float(value):.4g}"
            for name, value in trainer.progress_bar_metrics.items()
            if not name.startswith("v_num")
        }
        line.n = trainer.global_step
        line.set_postfix(
            facts | {"tok/s": f"{rate:,.0f}", "peak": f"{peak_memory_gib():.2f} GiB"}, refresh=False
        )
        line.refresh()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin_measuring(trainer, "validation", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_measuring(trainer, "test", trainer.num_test_batches)

    def on_validation_batch_end(self, *arguments: Any, **named: Any) -> None:
        if self._measured is not None:
            self._measured.update()

    def on_test_batch_end(self, *arguments: Any, **named: Any) -> None:
        self.on_validation_batch_end()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_measuring()

    def _begin_measuring(self, trainer: Trainer, name: str, num_batches: Sequence[float]) -> None:
        total = sum(num_batches)
        self._measured = tqdm(
            total=int(total) if total != float("inf") else None,
            desc=name,
            unit="batch",
            dynamic_ncols=True,
            delay=self.refresh_seconds,
            leave=False,
            disable=not self._enabled or not trainer.is_global_zero,
            file=sys.stderr,
        )

    def _end_measuring(self) -> None:
        if self._measured is not None:
            self._measured.close()
            self._measured = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_measuring()
        # The time of a validation is no training time.
        self._tokens, self._clock = 0, time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._end_measuring()
        if self._line is not None:
            self._line.close()
            self._line = None


class SaveModelFolder(Callback):
    """Write the trained model as an ordinary folder (config, weights, tokenizer) when training ends.

    Args:
        folder: where to write; None takes ``model`` inside the run's log folder.

    Attributes:
        written: where the model is, once it is written.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.written: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # a folder that cannot be written is found before the training, not after it
        if stage == "fit" and self.folder is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            results_folder(self.folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        from ..models.conversion import first_not_finite
        from ..models.hf import save_model

        broken = first_not_finite(pl_module.model.named_parameters())
        if broken is not None:
            raise ValueError(
                f"the weight {broken} is not finite after the last step, so no model is written"
                f"{way_on(trainer, None)}, with a lower model.optimizer.lr or trainer.gradient_clip_val."
            )
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "model")
        try:
            save_model(pl_module.model, folder, getattr(trainer.datamodule, "tokenizer", None))
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            line = f"error: the model could not be written to {folder} ({error.strerror})"
            raise RunEnded(f"{line}{way_on(trainer, None)}", 1) from error
        self.written = folder


class LogProbes(Callback):
    """Log what the layers record for `memzoo.layers.probe`, such as gates, rates and lengths of fast weights.

    Every so many steps the mean of each record over layers, tokens and heads is logged as ``probe/NAME``.

    Args:
        every: steps between two looks.

    Raises:
        ValueError: fewer than 1 step.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}.")
        self.every = every
        self._open = ExitStack()
        self._seen: dict[str, list[Tensor]] | None = None
        self._last = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 and step != self._last:  # the first batch of those that make a step
            self._last = step
            self._seen = self._open.enter_context(probe())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        if self._seen is None:
            return
        self._open.close()
        means = {
            f"probe/{name}": float(torch.stack([value.float().mean() for value in values]).mean())
            for name, values in self._seen.items()
        }
        self._seen = None
        if means:
            for logger in trainer.loggers:
                logger.log_metrics(means, self._last)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()
        self._seen = None


def peak_memory_gib() -> float:
    """Peak memory so far: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
