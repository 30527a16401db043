"""Synthetic memory tasks for Lightning: fresh batches of one or several lengths, all drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lightning.pytorch import LightningDataModule

from .batches import BatchSource, ResumableLoader, TokenBatch, check_loader_settings
from .tasks import Setting, Task, draw, make_task, split_rng

_MAX_SEED = 2**32


class TaskDataModule(LightningDataModule):
    """One synthetic task as training, validation and test data.

    Every batch holds fresh examples of one length, drawn from the seed, the epoch and its own number.

    Args:
        task: ``{type: ..., ...}``, the settings of the task without its length.
        train_lengths: tokens per example in training, one length or several.
        eval_lengths: lengths for validation and test; None takes those of training.
        length_order: ``mixture`` draws the length of each batch; ``curriculum`` goes through the lengths in
            their order, each for an equal part of an epoch.
        batch_size: examples per training batch.
        eval_batch_size: examples per validation and test batch.
        num_batches: training batches per epoch.
        num_eval_examples: validation examples, and as many for the test, of each length.
        seed: seed of all examples.
        num_workers: worker processes; 0 draws in the main process.

    Raises:
        ValueError: unknown task or setting (the nearest is suggested), sizes that do not fit one another, or,
            before the first batch, a model with too small a vocabulary.
    """

    def __init__(
        self,
        task: Mapping[str, Setting],
        train_lengths: Sequence[int] = (128,),
        eval_lengths: Sequence[int] | None = None,
        length_order: Literal["mixture", "curriculum"] = "mixture",
        batch_size: int = 64,
        eval_batch_size: int = 100,
        num_batches: int = 1000,
        num_eval_examples: int = 500,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_loader_settings(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_loader_settings(batch_size=eval_batch_size, num_workers=num_workers)
        if num_batches < 1 or num_eval_examples < 1:
            raise ValueError(
                f"num_batches and num_eval_examples must be at least 1, got {num_batches} and "
                f"{num_eval_examples}."
            )
        if not 0 <= seed < _MAX_SEED:
            raise ValueError(f"seed must lie in 0 .. 2**32 - 1, got {seed}.")
        self.train_tasks = tasks_of_lengths(task, train_lengths)
        self.eval_tasks = self.train_tasks if eval_lengths is None else tasks_of_lengths(task, eval_lengths)
        self.length_order = length_order
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_batches, self.num_eval_examples = num_batches, num_eval_examples
        self.seed, self.num_workers = seed, num_workers

    @property
    def vocab_size(self) -> int:
        """Tokens of the task."""
        return self.train_tasks[0].vocab_size

    @property
    def seq_len(self) -> int:
        """Tokens of the longest training examples, which decide how much memory a step needs."""
        return max(task.seq_len for task in self.train_tasks)

    def setup(self, stage: str | None = None) -> None:
        config = getattr(getattr(self.trainer, "lightning_module", None), "config", None)
        given = getattr(config, "vocab_size", self.vocab_size)
        if given < self.vocab_size:
            raise ValueError(
                f"the task has {self.vocab_size} tokens, the model {given}. "
                f"Set model.config.vocab_size to {self.vocab_size} or more."
            )

    def train_dataloader(self) -> ResumableLoader:
        trainer = self.trainer
        return ResumableLoader(
            TrainingTaskBatches(
                self.train_tasks,
                batch_size=self.batch_size,
                num_batches=self.num_batches,
                length_order=self.length_order,
                seed=self.seed,
            ),
            num_workers=self.num_workers,
            num_processes=trainer.world_size if trainer is not None else 1,
            process_index=trainer.global_rank if trainer is not None else 0,
        )

    def val_dataloader(self) -> ResumableLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> ResumableLoader:
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> ResumableLoader:
        batches = FixedTaskBatches(
            self.eval_tasks,
            batch_size=self.eval_batch_size,
            num_examples=self.num_eval_examples,
            split=split,
            seed=self.seed,
        )
        return ResumableLoader(batches, num_workers=self.num_workers)


class TrainingTaskBatches(BatchSource):
    """Batches that are new in every epoch.

    Args:
        tasks: the task at each length.
        batch_size: examples per batch.
        num_batches: batches per epoch.
        length_order: see `TaskDataModule`.
        seed: seed of all batches.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        batch_size: int,
        num_batches: int,
        length_order: Literal["mixture", "curriculum"] = "mixture",
        seed: int = 0,
    ) -> None:
        self.tasks = tuple(tasks)
        self.batch_size = batch_size
        self.length_order = length_order
        self.seed = seed
        self._num_batches = num_batches

    @property
    def num_batches(self) -> int:
        return self._num_batches

    def batch(self, epoch: int, index: int) -> TokenBatch:
        rng = split_rng(self.seed, "train", epoch, index)
        number = int(rng.integers(len(self.tasks)))
        if self.length_order == "curriculum":
            number = index * len(self.tasks) // self._num_batches
        return TokenBatch(*draw(self.tasks[number], rng, self.batch_size))


class FixedTaskBatches(BatchSource):
    """Batches that are the same in every epoch: all examples of the first length, then of the next.

    Args:
        tasks: the task at each length.
        batch_size: examples per batch; the last one of a length may be smaller.
        num_examples: examples of each length.
        split: ``"val"`` or ``"test"``.
        seed: seed of all batches.
    """

    def __init__(
        self, tasks: Sequence[Task], *, batch_size: int, num_examples: int, split: str, seed: int = 0
    ) -> None:
        self.split = split
        self.seed = seed
        self._batches = [
            (task, min(batch_size, num_examples - start))
            for task in tasks
            for start in range(0, num_examples, batch_size)
        ]

    @property
    def num_batches(self) -> int:
        return len(self._batches)

    def batch(self, epoch: int, index: int) -> TokenBatch:
        task, num_examples = self._batches[index]
        return TokenBatch(*draw(task, split_rng(self.seed, self.split, 0, index), num_examples))


def tasks_of_lengths(task: Mapping[str, Setting], lengths: Sequence[int]) -> tuple[Task, ...]:
    """The same task at several lengths.

    Raises:
        ValueError: no length, or what `make_task` refuses; the message names the length.
    """
    if not lengths:
        raise ValueError("there is no length. Give at least one, for example [128].")
    made = []
    for length in lengths:
        try:
            made.append(make_task(task, seq_len=length))
        except ValueError as error:
            raise ValueError(f"at length {length}: {error}") from None
    return tuple(made)
