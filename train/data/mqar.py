"""Multi-query associative recall (MQAR): the synthetic task that separates memories by what they can hold.

Sources: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023), section
4; Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (BASED,
2024), figure 2.

One example reads ``k1 v1 k2 v2 ... kn vn`` and then, at power-law distances, every key once more. At each
repeated key the model must answer with the paired value. All other positions hold token 0 (or random tokens)
and carry no loss::

    tokens   k1 v1 k2 v2 0 k2 0  0 k1 0
    labels    .  .  .  . . v2 .  . v1 .

Key number i is repeated at position ``2 n + 2 slot_i``; slots are drawn without replacement with probability
proportional to ``power_a * (slot + 1) ** (power_a - 1)``. The order of the random draws is part of the
definition, so a seed gives the same bits here as in the benchmark's own generator.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100

# Up to this many slots a plain Python loop draws faster than numpy's own `choice`, with identical results.
_MAX_SLOTS_FOR_LOOP = 160


@dataclass(frozen=True, kw_only=True)
class MQARConfig:
    """One segment of MQAR examples, all of the same shape.

    Args:
        vocab_size: number of tokens; keys come from ``1 .. vocab_size // 2 - 1``, values from ``vocab_size //
            2 ..``.
        input_seq_len: tokens per example (L), even.
        num_kv_pairs: key-value pairs per example (n), with ``4 n + 2 num_updates <= input_seq_len``.
        num_examples: examples in the segment (N).
        power_a: exponent of the gap law; small values crowd the queries right behind the pairs.
        random_non_queries: fill the empty positions with random tokens instead of 0.
        num_updates: keys that get a second, new value after all pairs; the label is the latest value
            ("forgetting" MQAR).
        seed: seed of all draws of this segment.

    Raises:
        ValueError: when the sizes do not fit one another; the message names them.
    """

    vocab_size: int = 8192
    input_seq_len: int = 64
    num_kv_pairs: int = 4
    num_examples: int = 1000
    power_a: float = 0.01
    random_non_queries: bool = False
    num_updates: int = 0
    seed: int = 123

    def __post_init__(self) -> None:
        for name in ("vocab_size", "input_seq_len", "num_kv_pairs", "num_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.input_seq_len % 2:
            raise ValueError(
                f"input_seq_len must be even, got {self.input_seq_len}. "
                f"Use {self.input_seq_len - 1} or {self.input_seq_len + 1}."
            )
        if self.vocab_size <= self.input_seq_len:
            raise ValueError(
                f"vocab_size must be larger than input_seq_len, got {self.vocab_size} and "
                f"{self.input_seq_len}. Raise vocab_size or shorten the examples."
            )
        if not 0 <= self.num_updates <= self.num_kv_pairs:
            raise ValueError(
                f"num_updates must lie between 0 and num_kv_pairs={self.num_kv_pairs}, "
                f"got {self.num_updates}. Every update gives another key a new value."
            )
        needed = 4 * self.num_kv_pairs + 2 * self.num_updates
        if needed > self.input_seq_len:
            raise ValueError(
                f"{self.num_kv_pairs} pairs with {self.num_updates} updates need input_seq_len >= {needed}, "
                f"got {self.input_seq_len}. Use longer examples or fewer pairs."
            )
        num_values = self.vocab_size - self.vocab_size // 2
        if self.num_kv_pairs + self.num_updates > num_values:
            raise ValueError(
                f"{self.num_kv_pairs} pairs with {self.num_updates} updates need as many different values, "
                f"but vocab_size={self.vocab_size} leaves {num_values}. Raise vocab_size."
            )
        if self.power_a <= 0:
            raise ValueError(f"power_a must be positive, got {self.power_a}. The papers use 0.01 and 0.1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0 .. 2**32 - 1, got {self.seed}.")


def mqar(config: MQARConfig) -> tuple[Tensor, Tensor]:
    """Draw the examples of one segment.

    The draws follow the benchmark's generator exactly (numpy's legacy generator, all key rows, then all value
    rows, then all query slots). The filler of ``random_non_queries`` comes from a torch generator seeded with
    the same seed. For ``num_updates > 0`` only the meaning is shared with the benchmark: a new value always
    differs from every value that the example has used, so from the key's own old value too.

    Returns:
        inputs (N, L) and labels (N, L), int64; labels are the paired value at a repeated key and -100
        elsewhere.
    """
    num_examples, num_pairs = config.num_examples, config.num_kv_pairs
    first_value = config.vocab_size // 2
    rng = np.random.RandomState(config.seed)

    keys = 1 + _distinct_draws(rng, first_value - 1, num_pairs, num_examples)  # (N, n)
    values = first_value + _distinct_draws(
        rng, config.vocab_size - first_value, num_pairs + config.num_updates, num_examples
    )  # (N, n + u)
    values, new_values = values[:, :num_pairs], values[:, num_pairs:]
    context_len = 2 * (num_pairs + config.num_updates)
    slots = _slot_draws(rng, config, (config.input_seq_len - context_len) // 2)  # (N, n)

    inputs = np.zeros((num_examples, config.input_seq_len), dtype=np.int64)
    inputs[:, 0 : 2 * num_pairs : 2] = keys
    inputs[:, 1 : 2 * num_pairs : 2] = values
    if config.num_updates:
        updated = _distinct_draws(rng, num_pairs, config.num_updates, num_examples)  # (N, u)
        inputs[:, 2 * num_pairs : context_len : 2] = np.take_along_axis(keys, updated, axis=1)
        inputs[:, 2 * num_pairs + 1 : context_len : 2] = new_values
        values = values.copy()
        np.put_along_axis(values, updated, new_values, axis=1)

    query_positions = context_len + 2 * slots  # (N, n)
    np.put_along_axis(inputs, query_positions, keys, axis=1)
    labels = np.full((num_examples, config.input_seq_len), IGNORE_INDEX, dtype=np.int64)
    np.put_along_axis(labels, query_positions, values, axis=1)

    input_ids = torch.from_numpy(inputs)
    if config.random_non_queries:
        generator = torch.Generator().manual_seed(config.seed)
        filler = torch.randint(config.vocab_size, tuple(input_ids.shape), generator=generator)
        input_ids = torch.where(input_ids == 0, filler, input_ids)
    return input_ids, torch.from_numpy(labels)


def recall_accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of the share of labelled positions that are answered right.

    Args:
        predictions: (B, T) predicted tokens.
        labels: (B, T) targets, -100 where nothing is asked. Examples without any label are left out.

    Returns:
        a float64 scalar; NaN when no example has a label.
    """
    return accuracy_per_example(predictions, labels).mean()


def accuracy_per_example(predictions: Tensor, labels: Tensor) -> Tensor:
    """Share of labelled positions answered right, for each example that has labels: (B',) float64."""
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions have shape {tuple(predictions.shape)}, labels {tuple(labels.shape)}; they must "
            "agree. Pass predicted tokens (logits.argmax(-1)), not logits."
        )
    asked = labels != IGNORE_INDEX
    num_asked = asked.sum(-1)  # (B,)
    num_right = ((predictions == labels) & asked).sum(-1)  # (B,)
    some = num_asked > 0
    return num_right[some].double() / num_asked[some]


def _distinct_draws(rng: np.random.RandomState, pool_size: int, num_draws: int, num_rows: int) -> np.ndarray:
    """Draw ``num_draws`` distinct numbers below ``pool_size`` for every row: (num_rows, num_draws) int64."""
    # The legacy `choice` without replacement is the head of a permutation; calling that directly spares its
    # checks.
    draws = np.empty((num_rows, num_draws), dtype=np.int64)
    for row in range(num_rows):
        draws[row] = rng.permutation(pool_size)[:num_draws]
    return draws


def _slot_draws(rng: np.random.RandomState, config: MQARConfig, num_slots: int) -> np.ndarray:
    """Draw the distinct query slots of every row by the power law: (N, n) int64."""
    weights = config.power_a * np.arange(1, num_slots + 1) ** (config.power_a - 1)
    probabilities = weights / weights.sum()
    num_draws = config.num_kv_pairs
    slots = np.empty((config.num_examples, num_draws), dtype=np.int64)
    if num_slots > _MAX_SLOTS_FOR_LOOP:
        for row in range(config.num_examples):
            slots[row] = rng.choice(num_slots, num_draws, replace=False, p=probabilities)
        return slots
    row_probabilities = probabilities.tolist()
    for row in range(config.num_examples):
        slots[row] = _weighted_choice(rng, row_probabilities, num_draws)
    return slots


def _weighted_choice(rng: np.random.RandomState, probabilities: list[float], num_draws: int) -> list[int]:
    """Repeat numpy's legacy weighted choice without replacement, bit for bit and faster.

    Draws that hit a slot already taken are dropped, the taken slots get probability zero, and the missing
    draws are repeated. Insertion order of ``found`` is the order of the first hits.
    """
    found: dict[int, None] = {}
    remaining = probabilities
    while len(found) < num_draws:
        uniforms = rng.random_sample(num_draws - len(found)).tolist()
        if found:
            remaining = list(remaining)
            for slot in found:
                remaining[slot] = 0.0
        cumulative = list(accumulate(remaining))
        total = cumulative[-1]
        cumulative = [value / total for value in cumulative]
        for uniform in uniforms:
            found.setdefault(bisect_right(cumulative, uniform))
    return list(found)
