"""MQAR for Lightning: fresh, seeded segments for training, fixed segments for validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor

from .batches import BatchSource, ResumableLoader, TokenBatch, check_loader_settings
from .mqar import MQARConfig, mqar

_TRAIN_SEEDS = (0, 2**31)
_TEST_SEEDS = (2**31, 2**32)


@dataclass(frozen=True, kw_only=True)
class MQARSegment:
    """Shape of one segment: all its examples have the same length and number of pairs.

    Args:
        input_seq_len: tokens per example, even.
        num_kv_pairs: key-value pairs per example.
        num_examples: examples in the segment.
        num_updates: keys that get a second value ("forgetting" MQAR).
    """

    input_seq_len: int
    num_kv_pairs: int
    num_examples: int
    num_updates: int = 0


class MQARDataModule(LightningDataModule):
    """MQAR as training, validation and test data.

    Batches never mix segments and come in the order of the segments (a curriculum, as in the BASED paper).
    The training seeds lie below 2**31, validation and test seeds above, so no example is met twice except by
    chance.

    Args:
        vocab_size: number of tokens, for all segments.
        train_segments: what one training epoch reads, in this order.
        eval_segments: shapes for validation and test; None takes the shapes of the training segments, 1,000
            examples each.
        batch_size: examples per training batch.
        eval_batch_size: examples per validation and test batch.
        power_a: exponent of the gap law.
        random_non_queries: fill empty positions with random tokens instead of 0.
        fresh_every_epoch: draw new training examples in every epoch; False repeats those of the first.
        seed: seed of all segment seeds.
        num_workers: worker processes; each draws its own copy of a segment (about 30 microseconds per
            example).

    Raises:
        ValueError: sizes that do not fit one another; the message names the segment's numbers.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        train_segments: Sequence[MQARSegment] = (
            MQARSegment(input_seq_len=64, num_kv_pairs=4, num_examples=100_000),
        ),
        eval_segments: Sequence[MQARSegment] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 250,
        power_a: float = 0.01,
        random_non_queries: bool = False,
        fresh_every_epoch: bool = True,
        seed: int = 123,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_loader_settings(batch_size=batch_size, num_workers=num_workers)
        check_loader_settings(batch_size=eval_batch_size, num_workers=num_workers)
        if not train_segments:
            raise ValueError("train_segments is empty. Give at least one segment.")
        if eval_segments is None:
            eval_segments = [replace(segment, num_examples=1000) for segment in train_segments]
        self.vocab_size, self.power_a, self.random_non_queries = vocab_size, power_a, random_non_queries
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.fresh_every_epoch = fresh_every_epoch
        self.num_workers = num_workers
        self.seed = seed
        self.train_configs = self._configs(train_segments, self._seeds(len(train_segments), _TRAIN_SEEDS))
        eval_seeds = self._seeds(2 * len(eval_segments), _TEST_SEEDS)
        self.test_configs = self._configs(eval_segments, eval_seeds[: len(eval_segments)])
        self.val_configs = self._configs(eval_segments, eval_seeds[len(eval_segments) :])

    def train_dataloader(self) -> ResumableLoader:
        trainer = self.trainer
        return ResumableLoader(
            MQARBatches(self.train_configs, self.batch_size, fresh_every_epoch=self.fresh_every_epoch),
            num_workers=self.num_workers,
            num_processes=trainer.world_size if trainer is not None else 1,
            process_index=trainer.global_rank if trainer is not None else 0,
        )

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(
            MQARBatches(self.val_configs, self.eval_batch_size), num_workers=self.num_workers
        )

    def test_dataloader(self) -> ResumableLoader:
        return ResumableLoader(
            MQARBatches(self.test_configs, self.eval_batch_size), num_workers=self.num_workers
        )

    def _configs(self, segments: Sequence[MQARSegment], seeds: list[int]) -> list[MQARConfig]:
        return [
            MQARConfig(
                vocab_size=self.vocab_size,
                power_a=self.power_a,
                random_non_queries=self.random_non_queries,
                input_seq_len=segment.input_seq_len,
                num_kv_pairs=segment.num_kv_pairs,
                num_examples=segment.num_examples,
                num_updates=segment.num_updates,
                seed=seed,
            )
            for segment, seed in zip(segments, seeds, strict=True)
        ]

    def _seeds(self, num_seeds: int, bounds: tuple[int, int]) -> list[int]:
        low, high = bounds
        return [int(seed) for seed in np.random.RandomState(self.seed).randint(low, high, size=num_seeds)]


class MQARBatches(BatchSource):
    """Batches of MQAR segments, drawn when the epoch first asks for a segment.

    Args:
        configs: the segments, in reading order.
        batch_size: examples per batch; the last batch of a segment may be smaller.
        fresh_every_epoch: give every epoch its own examples.
    """

    def __init__(
        self, configs: Sequence[MQARConfig], batch_size: int, *, fresh_every_epoch: bool = False
    ) -> None:
        self.configs = list(configs)
        self.batch_size = batch_size
        self.fresh_every_epoch = fresh_every_epoch
        self._batches = [
            (number, start)
            for number, config in enumerate(self.configs)
            for start in range(0, config.num_examples, batch_size)
        ]
        self._drawn: tuple[MQARConfig, tuple[Tensor, Tensor]] | None = None

    @property
    def num_batches(self) -> int:
        return len(self._batches)

    def batch(self, epoch: int, index: int) -> TokenBatch:
        number, start = self._batches[index]
        inputs, labels = self._segment(self._epoch_config(epoch, number))
        rows = slice(start, start + self.batch_size)
        return TokenBatch(inputs[rows], labels[rows])

    def _epoch_config(self, epoch: int, number: int) -> MQARConfig:
        config = self.configs[number]
        if epoch == 0 or not self.fresh_every_epoch:
            return config
        (seed,) = np.random.SeedSequence([config.seed, epoch]).generate_state(1)
        return replace(config, seed=int(seed) % _TRAIN_SEEDS[1])

    def _segment(self, config: MQARConfig) -> tuple[Tensor, Tensor]:
        """The examples of one segment; only the latest one is kept in memory."""
        if self._drawn is None or self._drawn[0] != config:
            self._drawn = (config, mqar(config))
        return self._drawn[1]
