"""Copying: repeat tokens in their order after a long gap.

Source: the synthetic tasks of Mamba (Gu and Dao 2023), copying and selective copying: the tokens to be
repeated stand at the start, or scattered over the text; at the end each mark asks for the next of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....layers.contract import check_positive
from .base import ASK, Rows, Task, TaskExamples, check_counts, check_switches, distinct, parts_of_vocabulary


@dataclass(frozen=True, kw_only=True)
class CopyingTask(Task):
    """Tokens to be repeated in the order in which they stood, one at each mark; the answers are not shown.

    ::

        tokens   n v3 n n v9 n v3 n n  ?  ?  ?
        labels   . .  . . .  . .  . .  v3 v9 v3

    Args:
        num_tokens: tokens to be repeated.
        selective: whether they are scattered over the text; otherwise they stand together at its start.
        value_vocab: different tokens that may have to be repeated.
        noise_vocab: different tokens of the noise; 0 leaves it blank, as in the source.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    num_tokens: int = 8
    selective: bool = True
    value_vocab: int = 16
    noise_vocab: int = 0

    def _check(self) -> None:
        check_positive(self, "num_tokens", "value_vocab")
        check_counts(self, "noise_vocab")
        check_switches(self, "selective")

    @property
    def vocabulary(self) -> Mapping[str, range]:
        return parts_of_vocabulary(1, values=self.value_vocab, noise=self.noise_vocab)

    @property
    def min_seq_len(self) -> int:
        return 2 * self.num_tokens

    def examples(self, rng: np.random.Generator, num_examples: int) -> TaskExamples:
        parts = self.vocabulary
        rows = Rows(self.seq_len, num_examples, parts.get("noise"), rng)
        shape = (num_examples, self.num_tokens)
        tokens = rng.integers(parts["values"].start, parts["values"].stop, size=shape)
        places = np.broadcast_to(np.arange(self.num_tokens), shape)
        if self.selective:
            places = np.sort(distinct(rng, self.seq_len - self.num_tokens, self.num_tokens, num_examples))
        rows.write(places, tokens)
        marks = np.broadcast_to(self.seq_len - self.num_tokens + np.arange(self.num_tokens), shape)
        rows.write(marks, ASK)
        rows.ask(marks, tokens, places)
        return rows.done()
