"""A run small enough to be made dozens of times in a test, with all in it that a resume can get wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from memzoo.train.callbacks import ExactResume
from memzoo.train.checkpointing import FolderCheckpointIO
from memzoo.train.data.batches import BatchSource, ResumableLoader, TokenBatch


class Noise(BatchSource):
    """Random tokens; the order of an epoch is shuffled, and both depend on nothing but epoch and index."""

    num_batches = 7

    def batch(self, epoch: int, index: int) -> TokenBatch:
        generator = torch.Generator().manual_seed(epoch)
        place = int(torch.randperm(self.num_batches, generator=generator)[index])
        ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1000 * epoch + place))
        return TokenBatch(ids, ids)


class NoiseData(LightningDataModule):
    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(Noise(), num_workers=self.num_workers)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(Noise())


class Restless(LightningModule):
    """Draws from every generator there is, in training and in validation, and carries a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)
        self.carried = torch.zeros(8)

    def loss(self, batch: TokenBatch) -> Tensor:
        x = F.dropout(self.embed(batch.input_ids), 0.2) + self.carried
        x = x * (1 + 0.1 * random.random() + 0.1 * np.random.rand())  # noqa: NPY002
        self.carried = 0.9 * self.carried + 0.1 * x.detach().mean((0, 1))
        return F.cross_entropy(self.head(x).flatten(0, 1), batch.labels.flatten())

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def on_validation_start(self) -> None:
        self.kept = self.carried

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=2)

    def on_validation_end(self) -> None:
        self.carried = self.kept

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["carried"] = self.kept if self.trainer.validating else self.carried

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.carried = checkpoint["carried"]


class Book(Logger):
    """Remembers what it is told: (step, name) -> value; two different values for one place are an error."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[tuple[int, str], float] = {}

    name = "book"
    version = 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            assert self.lines.setdefault((step, name), value) == value


class SaveAlways(Checkpoint):
    """A checkpoint wherever one can be written."""

    def __init__(self, folder: Path, book: Book) -> None:
        self.folder, self.book = folder, book
        self.logged: dict[Path, dict[tuple[int, str], float]] = {}

    def save(self, trainer: Trainer, word: str) -> None:
        if not trainer.sanity_checking:
            path = self.folder / f"{len(self.logged):02d}-{word}"
            self.logged[path] = dict(self.book.lines)
            trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[3] == 1:
            self.save(trainer, "validating")

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "validated")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "epoch")


def toy_trainer(book: Book, *callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "val_check_interval": 3,
            "limit_val_batches": 3,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(each, Checkpoint) for each in callbacks),
            "logger": book,
            "callbacks": [ExactResume(), *callbacks],
            "plugins": [FolderCheckpointIO()],
        }
        | settings
    )


def toy_run(
    *callbacks: Any, book: Book, path: Path | None = None, workers: int = 0, **settings: Any
) -> Restless:
    """One run from the start, or from a checkpoint."""
    # a process that goes on has drawn other numbers on its way than the one that was stopped
    seed_everything(0 if path is None else 99, verbose=False)
    module = Restless()
    if path is None:
        seed_everything(1, verbose=False)
    toy_trainer(book, *callbacks, **settings).fit(module, NoiseData(workers), ckpt_path=path)
    return module
