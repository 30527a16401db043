"""Entries in fewer bits or channels: codes, scales, and how they are packed into bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import State

# Dimensions: N sequences, B sequences with equally many tokens read, S slots, C entries, G key/value heads, D
# width, K kept channels, g quantisation group

BIT_WIDTHS = (2, 3, 4, 8)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
PER_ENTRY = ("key", "value", "order", "key_scale", "key_zero", "value_scale", "value_zero")
PER_HEAD = ("balance", "channels")


@dataclass
class PackedEntries:
    """Entries that are not kept whole; a `Tier` knows what the codes mean.

    Attributes:
        key, value: (B, G, C, ...) codes, or vectors with fewer channels.
        order: (B, G, C) int32, position + 1, 0 where empty.
        key_scale, key_zero, value_scale, value_zero: (B, G, C, groups), or None.
        balance: (B, G, D) factors of the keys' channels before they were quantised, or None.
        channels: (B, G, K) int16 the channels that keys still have, or None.
    """

    key: Tensor
    value: Tensor
    order: Tensor
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    value_scale: Tensor | None = None
    value_zero: Tensor | None = None
    balance: Tensor | None = None
    channels: Tensor | None = None

    @property
    def num_slots(self) -> int:
        return self.order.shape[2]

    def changed(self, fn: Callable[[Tensor], Tensor]) -> PackedEntries:
        """Applies `fn` to everything that is kept per entry."""
        found: dict[str, Any] = {name: getattr(self, name) for name in PER_HEAD}
        for name in PER_ENTRY:
            x = getattr(self, name)
            found[name] = None if x is None else fn(x)
        return PackedEntries(**found)

    def take(self, index: Tensor, keep: Tensor) -> PackedEntries:
        """The entries of the slots `index` (B, G, n); those where `keep` is False become empty."""

        def gather(x: Tensor) -> Tensor:
            if x.dim() == 3:
                return x.gather(2, index).masked_fill(~keep, 0)
            plain = x.view(torch.uint8) if x.dtype == FP8 else x  # gathers are not made for eight-bit floats
            at = index[..., None].expand(*index.shape, plain.shape[-1])
            return plain.gather(2, at).masked_fill(~keep[..., None], 0).view(x.dtype)

        return self.changed(gather)

    def emptied(self, rows: int) -> PackedEntries:
        """The same kind for some rows, without slots."""
        found: dict[str, Any] = {}
        for name in (*PER_ENTRY, *PER_HEAD):
            x = getattr(self, name)
            if x is not None:
                shape = (rows, *x.shape[1:]) if name in PER_HEAD else (rows, x.shape[1], 0, *x.shape[3:])
                found[name] = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return PackedEntries(**found)

    def followed_by(self, other: PackedEntries) -> PackedEntries:
        """These entries and others of the same kind behind them."""

        def joined(x: Tensor, y: Tensor) -> Tensor:
            if x.dtype == FP8:
                return torch.cat([x.view(torch.uint8), y.view(torch.uint8)], dim=2).view(FP8)
            return torch.cat([x, y], dim=2)

        rest = iter([getattr(other, name) for name in PER_ENTRY if getattr(other, name) is not None])
        return self.changed(lambda x: joined(x, next(rest)))


@dataclass(kw_only=True)
class PackedState(State):
    """The stored form of `PackedEntries`: slots along dimension 1, (N, S, G, ...)."""

    key: Tensor
    value: Tensor
    order: Tensor
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    value_scale: Tensor | None = None
    value_zero: Tensor | None = None
    balance: Tensor | None = None
    channels: Tensor | None = None

    def entries(self, rows: slice) -> PackedEntries:
        """The working form of some rows."""
        found: dict[str, Any] = {}
        for name in (*PER_ENTRY, *PER_HEAD):
            x = getattr(self, name)
            found[name] = None if x is None else x[rows]
            if x is not None and name in PER_ENTRY:
                found[name] = found[name].transpose(1, 2)
        return PackedEntries(**found)

    @classmethod
    def of(cls, parts: Sequence[PackedEntries], num_tokens: Tensor) -> PackedState:
        """The stored form of consecutive rows."""
        most = max(part.num_slots for part in parts)
        found: dict[str, Any] = {}
        for name in (*PER_ENTRY, *PER_HEAD):
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is None:
                continue
            if name in PER_ENTRY:
                tensors = [_padded(x.transpose(1, 2), most) for x in tensors]
            found[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return cls(num_tokens=num_tokens, **found)


def quantize_per_token(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric round-to-nearest in groups along the last dimension.

    s = (max - min) / (2^b - 1) or 1,  z = min,  q = clamp(round((x - z) / s), 0, 2^b - 1)

    Args:
        x: (..., D).
        bits: 2, 3, 4 or 8.
        group: channels that share scale and zero, a divisor of D.

    Returns:
        uint8 (..., D bits / 8) packed codes, and scale and zero (..., D / group) in float16.

    Raises:
        ValueError: bits or group that do not fit, or values that are not finite.
    """
    if bits not in BIT_WIDTHS or x.shape[-1] % group or x.shape[-1] * bits % 8:
        raise ValueError(
            f"cannot quantise a width of {x.shape[-1]} to {bits} bits in groups of {group}. bits must be one "
            f"of {BIT_WIDTHS}, group a divisor of the width, and a vector must fill whole bytes."
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError("cannot quantise values that are not finite. Look for what produced them.")
    grouped = x.detach().float().unflatten(-1, (-1, group))
    zero = grouped.amin(-1).half()
    scale = ((grouped.amax(-1) - zero.float()) / (2**bits - 1)).half()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = ((grouped - zero.float()[..., None]) / scale.float()[..., None]).round()
    return pack_bits(codes.clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2), bits), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What `quantize_per_token` stored, (..., D) in float32."""
    values = unpack_bits(codes, bits).float().unflatten(-1, (scale.shape[-1], -1))
    return (values * scale.float()[..., None] + zero.float()[..., None]).flatten(-2)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., D) below 2^bits, packed into (..., D bits / 8) bytes."""
    places = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = ((codes[..., None] >> places) & 1).flatten(-2).unflatten(-1, (-1, 8))
    powers = 1 << torch.arange(8, device=codes.device, dtype=torch.uint8)
    return (stream * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = ((packed[..., None] >> places) & 1).flatten(-2).unflatten(-1, (-1, bits))
    powers = 1 << torch.arange(bits, device=packed.device, dtype=torch.uint8)
    return (stream * powers).sum(-1, dtype=torch.uint8)


def quantize_fp8(x: Tensor, *, is_shared: bool = False) -> tuple[Tensor, Tensor]:
    """Eight-bit floats (e4m3) with a scale per token, amax / 448.

    Args:
        x: (B, G, C, D).
        is_shared: one scale for all rows and heads of a token, as the code of ARKV has it; it couples rows.

    Returns:
        (B, G, C, D) in float8, and scale (B, G, C, 1) in float32.
    """
    wide = x.detach().float()
    largest = wide.abs().amax((0, 1, 3) if is_shared else -1, keepdim=True)
    scale = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    return (wide / scale).to(FP8), scale.expand(*x.shape[:3], 1)


def _padded(x: Tensor, slots: int) -> Tensor:
    missing = slots - x.shape[1]
    if missing == 0:
        return x
    plain = x.view(torch.uint8) if x.dtype == FP8 else x
    return torch.cat([plain, plain.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1).view(x.dtype)
