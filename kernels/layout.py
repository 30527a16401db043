"""How sequences of unequal length lie in chunks of one size.

A tight row holds N sequences one after the other without padding, (L, ...). A chunk grid is (K, C, ...): each
sequence starts in a chunk of its own, after `phase` empty slots (so that chunk boundaries fall where the
tokens read before this call put them), and its last chunk is filled up with empty slots. At most N (C - 1)
slots are empty in front and as many behind; one long sequence costs what it is long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: B batch, T tokens, N sequences, L tokens of all sequences, K chunks, C chunk length


def sequence_lengths(cu_seqlens: Tensor | None, batch_size: int, num_tokens: int) -> tuple[int, ...]:
    """Lengths of the sequences in a call, checked.

    Args:
        cu_seqlens: (N+1,) int64 CPU tensor of boundaries in a packed row, or None for a dense batch.
        batch_size: B of the tensors of the call.
        num_tokens: T of the tensors of the call.

    Returns:
        N lengths: `batch_size` times `num_tokens` without `cu_seqlens`.

    Raises:
        ValueError: cu_seqlens is not a boundary list of a packed row of `num_tokens` tokens.
    """
    if cu_seqlens is None:
        return (num_tokens,) * batch_size
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must be a 1-D integer tensor of N + 1 boundaries, got shape "
            f"{tuple(cu_seqlens.shape)} "
            f"and dtype {cu_seqlens.dtype}."
        )
    if cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens must be on the CPU, got device {cu_seqlens.device}. Move it once with "
            "cu_seqlens.cpu()."
        )
    if batch_size != 1:
        raise ValueError(
            f"cu_seqlens describes one packed row, so the batch size must be 1, got {batch_size}. "
            "Flatten the rows to (1, L, ...), or leave cu_seqlens out for a dense batch."
        )
    bounds: list[int] = cu_seqlens.tolist()
    lengths = tuple(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    if bounds[0] != 0 or bounds[-1] != num_tokens or any(n < 0 for n in lengths):
        raise ValueError(
            f"cu_seqlens must start with 0, never decrease and end with the number of tokens {num_tokens}, "
            f"got {bounds}."
        )
    return lengths


@dataclass(frozen=True)
class ChunkLayout:
    """Places sequences on a grid of chunks; make one with `ChunkLayout.make`.

    Attributes:
        lengths: tokens of each sequence in this call.
        chunk_size: C, slots per chunk.
        phases: empty slots in front of each sequence's first token, each in 0 .. C-1.
        num_chunks: chunks of each sequence; 0 for a sequence without tokens.
    """

    lengths: tuple[int, ...]
    chunk_size: int
    phases: tuple[int, ...]
    num_chunks: tuple[int, ...]

    @classmethod
    def make(
        cls, lengths: Sequence[int], chunk_size: int, phases: Sequence[int] | None = None
    ) -> "ChunkLayout":
        """Lay out sequences of the given lengths.

        Args:
            lengths: tokens of each sequence; 0 is allowed.
            chunk_size: slots per chunk, at least 1.
            phases: position of each sequence's first token inside its chunk (tokens read before, modulo the
                chunk size); default 0 for all.

        Raises:
            ValueError: chunk_size below 1, a negative length, or phases that do not match.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        if any(n < 0 for n in lengths):
            raise ValueError(f"lengths must not be negative, got {list(lengths)}.")
        phases = [0] * len(lengths) if phases is None else phases
        if len(phases) != len(lengths) or any(not 0 <= p < chunk_size for p in phases):
            raise ValueError(
                f"phases must hold {len(lengths)} numbers from 0 to {chunk_size - 1}, got {list(phases)}."
            )
        num_chunks = tuple(
            -(-(p + n) // chunk_size) if n else 0 for p, n in zip(phases, lengths, strict=True)
        )
        return cls(tuple(lengths), chunk_size, tuple(phases), num_chunks)

    @property
    def total_chunks(self) -> int:
        """K, the number of chunks of all sequences."""
        return sum(self.num_chunks)

    @property
    def is_aligned(self) -> bool:
        """Whether every slot holds a token, so that the grid is a view of the tight row."""
        return self.total_chunks * self.chunk_size == sum(self.lengths)

    @property
    def _is_uniform(self) -> bool:
        """Whether all sequences lie in their chunks alike, so that padding does without an index."""
        return len(set(self.lengths)) == 1 and len(set(self.phases)) == 1

    @cached_property
    def valid(self) -> Tensor | None:
        """(K, C) bool on the CPU, True where a slot holds a token; None when every slot does."""
        if self.is_aligned:
            return None
        valid = torch.zeros(self.total_chunks * self.chunk_size, dtype=torch.bool)
        valid[self._slots] = True
        return valid.view(self.total_chunks, self.chunk_size)

    @cached_property
    def first_chunk(self) -> Tensor:
        """(K,) bool on the CPU, True where a chunk is the first of its sequence in this call."""
        first = torch.zeros(self.total_chunks, dtype=torch.bool)
        first[[start for start, count in zip(self.chunk_starts, self.num_chunks, strict=True) if count]] = (
            True
        )
        return first

    @cached_property
    def sequence_of_chunk(self) -> Tensor:
        """(K,) int64 on the CPU: which sequence a chunk belongs to."""
        return torch.repeat_interleave(
            torch.arange(len(self.lengths)), torch.tensor(self.num_chunks, dtype=torch.int64)
        )

    @cached_property
    def chunk_starts(self) -> tuple[int, ...]:
        """Index of the first chunk of each sequence (where it would be, for one without tokens)."""
        return tuple(accumulate(self.num_chunks, initial=0))[:-1]

    def to_chunks(self, x: Tensor, fill: float = 0) -> Tensor:
        """Put the tokens of a tight row on the grid.

        Args:
            x: (L, ...), the tokens of all sequences one after the other.
            fill: value of empty slots.

        Returns:
            (K, C, ...); a view when every slot holds a token.
        """
        if x.shape[0] != sum(self.lengths):
            raise ValueError(f"x must hold {sum(self.lengths)} tokens of all sequences, got {x.shape[0]}.")
        shape = (self.total_chunks, self.chunk_size, *x.shape[1:])
        if self.is_aligned:
            return x.reshape(shape)
        if self._is_uniform:
            rows, phase = x.reshape(len(self.lengths), self.lengths[0], -1), self.phases[0]
            missing = self.num_chunks[0] * self.chunk_size - self.lengths[0] - phase
            return F.pad(rows, (0, 0, phase, missing), value=fill).reshape(shape)
        flat = x.new_full((shape[0] * shape[1], *x.shape[1:]), fill)
        return flat.index_copy(0, self._slots.to(x.device), x).view(shape)

    def from_chunks(self, chunks: Tensor) -> Tensor:
        """Take the tokens off the grid: the inverse of `to_chunks`.

        Args:
            chunks: (K, C, ...).

        Returns:
            (L, ...), without the empty slots.
        """
        expected = (self.total_chunks, self.chunk_size)
        if tuple(chunks.shape[:2]) != expected:
            raise ValueError(f"chunks must have shape {expected} + (...), got {tuple(chunks.shape)}.")
        flat = chunks.reshape(-1, *chunks.shape[2:])
        if self.is_aligned:
            return flat
        if self._is_uniform:
            rows, phase = chunks.reshape(len(self.lengths), -1, *chunks.shape[2:]), self.phases[0]
            return rows[:, phase : phase + self.lengths[0]].flatten(0, 1)
        return flat.index_select(0, self._slots.to(chunks.device))

    @cached_property
    def _slots(self) -> Tensor:
        """(L,) int64: slot of each token in the flattened grid."""
        pieces = [
            torch.arange(length) + (start * self.chunk_size + phase)
            for length, phase, start in zip(self.lengths, self.phases, self.chunk_starts, strict=True)
        ]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
