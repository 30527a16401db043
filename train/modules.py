"""Lightning modules: what is trained, with which loss."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ..models.config import ModelConfig
from ..models.decoder import MemoryLM
from .data.batches import TokenBatch
from .data.mqar import IGNORE_INDEX, accuracy_per_example
from .optim import OptimizerConfig, build_optimizer, lr_factor

DEFAULT_OPTIMIZER = OptimizerConfig()

# Dimensions: B rows, T tokens, V vocabulary


class LanguageModelModule(LightningModule):
    """A `MemoryLM` trained with cross-entropy on the labelled positions of each batch.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy`` (mean over examples of the share of labelled positions
    answered right) and the same for test.

    Args:
        config: the model.
        optimizer: optimiser and schedule.
        mixer_init_scale: draw the linear maps of the mixers from N(0, (scale / sqrt(inputs))^2) instead of
            each mixer's own law. Many mixers follow papers whose 0.02 suits a width of a thousand; a model of
            width 64 barely learns from there and wants 1.0.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        mixer_init_scale: float | None = None,
    ) -> None:
        super().__init__()
        if mixer_init_scale is not None and mixer_init_scale <= 0:
            raise ValueError(
                f"mixer_init_scale must be positive, got {mixer_init_scale}. Leave it out for none."
            )
        self.config = config
        self.optimizer_config = optimizer
        self.model = MemoryLM(config)
        if mixer_init_scale is not None:
            init_mixers(self.model, mixer_init_scale)

    def forward(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Logits (n, V) and targets (n,) of the labelled positions, in reading order."""
        out = self.model(
            batch.input_ids, cu_seqlens=batch.cu_seqlens, return_hidden_states=True, last_only=True
        )
        asked = batch.labels != IGNORE_INDEX  # (B, T)
        # The head is the widest product of a small model, and MQAR asks at one position in sixteen.
        return self.model.head(out.hidden_states[-1][asked]), batch.labels[asked]

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """The mean cross-entropy over the labelled positions, in float32."""
        logits, targets = self(batch)
        loss = F.cross_entropy(logits.float(), targets)
        self.log("train_loss", loss, prog_bar=True, batch_size=batch.num_rows)
        return loss

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_accuracy``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_accuracy``."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over tagged groups, with a schedule over the whole run."""
        optimizer = build_optimizer(self.model.parameters(), self.optimizer_config)
        num_steps = planned_steps(self.trainer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(self.optimizer_config, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the settings as plain data."""
        # Plain data, so that checkpoints load with weights_only=True.
        checkpoint["memzoo"] = {"config": self.config.to_dict(), "optimizer": asdict(self.optimizer_config)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another model.

        Raises:
            ValueError: the message names the first difference.
        """
        saved = checkpoint.get("memzoo", {}).get("config")
        if saved is not None and saved != self.config.to_dict():
            raise ValueError(
                f"the checkpoint holds another model ({_first_difference(saved, self.config.to_dict())}). "
                "Resume with the configuration that lies beside the checkpoint."
            )

    def _evaluate(self, batch: TokenBatch, split: str) -> None:
        logits, targets = self(batch)
        if not len(targets):
            return
        predictions = torch.full_like(batch.labels, IGNORE_INDEX)
        predictions[batch.labels != IGNORE_INDEX] = logits.argmax(-1)
        accuracy = accuracy_per_example(predictions, batch.labels)  # (B',)
        loss = F.cross_entropy(logits.float(), targets)
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=len(targets), sync_dist=True)
        self.log(
            f"{split}_accuracy", accuracy.mean(), prog_bar=True, batch_size=len(accuracy), sync_dist=True
        )


def planned_steps(trainer: Trainer) -> int:
    """Optimiser steps of the whole run.

    Lightning's own estimate would set up the loaders before a checkpoint can restore their position, and a
    resumed run would read its epoch from the start again.

    Raises:
        ValueError: the run has no end.
    """
    if trainer.max_epochs == -1:
        if trainer.max_steps == -1:
            raise ValueError("the run has no end. Set trainer.max_steps or trainer.max_epochs.")
        return int(trainer.max_steps)
    num_batches = len(trainer.datamodule.train_dataloader())
    limit = trainer.limit_train_batches
    num_batches = min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)
    num_steps = -(-num_batches // trainer.accumulate_grad_batches) * trainer.max_epochs
    return num_steps if trainer.max_steps == -1 else min(num_steps, trainer.max_steps)


def init_mixers(model: MemoryLM, scale: float) -> None:
    """Draws the weights of all linear maps inside the mixers with a deviation of ``scale / sqrt(inputs)``."""
    for block in model.blocks:
        for module in block.mixer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))


def _first_difference(saved: dict[str, Any], given: dict[str, Any]) -> str:
    for key in saved:
        if saved[key] != given.get(key):
            return f"{key} is {saved[key]!r} there and {given.get(key)!r} here"
    return "some keys are missing there"
