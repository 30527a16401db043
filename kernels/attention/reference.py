"""Softmax attention by the definition: one query at a time, over the list of keys it may see.

o_i = sum_j p_ij v_j,   p_ij = softmax_j(scale q_i . k_j)   over j <= i with i - j < window_size or j <
num_sinks
"""

import torch
from torch import Tensor

from .types import AttentionOutput, KVPrefix

# Dimensions: B batch, T tokens, N sequences, H query heads, G query heads per key head, D key width, E value
# width, J keys


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    window_size: int | None,
    window_grid: int | None,
    num_sinks: int,
    prefix: KVPrefix | None,
    scale: float,
) -> AttentionOutput:
    """The definition of `memzoo.kernels.attention` on checked arguments; always returns the statistics."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows_q, rows_k, rows_v = (x.flatten(0, 1).split(list(lengths)) for x in (q, k, v))
    outputs, lses, maxima = [], [], []
    for n, length in enumerate(lengths):
        keys, values, positions = _filled_slots(prefix, n, num_sinks)
        num_seen = 0 if prefix is None else int(prefix.num_seen[n])
        keys += rows_k[n].unbind(0)
        values += rows_v[n].unbind(0)
        positions += range(num_seen, num_seen + length)
        for t in range(length):
            i = num_seen + t
            last = i if window_grid is None else (i // window_grid + 1) * window_grid - 1
            seen = [
                slot
                for slot, j in enumerate(positions)
                if j <= i and (window_size is None or last - j < window_size or j < num_sinks)
            ]
            k_seen = torch.stack([keys[slot] for slot in seen]).to(acc)  # (J, Hkv, D)
            v_seen = torch.stack([values[slot] for slot in seen]).to(acc)  # (J, Hkv, E)
            q_grouped = rows_q[n][t].to(acc).unflatten(0, (k.shape[2], -1))  # (Hkv, G, D)
            logits = torch.einsum("hgd,jhd->hgj", q_grouped, k_seen) * scale
            outputs.append(torch.einsum("hgj,jhe->hge", logits.softmax(-1), v_seen).flatten(0, 1))
            lses.append(logits.logsumexp(-1).flatten())
            maxima.append(logits.amax(-1).flatten())
    shape = q.shape[:3]
    if not outputs:
        return AttentionOutput(
            q.new_zeros(*shape, v.shape[-1]), *(q.new_zeros(shape, dtype=acc) for _ in range(2))
        )
    return AttentionOutput(
        torch.stack(outputs).to(q.dtype).reshape(*shape, -1),
        torch.stack(lses).reshape(shape),
        torch.stack(maxima).reshape(shape),
    )


def _filled_slots(
    prefix: KVPrefix | None, n: int, num_sinks: int
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Keys, values and positions of the filled slots of one sequence, each position once."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    positions: list[int] = []
    if prefix is None:
        return keys, values, positions
    num_seen, num_slots = int(prefix.num_seen[n]), prefix.k.shape[1]
    if prefix.sink_k is not None and prefix.sink_v is not None:
        for j in range(min(prefix.sink_k.shape[1], num_sinks, max(num_seen - num_slots, 0))):
            keys.append(prefix.sink_k[n, j])
            values.append(prefix.sink_v[n, j])
            positions.append(j)
    for slot in range(num_slots):
        if num_seen - num_slots + slot >= 0:
            keys.append(prefix.k[n, slot])
            values.append(prefix.v[n, slot])
            positions.append(num_seen - num_slots + slot)
    return keys, values, positions


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, bias: Tensor | None, *, scale: float
) -> AttentionOutput:
    """The definition of `memzoo.kernels.decode_attention`; statistics are always returned."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs, lses, maxima = [], [], []
    for n in range(q.shape[0]):
        slots = torch.arange(k.shape[1], device=k.device) if valid is None else valid[n].nonzero()[:, 0]
        q_grouped = q[n, 0].to(acc).unflatten(0, (k.shape[2], -1))  # (Hkv, G, D)
        logits = torch.einsum("hgd,jhd->hgj", q_grouped, k[n, slots].to(acc)) * scale
        if bias is not None:
            logits = logits + bias[n, slots].T.unflatten(0, (k.shape[2], -1))
        outputs.append(torch.einsum("hgj,jhe->hge", logits.softmax(-1), v[n, slots].to(acc)).flatten(0, 1))
        lses.append(logits.logsumexp(-1).flatten())
        maxima.append(logits.amax(-1).flatten())
    return AttentionOutput(
        torch.stack(outputs).to(q.dtype)[:, None], torch.stack(lses)[:, None], torch.stack(maxima)[:, None]
    )
