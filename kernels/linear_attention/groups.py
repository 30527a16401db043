"""Groups of chunks: how a call is cut up, and how tokens get into a group and out of it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: B batch, T tokens, H heads, K key width, V value width, D any width, Y chunks of all rows and
# heads of a group, J chunks of a sequence in a group, X rows times heads, C chunk length

_MAX_CHUNK = 128
_GROUP_ELEMENTS = 2**18


class Plan(NamedTuple):
    """How a call is cut up: (start, length) of each segment, most tokens of a chunk, chunks of a group.

    A dense batch is one segment of all its rows; a packed row has one segment per sequence.
    """

    segments: tuple[tuple[int, int], ...]
    chunk_size: int
    group_size: int

    def groups(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """Segment of each group, and its first token, end and chunk length."""
        for m, (start, length) in enumerate(self.segments):
            chunk_size = min(self.chunk_size, 1 << max(length - 1, 0).bit_length())
            step = chunk_size * self.group_size
            for t0 in range(start, start + length, step):
                yield m, (t0, min(t0 + step, start + length), chunk_size)


def make_plan(
    keys: Tensor, values: Tensor, lengths: tuple[int, ...], is_packed: bool, chunk_size: int
) -> Plan:
    """Plan of a call with keys (B, T, H, K) and values (B, T, H, V).

    Chunks have a power of two of tokens. A group has as many chunks as the cache holds, and so many that the
    states before groups take no more memory than keys and values.
    """
    batch_size, num_tokens, num_heads, key_width = keys.shape
    value_width = values.shape[3]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    segments = tuple(zip(starts[:-1], lengths, strict=True)) if is_packed else ((0, num_tokens),)
    chunk_size = 1 << (min(chunk_size, _MAX_CHUNK).bit_length() - 1)
    in_cache = _GROUP_ELEMENTS // max(1, batch_size * num_heads * chunk_size * max(key_width, value_width))
    enough = -(-key_width * value_width // max(1, chunk_size * (key_width + value_width)))
    return Plan(segments, chunk_size, max(1, in_cache, enough))


class Group:
    """The chunks of one group, for tensors (B, T, H, D) such as `like`, in the accumulation dtype."""

    def __init__(self, like: Tensor, bounds: tuple[int, int, int]):
        t0, t1, chunk_size = self.bounds = bounds
        self.acc = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.sizes = (-(-(t1 - t0) // chunk_size), like.shape[0], like.shape[2])  # J, B, H

    def load(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """The group's tokens of (B, T, H, D) as (Y, C, D), zeros (which change no state) behind the last.

        They are copied into `into` where that is given.
        """
        t0, t1, chunk_size = self.bounds
        num_chunks = self.sizes[0]
        part = x[:, t0:t1]
        if num_chunks * chunk_size > t1 - t0:
            part = F.pad(part, (0, 0, 0, 0, 0, num_chunks * chunk_size - (t1 - t0)))
        part = part.unflatten(1, (num_chunks, chunk_size)).permute(1, 0, 3, 2, 4)  # (J, B, H, C, D)
        if into is None:
            return part.to(self.acc, memory_format=torch.contiguous_format).flatten(0, 2)
        into.unflatten(0, self.sizes).copy_(part)
        return into

    def store(self, target: Tensor, x: Tensor) -> None:
        """Write (Y, C, D) to the group's tokens of `target` (B, T, H, D)."""
        t0, t1, chunk_size = self.bounds
        chunks = x.unflatten(0, self.sizes).permute(1, 0, 3, 2, 4)  # (B, J, C, H, D)
        if self.sizes[0] * chunk_size == t1 - t0:
            target[:, t0:t1].unflatten(1, (-1, chunk_size)).copy_(chunks)
        else:
            target[:, t0:t1] = chunks.flatten(1, 2)[:, : t1 - t0]

    def split(self, x: Tensor) -> Tensor:
        """(Y, ...) -> (J, X, ...)."""
        return x.unflatten(0, (self.sizes[0], -1))
