"""Long documents read through: each row of a batch goes on where the row of the batch before stopped."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batches import BatchSource, TokenBatch
from .mqar import IGNORE_INDEX
from .windows import TokenStream

# Dimensions: B rows, T tokens of a window


@dataclass(frozen=True)
class _RowOrder:
    """What a row reads in one epoch.

    Attributes:
        documents: (n,) numbers of its documents, in reading order.
        ends: (n,) windows read when each of them ends.
    """

    documents: np.ndarray
    ends: np.ndarray


class ContiguousBatches(BatchSource):
    """Batches whose rows read whole documents, one after another.

    A document of L tokens fills ``ceil((L - 1) / seq_len)`` windows of one row, in successive batches: each
    of its tokens but the last is read and each but the first is predicted, once per epoch. It begins at the
    start of a window, where ``resets`` is True, and its last window is padded. Every row has its own
    documents, spread so that the rows are about equally long; shuffling changes their order inside the row. A
    row that has read all of its own is padding until the epoch ends. The first batch resets every row.

    Args:
        stream: the documents; those of a single token are left out.
        seq_len: tokens per window.
        num_rows: rows of every batch.
        shuffle: read the documents of a row in an order drawn from ``seed`` and the epoch.
        seed: seed of the order.
        max_windows: stop an epoch after this many windows, padded ones included; None reads all.

    Raises:
        ValueError: fewer documents than rows, or none from which something can be learned.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        num_rows: int,
        shuffle: bool = False,
        seed: int = 0,
        max_windows: int | None = None,
    ) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.shuffle = shuffle
        self.seed = seed
        kept = stream.lengths > 1
        self._starts, self._lengths = stream.starts[kept].numpy(), stream.lengths[kept].numpy()
        self._num_windows = -(-(self._lengths - 1) // seq_len)
        if not len(self._starts):
            raise ValueError(
                "there is no document of two tokens or more, and one predicts nothing. Give longer ones."
            )
        if num_rows > len(self._starts):
            raise ValueError(
                f"{len(self._starts)} documents do not fill {num_rows} rows, and rows read whole documents. "
                f"Set batch_size to at most {len(self._starts)}, or give more documents."
            )
        self._rows = _balanced_rows(self._num_windows, num_rows)
        self._num_batches = max(int(self._num_windows[row].sum()) for row in self._rows)
        if max_windows is not None:
            self._num_batches = min(self._num_batches, max(max_windows // num_rows, 1))
        self._order: tuple[int, list[_RowOrder]] | None = None

    @property
    def num_batches(self) -> int:
        return self._num_batches

    def batch(self, epoch: int, index: int) -> TokenBatch:
        shape = (len(self._rows), self.seq_len)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.bool)
        resets = torch.zeros(len(self._rows), dtype=torch.bool)
        for row, order in enumerate(self._epoch_order(epoch)):
            place = int(np.searchsorted(order.ends, index, side="right"))
            if place == len(order.documents):
                continue  # the row has read all its documents
            first = int(order.ends[place - 1]) if place else 0
            resets[row] = index == first
            tokens = self._window(int(order.documents[place]), index - first)
            num_read = len(tokens) - 1
            input_ids[row, :num_read] = tokens[:-1]
            labels[row, :num_read] = tokens[1:]
            mask[row, :num_read] = True
        return TokenBatch(input_ids, labels, mask=None if mask.all() else mask, resets=resets)

    def _window(self, document: int, number: int) -> Tensor:
        """Window ``number`` of a document with the token behind it: at most T + 1 tokens, at least 2."""
        start, length = int(self._starts[document]), int(self._lengths[document])
        first = number * self.seq_len
        return self.stream.tokens[start + first : start + min(first + self.seq_len + 1, length)]

    def _epoch_order(self, epoch: int) -> list[_RowOrder]:
        if self._order is None or (self.shuffle and self._order[0] != epoch):
            rng = np.random.default_rng([self.seed, epoch])
            rows = [rng.permutation(row) if self.shuffle else row for row in self._rows]
            orders = [_RowOrder(row, np.cumsum(self._num_windows[row])) for row in rows]
            self._order = (epoch, orders)
        return self._order[1]


def _balanced_rows(sizes: np.ndarray, num_rows: int) -> list[np.ndarray]:
    """The numbers of the documents of each row, ascending: the largest first, always to the shortest row."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    shortest = [(0, row) for row in range(num_rows)]
    for document in np.argsort(-sizes, kind="stable"):
        length, row = heapq.heappop(shortest)
        rows[row].append(int(document))
        heapq.heappush(shortest, (length + int(sizes[document]), row))
    return [np.array(sorted(row), dtype=np.int64) for row in rows]
