"""Synthetic memory tasks at the level of tokens, for models trained from scratch.

Each task is a frozen config that says in its docstring what a row looks like. `draw` makes examples from it:
a pure function of the config and a random generator, without files and without a network. The answers are
determined by the tokens before them, and a task can be drawn at any length.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from .associative_retrieval import AssociativeRetrievalTask
from .base import Setting, Task, TaskExamples, config_from
from .copying import CopyingTask
from .multi_document_recall import MultiDocumentRecallTask
from .needle import NeedleTask
from .recall import MQARTask
from .variable_tracking import VariableTrackingTask

TASKS: dict[str, type[Task]] = {
    "associative_retrieval": AssociativeRetrievalTask,
    "copying": CopyingTask,
    "mqar": MQARTask,
    "multi_document_recall": MultiDocumentRecallTask,
    "needle": NeedleTask,
    "variable_tracking": VariableTrackingTask,
}

SPLITS = ("train", "val", "test", "evaluate")

__all__ = [
    "SPLITS",
    "TASKS",
    "AssociativeRetrievalTask",
    "CopyingTask",
    "MQARTask",
    "MultiDocumentRecallTask",
    "NeedleTask",
    "Setting",
    "Task",
    "TaskExamples",
    "VariableTrackingTask",
    "draw",
    "make_task",
    "split_rng",
]


def draw(config: Task, rng: np.random.Generator, num_examples: int) -> tuple[Tensor, Tensor]:
    """Draw examples of a task; `Task.examples` tells where the evidence stood as well.

    Args:
        config: the task.
        rng: the only source of chance, for example `split_rng(0, "train", 0, 0)`.
        num_examples: examples (N).

    Returns:
        inputs (N, L) and labels (N, L), int64; labels are the answers, -100 where nothing is asked.
    """
    drawn = config.examples(rng, num_examples)
    return drawn.inputs, drawn.labels


def make_task(settings: Mapping[str, Setting], *, seq_len: int) -> Task:
    """A task from plain data.

    Args:
        settings: ``{type: ..., ...}``, without the length.
        seq_len: tokens per example.

    Raises:
        ValueError: unknown type or key (the nearest is suggested), or settings that do not fit.
    """
    return config_from(settings, seq_len=seq_len, types=TASKS)


def split_rng(seed: int, split: str, first: int, second: int) -> np.random.Generator:
    """A fresh generator for one batch, or one example, of one split.

    Args:
        seed: seed of the data.
        split: one of `SPLITS`; the splits share no generator.
        first, second: epoch and index of a batch; length and number of an example in an evaluation.
    """
    return np.random.default_rng([seed, SPLITS.index(split), first, second])
