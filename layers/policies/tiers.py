"""A second store beside the entries kept whole: fewer bits, or fewer channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .entries import Entries, LayerMemory, by_position
from .packed import PackedEntries, dequantize, quantize_fp8, quantize_per_token
from .reading import Observation, wide_dtype
from .scorers import Scorer
from .selection import settled

# Dimensions: B sequences, G key/value heads, C entries, D width, K kept channels, R query heads per key head


class Tier:
    """Decides at each compression which entries stay whole, and keeps others in less space."""

    def settle(
        self, memory: LayerMemory, obs: Observation, scorer: Scorer, *, is_prompt: bool
    ) -> LayerMemory:
        """The memory after a compression.

        Args:
            memory: what is held, the newest tokens included.
            obs: with the queries read since the last compression.
            scorer: of the policy.
            is_prompt: a call of several tokens has been read whole.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement settle")

    def unpack(self, packed: PackedEntries, like: Entries) -> Entries:
        """The packed entries as the whole ones they stand for."""
        raise NotImplementedError(f"{type(self).__name__} does not implement unpack")

    def all_entries(self, memory: LayerMemory) -> Entries:
        """Packed entries, unpacked, in front of those kept whole."""
        if memory.packed is None or memory.packed.num_slots == 0:
            return memory.entries
        return Entries.concat([self.unpack(memory.packed, memory.entries), memory.entries])


@dataclass(frozen=True)
class LowBits(Tier):
    """Nothing is dropped: entries of low score go to integers of few bits (MiKV, Yang et al., 2402.18096).

    The budget of the layer counts the important entries; `recent` tokens are kept whole besides. Before they
    are quantised, channels of keys are balanced by b_c = sqrt(max |q_c| / max |k_c|), from the prompt.

    Attributes:
        bits: of low entries: 2, 3, 4 or 8.
        group: channels that share a scale; None for the whole head.
        recent: last tokens kept whole.
        balance: use the balancer.
    """

    bits: int = 2
    group: int | None = None
    recent: int = 32
    balance: bool = True

    def settle(
        self, memory: LayerMemory, obs: Observation, scorer: Scorer, *, is_prompt: bool
    ) -> LayerMemory:
        entries, capacity = memory.entries, memory.budget + self.recent
        packed = memory.packed
        if entries.num_slots <= capacity:
            return memory
        scores = settled(scorer.score(entries, obs))
        scores = scores.masked_fill(entries.order > memory.num_seen - self.recent, torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices.split(
            [capacity, entries.num_slots - capacity], dim=-1
        )
        high, low = (entries.take(index.sort(dim=-1).values) for index in best)
        if packed is not None and not bool(packed.order.any()):
            packed = None  # a row without low entries, beside rows that have some
        new = self._pack(low, self._balancer(entries, obs) if packed is None else packed.balance)
        return replace(memory, entries=high, packed=new if packed is None else packed.followed_by(new))

    def unpack(self, packed: PackedEntries, like: Entries) -> Entries:
        found = []
        for codes, scale, zero in (
            (packed.key, packed.key_scale, packed.key_zero),
            (packed.value, packed.value_scale, packed.value_zero),
        ):
            assert scale is not None
            assert zero is not None
            found.append(dequantize(codes, scale, zero, self.bits))
        key, value = found
        if packed.balance is not None:
            key = key / packed.balance[:, :, None]
        return Entries(
            key.to(like.key.dtype),
            value.to(like.value.dtype),
            packed.order,
            None if like.score is None else torch.zeros_like(packed.order, dtype=like.score.dtype),
        )

    def _pack(self, entries: Entries, balance: Tensor | None) -> PackedEntries:
        key, value = entries.key.detach().float(), entries.value.detach().float()
        if balance is not None:
            key = key * balance[:, :, None]
        key_codes, key_scale, key_zero = quantize_per_token(key, self.bits, self.group or key.shape[-1])
        codes, scale, zero = quantize_per_token(value, self.bits, self.group or value.shape[-1])
        return PackedEntries(key_codes, codes, entries.order, key_scale, key_zero, scale, zero, balance)

    def _balancer(self, entries: Entries, obs: Observation) -> Tensor | None:
        """(B, G, D) b_c, over all queries of the group."""
        if not self.balance:
            return None
        groups = entries.order.shape[1]
        queries = obs.queries.float().unflatten(2, (groups, -1)).abs().amax((1, 3))  # (B, G, D)
        keys = entries.key.detach().float().abs().amax(2)
        return (queries.clamp(min=1e-6) / keys.clamp(min=1e-6)).sqrt()


@dataclass(frozen=True)
class ThreeStates(Tier):
    """Entries are whole, in eight-bit floats, or gone (ARKV, 2603.08727).

    A prompt keeps its best `cache_size - window` entries and the last `window`, all whole. Later, when more
    than `cache_size` are held, the best `keep` of the past stay: of these the best whole, as many as the
    budget of the layer says, the others in eight bits. What is in eight bits stays so.

    Attributes:
        cache_size: entries of a head, both kinds.
        window: last entries, always whole.
        keep: share of the past that stays.
    """

    cache_size: int
    window: int = 32
    keep: float = 0.75

    def settle(
        self, memory: LayerMemory, obs: Observation, scorer: Scorer, *, is_prompt: bool
    ) -> LayerMemory:
        held = self.all_entries(memory)
        count = int(held.valid.sum(-1).max())
        if count <= self.cache_size:
            return memory
        index = by_position(held.order)[..., :count]
        held = held.take(index)
        num_packed = 0 if memory.packed is None else memory.packed.num_slots
        was_packed = index < num_packed
        scores = settled(scorer.score(held, obs)).masked_fill(~held.valid, -torch.inf)
        past = count - self.window
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # the window comes first
        room = self.cache_size if is_prompt else self.window + int(self.keep * past)
        whole = room if is_prompt else min(room, max(self.window, memory.budget))
        stays = (rank < room) & held.valid
        is_whole = stays & (rank < whole) & ~was_packed
        new = held.take(*_chosen(held.order, stays & ~was_packed & ~is_whole))
        packed = self._pack(new) if new.num_slots else None
        if memory.packed is not None and num_packed:
            slots = stays.new_zeros(*stays.shape[:2], num_packed + memory.entries.num_slots)
            stayed = slots.scatter(-1, index, stays & was_packed)[..., :num_packed]
            old = memory.packed.take(*_chosen(memory.packed.order, stayed))
            packed = old if packed is None else old.followed_by(packed)
        return replace(memory, entries=held.take(*_chosen(held.order, is_whole)), packed=packed)

    def unpack(self, packed: PackedEntries, like: Entries) -> Entries:
        assert packed.key_scale is not None
        assert packed.value_scale is not None
        key = packed.key.float() * packed.key_scale
        value = packed.value.float() * packed.value_scale
        return Entries(key.to(like.key.dtype), value.to(like.value.dtype), packed.order)

    def _pack(self, entries: Entries) -> PackedEntries:
        (key, key_scale), (value, value_scale) = quantize_fp8(entries.key), quantize_fp8(entries.value)
        return PackedEntries(key, value, entries.order, key_scale=key_scale, value_scale=value_scale)


@dataclass(frozen=True)
class FewerChannels(Tier):
    """Keys lose the channels that matter least to the last queries of the prompt (ThinK, 2407.21018).

    s_c = (mean over the last `window` queries and the group of q_c^2) (mean over keys of k_c^2); of every
    key/value head the int(D ratio) lowest go. The scale of the logits stays D ** -0.5.

    Attributes:
        ratio: share of channels removed.
        window: last queries looked at.
        recent: last tokens whose keys stay whole.
    """

    ratio: float = 0.4
    window: int = 32
    recent: int = 32

    def settle(
        self, memory: LayerMemory, obs: Observation, scorer: Scorer, *, is_prompt: bool
    ) -> LayerMemory:
        entries, packed = memory.entries, memory.packed
        if packed is not None and packed.channels is not None and not bool(packed.channels.any()):
            packed = None  # a row without prompt, beside rows that have one
        if packed is None:
            channels = kept_channels(self.channel_scores(entries, obs), self.ratio)
        else:
            assert packed.channels is not None
            channels = packed.channels
        old = entries.num_slots - self.recent
        if old <= 0 and packed is not None:
            return memory
        index = torch.arange(entries.num_slots, device=entries.order.device).expand(entries.order.shape)
        aged, rest = entries.take(index[..., : max(0, old)]), entries.take(index[..., max(0, old) :])
        at = channels.long()[:, :, None].expand(-1, -1, aged.num_slots, -1)
        new = PackedEntries(aged.key.gather(-1, at), aged.value, aged.order, channels=channels)
        return replace(memory, entries=rest, packed=new if packed is None else packed.followed_by(new))

    def unpack(self, packed: PackedEntries, like: Entries) -> Entries:
        assert packed.channels is not None
        at = packed.channels.long()[:, :, None].expand(packed.key.shape)
        key = packed.key.new_zeros(*packed.key.shape[:3], like.key.shape[-1]).scatter(-1, at, packed.key)
        return Entries(key, packed.value, packed.order)

    def channel_scores(self, entries: Entries, obs: Observation) -> Tensor:
        """(B, G, D) how much each channel of the keys contributes to the last logits."""
        wide, groups = wide_dtype(entries.key.dtype), entries.order.shape[1]
        queries = obs.queries[:, -self.window :].to(wide).square().unflatten(2, (groups, -1)).mean((1, 3))
        return queries * entries.key.detach().to(wide).square().mean(2)


def kept_channels(scores: Tensor, ratio: float) -> Tensor:
    """(B, G, K) int16 channels that stay, in order, from scores (B, G, D)."""
    num_removed = int(scores.shape[-1] * ratio)
    lowest = scores.sort(dim=-1, stable=True).indices
    return lowest[..., num_removed:].sort(dim=-1).values.to(torch.int16)


def _chosen(order: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of the entries to keep, by position, as many as the fullest head has; and which of them count."""
    most = int(keep.sum(-1).max()) if keep.numel() else 0
    index = by_position(torch.where(keep, order, 0))[..., :most]
    return index, keep.gather(-1, index)
