"""Memory tasks in plain English for Lightning: a pretrained model learns to recall what it has read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from .batches import BatchSource, ResumableLoader, TokenBatch, check_ids, check_loader_settings
from .mqar import IGNORE_INDEX
from .tasks import Setting, split_rng
from .text_tasks import TextExamples, TextTask, make_text_task
from .tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Dimensions: B examples of a batch, T tokens of an example


class TextTaskDataModule(LightningDataModule):
    """A task in English as training and validation data.

    Every batch holds fresh contexts, drawn from the seed, the epoch and its own number. They are a few tokens
    shorter than ``seq_len``; what is behind them is the last token again and has no label.

    Args:
        task: ``{type: ..., ...}``, the settings of the task without its length.
        tokenizer: a folder with a tokenizer, a ``.gguf`` file, ``"smollm2-135m"``, or ``"bytes"``.
        labels: ``answers`` asks for nothing but the answers; ``all`` for every token of the context.
        seq_len: tokens per context.
        batch_size: contexts per batch.
        num_batches: training batches per epoch.
        num_val_examples: contexts for validation.
        seed: seed of all contexts.
        num_workers: worker processes; 0 draws in the main process.

    Raises:
        ValueError: unknown task or setting (the nearest is suggested), sizes that do not fit one another, or
            contexts too short for what is hidden and asked.
    """

    def __init__(
        self,
        task: Mapping[str, Setting],
        tokenizer: str,
        labels: Literal["answers", "all"] = "answers",
        seq_len: int = 512,
        batch_size: int = 8,
        num_batches: int = 1000,
        num_val_examples: int = 100,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_loader_settings(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if num_batches < 1 or num_val_examples < 1:
            raise ValueError(
                f"num_batches and num_val_examples must be at least 1, got {num_batches} and "
                f"{num_val_examples}."
            )
        if labels not in ("answers", "all"):
            raise ValueError(f"labels must be answers or all, got {labels!r}.")
        self.task = make_text_task(task, seq_len=seq_len)
        self.tokenizer = load_tokenizer(tokenizer)
        self.labels, self.seq_len, self.batch_size = labels, seq_len, batch_size
        self.num_batches, self.num_val_examples = num_batches, num_val_examples
        self.seed, self.num_workers = seed, num_workers

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer, added ones included."""
        return len(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        tried = self._batches("train", 1).batch(0, 0)  # raises where the context is too short
        check_ids(self.trainer, int(tried.input_ids.max()), self.vocab_size)

    def train_dataloader(self) -> ResumableLoader:
        trainer = self.trainer
        return ResumableLoader(
            self._batches("train", self.num_batches),
            num_workers=self.num_workers,
            num_processes=trainer.world_size if trainer is not None else 1,
            process_index=trainer.global_rank if trainer is not None else 0,
        )

    def val_dataloader(self) -> ResumableLoader:
        batches = self._batches("val", -(-self.num_val_examples // self.batch_size))
        return ResumableLoader(batches, num_workers=self.num_workers)

    def _batches(self, split: str, num_batches: int) -> TextTaskBatches:
        return TextTaskBatches(
            self.task,
            self.tokenizer,
            labels=self.labels,
            batch_size=self.batch_size,
            num_batches=num_batches,
            split=split,
            seed=self.seed,
        )


class TextTaskBatches(BatchSource):
    """Contexts with their answers as labels.

    Args:
        task: the task, with its length.
        tokenizer: of the contexts.
        labels: see `TextTaskDataModule`.
        batch_size: contexts per batch.
        num_batches: batches per epoch.
        split: ``"train"``, new in every epoch, or ``"val"``, the same in all.
        seed: seed of all contexts.
    """

    def __init__(
        self,
        task: TextTask,
        tokenizer: PreTrainedTokenizerFast,
        *,
        labels: str,
        batch_size: int,
        num_batches: int,
        split: str,
        seed: int = 0,
    ) -> None:
        self.task, self.tokenizer, self.labels = task, tokenizer, labels
        self.batch_size, self.split, self.seed = batch_size, split, seed
        self._num_batches = num_batches

    @property
    def num_batches(self) -> int:
        return self._num_batches

    def batch(self, epoch: int, index: int) -> TokenBatch:
        rng = split_rng(self.seed, self.split, epoch if self.split == "train" else 0, index)
        drawn = self.task.examples(self.tokenizer, rng, self.batch_size)
        return TokenBatch(*_aligned(drawn, self.task.seq_len, only_answers=self.labels == "answers"))


def _aligned(drawn: TextExamples, seq_len: int, *, only_answers: bool) -> tuple[Tensor, Tensor]:
    """Ids and shifted labels (B, T)."""
    ids = torch.stack([torch.cat([row, row[-1:].expand(seq_len - len(row))]) for row in drawn.ids])
    is_asked = torch.zeros_like(ids, dtype=torch.bool)
    for number, (row, spans) in enumerate(zip(drawn.ids, drawn.answers, strict=True)):
        for first, end in spans if only_answers else [(0, len(row))]:
            is_asked[number, first:end] = True
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = ids[:, 1:].masked_fill(~is_asked[:, 1:], IGNORE_INDEX)
    return ids, labels
