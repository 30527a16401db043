"""Windows of a stream of documents, with the borders of the documents kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batches import BatchSource, EpochOrder, TokenBatch
from .mqar import IGNORE_INDEX

# Dimensions: L tokens of all documents, N documents, B windows of a batch, T tokens of a window


@dataclass(frozen=True)
class TokenStream:
    """Documents one after another.

    Attributes:
        tokens: (L,) int64.
        starts: (N,) int64, ascending positions at which a document begins; the first is 0.
    """

    tokens: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each document."""
        return torch.diff(self.starts, append=torch.tensor([len(self)]))

    @classmethod
    def join(cls, documents: Sequence[np.ndarray]) -> TokenStream:
        """Put tokenised documents one after another; empty ones are left out."""
        documents = [document for document in documents if len(document)]
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int64)
        return cls(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(np.cumsum(lengths) - lengths))

    def cut(self, position: int) -> tuple[TokenStream, TokenStream]:
        """Two streams, before and from ``position``; a document across it is continued as one of its own."""
        before = self.starts[self.starts < position]
        after = self.starts[self.starts > position] - position
        return (
            TokenStream(self.tokens[:position], before),
            TokenStream(self.tokens[position:], torch.cat([torch.zeros(1, dtype=torch.int64), after])),
        )


class WindowBatches(BatchSource):
    """Batches of windows of a token stream.

    Window number i reads the tokens ``i seq_len .. (i + 1) seq_len - 1`` and predicts each one's successor.
    The rest that fills no window is not read; the last batch of an epoch may be smaller.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        batch_size: int,
        reset_at_documents: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        max_windows: int | None = None,
    ) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.reset_at_documents = reset_at_documents
        self.num_windows = max(len(stream) - 1, 0) // seq_len
        if max_windows is not None:
            self.num_windows = min(self.num_windows, max_windows)
        self._order = EpochOrder(self.num_windows, shuffle=shuffle, seed=seed)

    @property
    def num_batches(self) -> int:
        return -(-self.num_windows // self.batch_size)

    def batch(self, epoch: int, index: int) -> TokenBatch:
        numbers = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        starts = torch.from_numpy(numbers) * self.seq_len  # (B,)
        positions = starts[:, None] + torch.arange(self.seq_len + 1)  # (B, T + 1)
        return window_batch(
            self.stream.tokens[positions],
            torch.isin(positions, self.stream.starts) if self.reset_at_documents else None,
        )


def window_batch(tokens: Tensor, is_start: Tensor | None) -> TokenBatch:
    """A batch of windows, packed where a document begins inside one.

    Args:
        tokens: (B, T + 1), each window with the token behind it.
        is_start: (B, T + 1) bool, where a document begins; None reads on through all borders.
    """
    input_ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    if is_start is None:
        return TokenBatch(input_ids, labels)
    labels[is_start[:, 1:]] = IGNORE_INDEX
    inside = is_start[:, :-1].clone()
    inside[:, 0] = False
    if not inside.any():
        return TokenBatch(input_ids, labels)
    inside[:, 0] = True
    borders = inside.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.cat([borders, torch.tensor([inside.numel()])])
    return TokenBatch(input_ids.reshape(1, -1), labels.reshape(1, -1), cu_seqlens)


def held_out_start(stream: TokenStream, fraction: float) -> int:
    """Position from which a stream is held out: a document start that leaves ``fraction`` behind it.

    With a single document, or when whole documents would take more than half of the text, the cut falls
    inside a document.
    """
    position = len(stream) - max(int(len(stream) * fraction), 1)
    earlier = stream.starts[stream.starts <= position]
    document = int(earlier[-1]) if len(earlier) else 0
    return document if document > len(stream) // 2 else position


def check_window_settings(*, seq_len: int, max_val_windows: int | None) -> None:
    """Refuse sizes no window can have.

    Raises:
        ValueError: one of them is below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
    if max_val_windows is not None and max_val_windows < 1:
        raise ValueError(f"max_val_windows must be at least 1, or null for all, got {max_val_windows}.")


def check_length(stream: TokenStream, name: str, seq_len: int) -> None:
    """Refuse a text that fills no window.

    Args:
        name: what the text is for, for the message.

    Raises:
        ValueError: too few tokens.
    """
    if len(stream) <= seq_len:
        raise ValueError(
            f"the {name} text has {len(stream)} tokens, a window needs {seq_len + 1}. "
            "Give more text, a smaller seq_len, or another val_fraction."
        )
