"""Softmax attention whose keys fade with their age: retention gates (TRIM-KV) and forget gates (FoX)."""

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import sequence_lengths
from .chunked import decayed_attention_torch
from .reference import decayed_attention_reference
from .types import DecayPrefix

__all__ = ["FORMS", "DecayPrefix", "decayed_attention"]

# Dimensions: B batch, T tokens, N sequences, P prefix slots, H query heads, Hkv key heads, D key width, E
# value width

FORMS = ("age", "sum", "scaled")
LOWEST = -1e4  # of a log-decay, so that an age of 0 times it is 0


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    form: str = "age",
    prefix: DecayPrefix | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention over the whole past with logits that sink as keys grow old.

        age       s_ti = scale q_t . k_i + (t - i) g_i               TRIM-KV, arXiv 2512.03324, training form
        sum       s_ti = scale q_t . k_i + sum_{j=i+1..t} g_j        forget gates, arXiv 2503.02130
        scaled    s_ti = scale q_t . k_i exp((t - i) g_i)            the eager code published with TRIM-KV

        o_t = sum_{i <= t} softmax_i(s_ti) v_i

    Scores, decays and softmax are float32 (float64 for float64 input); no exponent is ever positive. The
    scores of one block of queries exist at a time, in the backward pass too: memory is O(T). Differentiable
    with respect to every tensor, once.

    Args:
        q: (B, T, H, D); T = 0 is allowed. Query heads i * H/Hkv .. (i + 1) * H/Hkv - 1 share key head i.
        k: (B, T, Hkv, D), H a multiple of Hkv.
        v: (B, T, Hkv, E).
        log_decay: g, at most 0 (below -1e4 it counts as that): (B, T, Hkv), one per key; (B, T, H), one per
            token and query head, for form "sum". Its dtype is float32, or float64 beside float64.
        form: "age", "sum" or "scaled". The last one is there for comparison and runs on the reference alone.
        prefix: the past of each sequence, whole.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary.
        scale: factor on the products, default D ** -0.5.
        backend: "auto", "reference" or "torch".

    Returns:
        (B, T, H, E) in the dtype of q.

    Raises:
        ValueError: sizes or dtypes that do not agree, an unknown form, or a prefix without the whole past.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, T, H, D)")
    check_dtypes(q=q, k=k, v=v)
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or k.shape[2] != v.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k and v must agree in batch and tokens, k and v in heads, q and k in width, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads, got {q.shape[2]} "
            f"and {k.shape[2]}."
        )
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    expected = (*q.shape[:2], q.shape[2] if form == "sum" else k.shape[2])
    if tuple(log_decay.shape) != expected or log_decay.dtype != acc:
        raise ValueError(
            f"log_decay must be {acc} of shape {expected} for form {form!r}, got {log_decay.dtype} of shape "
            f"{tuple(log_decay.shape)}."
        )
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    if prefix is not None:
        _check_prefix(prefix, k, v, log_decay, len(lengths))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    eligible = ("torch",) if form != "scaled" else ("reference",)
    chosen = choose_backend("decayed_attention", backend, eligible)
    with without_autocast(q.device):
        log_decay = log_decay.clamp(min=LOWEST)
        if prefix is not None:
            prefix = prefix._replace(log_decay=prefix.log_decay.clamp(min=LOWEST))
        if chosen == "reference":
            return decayed_attention_reference(
                q, k, v, log_decay, lengths, form=form, prefix=prefix, scale=scale
            )
        is_packed = cu_seqlens is not None
        return decayed_attention_torch(
            q, k, v, log_decay, lengths, form=form, prefix=prefix, scale=scale, is_packed=is_packed
        )


def _check_prefix(prefix: DecayPrefix, k: Tensor, v: Tensor, log_decay: Tensor, num_sequences: int) -> None:
    num_slots = prefix.k.shape[1]
    for name, x, like in (
        ("prefix.k", prefix.k, k),
        ("prefix.v", prefix.v, v),
        ("prefix.log_decay", prefix.log_decay, log_decay),
    ):
        expected = (num_sequences, num_slots, *like.shape[2:])
        if tuple(x.shape) != expected or x.dtype != like.dtype:
            raise ValueError(
                f"{name} must be {like.dtype} of shape {expected}, got {x.dtype} of shape {tuple(x.shape)}."
            )
    num_seen = prefix.num_seen
    if num_seen.shape != (num_sequences,) or num_seen.dtype != torch.int64 or num_seen.device.type != "cpu":
        raise ValueError(
            f"prefix.num_seen must be an int64 CPU tensor of shape ({num_sequences},), got "
            f"{num_seen.dtype} of shape {tuple(num_seen.shape)} on {num_seen.device}."
        )
    if num_sequences and int(num_seen.max()) > num_slots:
        raise ValueError(
            f"the prefix must hold the whole past: {num_slots} slots for up to {int(num_seen.max())} tokens "
            "read. Keep every key."
        )
