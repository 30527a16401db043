"""Needles in a haystack: facts scattered over noise, some of which are asked for at the end.

Sources: the needle task of HMT's miniatures (one key and its value in one of many segments), and the single,
multi-key, multi-value and multi-query needles of RULER (Hsieh et al. 2024) at the level of tokens.
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
    cell_starts,
    check_counts,
    check_depth,
    check_pool,
    distinct,
    parts_of_vocabulary,
)

_WIDTH = 2  # a key and one value


@dataclass(frozen=True, kw_only=True)
class NeedleTask(Task):
    """Needles ``key value`` in noise; at the end keys are asked for, each with all its values.

    ::

        tokens   n n K7 v3 n n K2 v9 n K7 v5 n  ? K7 v3
        labels   . . .  .  . . .  .  . .  .  .  . v3 v5

    Here K7 is asked for, with two values in the order in which they stood, and K2 is a distractor.

    Args:
        num_queries: keys asked for.
        num_values: values of each key, every one in a needle of its own.
        num_distractors: needles with other keys, each once, which are not asked for.
        key_vocab: different keys.
        value_vocab: different values.
        noise_vocab: different tokens of the noise; 0 leaves it blank.
        depth: share of the text, from .. to, in which the needles that matter lie.
        segment_len: no needle crosses a multiple of this, and the question has the last segment for itself;
            None sets no such borders.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    num_queries: int = 1
    num_values: int = 1
    num_distractors: int = 0
    key_vocab: int = 32
    value_vocab: int = 16
    noise_vocab: int = 16
    depth: tuple[float, float] = (0.0, 1.0)
    segment_len: int | None = None

    def _check(self) -> None:
        check_positive(self, "num_queries", "num_values", "key_vocab", "value_vocab")
        check_counts(self, "num_distractors", "noise_vocab")
        object.__setattr__(self, "depth", check_depth(self.depth))
        check_pool(self.num_queries + self.num_distractors, self.key_vocab, "keys", "key_vocab")
        if self.segment_len is not None:
            check_positive(self, "segment_len")
            if self.segment_len < max(_WIDTH, self._question_len):
                raise ValueError(
                    f"segment_len must hold a needle and the question of {self._question_len} tokens, got "
                    f"{self.segment_len}."
                )
            if self.seq_len % self.segment_len:
                raise ValueError(
                    f"seq_len must be a multiple of segment_len={self.segment_len}, got {self.seq_len}."
                )
        if self.seq_len < self.min_seq_len:
            return
        num_cells, num_allowed = len(self._cells), len(self._allowed)
        asked = self.num_queries * self.num_values
        if num_allowed < asked or num_cells < asked + self.num_distractors:
            raise ValueError(
                f"{asked} needles and {self.num_distractors} distractors do not fit: {self.seq_len} tokens "
                f"have {num_cells} places, {num_allowed} of them at depth {list(self.depth)}. "
                "Use longer examples, a wider depth, or fewer needles."
            )

    @property
    def vocabulary(self) -> Mapping[str, range]:
        return parts_of_vocabulary(1, keys=self.key_vocab, values=self.value_vocab, noise=self.noise_vocab)

    @property
    def min_seq_len(self) -> int:
        num_needles = self.num_queries * self.num_values + self.num_distractors
        if self.segment_len is None:
            return _WIDTH * num_needles + self._question_len
        return self.segment_len * (1 + -(-num_needles // (self.segment_len // _WIDTH)))

    def examples(self, rng: np.random.Generator, num_examples: int) -> TaskExamples:
        parts = self.vocabulary
        rows = Rows(self.seq_len, num_examples, parts.get("noise"), rng)
        shape = (num_examples, self.num_queries, self.num_values)
        keys = parts["keys"].start + distinct(
            rng, self.key_vocab, self.num_queries + self.num_distractors, num_examples
        )
        asked, others = keys[:, : self.num_queries], keys[:, self.num_queries :]
        values = rng.integers(parts["values"].start, parts["values"].stop, size=shape)
        other_values = rng.integers(parts["values"].start, parts["values"].stop, size=others.shape)

        places = np.empty(shape, dtype=np.int64)
        other_places = np.empty(others.shape, dtype=np.int64)
        for row in range(num_examples):
            chosen = rng.choice(self._allowed, places[row].size, replace=False)
            left = np.setdiff1d(self._cells, chosen, assume_unique=True)
            places[row] = np.sort(chosen.reshape(shape[1:]), axis=1)  # values in the order of reading
            other_places[row] = rng.choice(left, self.num_distractors, replace=False)

        flat = places.reshape(num_examples, -1)
        rows.write(flat, np.repeat(asked, self.num_values, axis=1))
        rows.write(flat + 1, values.reshape(num_examples, -1))
        rows.write(other_places, others)
        rows.write(other_places + 1, other_values)

        position = self.seq_len - self._question_len
        for query in range(self.num_queries):
            rows.write(position, ASK)
            rows.write(position + 1, asked[:, query])
            answered = position + 1 + np.arange(self.num_values)
            rows.write(
                np.broadcast_to(answered[1:], (num_examples, self.num_values - 1)), values[:, query, :-1]
            )
            rows.ask(
                np.broadcast_to(answered, (num_examples, self.num_values)),
                values[:, query],
                places[:, query] + 1,
            )
            position += 1 + self.num_values
        return rows.done()

    @property
    def _question_len(self) -> int:
        return self.num_queries * (1 + self.num_values)

    @property
    def _cells(self) -> np.ndarray:
        """Where needles may start."""
        last = self._question_len if self.segment_len is None else self.segment_len
        return cell_starts(max(self.seq_len - last, 0), _WIDTH, self.segment_len)

    @property
    def _allowed(self) -> np.ndarray:
        """Where the needles that matter may start."""
        low, high = self.depth
        shares = self._cells / self.seq_len
        return self._cells[(shares >= low) & (shares < high)]
