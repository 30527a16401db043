"""What layers record about themselves, in the logs of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from memzoo.layers import probe
from memzoo.layers.contract import record
from memzoo.train.callbacks import LogProbes
from memzoo.train.data.batches import TokenBatch

from .run_toys import Book, NoiseData


class Recording(LightningModule):
    """Records 0, 1, 2, ... and ten times as much, as two layers would."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.calls = 0

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        record("gate", torch.full((2, 3), float(self.calls)))
        record("gate", torch.full((5,), 10.0 * self.calls))
        self.calls += 1
        return self.head.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(tmp_path: Path, **options: int) -> dict[tuple[int, str], float]:
    book = Book()
    trainer = Trainer(
        accelerator="cpu",
        logger=book,
        callbacks=[LogProbes(every=3)],
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(Recording(), NoiseData())
    return {place: value for place, value in book.lines.items() if place[1].startswith("probe/")}


def test_the_mean_over_layers_is_logged_every_so_many_steps(tmp_path: Path) -> None:
    # seven batches: steps 0, 3 and 6
    assert train(tmp_path) == {(step, "probe/gate"): 5.5 * step for step in (0, 3, 6)}


def test_of_several_batches_of_a_step_the_first_is_looked_at(tmp_path: Path) -> None:
    # steps of two batches: step 3 begins with the seventh
    assert train(tmp_path, accumulate_grad_batches=2) == {(0, "probe/gate"): 0.0, (3, "probe/gate"): 33.0}


def test_nothing_stays_open_when_a_training_breaks(tmp_path: Path) -> None:
    callback = LogProbes()
    trainer, module = Trainer(logger=False, enable_checkpointing=False), Recording()
    callback.on_train_batch_start(trainer, module, None, 0)
    callback.on_exception(trainer, module, RuntimeError())
    with probe() as seen:
        record("gate", torch.ones(1))
    assert callback._seen is None
    assert list(seen) == ["gate"]


def test_a_step_at_least(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        LogProbes(every=0)
