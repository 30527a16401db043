"""What every synthetic memory task has in common: fields, vocabulary, and the rows under construction."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ....layers.contract import check_positive, suggest
from ..mqar import IGNORE_INDEX

# Dimensions: N examples, L tokens of an example, m things of one kind in an example

BLANK = 0  # the token of an empty position
ASK = 1  # the mark in front of a question
NO_EVIDENCE = -1

Setting = bool | int | float | str | None | Sequence[float]
Config = TypeVar("Config")


@dataclass(frozen=True)
class TaskExamples:
    """Examples of a task.

    Attributes:
        inputs: (N, L) int64, the tokens.
        labels: (N, L) int64, the answer to be predicted at a position, -100 where nothing is asked.
        evidence: (N, L) int64, at each asked position the position of the token that settles the answer; -1
            elsewhere.
    """

    inputs: Tensor
    labels: Tensor
    evidence: Tensor


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Settings of one synthetic task; a subclass says what a row looks like.

    Every answer is determined by the tokens before it, and is equally likely to be any value token, so that
    `chance` is the accuracy of a reader without memory.

    Args:
        seq_len: tokens per example.
    """

    seq_len: int = 128

    def __post_init__(self) -> None:
        check_positive(self, "seq_len")
        self._check()
        if self.seq_len < self.min_seq_len:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.min_seq_len} tokens, got {self.seq_len}. "
                "Use longer examples, or state and ask less."
            )

    @property
    @abstractmethod
    def vocabulary(self) -> Mapping[str, range]:
        """The kinds of tokens with their ids; together they fill ``0 .. vocab_size - 1``."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the task; a model needs at least as many."""
        return max(part.stop for part in self.vocabulary.values())

    @property
    def chance(self) -> float:
        """Accuracy of a reader that guesses among the value tokens."""
        return 1 / len(self.vocabulary["values"])

    @property
    @abstractmethod
    def min_seq_len(self) -> int:
        """Tokens of the shortest example that these settings allow."""

    @abstractmethod
    def examples(self, rng: np.random.Generator, num_examples: int) -> TaskExamples:
        """Draw examples; nothing but ``rng`` decides which."""

    @abstractmethod
    def _check(self) -> None:
        """Refuse settings that do not fit one another; `seq_len` is compared with `min_seq_len` later."""


class Rows:
    """Examples under construction: first nothing but noise, no label and no evidence.

    Args:
        seq_len: tokens per example (L).
        num_examples: examples (N).
        noise: tokens that fill the empty positions, drawn evenly; None leaves them blank.
        rng: draws the noise.
    """

    def __init__(self, seq_len: int, num_examples: int, noise: range | None, rng: np.random.Generator):
        shape = (num_examples, seq_len)
        if noise:
            self.inputs = rng.integers(noise.start, noise.stop, size=shape)
        else:
            self.inputs = np.full(shape, BLANK, dtype=np.int64)
        self.labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        self.evidence = np.full(shape, NO_EVIDENCE, dtype=np.int64)

    def write(self, positions: np.ndarray | int, tokens: np.ndarray | int) -> None:
        """Put tokens (N, m) at positions (N, m); single numbers stand for all rows."""
        where, what = np.broadcast_arrays(self._table(positions), self._table(tokens))
        np.put_along_axis(self.inputs, where, what, axis=1)

    def ask(self, positions: np.ndarray | int, answers: np.ndarray, evidence: np.ndarray) -> None:
        """Ask at positions (N, m) for answers (N, m), which the tokens at ``evidence`` (N, m) settle."""
        where, answers, evidence = np.broadcast_arrays(
            self._table(positions), self._table(answers), self._table(evidence)
        )
        np.put_along_axis(self.labels, where, answers, axis=1)
        np.put_along_axis(self.evidence, where, evidence, axis=1)

    def done(self) -> TaskExamples:
        return TaskExamples(*(torch.from_numpy(part) for part in (self.inputs, self.labels, self.evidence)))

    def _table(self, numbers: np.ndarray | int) -> np.ndarray:
        """Numbers as (N, m): a single one for every row, (N,) as one column."""
        table = np.asarray(numbers, dtype=np.int64)
        if table.ndim == 2:
            return table
        return np.broadcast_to(table.reshape(-1, 1), (len(self.inputs), 1))


def config_from(
    settings: Mapping[str, Setting], *, seq_len: int, types: Mapping[str, type[Config]]
) -> Config:
    """A task config from ``{type: ..., ...}`` and its length.

    Raises:
        ValueError: unknown type or key (the nearest is suggested), or settings that do not fit.
    """
    if not isinstance(settings, Mapping) or "type" not in settings:
        raise ValueError(f"a task is a mapping with a type, got {settings!r}. {suggest('', types)}")
    fields = {str(name): value for name, value in settings.items() if name != "type"}
    name = str(settings["type"])
    if name not in types:
        raise ValueError(f"task type {name!r} is unknown. {suggest(name, types)}")
    if "seq_len" in fields:
        raise ValueError("seq_len is no setting of the task here. Give the lengths beside the task.")
    known = {field.name for field in dataclasses.fields(types[name])} - {"seq_len"}  # type: ignore[arg-type]
    for field in fields:
        if field not in known:
            raise ValueError(f"the task {name!r} has no setting {field!r}. {suggest(field, known)}")
    make: Callable[..., Config] = types[name]
    return make(seq_len=seq_len, **fields)


def parts_of_vocabulary(marks: int, **sizes: int) -> dict[str, range]:
    """Number the tokens: blank, the marks, then each kind in turn; kinds of size 0 are left out."""
    parts = {"blank": range(1), "marks": range(1, 1 + marks)}
    first = 1 + marks
    for name, size in sizes.items():
        if size:
            parts[name] = range(first, first + size)
            first += size
    return parts


def distinct(rng: np.random.Generator, pool: int | np.ndarray, num: int, num_rows: int) -> np.ndarray:
    """``num`` different members of a pool (or numbers below it) for every row, in random order: (N, m)."""
    draws = np.empty((num_rows, num), dtype=np.int64)
    for row in range(num_rows):
        draws[row] = rng.choice(pool, num, replace=False)
    return draws


def spell(numbers: np.ndarray, tokens: range, num_digits: int) -> np.ndarray:
    """Write each number with ``num_digits`` tokens, highest digit first: (..., num_digits)."""
    powers = len(tokens) ** np.arange(num_digits - 1, -1, -1, dtype=np.int64)
    return tokens.start + numbers[..., None] // powers % len(tokens)


def cell_starts(num_tokens: int, width: int, segment_len: int | None = None) -> np.ndarray:
    """Where the cells start into which a text is cut, so that things of ``width`` tokens never overlap.

    Args:
        num_tokens: length of the text.
        width: tokens of a cell.
        segment_len: no cell crosses a multiple of this; None sets no such border.
    """
    length = num_tokens if segment_len is None else segment_len
    inside = np.arange(0, length - width + 1, width)
    segments = np.arange(0, num_tokens - length + 1, length)
    starts: np.ndarray = (segments[:, None] + inside).reshape(-1)
    return starts


def check_counts(config: object, *names: str) -> None:
    """Raises ValueError unless each named field is an integer of at least 0."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}.")


def check_switches(config: object, *names: str) -> None:
    """Raises ValueError unless each named field is true or false."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be true or false, got {getattr(config, name)!r}.")


def check_depth(depth: object) -> tuple[float, float]:
    """A share of the text from .. to, as a pair.

    Raises:
        ValueError: no pair of ascending numbers from 0 to 1.
    """
    pair = tuple(depth) if isinstance(depth, (list, tuple)) else ()
    if (
        len(pair) != 2
        or not all(isinstance(edge, (int, float)) and not isinstance(edge, bool) for edge in pair)
        or not 0 <= pair[0] < pair[1] <= 1
    ):
        raise ValueError(
            f"depth must be a pair of ascending numbers from 0 to 1, got {depth!r}. [0, 1] is the whole text."
        )
    return float(pair[0]), float(pair[1])


def check_pool(num: int, pool: int, things: str, field: str) -> None:
    """Raises ValueError when ``num`` different ``things`` are wanted and there are only ``pool``."""
    if num > pool:
        raise ValueError(f"{num} different {things} are needed, but there are {pool}. Raise {field}.")
