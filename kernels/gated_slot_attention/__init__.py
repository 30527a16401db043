"""Gated slot attention: a fixed number of slots that fade, written by all tokens and read by a softmax."""

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import sequence_lengths
from ..linear_attention import LinearState, linear_attention
from ..linear_attention.arguments import check_log_decay
from .chunked import slot_scores_torch
from .external import can_run_fla, gated_slot_attention_fla
from .reference import gated_slot_attention_reference
from .types import SlotState

__all__ = ["SlotState", "gated_slot_attention"]

# Dimensions: B batch, T tokens, N sequences, H query heads, Hk key/value heads, K key width, V value width,
# M slots


def gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    initial_state: SlotState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, SlotState | None]:
    """Attention to slots instead of tokens (arXiv 2409.07146): two passes of gated linear attention.

        P_t = P_{t-1} Diag(exp(g_t)) + k_t^T s_t        a_t = softmax(scale q_t P_t)
        R_t = Diag(exp(g_t)) R_{t-1} + s_t^T v_t        o_t = a_t R_t

    Sums are float32 (float64 for float64 input).

    Args:
        q: (B, T, H, K), H a multiple of Hk; T = 0 is allowed.
        k: (B, T, Hk, K).
        v: (B, T, Hk, V).
        g: (B, T, Hk, M), log-decay of each slot, at most 0.
        slots: (B, T, Hk, M), how much a token writes into each slot; default 1 - exp(g).
        scale: factor on q, default K ** -0.5.
        initial_state: state of the tokens read before, one row per sequence; None for none.
        return_state: also return the state after the last token.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed and return their state unchanged.
        chunk_size: tokens handled by one block of matmuls; changes speed, not the result.
        backend: "auto", "reference", "torch" or "fla".

    Returns:
        The output (B, T, H, V) in the dtype of q, and the state or None.

    Raises:
        ValueError: sizes that do not agree, g above 0, or a state of other sizes or another dtype.
    """
    lengths = _check(q, k, v, g, slots, initial_state, chunk_size, cu_seqlens)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[3] ** -0.5 if scale is None else scale
    eligible = ("fla", "torch") if can_run_fla(q, k) else ("torch",)
    chosen = choose_backend("gated_slot_attention", backend, eligible)
    with without_autocast(q.device):
        written = -torch.expm1(g.to(acc)) if slots is None else slots
        if chosen == "fla":
            return gated_slot_attention_fla(
                q,
                k,
                v,
                written,
                g,
                scale=scale,
                initial_state=initial_state,
                return_state=return_state,
                cu_seqlens=cu_seqlens,
            )
        if chosen == "reference":
            output, state = gated_slot_attention_reference(
                q, k, v, written, g, lengths, scale=scale, initial_state=initial_state
            )
            return output, state if return_state else None
        num_groups = q.shape[2] // k.shape[2]
        keys, values = (None, None) if initial_state is None else initial_state
        # every query head with keys and slots of its own; grouped ones repeat what they share
        wide_k, wide_slots, wide_g = (_repeat(x, 2, num_groups) for x in (k, written, g))
        scores, new_keys = slot_scores_torch(
            q,
            wide_k,
            wide_slots,
            wide_g,
            lengths,
            is_packed=cu_seqlens is not None,
            scale=scale,
            initial_keys=None if keys is None else _repeat(keys, 1, num_groups),
            chunk_size=chunk_size,
        )
    weights = torch.softmax(scores, -1)  # (B, T, H, M)
    output, memory = linear_attention(
        weights,
        written.to(acc),
        v.to(acc),
        g=g,
        scale=1.0,
        initial_state=None if values is None else LinearState(values),
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend="torch",
    )
    if memory is None:
        return output.to(q.dtype), None
    return output.to(q.dtype), SlotState(new_keys[:, ::num_groups], memory.memory)


def _repeat(x: Tensor, axis: int, num_groups: int) -> Tensor:
    return x if num_groups == 1 else x.repeat_interleave(num_groups, axis)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slots: Tensor | None,
    state: SlotState | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
) -> tuple[int, ...]:
    """Raise unless the arguments fit together; the lengths of the sequences."""
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g)):
        check_rank(name, x, "(B, T, H, K)")
    check_dtypes(q=q, k=k, v=v)
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or k.shape[2] != v.shape[2]:
        raise ValueError(
            "q, k and v must agree in batch and tokens, and k and v in heads, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}."
        )
    if q.shape[3] != k.shape[3] or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q must have the width of k and a multiple of its heads, got "
            f"q {tuple(q.shape)} and k {tuple(k.shape)}."
        )
    if g.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"g must have shape {(*k.shape[:3], 'M')}: one log-decay per token, key head and slot, got "
            f"{tuple(g.shape)}."
        )
    if slots is not None and slots.shape != g.shape:
        raise ValueError(f"slots must have the shape {tuple(g.shape)} of g, got {tuple(slots.shape)}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    check_log_decay(g)
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    if state is not None:
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        heads, num_slots = k.shape[2], g.shape[3]
        for name, x, sizes in (
            ("keys", state.keys, (k.shape[3], num_slots)),
            ("values", state.values, (num_slots, v.shape[3])),
        ):
            expected = (len(lengths), heads, *sizes)
            if tuple(x.shape) != expected or x.dtype != acc:
                raise ValueError(
                    f"initial_state.{name} must have shape {expected} and dtype {acc}, got {tuple(x.shape)} "
                    f"and {x.dtype}. Select the rows of the state that continue in this call, or convert it."
                )
    return lengths
