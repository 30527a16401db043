"""Keys and values kept verbatim: a bounded ring with sinks, and caches that grow.

They write the token at position p to a slot that depends on p alone and leave unread slots zero, so equal
histories give equal states however they were cut. Keys are stored after the rotation by their absolute
position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import DecayPrefix, KVPrefix
from ..contract import SequenceContext, State

# Dimensions: N sequences, S sinks, W window, P tokens of the past, H kv heads, D key width, E value width, T
# tokens

GROWTH = 128  # a growing cache allocates whole blocks of this many tokens


def empty_tokens(batch_size: int) -> Tensor:
    """(N,) int64 zeros on the CPU, the counter of a fresh state."""
    return torch.zeros(batch_size, dtype=torch.int64)


@dataclass(kw_only=True)
class WindowCache(State):
    """The first `num_sinks` tokens and a ring of the last `window_size` tokens behind them.

    Position p lives in slot p for p < S, else in slot S + (p - S) mod W.

    Attributes:
        key: (N, S + W, H, D) in the dtype of the activations.
        value: (N, S + W, H, E).
    """

    key: Tensor
    value: Tensor

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_slots: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> WindowCache:
        """Zeros; `num_slots` is S + W."""
        return cls(
            num_tokens=empty_tokens(batch_size),
            key=torch.zeros(batch_size, num_slots, num_heads, key_dim, device=device, dtype=dtype),
            value=torch.zeros(batch_size, num_slots, num_heads, value_dim, device=device, dtype=dtype),
        )

    def append(self, key: Tensor, value: Tensor, ctx: SequenceContext, num_sinks: int) -> WindowCache:
        """The cache after the tokens of this call; key (B, T, H, D) and value (B, T, H, E) in internal
        form.
        """
        return WindowCache(
            num_tokens=ctx.num_tokens_after,
            key=_write(self.key, key, ctx, num_sinks),
            value=_write(self.value, value, ctx, num_sinks),
        )

    def prefix(self, ctx: SequenceContext, num_sinks: int) -> KVPrefix:
        """The past as the attention kernel wants it: the last W tokens in order of time, and the sinks."""
        window = self.key.shape[1] - num_sinks
        position = self.num_tokens[:, None] - window + torch.arange(window)  # (N, W)
        slot = _slot(position.clamp(min=0), num_sinks, window)
        sinks = (self.key[:, :num_sinks], self.value[:, :num_sinks]) if num_sinks else (None, None)
        return KVPrefix(_take(self.key, slot, ctx), _take(self.value, slot, ctx), ctx.num_seen, *sinks)

    def valid(self, device: torch.device) -> Tensor | None:
        """(N, S + W) which slots hold a token, None when all do."""
        slots = self.key.shape[1]
        if int(self.num_tokens.min()) >= slots:
            return None
        return (torch.arange(slots) < self.num_tokens[:, None]).to(device)


@dataclass(kw_only=True)
class GrowingCache(State):
    """Every token ever read; position p lives in slot p. Memory grows in blocks of 128 tokens.

    Attributes:
        key: (N, P, H, D), P a multiple of 128 that holds the longest sequence.
        value: (N, P, H, E).
    """

    key: Tensor
    value: Tensor

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> GrowingCache:
        """A cache without slots."""
        return cls(
            num_tokens=empty_tokens(batch_size),
            key=torch.zeros(batch_size, 0, num_heads, key_dim, device=device, dtype=dtype),
            value=torch.zeros(batch_size, 0, num_heads, value_dim, device=device, dtype=dtype),
        )

    def append(self, key: Tensor, value: Tensor, ctx: SequenceContext) -> GrowingCache:
        """The cache after the tokens of this call."""
        after = ctx.num_tokens_after
        longest = int(after.max()) if after.numel() else 0
        return GrowingCache(
            num_tokens=after,
            key=_write(_grown(self.key, longest), key, ctx, None),
            value=_write(_grown(self.value, longest), value, ctx, None),
        )

    def prefix(self, ctx: SequenceContext) -> KVPrefix:
        """The whole past in order of time, ending at the last token read."""
        longest = int(self.num_tokens.max()) if self.batch_size else 0
        if ctx.uniform_num_seen is not None:
            return KVPrefix(self.key[:, :longest], self.value[:, :longest], ctx.num_seen)
        slot = (self.num_tokens[:, None] - longest + torch.arange(longest)).clamp(min=0)
        return KVPrefix(_take(self.key, slot, ctx), _take(self.value, slot, ctx), ctx.num_seen)


@dataclass(kw_only=True)
class DecayedCache(GrowingCache):
    """Every token ever read, with the log-decay it brought.

    Attributes:
        log_decay: (N, P, A), one per key/value head or per query head; float32, float64 beside float64.
    """

    log_decay: Tensor

    @classmethod
    def empty_decayed(
        cls,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        num_decays: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> DecayedCache:
        """A cache without slots."""
        kept = GrowingCache.empty(batch_size, num_heads, head_dim, head_dim, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            num_tokens=kept.num_tokens,
            key=kept.key,
            value=kept.value,
            log_decay=torch.zeros(batch_size, 0, num_decays, device=device, dtype=wide),
        )

    def append_decayed(
        self, key: Tensor, value: Tensor, log_decay: Tensor, ctx: SequenceContext
    ) -> DecayedCache:
        """The cache after the tokens of this call; log_decay (B, T, A) in internal form."""
        kept = self.append(key, value, ctx)
        longest = int(kept.num_tokens.max()) if kept.batch_size else 0
        return DecayedCache(
            num_tokens=kept.num_tokens,
            key=kept.key,
            value=kept.value,
            log_decay=_write(_grown(self.log_decay, longest), log_decay, ctx, None),
        )

    def decayed_prefix(self, ctx: SequenceContext) -> DecayPrefix:
        """The whole past in order of time, ending at the last token read."""
        kept = self.prefix(ctx)
        longest = kept.k.shape[1]
        if ctx.uniform_num_seen is not None:
            return DecayPrefix(kept.k, kept.v, self.log_decay[:, :longest], kept.num_seen)
        slot = (self.num_tokens[:, None] - longest + torch.arange(longest)).clamp(min=0)
        return DecayPrefix(kept.k, kept.v, _take(self.log_decay, slot, ctx), kept.num_seen)

    def slots(self, ctx: SequenceContext) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values and log-decays (N, P, ...) up to the longest sequence, and which count, for
        `decode_attention`: all, or (N, P).
        """
        longest = int(self.num_tokens.max())
        valid = None
        if ctx.uniform_num_seen is None:
            valid = (torch.arange(longest) < self.num_tokens[:, None]).to(self.key.device)
        return self.key[:, :longest], self.value[:, :longest], self.log_decay[:, :longest], valid


def growing_slots(num_tokens: int) -> int:
    """Slots of a growing cache after `num_tokens` tokens."""
    return -(-num_tokens // GROWTH) * GROWTH


def _grown(buffer: Tensor, num_tokens: int) -> Tensor:
    slots = growing_slots(num_tokens)
    if slots <= buffer.shape[1]:
        return buffer
    return torch.cat(
        [buffer, buffer.new_zeros(buffer.shape[0], slots - buffer.shape[1], *buffer.shape[2:])], dim=1
    )


def _slot(position: Tensor, num_sinks: int, window: int) -> Tensor:
    return torch.where(position < num_sinks, position, num_sinks + (position - num_sinks) % window)


def _take(buffer: Tensor, slot: Tensor, ctx: SequenceContext) -> Tensor:
    """buffer (N, slots, ...) and slot (N, P) -> (N, P, ...)."""
    if ctx.uniform_num_seen is not None:
        return (
            buffer.index_select(1, slot[0].to(buffer.device)) if slot.shape[0] else buffer[:, : slot.shape[1]]
        )
    rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
    return buffer[rows, slot.to(buffer.device)]


def _write(buffer: Tensor, new: Tensor, ctx: SequenceContext, num_sinks: int | None) -> Tensor:
    """Writes tokens (internal form) to their slots; `num_sinks` None means slot = position."""
    slots = buffer.shape[1]
    in_place = ctx.in_place and buffer.dtype == new.dtype
    buffer = buffer.to(new.dtype)
    if not in_place:
        buffer = buffer.clone()
    window = slots - (num_sinks or 0)

    def slot_of(position: Tensor) -> Tensor:
        return position if num_sinks is None else _slot(position, num_sinks, window)

    if ctx.cu_seqlens is None and ctx.uniform_num_seen is not None:
        # every row writes the same slots: no gathers
        start, length = ctx.uniform_num_seen, new.shape[1]
        local = _surviving(start, length, num_sinks, window)
        if local.numel() == 1:
            index = int(local)
            buffer[:, int(slot_of(torch.tensor(start + index)))] = new[:, index]
        elif local.numel():
            source = new if local.numel() == length else new.index_select(1, local.to(new.device))
            buffer[:, slot_of(start + local).to(new.device)] = source
        return buffer
    rows, slots_written, source_index = [], [], []
    offset = 0
    for row, length in enumerate(ctx.lengths):
        start = int(ctx.num_seen[row])
        local = _surviving(start, length, num_sinks, window)
        rows.append(torch.full_like(local, row))
        slots_written.append(slot_of(start + local))
        source_index.append(offset + local)
        offset += length
    if offset:
        where = (torch.cat(rows).to(buffer.device), torch.cat(slots_written).to(buffer.device))
        buffer[where] = new.flatten(0, 1).index_select(0, torch.cat(source_index).to(new.device))
    return buffer


def _surviving(start: int, length: int, num_sinks: int | None, window: int) -> Tensor:
    """Which tokens of the call are still held after it: sinks, and the last `window` tokens."""
    local = torch.arange(length)
    if num_sinks is None or length <= window:
        return local
    return local[(local >= length - window) | (start + local < num_sinks)]


def write_ring(buffer: Tensor, new: Tensor, ctx: SequenceContext) -> Tensor:
    """A ring (N, slots, ...) after the tokens (B, T, ...) of a call; position p lies in slot p mod slots."""
    return _write(buffer, new, ctx, 0)


def read_ring(buffer: Tensor, ctx: SequenceContext) -> Tensor:
    """(N, slots, ...), the last tokens before a call in order of time, the newest last; where fewer were
    read, what stands in front is any slot.
    """
    slots = buffer.shape[1]
    position = ctx.num_seen[:, None] - slots + torch.arange(slots)
    return _take(buffer, position.clamp(min=0) % slots, ctx)
