"""Lightning modules: what is trained, with which loss."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ..kernels import linear_cross_entropy
from ..kernels.linear_cross_entropy import default_chunk_size
from ..models.config import ModelConfig
from ..models.conversion import first_not_finite
from ..models.decoder import MemoryLM
from .carried import CarriedStates
from .data.batches import TokenBatch, refuse_processes
from .data.mqar import IGNORE_INDEX, accuracy_per_example
from .optim import OptimizerConfig, build_optimizer, lr_factor
from .sizes import check_sizes, draw_sizes, step_generator
from .stopping import way_on

logger = logging.getLogger(__name__)

DEFAULT_OPTIMIZER = OptimizerConfig()
_RATES = ("lr", "weight_decay", "beta1", "beta2", "eps")  # settings that a checkpoint of AdamW brings along

# Dimensions: B rows, T tokens, C positions of a chunk, M model width, V vocabulary


class LanguageModelModule(LightningModule):
    """A `MemoryLM` trained with cross-entropy on the labelled positions of each batch.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy`` (mean over examples of the share of labelled positions
    answered right) and the same for test. Logits exist for some positions at a time only, see
    `memzoo.kernels.linear_cross_entropy`.

    Args:
        config: the model.
        optimizer: optimiser and schedule.
        mixer_init_scale: draw the linear maps of the mixers from N(0, (scale / sqrt(inputs))^2) instead of
            each mixer's own law. Many mixers follow papers whose 0.02 suits a width of a thousand; a model of
            width 64 barely learns from there and wants 1.0.
        recompute: run each block again in the backward pass instead of keeping what it computed: less memory,
            one more forward pass of the blocks, the same numbers.
        carry_state: begin each row of a batch with the memory that the same row of the batch before has ended
            with, without gradient, unless the batch says that the row begins anew. Needs contiguous data and
            one process. Every validation begins with empty memories.
        sizes: size -> smallest and largest: every training step draws one for all layers (`window_size`,
            `num_sinks`, `chunk_size`), so that the model works with any. Validation has those of the config.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        mixer_init_scale: float | None = None,
        recompute: bool = False,
        carry_state: bool = False,
        sizes: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        if mixer_init_scale is not None and not 0 < mixer_init_scale < math.inf:
            raise ValueError(
                f"mixer_init_scale must be positive and finite, got {mixer_init_scale}. "
                "Leave it out for none."
            )
        self.config = config
        self.optimizer_config = optimizer
        self.model = MemoryLM(config)
        self.model.gradient_checkpointing = recompute
        self.carried = CarriedStates() if carry_state else None
        self.sizes = sizes or {}
        check_sizes("model", self.sizes)
        if self.sizes and carry_state:
            raise ValueError(
                f"sizes that change from step to step ({', '.join(self.sizes)}) do not fit a memory that "
                "goes on from batch to batch. Leave out sizes or carry_state."
            )
        if mixer_init_scale is not None:
            init_mixers(self.model, mixer_init_scale)

    def setup(self, stage: str) -> None:
        """Refuses several processes where states are carried.

        Raises:
            ValueError: ``carry_state`` in more than one process.
        """
        if self.carried is not None:
            refuse_processes(self.trainer, "batches that go on, as carry_state needs them,")

    def forward(self, batch: TokenBatch, split: str = "train") -> Tensor:
        """What the head reads, (B, T, M); carries the memory of ``split`` where that is asked for."""
        state = None if self.carried is None else self.carried.before(split, batch, self.model)
        sizes = {}
        if self.sizes and split == "train":
            sizes = draw_sizes(self.sizes, step_generator(0, self.global_step))
        out = self.model(
            batch.input_ids,
            state,
            mask=batch.mask,
            cu_seqlens=batch.cu_seqlens,
            overrides=sizes,
            return_state=self.carried is not None,
            return_hidden_states="last",
            last_only=True,
        )
        if self.carried is not None:
            self.carried.after(split, out.state)
        hidden: Tensor = out.hidden_states[0]
        return hidden

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """The mean cross-entropy over the labelled positions, in float32; 0 where there is none."""
        hidden = self(batch)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), self.model.head_weight, batch.labels.flatten(), ignore_index=IGNORE_INDEX
        )
        self.log("train_loss", loss, prog_bar=True, batch_size=int(batch.num_labels()))
        return loss

    def on_validation_start(self) -> None:
        """Every validation begins with empty memories."""
        if self.carried is not None:
            self.carried.drop("val")

    def on_test_start(self) -> None:
        """Every test begins with empty memories."""
        if self.carried is not None:
            self.carried.drop("test")

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
        """Adds the settings, and the carried memory, as plain data.

        Raises:
            ValueError: a weight is not finite; the checkpoints that are there stay.
        """
        broken = first_not_finite(self.named_parameters())
        if broken is not None:
            raise ValueError(
                f"the weight {broken.removeprefix('model.')} is not finite after step "
                f"{self.trainer.global_step}, so nothing is saved{way_on(self.trainer, None)}, with a lower "
                "model.optimizer.lr or trainer.gradient_clip_val."
            )
        # Plain data, so that checkpoints load with weights_only=True.
        checkpoint["memzoo"] = {"config": self.config.to_dict(), "optimizer": asdict(self.optimizer_config)}
        if self.carried is not None:
            checkpoint["memzoo"]["carried"] = self.carried.to_plain()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the carried memory over, and refuses the checkpoint of another model.

        An optimiser of other settings goes on with those given here, not with those in the checkpoint.

        Raises:
            ValueError: the message names the first difference.
        """
        own = checkpoint.get("memzoo", {})
        saved = own.get("config")
        if saved is not None and saved != self.config.to_dict():
            raise ValueError(
                f"the checkpoint holds another model ({_first_difference(saved, self.config.to_dict())}). "
                "Resume with the configuration that lies beside the checkpoint."
            )
        if self.carried is not None:
            self.carried.load_plain(own.get("carried", {}))
        is_fit = self._trainer is not None and self._trainer.state.fn == "fit"
        if is_fit and own.get("optimizer"):
            self._take_rates(checkpoint, own["optimizer"])

    def _take_rates(self, checkpoint: dict[str, Any], saved: dict[str, Any]) -> None:
        """Writes the rates given here into the optimiser of a checkpoint that was written with others."""
        given = asdict(self.optimizer_config)
        changed = [name for name in _RATES if saved.get(name) != given[name]]
        if not changed:
            return
        fresh = build_optimizer(self.model.parameters(), self.optimizer_config).param_groups
        (optimizer,), (schedule,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        for old, new in zip(optimizer["param_groups"], fresh, strict=True):
            old["lr"] *= new["lr"] / old["initial_lr"]
            old["initial_lr"] = new["lr"]
            old |= {name: new[name] for name in ("weight_decay", "betas", "eps")}
        schedule["base_lrs"] = [group["initial_lr"] for group in optimizer["param_groups"]]
        told = ", ".join(f"{name} {given[name]} instead of {saved.get(name)}" for name in changed)
        logger.warning("the run goes on with another optimizer than its checkpoint: %s", told)

    @torch.no_grad()
    def _evaluate(self, batch: TokenBatch, split: str) -> None:
        hidden = self(batch, split)
        asked = batch.labels != IGNORE_INDEX  # (B, T)
        targets = batch.labels[asked]  # (n,)
        if not len(targets):
            return
        total, answers = hidden.new_zeros((), dtype=torch.float32), []
        size = default_chunk_size(self.config.vocab_size)
        for part, wanted in zip(hidden[asked].split(size), targets.split(size), strict=True):
            logits = self.model.head(part).float()  # (C, V)
            total += F.cross_entropy(logits, wanted, reduction="sum")
            answers.append(logits.argmax(-1))
        predictions = torch.full_like(batch.labels, IGNORE_INDEX)
        predictions[asked] = torch.cat(answers)
        accuracy = accuracy_per_example(predictions, batch.labels)  # (B',)
        loss = total / len(targets)
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=len(targets), sync_dist=True)
        self.log(
            f"{split}_accuracy", accuracy.mean(), prog_bar=True, batch_size=len(accuracy), sync_dist=True
        )


def planned_steps(trainer: Trainer) -> int:
    """Optimiser steps of the whole run.

    Lightning's own estimate would set up the loaders before a checkpoint can restore their position, and a
    resumed run would read its epoch from the start again.

    Raises:
        ValueError: the run has no end, or steps of no batch.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches must be at least 1, got {trainer.accumulate_grad_batches}."
        )
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
