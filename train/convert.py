"""Conversion from a pretrained model to a hybrid, with the control that says whether its memory earns its
place.

One recipe: surgery, alignment of each new mixer with the attention it replaces, low-rank tune of the whole
model. The control goes through the same tokens in the same order with the same number of trainable
parameters, but has no memory: its mixers are a window with the same sinks, and all of its steps are low-rank
tune.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..models.conversion import ParityReport, check_parity, convert_mixers, memory_off
from ..models.decoder import MemoryLM
from .callbacks import TrainingProgress
from .comparison import Row
from .data.batches import TokenBatch
from .data.documents import encode_documents
from .data.text import TextDataModule
from .data.texts import load_text
from .distillation import (
    AlignmentModule,
    DistillModule,
    TeacherReadings,
    freeze_except,
    lora_size,
    low_rank_updates,
    scaled_rates,
)
from .evaluate import position_losses
from .optim import OptimizerConfig
from .recipe import ConversionRecipe, window_only

logger = logging.getLogger(__name__)

# of the comparison: tokens per window, and the token of each book at which the first window starts
WINDOW_SIZE = 1024
FIRST_TOKEN = 8192


@dataclass
class Conversion:
    """A converted model with what is known about it.

    Attributes:
        model: the hybrid, in the dtype of its source.
        report: what the surgery did and its parity checks.
        num_trained: numbers that were trained in any stage.
        num_tokens: tokens of training text read.
        seconds: duration of each stage; the control shares what the teacher made of the text.
    """

    model: MemoryLM
    report: ParityReport
    num_trained: int
    num_tokens: int
    seconds: dict[str, float]


def run_recipe(
    teacher: MemoryLM,
    tokenizer: str,
    recipe: ConversionRecipe,
    *,
    progress: bool = True,
    accelerator: str = "auto",
    readings: TeacherReadings | None = None,
) -> Conversion:
    """Surgery and both stages.

    Args:
        teacher: the pretrained model (float32 or bfloat16); it is not changed.
        tokenizer: folder or .gguf file of its tokenizer.
        progress: show a progress bar.
        accelerator: where to train, as Lightning names it.
        readings: of this teacher in the run of the control, to be shared with it.

    Raises:
        ValueError: a target or layers that do not fit the teacher, or text too short for one window.
    """
    seed_everything(recipe.seed, verbose=False)
    stages = _Stages(tokenizer, recipe, progress, accelerator, readings)
    student, report = convert_mixers(teacher, recipe.target, recipe.layers)
    check_parity(teacher, student, report, stages.first_window())
    report.raise_on_failure()
    frozen_teacher = copy.deepcopy(teacher).to(torch.bfloat16)
    student, fresh = student.to(torch.bfloat16), list(report.new_parameters)

    clock = time.monotonic()
    num_new = freeze_except(student, fresh)
    if fresh:
        optimizer = _optimizer(recipe.align_lr, recipe.align_steps)
        module = AlignmentModule(student, frozen_teacher, report.layers, optimizer)
        stages.fit(module, recipe.align_steps, "align")
    seconds = {"align": time.monotonic() - clock}

    clock = time.monotonic()
    stages.tune(
        student,
        frozen_teacher,
        rank=recipe.lora_rank,
        steps=recipe.tune_steps,
        also_train=fresh if recipe.new_lr_scale else [],
        name="tune",
    )
    seconds["tune"] = time.monotonic() - clock
    is_new_trained = recipe.align_steps or (recipe.tune_steps and recipe.new_lr_scale)
    rank = recipe.lora_rank if recipe.tune_steps else 0
    return Conversion(
        model=student.to(teacher.embed_tokens.weight.dtype).requires_grad_(True),
        report=report,
        num_trained=(num_new if is_new_trained else 0) + rank * lora_size(student, recipe.lora_targets),
        num_tokens=(recipe.align_steps + recipe.tune_steps) * recipe.batch_size * recipe.seq_len,
        seconds=seconds,
    )


def run_control(
    teacher: MemoryLM,
    tokenizer: str,
    recipe: ConversionRecipe,
    num_trained: int,
    *,
    progress: bool = True,
    accelerator: str = "auto",
    readings: TeacherReadings | None = None,
) -> Conversion:
    """The same budget without a memory: window and sinks of the recipe's target, low-rank tune over all of
    its steps.

    Args:
        num_trained: trainable numbers to match (rounded to the nearest rank).
        progress, accelerator, readings: as in `run_recipe`.
    """
    seed_everything(recipe.seed, verbose=False)
    student, report = convert_mixers(teacher, window_only(recipe.target), recipe.layers)
    frozen_teacher = copy.deepcopy(teacher).to(torch.bfloat16)
    student = student.to(torch.bfloat16)
    per_rank = lora_size(student, recipe.lora_targets)
    rank = max(1, round(num_trained / per_rank))
    steps = recipe.align_steps + recipe.tune_steps
    clock = time.monotonic()
    stages = _Stages(tokenizer, recipe, progress, accelerator, readings)
    stages.tune(student, frozen_teacher, rank=rank, steps=steps, name="tune of the control")
    return Conversion(
        model=student.to(teacher.embed_tokens.weight.dtype).requires_grad_(True),
        report=report,
        num_trained=rank * per_rank,
        num_tokens=steps * recipe.batch_size * recipe.seq_len,
        seconds={"tune": time.monotonic() - clock},
    )


class _Stages:
    """Training stages over one text; each goes on where the one before it stopped."""

    def __init__(
        self,
        tokenizer: str,
        recipe: ConversionRecipe,
        progress: bool,
        accelerator: str,
        readings: TeacherReadings | None,
    ) -> None:
        self.recipe, self.progress, self.accelerator = recipe, progress, accelerator
        self.readings = readings
        self.data = TextDataModule(
            texts=tuple(recipe.texts),
            files=tuple(recipe.files),
            tokenizer=tokenizer,
            seq_len=recipe.seq_len,
            batch_size=recipe.batch_size,
            reset_at_documents=False,
            append_eos=False,
            seed=recipe.seed,
        )
        self.data.setup()
        self.num_steps = 0

    def first_window(self) -> Tensor:
        """(1, T) ids of the first window of training."""
        batch: TokenBatch = next(iter(self.data.train_dataloader()))
        return batch.input_ids[:1]

    def tune(
        self,
        student: MemoryLM,
        teacher: MemoryLM,
        *,
        rank: int,
        steps: int,
        name: str,
        also_train: Sequence[str] = (),
    ) -> None:
        """Stage 2: low-rank updates and the named parameters, against the teacher's distribution."""
        recipe = self.recipe
        with (
            scaled_rates(student, also_train, recipe.new_lr_scale),
            low_rank_updates(
                student, rank=rank, alpha=2 * rank, targets=recipe.lora_targets, also_train=also_train
            ) as (wrapped, _),
        ):
            optimizer = _optimizer(recipe.tune_lr, steps)
            module = DistillModule(
                wrapped, teacher, optimizer, recipe.kl_weight, recipe.ce_weight, self.readings
            )
            self.fit(module, steps, name)

    def fit(self, module: LightningModule, steps: int, name: str) -> None:
        """Trains for so many steps; none leaves everything as it is."""
        if not steps:
            return
        loader = self.data.train_dataloader()
        loader.load_state_dict({"num_yielded": self.num_steps})
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator=self.accelerator,
            devices=1,
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=self.progress,
            callbacks=[TrainingProgress(refresh_rate=1, name=name)] if self.progress else None,
        )
        module.train()
        trainer.fit(module, train_dataloaders=loader)
        module.eval()
        module.trainer = None  # the module outlives the trainer
        self.num_steps += steps


def check_accelerator(name: str) -> None:
    """Raises ValueError for an accelerator that Lightning does not know or this machine does not have."""
    try:
        Trainer(
            accelerator=name,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
    except (ValueError, MisconfigurationException) as error:
        raise ValueError(f"accelerator {name!r} cannot be used: {error} Use auto or cpu.") from error


def _optimizer(lr: float, steps: int) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, weight_decay=0.0, warmup_steps=min(10, steps // 10))


def training_results(hybrid: Conversion, control: Conversion | None) -> dict[str, Any]:
    """Seconds of each stage and tokens read, for a record."""
    found = {"hybrid": hybrid} | ({} if control is None else {"control": control})
    return {
        "stage_seconds": {name: conversion.seconds for name, conversion in found.items()},
        "tokens_read": {name: conversion.num_tokens for name, conversion in found.items()},
    }


def convert_and_compare(
    teacher: MemoryLM,
    tokenizer: str,
    recipe: ConversionRecipe,
    *,
    tokens: Mapping[str, Tensor],
    num_windows: int = 8,
    window_size: int = WINDOW_SIZE,
    first_token: int = FIRST_TOKEN,
    with_control: bool = True,
    progress: bool = True,
    accelerator: str = "auto",
    on_trained: Callable[[str, Conversion], None] = lambda name, conversion: None,
) -> tuple[list[Row], Conversion, Conversion | None]:
    """Converts by a recipe and measures teacher, windows, control and hybrid on the same windows, in
    bfloat16.

    Args:
        tokenizer: folder or .gguf file of the tokenizer.
        tokens: book -> (L,) ids.
        num_windows, window_size, first_token: windows of each book, from `first_token` on.
        on_trained: called with ("hybrid", ...) and ("control", ...) as soon as each is trained.

    Returns:
        the rows in the order of the table, the hybrid, and the control if one was trained.
    """
    rows: list[Row] = []

    def measure(name: str, model: MemoryLM, num_trained: int = 0) -> None:
        low = copy.deepcopy(model).to(torch.bfloat16).eval()
        losses = {}
        with tqdm(
            desc=name,
            unit="window",
            total=num_windows * len(tokens),
            disable=not (progress and tokens),
            leave=False,
        ) as line:
            for book, ids in tokens.items():
                losses[book] = position_losses(
                    low,
                    ids,
                    window_size=window_size,
                    num_windows=num_windows,
                    first_token=first_token,
                    on_window=lambda done, total: line.update(),
                )
        rows.append(Row(name, model.config, losses, num_trained))
        if losses:
            logger.info("%s: perplexity %s", name, {b: round(x.perplexity, 2) for b, x in losses.items()})

    window = window_only(recipe.target)
    size, sinks = window["window_size"], window["num_sinks"]
    measure("teacher, full attention", teacher)
    measure(f"window {size}", convert_mixers(teacher, window_only(recipe.target, 0), recipe.layers)[0])
    if sinks:
        measure(
            f"window {size} + {sinks} sinks",
            convert_mixers(teacher, window, recipe.layers)[0],
        )
    seed_everything(recipe.seed, verbose=False)
    measure("hybrid before training", convert_mixers(teacher, recipe.target, recipe.layers)[0])
    training: dict[str, Any] = {"progress": progress, "accelerator": accelerator}
    if with_control:
        training["readings"] = TeacherReadings()
    hybrid = run_recipe(teacher, tokenizer, recipe, **training)
    on_trained("hybrid", hybrid)
    measure("hybrid", hybrid.model, hybrid.num_trained)
    with memory_off(hybrid.model):
        measure("hybrid, memory branch off", hybrid.model, hybrid.num_trained)
    control = None
    if with_control:
        control = run_control(teacher, tokenizer, recipe, hybrid.num_trained, **training)
        on_trained("control", control)
        measure("control: window + sinks, same budget", control.model, control.num_trained)
    return rows, hybrid, control


def book_tokens(tokenizer: Any, name: str) -> Tensor:
    """Ids (L,) of the first document of a bundled text."""
    (ids,) = encode_documents(tokenizer, [load_text(name)[0].text])
    return torch.from_numpy(ids)
