"""Attention by kernels of the field: torch's scaled_dot_product_attention, and flash-attn on CUDA."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiles import lay_out_dense, lay_out_ragged
from .types import KVPrefix

# Dimensions: B batch, T tokens, N sequences, H query heads, Hkv key heads, D key width, E value width, S key
# slots

_MAX_FLASH_WIDTH = 256


def can_run_sdpa(q: Tensor, v: Tensor) -> bool:
    """Whether torch has a fused kernel; with unequal widths it would fill a T x T matrix."""
    return q.shape[1] > 0 and q.shape[3] == v.shape[3]


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention over the whole of a dense batch; shapes as in `memzoo.kernels.attention`."""
    output = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return output.transpose(1, 2)


def can_run_flash_attn(q: Tensor, v: Tensor) -> bool:
    """Whether flash-attn covers these tensors."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[1] > 0
        and q.shape[3] == v.shape[3] <= _MAX_FLASH_WIDTH
    )


def attention_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    window_size: int | None,
    prefix: KVPrefix | None,
    is_packed: bool,
    scale: float,
) -> Tensor:
    """Attention without sinks and statistics. Untested until a GPU record agrees with the reference."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1) if window_size is None else (window_size - 1, 0),
    }
    seen = [0] * len(lengths) if prefix is None else prefix.num_seen.tolist()
    if not is_packed and len(set(seen)) <= 1:
        keys, values, _ = lay_out_dense(k, v, seen[0] if seen else 0, 0, prefix)
        return flash_attn_func(q, keys, values, **options)
    flat_k, flat_v = (x.flatten(0, 1)[None] for x in (k, v))
    keys, values, segments = lay_out_ragged(flat_k, flat_v, lengths, seen, 0, prefix)
    # Queries and keys of a sequence end together, which is how flash-attn aligns unequal numbers of them.
    key_lengths = [s.num_seen - s.first_position + s.length for s in segments]
    query_lengths = [s.length for s in segments]
    bounds = [
        torch.tensor([0, *x], dtype=torch.int32, device=q.device).cumsum(0, dtype=torch.int32)
        for x in (query_lengths, key_lengths)
    ]
    output = flash_attn_varlen_func(
        q.flatten(0, 1), keys[0], values[0], *bounds, max(query_lengths), max(key_lengths), **options
    )
    return output.view(*q.shape[:3], -1)
