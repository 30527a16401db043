"""Associative retrieval: one pair per segment, one of the keys is asked for in the last segment.

Source: the task of ARMT (Rodkin et al. 2024), whose segments hold a key, a value and two marks each; with
updates its rewriting variant, in which a key is given a new value and the latest one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....layers.contract import check_positive
from .base import (
    ASK,
    Rows,
    Task,
    TaskExamples,
    check_counts,
    check_pool,
    distinct,
    parts_of_vocabulary,
    spell,
)

_IS, _END = 2, 3  # the marks between key and value, and behind the value


@dataclass(frozen=True, kw_only=True)
class AssociativeRetrievalTask(Task):
    """Pairs ``key : value ;`` at the starts of segments, and one question at the end of the last segment.

    ::

        tokens   K7 : v3 ;   K2 : v9 ;   K7 : v5 ;   _ ? K7 :
        labels   .  . .  .   .  . .  .   .  . .  .   . . .  v5

    Here segments have four tokens and K7 is given a second value. Keys and values may have several tokens;
    those of the value are asked for one after the other.

    Args:
        num_pairs: keys; None takes as many as there are segments, so that longer texts hold more of them.
        num_updates: keys that get another value in a segment of their own; the later one counts.
        key_len: tokens of a key.
        value_len: tokens of a value.
        segment_len: tokens of a segment; None takes as many as a pair needs.
        key_vocab: different tokens of keys.
        value_vocab: different tokens of values.
        noise_vocab: different tokens that fill the rest of a segment; 0 leaves it blank.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    num_pairs: int | None = None
    num_updates: int = 0
    key_len: int = 1
    value_len: int = 1
    segment_len: int | None = None
    key_vocab: int = 64
    value_vocab: int = 16
    noise_vocab: int = 0

    def _check(self) -> None:
        check_positive(self, "key_len", "value_len", "key_vocab", "value_vocab")
        check_counts(self, "num_updates", "noise_vocab")
        for name in ("num_pairs", "segment_len"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        if self._segment_len < self._pair_len:
            raise ValueError(
                f"segment_len must be at least {self._pair_len}, a key, a value and two marks; "
                f"got {self.segment_len}."
            )
        if self.seq_len % self._segment_len:
            raise ValueError(
                f"seq_len must be a multiple of the segment length {self._segment_len}, got {self.seq_len}."
            )
        if self.seq_len < self.min_seq_len:
            return
        num_pairs = self._num_pairs
        check_pool(num_pairs, self.key_vocab**self.key_len, "keys", "key_vocab or key_len")
        if self.num_updates and self.value_vocab < 2:
            raise ValueError("num_updates needs at least two values, got value_vocab=1.")
        if self.num_updates > num_pairs:
            raise ValueError(
                f"num_updates must be at most the number of keys, {num_pairs}, got {self.num_updates}."
            )

    @property
    def vocabulary(self) -> Mapping[str, range]:
        return parts_of_vocabulary(3, keys=self.key_vocab, values=self.value_vocab, noise=self.noise_vocab)

    @property
    def min_seq_len(self) -> int:
        num_pairs = max(self.num_updates, 1) if self.num_pairs is None else self.num_pairs
        return self._segment_len * (num_pairs + self.num_updates + 1)

    def examples(self, rng: np.random.Generator, num_examples: int) -> TaskExamples:
        parts = self.vocabulary
        rows = Rows(self.seq_len, num_examples, parts.get("noise"), rng)
        num_pairs, num_values = self._num_pairs, self.value_vocab**self.value_len
        keys = distinct(rng, self.key_vocab**self.key_len, num_pairs, num_examples)
        values = rng.integers(num_values, size=(num_examples, num_pairs + self.num_updates))
        if self.num_updates:
            # the keys with updates are the first ones, which are as random as any
            step = 1 + rng.integers(num_values - 1, size=(num_examples, self.num_updates))
            values[:, num_pairs:] = (values[:, : self.num_updates] + step) % num_values
            keys = np.concatenate([keys, keys[:, : self.num_updates]], axis=1)
        num_segments = self.seq_len // self._segment_len - 1
        segments = distinct(rng, num_segments, num_pairs + self.num_updates, num_examples)
        starts = self._segment_len * segments  # (N, m)

        spelled_keys = spell(keys, parts["keys"], self.key_len)  # (N, m, key_len)
        spelled_values = spell(values, parts["values"], self.value_len)  # (N, m, value_len)
        for offset in range(self.key_len):
            rows.write(starts + offset, spelled_keys[..., offset])
        rows.write(starts + self.key_len, _IS)
        for offset in range(self.value_len):
            rows.write(starts + self.key_len + 1 + offset, spelled_values[..., offset])
        rows.write(starts + self._pair_len - 1, _END)

        row = np.arange(num_examples)
        asked = rng.integers(num_pairs, size=num_examples)
        counts = asked.copy()  # the statement that counts: the later one of the key
        updated = np.flatnonzero(asked < self.num_updates)
        later = starts[updated, num_pairs + asked[updated]] > starts[updated, asked[updated]]
        counts[updated[later]] += num_pairs
        position = self.seq_len - (self.key_len + self.value_len + 1)
        rows.write(position, ASK)
        for offset in range(self.key_len):
            rows.write(position + 1 + offset, spelled_keys[row, asked, offset])
        position += 1 + self.key_len
        rows.write(position, _IS)
        for offset in range(self.value_len):
            answer = spelled_values[row, counts, offset]
            rows.ask(position + offset, answer, starts[row, counts] + self.key_len + 1 + offset)
            if offset + 1 < self.value_len:
                rows.write(position + 1 + offset, answer)
        return rows.done()

    @property
    def _pair_len(self) -> int:
        return self.key_len + self.value_len + 2

    @property
    def _segment_len(self) -> int:
        return self._pair_len if self.segment_len is None else self.segment_len

    @property
    def _num_pairs(self) -> int:
        if self.num_pairs is not None:
            return self.num_pairs
        return self.seq_len // self._segment_len - 1 - self.num_updates
