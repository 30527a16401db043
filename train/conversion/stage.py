"""One stage of one run: it goes on after a kill where it stopped, and leaves its weights in a sealed folder.

STAGE/                  weights, history and stage.json, once the stage is done
STAGE.running/          its last checkpoint until then
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from ...models.checkpoints.errors import CheckpointError
from ...models.checkpoints.files import read_json, verify_folder, write_folder
from ...models.checkpoints.safetensors_files import read_safetensors, write_safetensors_in_place
from ...models.decoder import MemoryLM
from ..callbacks import ExactResume, StopOnSignal, TrainingProgress
from ..checkpointing import FolderCheckpointIO, newest_checkpoint
from ..data.batches import BatchSource, ResumableLoader, TokenBatch
from ..data.mqar import IGNORE_INDEX
from ..stopping import RunEnded
from .modules import AlignmentModule, Capacity, DistillModule, StudentModule, as_tensors
from .recipe_stage import Stage
from .teacher import TeacherReadings
from .updates import freeze_except, linear_layers, lora_size, low_rank_updates, scaled_rates

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "weights.safetensors"
HISTORY_NAME = "history.safetensors"
FACTS_NAME = "stage.json"
SAVE_SECONDS = 60.0
_TRIED = 16  # batches that are searched for a label


@dataclass(frozen=True)
class Segment:
    """Consecutive batches of one size.

    Attributes:
        seq_len, batch_size: of a batch.
        first: number of the first of them in the order of the text.
        num_batches: how many.
    """

    seq_len: int
    batch_size: int
    first: int
    num_batches: int


class SegmentBatches(BatchSource):
    """Batches of several segments, one after another.

    Args:
        segments: what to read.
        sources: (seq_len, batch_size) -> all batches of that size; read again when they run out.
    """

    def __init__(self, segments: Sequence[Segment], sources: Callable[[int, int], BatchSource]) -> None:
        self.parts = [(segment, sources(segment.seq_len, segment.batch_size)) for segment in segments]

    @property
    def num_batches(self) -> int:
        return sum(segment.num_batches for segment, _ in self.parts)

    def batch(self, epoch: int, index: int) -> TokenBatch:
        for segment, source in self.parts:
            if index < segment.num_batches:
                return source.batch(*divmod(segment.first + index, source.num_batches))
            index -= segment.num_batches
        raise IndexError(f"there are {self.num_batches} batches.")


@dataclass
class StageFacts:
    """What a stage did.

    Attributes:
        name: of the stage.
        steps, num_tokens: optimiser steps and tokens of text.
        trained: parameter -> numbers that were trained in place.
        num_low_rank: numbers in its low-rank updates.
        seconds: duration, without what was lost in kills.
        history: figures of every step.
    """

    name: str
    steps: int
    num_tokens: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    num_low_rank: int = 0
    seconds: float = 0.0
    history: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageSettings:
    """How stages are run.

    Attributes:
        progress: show a progress line.
        accelerator: where to train, as Lightning names it.
        precision: of Lightning.
        save_seconds: time between two checkpoints inside a stage.
    """

    progress: bool = True
    accelerator: str = "auto"
    precision: str = "bf16-mixed"
    save_seconds: float = SAVE_SECONDS


def run_stage(
    stage: Stage,
    student: MemoryLM,
    teacher: MemoryLM,
    *,
    layers: Sequence[int],
    fresh: Sequence[str],
    segments: Sequence[Segment],
    sources: Callable[[int, int], BatchSource],
    folder: Path,
    seed: int,
    readings: TeacherReadings,
    settings: StageSettings,
    label: str,
) -> StageFacts:
    """Trains the student in place, or gives it the weights that the stage has left in `folder`.

    Args:
        stage: what to do; the segments hold its batches.
        teacher: the source for an alignment, the model to learn from otherwise.
        layers: blocks that were converted.
        fresh: names of the parameters that the source does not have.
        segments, sources: the text, as in `SegmentBatches`.
        folder: of the stage.
        seed: of initial updates and window dropout.
        readings: what the teacher has read.
        label: what the progress line begins with.

    Raises:
        ValueError: a stage over labelled tokens, and no labels.
    """
    if verified(folder):
        return _restore(student, folder)
    running = folder.with_name(f"{folder.name}.running")
    seed_everything(seed, verbose=False)
    names = trained_names(stage, student, layers, fresh)
    facts = StageFacts(stage.name, stage.steps)
    if stage.train == "lora":
        facts.num_low_rank = stage.lora_rank * lora_size(student, stage.lora_targets)
    with _trainable(stage, student, names) as network:
        facts.trained = {
            name: parameter.numel() for name, parameter in student.named_parameters() if name in names
        }
        module = _module(stage, network, teacher, layers, readings, seed, label)
        student.gradient_checkpointing = stage.recompute
        if facts.steps:
            batches = SegmentBatches(segments, sources)
            if not stage.counts_all:
                _check_labels(stage, batches)
            facts.seconds = _fit(module, batches, stage, running, settings, label)
        module.check_weights()
        facts.history, facts.num_tokens = module.history, module.num_tokens
    student.gradient_checkpointing = False
    touched = set(names)
    if stage.train == "lora":
        touched |= {f"{name}.weight" for name, _ in linear_layers(student, stage.lora_targets)}
    weights = {name: tensor.detach() for name, tensor in student.state_dict().items() if name in touched}
    write_folder(
        folder,
        {
            WEIGHTS_NAME: lambda path: write_safetensors_in_place(path, weights),
            HISTORY_NAME: lambda path: write_safetensors_in_place(path, as_tensors(facts.history)),
            FACTS_NAME: lambda path: _write_facts(path, facts),
        },
        extra={"kind": "conversion_stage"},
    )
    shutil.rmtree(running, ignore_errors=True)
    return facts


def verified(folder: Path) -> bool:
    """Whether a sealed folder is there and whole; of one that is damaged a warning is said."""
    try:
        return folder.is_dir() and verify_folder(folder) is not None
    except CheckpointError as error:
        logger.warning("%s This part is done again.", error)
        return False


def trained_names(stage: Stage, student: MemoryLM, layers: Sequence[int], fresh: Sequence[str]) -> list[str]:
    """Parameters of the student that a stage trains in place."""
    if stage.train == "all":
        return [name for name, _ in student.named_parameters()]
    if stage.train == "mixers":
        inside = tuple(f"layers.{index}.mixer." for index in layers)
        return [name for name, _ in student.named_parameters() if name.startswith(inside)]
    return [] if stage.train == "lora" and not stage.new_lr_scale else list(fresh)


@contextmanager
def _trainable(stage: Stage, student: MemoryLM, names: Sequence[str]) -> Iterator[nn.Module]:
    if stage.train != "lora":
        freeze_except(student, names)
        yield student
        return
    with (
        scaled_rates(student, names, stage.new_lr_scale),
        low_rank_updates(
            student, rank=stage.lora_rank, targets=stage.lora_targets, also_train=names
        ) as wrapped,
    ):
        yield wrapped


def _check_labels(stage: Stage, batches: BatchSource) -> None:
    tried = min(batches.num_batches, _TRIED)
    if not any(bool((batches.batch(0, index).labels != IGNORE_INDEX).any()) for index in range(tried)):
        raise ValueError(
            f"stage {stage.name!r} is over labelled tokens, and the first {tried} batches have none. Take "
            "data that asks for something, or set tokens: all."
        )


def _module(
    stage: Stage,
    network: nn.Module,
    teacher: MemoryLM,
    layers: Sequence[int],
    readings: TeacherReadings,
    seed: int,
    label: str,
) -> StudentModule:
    options: dict[str, Any] = {
        "window_dropout": stage.window_dropout,
        "sizes": stage.sizes,
        "counts_all": stage.counts_all,
        "seed": seed,
        "label": label,
    }
    if stage.is_alignment:
        assert isinstance(network, MemoryLM)
        return AlignmentModule(
            network, teacher, stage.optimizer, layers, stage.loss, normalize=stage.normalize, **options
        )
    capacity = None
    if stage.budget is not None:
        capacity = Capacity(stage.budget, stage.capacity_normalizer, stage.capacity_scope)
    return DistillModule(
        network, teacher, stage.optimizer, stage.loss, readings=readings, capacity=capacity, **options
    )


def _fit(
    module: StudentModule,
    batches: BatchSource,
    stage: Stage,
    running: Path,
    settings: StageSettings,
    label: str,
) -> float:
    """Trains to the end, from the last checkpoint if there is one; returns the seconds it took."""
    clock = TrainingClock()
    callbacks: list[Callback] = [clock]
    if settings.progress:
        callbacks.append(TrainingProgress(refresh_rate=1, name=label))
    # the last two save where the ModelCheckpoint says, and in no other way
    keeper = ModelCheckpoint(running, save_last=True, save_top_k=0, every_n_epochs=stage.steps + 1)
    callbacks += [ExactResume(), StopOnSignal(save_minutes=settings.save_seconds / 60), keeper]
    trainer = Trainer(
        max_steps=stage.steps,
        accumulate_grad_batches=stage.accumulate,
        max_epochs=-1,
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,
        gradient_clip_val=stage.clip,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=settings.progress,
        callbacks=callbacks,
        plugins=[FolderCheckpointIO()],
    )
    newest = newest_checkpoint(running) if running.is_dir() else None
    if newest is not None and not verified(newest):
        shutil.rmtree(running)
        newest = None
    if newest is not None:
        logger.info("%s goes on from its last checkpoint", label)
    module.train()
    try:
        trainer.fit(
            module,
            train_dataloaders=ResumableLoader(batches),
            ckpt_path=None if newest is None else str(newest),
        )
    except RunEnded as stop:
        done = f"{label} stopped after step {trainer.global_step} of {stage.steps}"
        raise RunEnded(f"{done}. Give the same command again to go on.", int(stop.code or 1)) from None
    module.eval()
    module.trainer = None  # the module outlives the trainer
    return clock.seconds


class TrainingClock(Callback):
    """Counts the seconds of training, those before a kill included.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = self._clock = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


def _write_facts(path: Path, facts: StageFacts) -> None:
    # the history of a long run is more than a JSON file here may hold
    path.write_text(json.dumps(asdict(replace(facts, history={}))), encoding="utf-8")


def _restore(student: MemoryLM, folder: Path) -> StageFacts:
    weights: dict[str, Tensor] = read_safetensors(folder / WEIGHTS_NAME)
    parameters = dict(student.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].data = tensor.to(parameters[name].device)
    history = {name: values.tolist() for name, values in read_safetensors(folder / HISTORY_NAME).items()}
    return StageFacts(**{**read_json(folder / FACTS_NAME), "history": history})
