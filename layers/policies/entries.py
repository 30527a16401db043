"""What a bounded cache holds of one layer: entries, and the state that keeps them between calls.

`PolicyState` is the stored form: a `State` like that of every mixer, one row per sequence, slots along
dimension 1. `LayerMemory` is the working form of sequences that have read equally many tokens, with heads in
front of slots as scores are written everywhere: (B, G, C).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..contract import State, host_field
from .packed import PackedEntries, PackedState

# Dimensions: N sequences, B sequences with equally many tokens read, S slots, C entries, G key/value heads, H
# query heads, D key width, E value width, W queries of the observation window

FIELDS = ("key", "value", "order", "score", "count", "extra", "sentence")  # of Entries
LAST = torch.iinfo(torch.int32).max  # sorts behind every position


@dataclass
class Entries:
    """Entries of every key/value head, sorted by position; heads may hold different tokens.

    Attributes:
        key: (B, G, C, D), rotated to the position at which it was read.
        value: (B, G, C, E).
        order: (B, G, C) int32, position + 1 of the token in its sequence; 0 marks an empty slot.
        score: (B, G, C) what the scorer has accumulated, float32 or wider; None where it accumulates nothing.
        count: (B, G, C) int32, tokens merged into the entry; None where nothing is merged.
        extra: (B, G, C) a number each token brought along (the log of its retention, for instance), or None.
        sentence: (B, G, C) int32, number of its sentence, from 1; None where sentences are not told apart.
    """

    key: Tensor
    value: Tensor
    order: Tensor
    score: Tensor | None = None
    count: Tensor | None = None
    extra: Tensor | None = None
    sentence: Tensor | None = None

    @property
    def pos(self) -> Tensor:
        """(B, G, C) positions; -1 in empty slots."""
        return self.order - 1

    @property
    def valid(self) -> Tensor:
        """(B, G, C) True where the slot holds an entry."""
        return self.order > 0

    @property
    def num_slots(self) -> int:
        return self.order.shape[2]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Entries:
        """Applies `fn` to every tensor that is there."""
        changed: dict[str, Any] = {name: _maybe(fn, getattr(self, name)) for name in FIELDS}
        return Entries(**changed)

    def take(self, index: Tensor, keep: Tensor | None = None) -> Entries:
        """The entries of the slots `index` (B, G, n); those where `keep` (B, G, n) is False become empty."""

        def gather(x: Tensor) -> Tensor:
            at = index if x.dim() == 3 else index[..., None].expand(*index.shape, x.shape[-1])
            found = x.gather(2, at)
            if keep is None:
                return found
            return found.masked_fill(~(keep if x.dim() == 3 else keep[..., None]), 0)

        return self.map(gather)

    @staticmethod
    def concat(parts: Sequence[Entries]) -> Entries:
        """Entries behind one another, in the dtypes of the first."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for name in FIELDS:
            tensors = [getattr(part, name) for part in parts]
            joined[name] = (
                None if tensors[0] is None else torch.cat([t.to(tensors[0].dtype) for t in tensors], dim=2)
            )
        return Entries(**joined)


@dataclass
class LayerMemory:
    """The working form of what one layer holds of sequences with equally many tokens read.

    Attributes:
        entries: those in full precision.
        num_seen: tokens each sequence has read.
        budget: entries a head may hold after a compression.
        queries: (B, W, H, D) the last W queries, the newest last; None where no scorer looks at them.
        threshold: (B, 1) similarity from which on evicted entries are merged; -2 before the first. Or None.
        packed: entries in fewer bits or channels, or None.
        question: (B, G, D + 1) sum of the queries since the last sentence or prompt ended (their mean over
            the heads of a group), and how many they are; None where sentences are not told apart.
    """

    entries: Entries
    num_seen: int
    budget: int
    queries: Tensor | None = None
    threshold: Tensor | None = None
    packed: PackedEntries | None = None
    question: Tensor | None = None

    def trimmed(self) -> LayerMemory:
        """Without the slots that are empty in every head; looks at the data."""
        longest = int(self.entries.valid.sum(-1).max()) if self.entries.order.numel() else 0
        if longest == self.entries.num_slots:
            return self
        index = by_position(self.entries.order)[..., :longest]
        return replace(self, entries=self.entries.take(index))


@dataclass(kw_only=True)
class PolicyState(State):
    """What a bounded cache keeps of one layer between calls; slots are sorted by position, unused ones last.

    Attributes:
        budget: (N,) int64 on the CPU, entries a head may hold after a compression.
        key: (N, S, G, D).
        value: (N, S, G, E).
        order: (N, S, G) int32, position + 1, 0 where the slot is empty.
        score, count, extra, sentence: (N, S, G) as in `Entries`, or None.
        queries: (N, W, H, D) the last queries, the newest last, or None.
        threshold: (N, 1) as in `LayerMemory`, or None.
        packed: entries in fewer bits or channels, or None.
        question: (N, G, D + 1) as in `LayerMemory`, or None.
    """

    budget: Tensor = host_field()
    key: Tensor
    value: Tensor
    order: Tensor
    score: Tensor | None = None
    count: Tensor | None = None
    extra: Tensor | None = None
    sentence: Tensor | None = None
    queries: Tensor | None = None
    threshold: Tensor | None = None
    packed: PackedState | None = None
    question: Tensor | None = None

    def memory(self, rows: slice, *, num_seen: int, budget: int, held: int | None = None) -> LayerMemory:
        """The working form of some rows, which have read equally many tokens under one budget.

        Args:
            rows: which.
            num_seen, budget: those of these rows; given, because compiled code cannot look them up.
            held: slots in use; None for all.
        """

        def heads_first(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows, :held].transpose(1, 2)

        key, value, order = (x[rows, :held].transpose(1, 2) for x in (self.key, self.value, self.order))
        return LayerMemory(
            entries=Entries(
                key,
                value,
                order,
                heads_first(self.score),
                heads_first(self.count),
                heads_first(self.extra),
                heads_first(self.sentence),
            ),
            num_seen=num_seen,
            budget=budget,
            queries=None if self.queries is None else self.queries[rows],
            threshold=None if self.threshold is None else self.threshold[rows],
            packed=None if self.packed is None else self.packed.entries(rows),
            question=None if self.question is None else self.question[rows],
        )

    @classmethod
    def of(cls, parts: Sequence[LayerMemory], *, slots: int | None = None) -> PolicyState:
        """The stored form of consecutive rows.

        Args:
            parts: their working forms.
            slots: how many to have; None for as many as the fullest head needs.
        """
        sizes = [part.entries.order.shape[0] for part in parts]
        most = max(part.entries.num_slots for part in parts) if slots is None else slots

        def column(pick: Callable[[LayerMemory], Tensor | None], slots: int | None = None) -> Tensor | None:
            tensors = [pick(part) for part in parts]
            if tensors[0] is None:
                return None
            if slots is not None:
                tensors = [_padded(x.transpose(1, 2), slots) for x in tensors if x is not None]
            return torch.cat([x for x in tensors if x is not None])

        def slotted(name: str) -> Tensor | None:
            return column(lambda part: getattr(part.entries, name), most)

        key, value, order = (slotted(name) for name in ("key", "value", "order"))
        assert key is not None
        assert value is not None
        assert order is not None
        num_tokens = _repeated([part.num_seen for part in parts], sizes)
        return cls(
            num_tokens=num_tokens,
            budget=_repeated([part.budget for part in parts], sizes),
            key=key,
            value=value,
            order=order,
            score=slotted("score"),
            count=slotted("count"),
            extra=slotted("extra"),
            sentence=slotted("sentence"),
            queries=column(lambda part: part.queries),
            threshold=column(lambda part: part.threshold),
            packed=_packed(parts, num_tokens),
            question=column(lambda part: part.question),
        )


def by_position(order: Tensor) -> Tensor:
    """(B, G, C) slots in the order of their positions, empty ones last."""
    return torch.where(order > 0, order, LAST).argsort(dim=-1, stable=True)


def _maybe(fn: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
    return None if x is None else fn(x)


def _repeated(values: list[int], sizes: list[int]) -> Tensor:
    return torch.tensor([v for v, n in zip(values, sizes, strict=True) for _ in range(n)], dtype=torch.int64)


def _padded(x: Tensor, slots: int) -> Tensor:
    """(N, S, ...) with empty slots at the end."""
    missing = slots - x.shape[1]
    return x if missing == 0 else torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)


def _packed(parts: Sequence[LayerMemory], num_tokens: Tensor) -> PackedState | None:
    """The packed entries of consecutive rows; rows that have none yet count as rows with empty slots."""
    first = next((part.packed for part in parts if part.packed is not None), None)
    if first is None:
        return None
    found = []
    for part in parts:
        packed = part.packed
        if packed is None:
            rows = part.entries.order.shape[0]
            packed = first.emptied(rows)
        found.append(packed)
    return PackedState.of(found, num_tokens)
