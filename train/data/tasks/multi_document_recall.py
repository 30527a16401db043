"""Recall from many documents: a question names a document and one of its facts.

Source: the miniatures of MSA, documents of one to four key-value pairs with filler, whose question is a key;
with ``unique_keys`` exactly those, otherwise keys recur in other documents and the question names one.
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
    check_pool,
    check_switches,
    distinct,
    parts_of_vocabulary,
    spell,
)

_DOCUMENT = 2  # the mark at the start of a document
_WIDTH = 2  # a key and its value


@dataclass(frozen=True, kw_only=True)
class MultiDocumentRecallTask(Task):
    """Documents of equal length, each with a name and some facts in noise, and a question at the end.

    ::

        tokens   # D3 n K7 v3 K2 v9 n   # D8 K7 v5 n n K4 v1   ? D8 K7
        labels   . .  . .  .  .  .  .   . .  .  .  . . .  .    . .  v5

    There are as many documents as fit into ``seq_len``, so longer texts hold more of them.

    Args:
        document_len: tokens of a document, mark and name included.
        num_facts: facts of a document, with different keys.
        unique_keys: no key stands in two documents, and the question leaves out the name of the document.
        id_len: tokens of the name of a document.
        id_vocab: different tokens of names.
        key_vocab: different keys.
        value_vocab: different values.
        noise_vocab: different tokens of the noise; 0 leaves it blank.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    document_len: int = 12
    num_facts: int = 2
    unique_keys: bool = False
    id_len: int = 1
    id_vocab: int = 64
    key_vocab: int = 8
    value_vocab: int = 16
    noise_vocab: int = 16

    def _check(self) -> None:
        check_positive(self, "document_len", "num_facts", "id_len", "id_vocab", "key_vocab", "value_vocab")
        check_counts(self, "noise_vocab")
        check_switches(self, "unique_keys")
        needed = 1 + self.id_len + _WIDTH * self.num_facts
        if self.document_len < needed:
            raise ValueError(
                f"document_len must be at least {needed} for a name and {self.num_facts} facts, "
                f"got {self.document_len}."
            )
        if self.seq_len < self.min_seq_len:
            return
        num_keys = self.num_facts * (self.num_documents if self.unique_keys else 1)
        check_pool(num_keys, self.key_vocab, "keys", "key_vocab")
        check_pool(self.num_documents, self.id_vocab**self.id_len, "names", "id_vocab or id_len")

    @property
    def num_documents(self) -> int:
        """Documents of an example."""
        return (self.seq_len - self._question_len) // self.document_len

    @property
    def vocabulary(self) -> Mapping[str, range]:
        return parts_of_vocabulary(
            2,
            ids=self.id_vocab,
            keys=self.key_vocab,
            values=self.value_vocab,
            noise=self.noise_vocab,
        )

    @property
    def min_seq_len(self) -> int:
        return self.document_len + self._question_len

    def examples(self, rng: np.random.Generator, num_examples: int) -> TaskExamples:
        parts = self.vocabulary
        rows = Rows(self.seq_len, num_examples, parts.get("noise"), rng)
        shape = (num_examples, self.num_documents, self.num_facts)
        names = spell(
            distinct(rng, self.id_vocab**self.id_len, self.num_documents, num_examples),
            parts["ids"],
            self.id_len,
        )  # (N, documents, id_len)
        per_draw = self.num_documents * self.num_facts if self.unique_keys else self.num_facts
        num_draws = num_examples * self.num_documents * self.num_facts // per_draw
        keys = parts["keys"].start + distinct(rng, self.key_vocab, per_draw, num_draws).reshape(shape)
        values = rng.integers(parts["values"].start, parts["values"].stop, size=shape)
        header = 1 + self.id_len
        cells = header + cell_starts(self.document_len - header, _WIDTH)
        inside = distinct(rng, cells, self.num_facts, num_examples * self.num_documents).reshape(shape)
        starts = self.document_len * np.arange(self.num_documents)  # (documents,)
        places = (starts[:, None] + inside).reshape(num_examples, -1)

        heads = np.broadcast_to(starts, shape[:2])
        rows.write(heads, _DOCUMENT)
        for offset in range(self.id_len):
            rows.write(heads + 1 + offset, names[..., offset])
        rows.write(places, keys.reshape(num_examples, -1))
        rows.write(places + 1, values.reshape(num_examples, -1))

        row = np.arange(num_examples)
        fact = rng.integers(self.num_documents * self.num_facts, size=num_examples)
        position = self.seq_len - self._question_len
        rows.write(position, ASK)
        if not self.unique_keys:
            for offset in range(self.id_len):
                rows.write(position + 1 + offset, names[row, fact // self.num_facts, offset])
        last = self.seq_len - 1
        rows.write(last, keys.reshape(num_examples, -1)[row, fact])
        rows.ask(last, values.reshape(num_examples, -1)[row, fact], places[row, fact] + 1)
        return rows.done()

    @property
    def _question_len(self) -> int:
        return 2 + (0 if self.unique_keys else self.id_len)
