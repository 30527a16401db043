"""Multi-query associative recall as one of the tasks; the definition is that of `train.data.mqar`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ....layers.contract import check_positive
from ..mqar import IGNORE_INDEX, MQARConfig, mqar
from .base import NO_EVIDENCE, Task, TaskExamples, check_counts, check_switches


@dataclass(frozen=True, kw_only=True)
class MQARTask(Task):
    """Pairs at the start, and every key once more at power-law distances.

    ::

        tokens   k1 v1 k2 v2 0 k2 0  0 k1 0
        labels    .  .  .  . . v2 .  . v1 .

    Args:
        vocab_size: tokens; the upper half are values.
        num_kv_pairs: pairs.
        num_updates: keys that get a second value after all pairs ("forgetting" MQAR); the later one counts.
        power_a: exponent of the gap law; small values crowd the questions right behind the pairs.
        random_non_queries: fill the empty positions with random tokens of all kinds instead of blanks.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    vocab_size: int = 512
    num_kv_pairs: int = 4
    num_updates: int = 0
    power_a: float = 0.01
    random_non_queries: bool = False

    def _check(self) -> None:
        check_positive(self, "vocab_size", "num_kv_pairs")
        check_counts(self, "num_updates")
        check_switches(self, "random_non_queries")
        if isinstance(self.power_a, bool) or not isinstance(self.power_a, (int, float)):
            raise ValueError(f"power_a must be a number, got {self.power_a!r}.")
        self._config(num_examples=1, seed=0)

    @property
    def vocabulary(self) -> Mapping[str, range]:
        half = self.vocab_size // 2
        return {"blank": range(1), "keys": range(1, half), "values": range(half, self.vocab_size)}

    @property
    def min_seq_len(self) -> int:
        return 4 * self.num_kv_pairs + 2 * self.num_updates

    def examples(self, rng: np.random.Generator, num_examples: int) -> TaskExamples:
        inputs, labels = mqar(self._config(num_examples=num_examples, seed=int(rng.integers(2**32))))
        context_len = 2 * (self.num_kv_pairs + self.num_updates)
        # (N, L, pairs): the pair whose value is the label; values of an example are all different
        is_source = labels[:, :, None] == inputs[:, None, 1:context_len:2]
        evidence = 1 + 2 * is_source.to(torch.uint8).argmax(-1)
        evidence[labels == IGNORE_INDEX] = NO_EVIDENCE
        return TaskExamples(inputs, labels, evidence)

    def _config(self, *, num_examples: int, seed: int) -> MQARConfig:
        return MQARConfig(
            vocab_size=self.vocab_size,
            input_seq_len=self.seq_len,
            num_kv_pairs=self.num_kv_pairs,
            num_examples=num_examples,
            power_a=self.power_a,
            random_non_queries=self.random_non_queries,
            num_updates=self.num_updates,
            seed=seed,
        )
