"""What a mixer is told about the tokens of one call, and the one internal form of every input.

Inside a mixer there are two forms only, and both are free of padding:

- dense: (B, T, ...), every row one sequence with T real tokens, `cu_seqlens` None. No gathers.
- packed: (1, L, ...), N sequences one after the other, `cu_seqlens` (N + 1,) on the CPU. A batch with a mask
  is compressed into this form, packed rows have it already.

N sequences mean N rows of state. A sequence may have no token in a call; its state is then unchanged.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import suggest

# Dimensions: B batch rows, T tokens of a row, N sequences, L tokens of all sequences together

OVERRIDES = ("window_size", "num_sinks", "chunk_size")  # sizes that a call may replace


@dataclass(frozen=True, kw_only=True)
class SequenceContext:
    """Facts about one call; frozen, and shared by all layers of a model.

    Attributes:
        lengths: tokens of each sequence in this call, N integers.
        num_seen: (N,) int64 on the CPU, tokens that each sequence had read before this call; `starts` has
            them as integers.
        uniform_num_seen: the common value of `num_seen`, or None where sequences differ.
        positions: (B, T) or (1, L) int64 on the device of the inputs: position of each token in its own
            sequence.
        cu_seqlens: (N + 1,) int64 on the CPU in packed form, None in dense form.
        streams: integer per-token streams (roles, segments), each of the shape of `positions`.
        overrides: per-call replacements of sizes (window_size, num_sinks, chunk_size) for randomised
            training.
        token_index: (L,) indices of the real tokens in the flattened (B * T) input, None when nothing was
            compressed.
        input_shape: (B, T) of the caller's input.
        return_state, return_extras: what the caller asked for.
        in_place: the incoming state was donated, its memory may be written.
        tables: scratch that layers of one model share during a call (rotary tables); never part of the state.
    """

    lengths: tuple[int, ...]
    num_seen: Tensor
    uniform_num_seen: int | None
    positions: Tensor
    input_shape: tuple[int, int]
    cu_seqlens: Tensor | None = None
    token_index: Tensor | None = None
    streams: Mapping[str, Tensor] = field(default_factory=dict)
    overrides: Mapping[str, int] = field(default_factory=dict)
    return_state: bool = False
    return_extras: bool = False
    in_place: bool = False
    tables: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def batch_size(self) -> int:
        """N, the number of sequences."""
        return len(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """`num_seen` as N integers, for arithmetic on the token grid, also under torch.compile."""
        if self.uniform_num_seen is not None:
            return (self.uniform_num_seen,) * self.batch_size
        return tuple(self.num_seen.tolist())

    @property
    def num_tokens_after(self) -> Tensor:
        """(N,) int64 on the CPU, tokens that each sequence has read after this call."""
        return self.num_seen.add(torch.tensor(self.lengths, dtype=torch.int64))

    def pack(self, x: Tensor) -> Tensor:
        """Brings a per-token input (B, T, ...) into the internal form."""
        if self.token_index is None:
            return x
        return x.flatten(0, 1).index_select(0, self.token_index).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """Brings a result in internal form back to (B, T, ...); padded positions hold zeros."""
        if self.token_index is None:
            return x
        rows, length = self.input_shape
        out = x.new_zeros(rows * length, *x.shape[2:])
        filled = out.index_copy(0, self.token_index, x.squeeze(0))
        return filled.reshape(rows, length, *x.shape[2:])

    def split(self, x: Tensor) -> list[Tensor]:
        """One tensor (tokens, ...) per sequence, from the internal form."""
        return list(x.unbind(0)) if self.cu_seqlens is None else list(x.squeeze(0).split(list(self.lengths)))

    def merge(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.stack(parts) if self.cu_seqlens is None else torch.cat(parts).unsqueeze(0)


def build_context(
    input_shape: tuple[int, int],
    device: torch.device,
    *,
    num_seen: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    streams: Mapping[str, Tensor] | None = None,
    overrides: Mapping[str, int] | None = None,
    return_state: bool = False,
    return_extras: bool = False,
    in_place: bool = False,
) -> SequenceContext:
    """Checks the arguments of a call and describes it.

    Args:
        input_shape: (B, T) of the input.
        num_seen: (N,) int64 on the CPU from the incoming state; None for an empty memory.
        mask: (B, T) bool, True = real token; any pattern.
        cu_seqlens: (N + 1,) boundaries of the sequences packed in the single row of the input.

    Raises:
        ValueError: shapes disagree, both a hiding mask and `cu_seqlens` are given, or the state has another
            batch size.
        TypeError: the mask is not boolean, or `cu_seqlens` no integers.
    """
    rows, length = input_shape
    for name in overrides or ():
        if name not in OVERRIDES:
            raise ValueError(f"size {name!r} cannot be overridden per call. {suggest(name, OVERRIDES)}")
    streams = dict(streams or {})
    for name, stream in streams.items():
        if tuple(stream.shape) != (rows, length):
            raise ValueError(
                f"stream {name!r} must have the shape of the tokens, ({rows}, {length}), got "
                f"{tuple(stream.shape)}. "
                "Give one integer per token."
            )
    if mask is not None:
        mask = _checked_mask(mask, rows, length)

    token_index: Tensor | None = None
    bounds: Tensor | None = None
    if cu_seqlens is not None:
        if mask is not None and not bool(mask.all()):
            raise ValueError(
                "mask hides tokens and cu_seqlens packs sequences in the same call. Give one of the two: "
                "drop the padding before packing, or leave out cu_seqlens."
            )
        bounds = _checked_bounds(cu_seqlens, rows, length)
        lengths = tuple(bounds.diff().tolist())
    elif mask is not None and not bool(mask.all()):
        token_index = mask.flatten().nonzero().squeeze(-1)
        counts = mask.sum(-1).cpu()
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        lengths = tuple(counts.tolist())
    else:
        lengths = (length,) * rows

    uniform: int | None = 0
    if num_seen is None:
        num_seen = torch.zeros(len(lengths), dtype=torch.int64)
    else:
        if num_seen.shape[0] != len(lengths):
            raise ValueError(
                f"state was made for batch size {num_seen.shape[0]}, but the input holds {len(lengths)} "
                "sequences. "
                "Call state.select(rows) to keep some rows, or start with state=None."
            )
        distinct = set(num_seen.tolist())
        uniform = distinct.pop() if len(distinct) == 1 else (None if distinct else 0)

    if bounds is None:
        local = torch.arange(length, device=device)
        positions = (local + (uniform if uniform is not None else num_seen.to(device)[:, None])).expand(
            rows, length
        )
    else:
        counts = bounds.diff()
        offset = torch.repeat_interleave(num_seen - bounds[:-1], counts)
        positions = (torch.arange(int(bounds[-1])) + offset).unsqueeze(0).to(device)
    context = SequenceContext(
        lengths=lengths,
        num_seen=num_seen,
        uniform_num_seen=uniform,
        positions=positions,
        input_shape=(rows, length),
        cu_seqlens=bounds,
        token_index=token_index,
        streams=streams,
        overrides=dict(overrides or {}),
        return_state=return_state,
        return_extras=return_extras,
        in_place=in_place and not torch.is_grad_enabled(),
    )
    if token_index is not None and streams:
        packed = {name: context.pack(stream) for name, stream in streams.items()}
        object.__setattr__(context, "streams", packed)
    return context


def _checked_mask(mask: Tensor, rows: int, length: int) -> Tensor:
    if tuple(mask.shape) != (rows, length):
        raise ValueError(
            f"mask must have the shape of the tokens, ({rows}, {length}), got {tuple(mask.shape)}."
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean (True = real token), got {mask.dtype}. Convert it with mask.bool()."
        )
    return mask


def _checked_bounds(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    bounds = torch.as_tensor(cu_seqlens)
    if bounds.is_floating_point() or bounds.is_complex() or bounds.dtype == torch.bool:
        raise TypeError(
            f"cu_seqlens must be integers, got {bounds.dtype}. Convert it with cu_seqlens.long()."
        )
    bounds = bounds.to("cpu", torch.int64)
    if rows != 1:
        raise ValueError(
            f"cu_seqlens packs sequences in one row, but the input has {rows} rows. Reshape it to one row."
        )
    if (
        bounds.dim() != 1
        or bounds.numel() < 1
        or int(bounds[0]) != 0
        or int(bounds[-1]) != length
        or bool((bounds.diff() < 0).any())
    ):
        given = (
            bounds.tolist() if bounds.numel() <= 16 else f"{bounds.numel()} values up to {int(bounds[-1])}"
        )
        raise ValueError(
            f"cu_seqlens must be a vector that starts at 0, never decreases and ends at the {length} tokens "
            f"of the row, got {given}."
        )
    return bounds
