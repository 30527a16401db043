"""Windows of a streamed data set: read as they come, shuffled through a buffer, resumable at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .batches import TokenBatch, start_of_epoch
from .datasets_source import DatasetSource
from .documents import text_of
from .windows import window_batch

if TYPE_CHECKING:
    from datasets import IterableDataset

# Dimensions: B windows of a batch, T tokens of a window, n windows in the buffer


class StreamedWindows:
    """An endless sequence of windows out of a streamed data set.

    The documents are joined in the order in which they come and cut into windows of ``seq_len`` tokens; each
    token is predicted once per pass over the data set, and a new pass begins where the last one ends. Each
    window that is handed out is drawn from a buffer of those read ahead, and the next one takes its place.

    `state_dict` holds all that the future depends on, the buffer included, so a restored sequence goes on
    with the same bits, as long as the data set gives the same rows.

    Args:
        rows: the data set.
        source: its description, for messages.
        text_field: field that holds the text.
        encode: token ids (L,) of a document.
        seq_len: tokens per window.
        buffer_size: windows to draw from; 1 keeps the order of the data set.
        seed: seed of the draws.
    """

    def __init__(
        self,
        rows: IterableDataset,
        *,
        source: DatasetSource,
        text_field: str,
        encode: Callable[[str], np.ndarray],
        seq_len: int,
        buffer_size: int,
        seed: int,
    ) -> None:
        self.rows, self.source, self.text_field = rows, source, text_field
        self.encode = encode
        self.seq_len, self.buffer_size, self.seed = seq_len, buffer_size, seed
        self._iterator: Iterator[Mapping[str, Any]] | None = None
        self._position: dict[str, Any] | None = None  # of the data set, where a restored pass goes on
        self._pass = 0
        self._num_rows = 0  # rows of this pass read so far
        self._num_drawn = 0
        self._found_tokens = False
        self._tokens = np.zeros(0, dtype=np.int64)  # read, but in no window yet
        self._is_start = np.zeros(0, dtype=bool)
        self._buffer: list[tuple[Tensor, Tensor]] = []

    def draw(self) -> tuple[Tensor, Tensor]:
        """The tokens of the next window with the one behind it, (T + 1,), and where documents begin in it."""
        while len(self._buffer) < self.buffer_size:
            self._buffer.append(self._read_window())
        # A generator for every draw: its state is then the number of draws.
        place = int(np.random.default_rng([self.seed, self._num_drawn]).integers(self.buffer_size))
        self._num_drawn += 1
        window, self._buffer[place] = self._buffer[place], self._read_window()
        return window

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        tokens, is_start = zip(*self._buffer, strict=True) if self._buffer else ((), ())
        empty = torch.zeros(0, self.seq_len + 1)
        return {
            "pass": self._pass,
            "num_rows": self._num_rows,
            "num_drawn": self._num_drawn,
            "found_tokens": self._found_tokens,
            "position": self._position if self._iterator is None else self.rows.state_dict(),
            "tokens": torch.from_numpy(self._tokens),
            "is_start": torch.from_numpy(self._is_start),
            "buffer_tokens": torch.stack(tokens) if tokens else empty.long(),
            "buffer_is_start": torch.stack(is_start) if is_start else empty.bool(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it was taken with another ``seq_len`` or ``buffer_size``.
        """
        num_windows, width = state["buffer_tokens"].shape
        if width != self.seq_len + 1 or num_windows not in (0, self.buffer_size):
            raise ValueError(
                f"the checkpoint was written with seq_len={width - 1} and a shuffle_buffer of {num_windows} "
                f"windows, not {self.seq_len} and {self.buffer_size}. Resume with the same settings."
            )
        self._pass, self._num_rows, self._num_drawn = state["pass"], state["num_rows"], state["num_drawn"]
        self._found_tokens = state["found_tokens"]
        self._tokens, self._is_start = state["tokens"].numpy().copy(), state["is_start"].numpy().copy()
        self._buffer = list(
            zip(state["buffer_tokens"].clone(), state["buffer_is_start"].clone(), strict=True)
        )
        self._position, self._iterator = state["position"], None

    def _read_window(self) -> tuple[Tensor, Tensor]:
        parts, starts, num_tokens = [self._tokens], [self._is_start], len(self._tokens)
        while num_tokens <= self.seq_len:
            ids = self._next_document()
            is_start = np.zeros(len(ids), dtype=bool)
            is_start[:1] = True
            parts.append(ids)
            starts.append(is_start)
            num_tokens += len(ids)
        tokens, is_start = parts[0], starts[0]
        if len(parts) > 1:
            tokens, is_start = np.concatenate(parts), np.concatenate(starts)
        self._tokens, self._is_start = tokens[self.seq_len :], is_start[self.seq_len :]
        size = self.seq_len + 1
        return torch.from_numpy(tokens[:size].copy()), torch.from_numpy(is_start[:size].copy())

    def _next_document(self) -> np.ndarray:
        """Token ids of the next row; after the last row the next pass begins."""
        if self._iterator is None:
            self.rows.set_epoch(self._pass)
            if self._position is not None:
                self.rows.load_state_dict(self._position)
            self._iterator = iter(self.rows)
        for row in self._iterator:
            self._num_rows += 1
            number = self.source.skip_rows + self._num_rows
            ids = self.encode(text_of(row, self.text_field, f"row {number} of {self.source}"))
            self._found_tokens |= len(ids) > 0
            return ids
        if not self._found_tokens:
            raise ValueError(f"{self.source} holds no text: every {self.text_field!r} is empty.")
        self._pass, self._num_rows = self._pass + 1, 0
        self._iterator = self._position = None
        return np.zeros(0, dtype=np.int64)


class EpochNumber:
    """What Lightning tells a loader: which epoch is read next."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class StreamLoader:
    """A loader over a stream that calls a fixed number of batches an epoch.

    The next epoch goes on in the stream where the last one stopped. Everything is read in the training
    process: workers would read ahead by amounts that no checkpoint could know.

    Args:
        windows: the stream.
        batch_size: windows per batch.
        num_batches: batches per epoch.
        reset_at_documents: whether documents are separate sequences inside a window.
    """

    def __init__(
        self, windows: StreamedWindows, *, batch_size: int, num_batches: int, reset_at_documents: bool = True
    ) -> None:
        self.windows = windows
        self.batch_size, self.num_batches = batch_size, num_batches
        self.reset_at_documents = reset_at_documents
        self.sampler = EpochNumber()
        self._num_yielded = 0
        self._resumed: dict[str, int] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[TokenBatch]:
        # A resumed epoch is shorter once; every later one has its full length.
        self._num_yielded = start_of_epoch(self._resumed, self.sampler.epoch, self.num_batches)
        self._resumed = None
        while self._num_yielded < self.num_batches:
            batch = self._batch()
            self._num_yielded += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches of the epoch so far, and the state of the stream."""
        position = self._resumed or {"num_yielded": self._num_yielded, "epoch": self.sampler.epoch}
        return {**position, "windows": self.windows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._resumed = {name: value for name, value in state.items() if name != "windows"}
        self.windows.load_state_dict(state["windows"])

    def _batch(self) -> TokenBatch:
        tokens, is_start = zip(*(self.windows.draw() for _ in range(self.batch_size)), strict=True)
        return window_batch(torch.stack(tokens), torch.stack(is_start) if self.reset_at_documents else None)
