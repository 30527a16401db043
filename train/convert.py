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
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..layers.contract import suggest
from ..layers.registry import mixer_entry
from ..models.config import ModelConfig
from ..models.conversion import ParityReport, check_parity, convert_mixers, converted_config
from ..models.decoder import MemoryLM
from .callbacks import TrainingProgress
from .comparison import Row
from .data.batches import TokenBatch
from .data.text import TextDataModule, check_text_file, encode_documents
from .data.texts import load_text
from .distillation import (
    AlignmentModule,
    DistillModule,
    freeze_except,
    lora_size,
    low_rank_updates,
    scaled_rates,
)
from .evaluate import position_losses
from .optim import OptimizerConfig

logger = logging.getLogger(__name__)

# of the comparison: tokens per window, and the token of each book at which the first window starts
WINDOW_SIZE = 1024
FIRST_TOKEN = 8192


@dataclass(frozen=True, kw_only=True)
class ConversionRecipe:
    """A staged conversion, as data.

    Attributes:
        target: the new mixer, `{type: ..., ...}`; heads and positions come from the attention it replaces.
        layers: blocks to convert; None converts all.
        texts: bundled training texts, by name; state_of_the_union where no files are given either.
        files: local training texts.
        seq_len: tokens of one window of text.
        batch_size: windows per step.
        align_steps: steps of stage 1, which trains only parameters that the source does not have.
        align_lr: peak learning rate of stage 1.
        tune_steps: steps of stage 2, which trains low-rank updates and the new parameters.
        tune_lr: peak learning rate of stage 2.
        new_lr_scale: rate of the new parameters in stage 2 as a multiple of tune_lr; 0 freezes them.
        lora_rank: rank of the updates of the hybrid; the control gets the rank that matches its budget.
        lora_targets: projections that are updated.
        kl_weight: weight of the divergence from the teacher in stage 2.
        ce_weight: weight of the cross-entropy of the next token in stage 2.
        seed: of initialisation and data order.
    """

    target: Mapping[str, Any] = field(
        default_factory=lambda: {
            "type": "lolcats",
            "window_size": 64,
            "num_sinks": 4,
            "feature_dim": 64,
            "is_affine": True,
            "initial_window_share": 0.99,
        }
    )
    layers: Sequence[int] | None = None
    texts: Sequence[str] = ()
    files: Sequence[str] = ()
    seq_len: int = 1024
    batch_size: int = 1
    align_steps: int = 40
    align_lr: float = 1e-2
    tune_steps: int = 110
    tune_lr: float = 1e-3
    new_lr_scale: float = 10.0
    lora_rank: int = 16
    lora_targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.target, Mapping):
            raise ValueError(
                f"the target of a conversion must be a mapping with a type, got {self.target!r}. "
                "Write {type: ..., ...}."
            )
        if "type" not in self.target:
            raise ValueError(f"the target of a conversion needs a type, got the keys {sorted(self.target)}.")
        for name in ("seq_len", "batch_size", "align_steps", "tune_steps", "lora_rank", "seed"):
            value, least = getattr(self, name), int(name in ("seq_len", "batch_size"))
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for name in ("align_lr", "tune_lr", "new_lr_scale", "kl_weight", "ce_weight"):
            value, is_rate = getattr(self, name), name.endswith("_lr")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < 0 or (is_rate and value == 0):
                range_of = "a positive number" if is_rate else "a number of at least 0"
                # YAML reads 1e-3, without a point, as text
                raise ValueError(f"{name} must be {range_of}, got {value!r}. Write it as 0.001 or 1.0e-3.")
        if not self.kl_weight + self.ce_weight:
            raise ValueError("kl_weight and ce_weight must not both be 0. Leave them out for 1 and 0.")
        for name in ("texts", "files", "lora_targets"):
            value = getattr(self, name)
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            if not is_list or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} must be a list of names, got {value!r}. Write {name}: [NAME, ...].")
        if isinstance(self.layers, Sequence) and not self.layers:
            raise ValueError("layers must name a block, got []. Leave layers out to convert all.")
        if not self.texts and not self.files:
            object.__setattr__(self, "texts", ("state_of_the_union",))


@dataclass
class Conversion:
    """A converted model with what is known about it.

    Attributes:
        model: the hybrid, in the dtype of its source.
        report: what the surgery did and its parity checks.
        num_trained: numbers that were trained in any stage.
        num_tokens: tokens of training text read.
        seconds: duration of each stage.
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
) -> Conversion:
    """Surgery and both stages.

    Args:
        teacher: the pretrained model (float32 or bfloat16); it is not changed.
        tokenizer: folder or .gguf file of its tokenizer.
        progress: show a progress bar.

    Raises:
        ValueError: a target or layers that do not fit the teacher, or text too short for one window.
    """
    seed_everything(recipe.seed, verbose=False)
    stages = _Stages(tokenizer, recipe, progress, accelerator)
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
) -> Conversion:
    """The same budget without a memory: window and sinks of the recipe's target, low-rank tune over all of
    its steps.

    Args:
        num_trained: trainable numbers to match (rounded to the nearest rank).
    """
    seed_everything(recipe.seed, verbose=False)
    student, report = convert_mixers(teacher, window_only(recipe.target), recipe.layers)
    frozen_teacher = copy.deepcopy(teacher).to(torch.bfloat16)
    student = student.to(torch.bfloat16)
    per_rank = lora_size(student, recipe.lora_targets)
    rank = max(1, round(num_trained / per_rank))
    steps = recipe.align_steps + recipe.tune_steps
    clock = time.monotonic()
    stages = _Stages(tokenizer, recipe, progress, accelerator)
    stages.tune(student, frozen_teacher, rank=rank, steps=steps, name="tune of the control")
    return Conversion(
        model=student.to(teacher.embed_tokens.weight.dtype).requires_grad_(True),
        report=report,
        num_trained=rank * per_rank,
        num_tokens=steps * recipe.batch_size * recipe.seq_len,
        seconds={"tune": time.monotonic() - clock},
    )


def window_only(target: Mapping[str, Any], num_sinks: int | None = None) -> dict[str, Any]:
    """The memoryless mixer with the window and the sinks of a target, defaults of its type included.

    Raises:
        ValueError: an unknown type, or one without a window.
    """
    entry = mixer_entry(str(target.get("type")))
    values = {item.name: item.default for item in fields(entry.config)} | {**entry.preset, **target}
    if not isinstance(values.get("window_size"), int):
        raise ValueError(
            f"the target {dict(target)} has no window_size, which the rows without memory and the control "
            "are made from. Add window_size, or choose a mixer that has one, such as lolcats."
        )
    sinks = values.get("num_sinks", 0) if num_sinks is None else num_sinks
    return {"type": "sliding_window", "window_size": values["window_size"], "num_sinks": sinks}


class _Stages:
    """Training stages over one text; each goes on where the one before it stopped."""

    def __init__(self, tokenizer: str, recipe: ConversionRecipe, progress: bool, accelerator: str) -> None:
        self.recipe, self.progress, self.accelerator = recipe, progress, accelerator
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
            module = DistillModule(wrapped, teacher, optimizer, recipe.kl_weight, recipe.ce_weight)
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


def _optimizer(lr: float, steps: int) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, weight_decay=0.0, warmup_steps=min(10, steps // 10))


def training_results(hybrid: Conversion, control: Conversion | None) -> dict[str, Any]:
    """Seconds of each stage and tokens read, for a record."""
    found = {"hybrid": hybrid} | ({} if control is None else {"control": control})
    return {
        "stage_seconds": {name: conversion.seconds for name, conversion in found.items()},
        "tokens_read": {name: conversion.num_tokens for name, conversion in found.items()},
    }


def recipe_dict(recipe: ConversionRecipe) -> dict[str, Any]:
    """The recipe as plain data for a record."""
    return asdict(recipe) | {"target": dict(recipe.target)}


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
    hybrid = run_recipe(teacher, tokenizer, recipe, progress=progress, accelerator=accelerator)
    on_trained("hybrid", hybrid)
    measure("hybrid", hybrid.model, hybrid.num_trained)
    with memory_off(hybrid.model):
        measure("hybrid, memory branch off", hybrid.model, hybrid.num_trained)
    control = None
    if with_control:
        control = run_control(
            teacher, tokenizer, recipe, hybrid.num_trained, progress=progress, accelerator=accelerator
        )
        on_trained("control", control)
        measure("control: window + sinks, same budget", control.model, control.num_trained)
    return rows, hybrid, control


@contextmanager
def memory_off(model: MemoryLM) -> Iterator[None]:
    """Leaves the memory branch out of every mixer that has one; windows and sinks go on.

    Raises:
        ValueError: no mixer of the model has a memory that can be switched off.
    """
    switched = [block.mixer for block in model.blocks if getattr(block.mixer, "memory_enabled", False)]
    if not switched:
        raise ValueError(
            "no mixer of this model has a memory branch that can be switched off. "
            "Use mixers that have one, such as lolcats."
        )
    for mixer in switched:
        mixer.memory_enabled = False  # type: ignore[assignment]  # a switch of the mixers that have it
    try:
        yield
    finally:
        for mixer in switched:
            mixer.memory_enabled = True  # type: ignore[assignment]


def read_recipe(name: str, **changes: Any) -> ConversionRecipe:
    """A shipped recipe by name, or one from a YAML file; `changes` that are not None replace fields.

    Raises:
        ValueError: no such recipe, an unknown key (the nearest is suggested), or a value out of range.
    """
    from .. import configs

    path = (
        Path(name) if Path(name).suffix in (".yaml", ".yml") else configs.find(f"convert/{name}", "convert")
    )
    if not path.is_file():
        raise ValueError(
            f"there is no recipe file {name!r} (looked in {Path.cwd()}). Check the path. "
            f"{configs.suggestion(name, 'convert')}"
        )
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold a mapping of recipe fields, got {type(values).__name__}.")
    known = {item.name for item in fields(ConversionRecipe)}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in recipe {name}. {suggest(str(key), known)}")
    return ConversionRecipe(
        **{**values, **{key: value for key, value in changes.items() if value is not None}}
    )


def check_recipe(recipe: ConversionRecipe, source: ModelConfig) -> None:
    """Refuses a recipe that does not fit a model, before any work: all its models are built without weights.

    Args:
        source: the config of the model to convert.

    Raises:
        ValueError: layers outside the model, a target that is no valid mixer or lacks a window or a memory
            that can be switched off or has other heads than the model, projections that no layer has,
            training windows that never leave the window of the mixer, or a training text that is not there.
    """
    memoryless = window_only(recipe.target)
    window = MemoryLM(converted_config(source, memoryless, recipe.layers), device="meta")
    for index in range(source.depth) if recipe.layers is None else recipe.layers:
        replaced = source.mixers[index].to_dict()
        for name in ("d_model", "num_heads", "num_kv_heads", "head_dim"):
            if name in recipe.target and recipe.target[name] != replaced.get(name):
                raise ValueError(
                    f"the target has {name}={recipe.target[name]!r}, the attention of layer {index} has "
                    f"{replaced.get(name)!r}. Leave {name} out to inherit it."
                )
    hybrid = MemoryLM(converted_config(source, recipe.target, recipe.layers), device="meta")
    with memory_off(hybrid):
        pass
    linear = {
        name.rpartition(".")[2] for name, module in hybrid.named_modules() if isinstance(module, nn.Linear)
    }
    for name in recipe.lora_targets:
        if name not in linear:
            raise ValueError(
                f"lora_targets: the converted model has no linear layer {name!r}. {suggest(name, linear)}"
            )
    if not lora_size(window, recipe.lora_targets):
        raise ValueError(
            f"lora_targets {list(recipe.lora_targets)} name no linear layer of the control, which could then "
            "not be tuned. Add a projection of its attention, such as q_proj."
        )
    reach = memoryless["window_size"] + memoryless["num_sinks"]
    if recipe.seq_len <= reach:
        raise ValueError(
            f"seq_len must be above window_size + num_sinks = {reach}, got {recipe.seq_len}: no token would "
            "ever reach the memory."
        )
    for name in recipe.texts:
        load_text(name)
    for file in recipe.files:
        check_text_file(file)


def book_tokens(tokenizer: Any, name: str) -> Tensor:
    """Ids (L,) of the first document of a bundled text."""
    (ids,) = encode_documents(tokenizer, [load_text(name)[0].text])
    return torch.from_numpy(ids)
