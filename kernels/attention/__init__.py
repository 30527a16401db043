"""Softmax attention: causal, window, sinks, grouped heads, carried prefix, packed rows, statistics out."""

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import sequence_lengths
from .chunked import attention_torch, decode_attention_torch
from .external import attention_flash_attn, attention_sdpa, can_run_flash_attn, can_run_sdpa
from .reference import attention_reference, decode_attention_reference
from .types import AttentionOutput, KVPrefix

__all__ = ["AttentionOutput", "KVPrefix", "attention", "decode_attention"]

# Dimensions: B batch, T tokens, N sequences, P prefix slots, S sink or cache slots, H query heads, Hkv key
# heads, D key width, E value width


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | None = None,
    window_grid: int | None = None,
    num_sinks: int = 0,
    prefix: KVPrefix | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> AttentionOutput:
    """Causal softmax attention of the tokens of a call over themselves and over a carried prefix.

    The query at position i sees the key at position j iff j <= i and (i - j < window_size or j < num_sinks);
    positions count from the start of each sequence, the carried past included. A key held both as a sink and
    in the prefix counts once. Scores and softmax are float32 (float64 for float64 input). Differentiable with
    respect to every tensor, once.

    Args:
        q: (B, T, H, D); T = 0 is allowed. Query heads i * H/Hkv .. (i + 1) * H/Hkv - 1 share key head i.
        k: (B, T, Hkv, D), H a multiple of Hkv.
        v: (B, T, Hkv, E).
        window_size: number of visible keys, the query's own included; None for the whole sequence.
        window_grid: cells of this many positions, whose queries share one window that ends with the cell: i
            above is then the last position of the query's cell. Twice the grid as window_size lets a cell
            see itself and the one before it (the terrace of LoLCATs).
        num_sinks: first positions of each sequence that stay visible.
        prefix: keys and values of the past, one row per sequence.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed.
        scale: factor on the logits, default D ** -0.5.
        return_stats: also return the log-sum-exp and the maximum of the logits of each query.
        backend: "auto", "reference", "torch", "sdpa" or "flash_attn".

    Returns:
        output (B, T, H, E), and lse and row_max (B, T, H) when asked for.

    Raises:
        ValueError: sizes that do not agree, window_size below 1, a prefix of another number of sequences,
            sinks that the prefix has dropped, or a backend that cannot do this call.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, T, H, D)")
    check_dtypes(q=q, k=k, v=v)
    _check_heads(q, k, v)
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q, k and v must agree in batch and tokens, got q {tuple(q.shape)} and k {tuple(k.shape)}. "
            "Keys of earlier tokens belong in prefix."
        )
    if window_size is not None and window_size < 1:
        raise ValueError(
            f"window_size must be at least 1, got {window_size}. Use window_size=None for attention over "
            "the whole sequence."
        )
    if window_grid is not None and (window_size is None or not 1 <= window_grid <= window_size):
        raise ValueError(
            f"window_grid must lie between 1 and window_size={window_size}, got {window_grid}: a cell sees "
            "at least itself. Leave it out for a window that slides with every token."
        )
    if num_sinks < 0:
        raise ValueError(f"num_sinks must not be negative, got {num_sinks}.")
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    if window_size is None:
        num_sinks = 0
    if prefix is not None:
        prefix = _check_prefix(prefix, q, k, v, len(lengths), window_size, num_sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    is_packed = cu_seqlens is not None
    is_plain = prefix is None and not is_packed and window_grid is None
    if is_plain and window_size is not None and window_size >= q.shape[1]:
        window_size, num_sinks = None, 0
    eligible: tuple[str, ...] = ("torch",)
    if not return_stats and num_sinks == 0 and window_grid is None:
        if can_run_flash_attn(q, v):
            eligible = ("flash_attn", *eligible)
        if is_plain and window_size is None and can_run_sdpa(q, v):
            eligible = ("sdpa", *eligible)
    chosen = choose_backend("attention", backend, eligible)
    # scores keep their precision and the output its dtype: autocast must not round the matmuls
    with without_autocast(q.device):
        if chosen == "sdpa":
            return AttentionOutput(attention_sdpa(q, k, v, scale), None, None)
        if chosen == "flash_attn":
            output = attention_flash_attn(
                q, k, v, lengths, window_size=window_size, prefix=prefix, is_packed=is_packed, scale=scale
            )
            return AttentionOutput(output, None, None)
        if chosen == "reference":
            result = attention_reference(
                q,
                k,
                v,
                lengths,
                window_size=window_size,
                window_grid=window_grid,
                num_sinks=num_sinks,
                prefix=prefix,
                scale=scale,
            )
            return result if return_stats else AttentionOutput(result.output, None, None)
        return attention_torch(
            q,
            k,
            v,
            lengths,
            is_packed=is_packed,
            window_size=window_size,
            window_grid=window_grid,
            num_sinks=num_sinks,
            prefix=prefix,
            scale=scale,
            return_stats=return_stats,
        )


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> AttentionOutput:
    """Softmax attention of one query per sequence over slots in any order, such as a ring buffer.

    Args:
        q: (N, 1, H, D).
        k: (N, S, Hkv, D), H a multiple of Hkv.
        v: (N, S, Hkv, E).
        valid: (N, S) bool, True where a slot counts; None when all do. Each sequence needs one valid slot.
            What lies in the others is never read.
        bias: (N, S, H) added to the scaled logits of each query head, float32 (float64 for float64 input).
        scale: factor on the products, default D ** -0.5.
        return_stats: also return the log-sum-exp and the maximum of the logits.
        backend: "auto", "reference" or "torch".

    Returns:
        output (N, 1, H, E), and lse and row_max (N, 1, H) when asked for.

    Raises:
        ValueError: sizes that do not agree.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(N, S, H, D)")
    check_dtypes(q=q, k=k, v=v)
    _check_heads(q, k, v)
    if q.shape[1] != 1 or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q must be (N, 1, H, D) with the N of k, got q {tuple(q.shape)} and k {tuple(k.shape)}. "
            "Use attention(..., prefix=...) for more than one query."
        )
    if k.shape[1] < 1:
        raise ValueError(f"k must hold at least one slot, got shape {tuple(k.shape)}.")
    if valid is not None and (valid.shape != k.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be a bool tensor of shape {tuple(k.shape[:2])}, got {valid.dtype} of shape "
            f"{tuple(valid.shape)}."
        )
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if bias is not None and (bias.shape != (*k.shape[:2], q.shape[2]) or bias.dtype != acc):
        raise ValueError(
            f"bias must be {acc} of shape {(*k.shape[:2], q.shape[2])}, got {bias.dtype} of shape "
            f"{tuple(bias.shape)}."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_backend("decode_attention", backend, ("torch",))
    with without_autocast(q.device):
        if chosen == "reference":
            result = decode_attention_reference(q, k, v, valid, bias, scale=scale)
            return result if return_stats else AttentionOutput(result.output, None, None)
        return decode_attention_torch(q, k, v, valid, bias, scale=scale, return_stats=return_stats)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must agree in all but their width, got k {tuple(k.shape)} and v {tuple(v.shape)}."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one width per head, got {q.shape[3]} and {k.shape[3]}.")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads, got {q.shape[2]} "
            f"and {k.shape[2]}."
        )


def _check_prefix(
    prefix: KVPrefix,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_sequences: int,
    window_size: int | None,
    num_sinks: int,
) -> KVPrefix:
    """Check a prefix against the call; drop its sink slots when the call looks at none of them."""
    if (prefix.sink_k is None) != (prefix.sink_v is None):
        raise ValueError("prefix.sink_k and prefix.sink_v must be given together.")
    for name, x, like in (
        ("prefix.k", prefix.k, k),
        ("prefix.v", prefix.v, v),
        ("prefix.sink_k", prefix.sink_k, k),
        ("prefix.sink_v", prefix.sink_v, v),
    ):
        if x is None:
            continue
        check_rank(name, x, "(N, P, Hkv, D)")
        if x.shape[0] != num_sequences or x.shape[2:] != like.shape[2:]:
            raise ValueError(
                f"{name} must have shape ({num_sequences}, slots, {like.shape[2]}, {like.shape[3]}): one "
                "row per sequence "
                f"and the heads of this call, got {tuple(x.shape)}."
            )
        if x.dtype != like.dtype:
            raise ValueError(f"{name} must have the dtype of the call, {like.dtype}, got {x.dtype}.")
    if prefix.k.shape[1] != prefix.v.shape[1]:
        raise ValueError(
            f"prefix.k and prefix.v must have the same number of slots, got {prefix.k.shape[1]} and "
            f"{prefix.v.shape[1]}."
        )
    num_seen = prefix.num_seen
    if num_seen.shape != (num_sequences,) or num_seen.dtype != torch.int64 or num_seen.device.type != "cpu":
        raise ValueError(
            f"prefix.num_seen must be an int64 CPU tensor of shape ({num_sequences},), got "
            f"{num_seen.dtype} of shape "
            f"{tuple(num_seen.shape)} on {num_seen.device}."
        )
    num_slots = prefix.k.shape[1]
    dropped = max([0, *(n - num_slots for n in num_seen.tolist())])
    if window_size is None and dropped:
        raise ValueError(
            f"attention over the whole sequence needs the whole past in the prefix: {num_slots} slots for "
            "up to "
            f"{num_slots + dropped} tokens read. Give window_size, or keep every key."
        )
    sink_slots = 0 if prefix.sink_k is None else prefix.sink_k.shape[1]
    if sink_slots < min(num_sinks, dropped):
        raise ValueError(
            f"num_sinks={num_sinks}, but the prefix no longer holds the first positions and carries "
            f"{sink_slots} sink "
            "slots. Give prefix.sink_k and prefix.sink_v with num_sinks slots."
        )
    return prefix if num_sinks else prefix._replace(sink_k=None, sink_v=None)
