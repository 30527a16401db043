"""Batches as a pure function of (epoch, index): what makes data deterministic and a run resumable.

A data set of this library answers one question, ``batch(epoch, index)``. Loader, sampler and worker processes
only decide when it is asked, so the order of the data depends on nothing but the seed, whatever the number of
workers, and a resumed run goes on with exactly the batch that an uninterrupted one would have read.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from ...models.config import ModelConfig
from .mqar import IGNORE_INDEX

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass
class TokenBatch:
    """Token ids with their targets.

    Args:
        input_ids: (B, T) int64. With ``cu_seqlens`` one packed row, (1, L).
        labels: same shape; the target of each position (already shifted), -100 where there is no loss.
        cu_seqlens: (N + 1,) int64 on the CPU, the borders of the packed sequences; None for a plain batch.
        mask: (B, T) bool, True = real token, any pattern; None where all are real. Not beside cu_seqlens.
        resets: (B,) bool on the CPU, True = this row does not continue the row of the batch before; None
            where no row does.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None
    resets: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens read, padding left out."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    def num_labels(self) -> Tensor:
        return (self.labels != IGNORE_INDEX).sum()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """Move ids, labels and mask; borders and resets stay on the CPU, where they are read."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            mask=None if self.mask is None else self.mask.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> TokenBatch:
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            mask=None if self.mask is None else self.mask.pin_memory(),
        )


class BatchSource(Dataset[TokenBatch], ABC):
    """A data set whose batches are a pure function of epoch and index."""

    @property
    @abstractmethod
    def num_batches(self) -> int:
        """Batches per epoch, the same in every epoch."""

    @abstractmethod
    def batch(self, epoch: int, index: int) -> TokenBatch:
        """The batch number ``index`` of epoch ``epoch``."""

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, key: tuple[int, int]) -> TokenBatch:
        return self.batch(*key)


class EpochOrder:
    """The order in which things are read in an epoch.

    Args:
        count: how many there are.
        shuffle: a random order, drawn from ``seed`` and the epoch; else their own.
        seed: seed of the order.
    """

    def __init__(self, count: int, *, shuffle: bool = False, seed: int = 0) -> None:
        self.count, self.shuffle, self.seed = count, shuffle, seed
        self._latest: tuple[int, np.ndarray] | None = None

    def __call__(self, epoch: int) -> np.ndarray:
        """Their numbers, (count,), in the order of an epoch."""
        if not self.shuffle:
            return np.arange(self.count)
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count))
        return self._latest[1]


class EpochSampler(DistributedSampler[Any]):
    """Yields (epoch, index) for the batches that one process reads in one epoch.

    Lightning calls ``set_epoch`` before each epoch.

    Args:
        source: the batches.
        num_processes: training processes that share an epoch; each reads every ``num_processes``-th batch.
        process_index: number of this process.
    """

    def __init__(self, source: BatchSource, *, num_processes: int = 1, process_index: int = 0) -> None:
        # Being a DistributedSampler keeps Lightning from wrapping it in another one.
        super().__init__(
            source, num_replicas=num_processes, rank=process_index, shuffle=False, drop_last=True
        )
        self.source = source
        self.start = 0

    def __len__(self) -> int:
        return self.source.num_batches // self.num_replicas

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in range(self.start, len(self)):
            yield self.epoch, index * self.num_replicas + self.rank


class ResumableLoader(DataLoader[TokenBatch]):
    """A loader of whole batches that remembers how many of the running epoch it has handed out."""

    def __init__(
        self,
        source: BatchSource,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self._num_yielded = 0
        self._resumed: dict[str, int] | None = None
        super().__init__(
            source,
            batch_size=None,
            sampler=EpochSampler(source, num_processes=num_processes, process_index=process_index),
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # The loader draws a seed for its workers at the start of each epoch. From the global generator it
            # would be one draw more in a resumed run, and every random number of the run would differ.
            generator=torch.Generator(),
            worker_init_fn=functools.partial(_begin_worker, os.getpid()),
        )

    def __iter__(self) -> Iterator[TokenBatch]:  # type: ignore[override]  # the parent names a private class
        self._num_yielded = start_of_epoch(self._resumed, self._epoch_sampler.epoch, len(self))
        self._resumed = None
        self._epoch_sampler.start = self._num_yielded
        for batch in super().__iter__():
            self._num_yielded += 1
            yield batch

    @property
    def _epoch_sampler(self) -> EpochSampler:
        assert isinstance(self.sampler, EpochSampler)
        return self.sampler

    def state_dict(self) -> dict[str, int]:
        # A run that saves again before it reads anything stands where it was resumed.
        position = self._resumed or {"num_yielded": self._num_yielded, "epoch": self._epoch_sampler.epoch}
        return {**position, "num_batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        saved = state.get("num_batches", len(self))
        if saved != len(self):
            logger.warning(
                "the data has %d batches an epoch, and had %d when the checkpoint was written: it is not the "
                "same text, seq_len or batch_size, and the run will not read on where it stopped",
                len(self),
                saved,
            )
        self._resumed = state


def start_of_epoch(resumed: Mapping[str, int] | None, epoch: int, num_batches: int) -> int:
    """Batches of an epoch that were read before a resumed run begins to read.

    Args:
        resumed: `num_yielded` and `epoch` of the loader when the checkpoint was written; None where nothing
            was resumed.
        epoch: the one that is about to be read. It is another one where the checkpoint was written behind the
            last batch that the run takes of an epoch, which may be any (`limit_train_batches`).
        num_batches: batches of an epoch.
    """
    if resumed is None or resumed.get("epoch", epoch) != epoch:
        return 0
    return resumed["num_yielded"] % max(num_batches, 1)


def _begin_worker(run: int, worker: int) -> None:
    """Ties a worker process to its run: it ends when the run is killed, and not before.

    Args:
        run: process id of the run.
        worker: number of the worker.
    """
    # Out of reach of signals to the whole group, such as Ctrl-C in a terminal: the run finishes its step
    # before it stops; a worker would end at once, and the step with it.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    # PyTorch's own watch over the run begins after this; a run killed before it would leave a worker behind.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # Linux
    if multiprocessing.get_start_method() == "fork" and os.getppid() != run:
        os._exit(1)


def check_loader_settings(*, batch_size: int, num_workers: int, seed: int = 0) -> None:
    """Refuse sizes no loader can work with.

    Raises:
        ValueError: ``batch_size`` below 1, ``num_workers`` or ``seed`` below 0.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if num_workers < 0:
        raise ValueError(
            f"num_workers must be at least 0, got {num_workers}. Use 0 to load in the main process."
        )


def refuse_processes(trainer: Trainer | None, what: str) -> None:
    """Refuse several training processes.

    Args:
        trainer: the one that will read the data, if there is one yet.
        what: the data, for the message.

    Raises:
        ValueError: there are several.
    """
    if trainer is not None and trainer.world_size > 1:
        raise ValueError(
            f"{what} can be read by one training process only, got {trainer.world_size}. "
            "Set trainer.devices=1 and trainer.num_nodes=1."
        )


def check_ids(trainer: Trainer | None, largest: int, num_tokens: int) -> None:
    """Refuse data with tokens that the model does not have.

    Args:
        trainer: the one that will read the data, if there is one yet.
        largest: largest token id of the data.
        num_tokens: tokens of the tokenizer, for the message.

    Raises:
        ValueError: the model to be trained has fewer ids.
    """
    config = getattr(None if trainer is None else trainer.lightning_module, "config", None)
    if isinstance(config, ModelConfig) and largest >= config.vocab_size:
        raise ValueError(
            f"the data holds the token {largest}, but the model has the ids 0 to {config.vocab_size - 1}. Is "
            f"the tokenizer that of the model? A new model needs vocab_size: {num_tokens}."
        )
