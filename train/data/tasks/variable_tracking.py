"""Variable tracking: a value is handed from variable to variable, and the last one is asked for.

Sources: the task of RULER (Hsieh et al. 2024), with the value as the answer instead of the list of variables,
so that one answer needs all hops; and the two-hop questions of MSA (the value of key A is key B).
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
    distinct,
    parts_of_vocabulary,
)

_SET = 2  # the mark between a variable and what it is set to
_WIDTH = 3


@dataclass(frozen=True, kw_only=True)
class VariableTrackingTask(Task):
    """Chains of assignments in noise, each in reading order; at the end the last variables of some chains.

    ::

        tokens   n X4 = v3 n n X8 = v9 X2 = X4 n n X5 = X2 n  ? X5
        labels   . .  . .  . . .  . .  .  . .  . . .  . .  .  . v3

    Here the chain X4, X2, X5 has two hops, and X8 is the start of another one.

    Args:
        num_chains: chains in the text.
        num_hops: assignments of a chain after its first; 0 asks for a plain fact.
        num_queries: chains whose last variable is asked for.
        variable_vocab: different variables.
        value_vocab: different values.
        noise_vocab: different tokens of the noise; 0 leaves it blank.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    num_chains: int = 2
    num_hops: int = 2
    num_queries: int = 1
    variable_vocab: int = 32
    value_vocab: int = 16
    noise_vocab: int = 16

    def _check(self) -> None:
        check_positive(self, "num_chains", "num_queries", "variable_vocab", "value_vocab")
        check_counts(self, "num_hops", "noise_vocab")
        check_pool(self.num_queries, self.num_chains, "chains", "num_chains")
        check_pool(self._num_statements, self.variable_vocab, "variables", "variable_vocab")

    @property
    def vocabulary(self) -> Mapping[str, range]:
        return parts_of_vocabulary(
            2, variables=self.variable_vocab, values=self.value_vocab, noise=self.noise_vocab
        )

    @property
    def min_seq_len(self) -> int:
        return _WIDTH * self._num_statements + 2 * self.num_queries

    def examples(self, rng: np.random.Generator, num_examples: int) -> TaskExamples:
        parts = self.vocabulary
        rows = Rows(self.seq_len, num_examples, parts.get("noise"), rng)
        shape = (num_examples, self.num_chains, self.num_hops + 1)
        variables = parts["variables"].start + distinct(
            rng, self.variable_vocab, self._num_statements, num_examples
        ).reshape(shape)
        values = rng.integers(parts["values"].start, parts["values"].stop, size=shape[:2])
        cells = cell_starts(self.seq_len - 2 * self.num_queries, _WIDTH)
        places = distinct(rng, cells, self._num_statements, num_examples).reshape(shape)
        places.sort(axis=2)  # an assignment follows the one that it refers to
        sources = np.concatenate([values[..., None], variables[..., :-1]], axis=2)

        for offset, tokens in ((0, variables), (1, np.full(shape, _SET)), (2, sources)):
            rows.write(places.reshape(num_examples, -1) + offset, tokens.reshape(num_examples, -1))
        first = self.seq_len - 2 * self.num_queries
        for query in range(self.num_queries):
            rows.write(first + 2 * query, ASK)
            rows.write(first + 2 * query + 1, variables[:, query, -1])
            rows.ask(first + 2 * query + 1, values[:, query], places[:, query, 0] + 2)
        return rows.done()

    @property
    def _num_statements(self) -> int:
        return self.num_chains * (self.num_hops + 1)
