"""Linear attention: a matrix state per head with an additive or a corrected write, decays and normaliser."""

from typing import Any

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..layout import sequence_lengths
from .arguments import check_arguments, check_state
from .chunked import linear_attention_torch
from .external import can_run_fla, linear_attention_fla
from .general import linear_attention_general
from .reference import linear_attention_reference
from .single import linear_attention_single
from .types import LinearState

__all__ = ["LinearState", "linear_attention"]

# Dimensions: B batch, T tokens, N sequences, H query heads, Hk key heads, HV value heads, K key width, V
# value width


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    rule: str = "additive",
    normalize: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, LinearState | None]:
    """Linear attention: the past of a head is one matrix, which decays, is written to and is read.

        S~_t = Diag(exp(g_t)) S_{t-1}
        additive:   S_t = S~_t + k_t^T beta_t v_t
        delta:      S_t = S~_t + k_t^T beta_t (v_t - k_t S~_t)
        o_t  = (scale q_t) S_t
        with normalize:
        n_t  = exp(g_t) n_{t-1} + beta_t k_t,   o_t = (scale q_t) S_t / ((scale q_t) . n_t + eps)

    Additive: linear attention (arXiv 2006.16236) without decay; RetNet (2307.08621), Mamba-2 (2405.21060) and
    simple GLA with one decay per head; GLA (2312.06635) with one per key channel. Delta: DeltaNet
    (2102.11174, 2406.06484) without decay; Gated DeltaNet (2412.06464) with one per head; Kimi Delta
    Attention (2510.26692) with one per key channel.

    Heads may be grouped on one side: several value heads per query and key head (H = Hk, HV a multiple of
    it), or several query heads per key and value head (Hk = HV, H a multiple of it). Sums are float32
    (float64 for float64 input).

    Args:
        q: (B, T, H, K); T = 0 is allowed.
        k: (B, T, Hk, K). For the delta rule of length at most 1 (with beta |k|^2 above 2 the state grows
            without bound).
        v: (B, T, HV, V).
        g: log-decay, at most 0, or None for no decay. One per head, (B, T, Hk) or (B, T, HV), or one per key
            channel, (B, T, Hk, K) or (B, T, HV, K).
        beta: (B, T, HV) or None for 1. Delta: the step of the correction, in [0, 2]. Additive: a factor of
            the write, any number.
        rule: "additive" or "delta".
        normalize: divide by the weight of the read keys; needs feature maps that keep it positive. Additive
            only.
        scale: factor on q, default K ** -0.5.
        eps: added to the weight before the division.
        initial_state: state of the tokens read before, one row per sequence; None for none.
        return_state: also return the state after the last token.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed and return their state unchanged.
        chunk_size: most tokens handled by one block of matmuls; changes speed, not the result.
        backend: "auto", "reference", "torch" or "fla".

    Returns:
        The output (B, T, max(H, HV), V) in the dtype of q, and the state or None.

    Raises:
        ValueError: sizes that do not agree, g above 0, beta of the delta rule outside [0, 2], a normalised
            delta rule, a state of another number of sequences, or a normalised call that continues a state
            without normaliser.
    """
    check_arguments(q, k, v, g, beta, rule=rule, normalize=normalize, eps=eps, chunk_size=chunk_size)
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is not None:
        check_state(initial_state, k, v, len(lengths), acc, normalize)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    eligible = ("fla", "torch") if can_run_fla(q, k, v, normalize) else ("torch",)
    chosen = choose_backend("linear_attention", backend, eligible)
    # sums stay in the accumulation dtype: autocast must not round the matmuls that make them
    with without_autocast(q.device):
        options: dict[str, Any] = {
            "normalize": normalize,
            "scale": scale,
            "eps": eps,
            "initial_state": initial_state,
        }
        if chosen == "reference":
            output, state = linear_attention_reference(q, k, v, g, beta, lengths, rule=rule, **options)
            return output, state if return_state else None
        if chosen == "fla":
            return linear_attention_fla(
                q,
                k,
                v,
                g,
                beta,
                rule=rule,
                scale=scale,
                initial_state=initial_state,
                return_state=return_state,
                cu_seqlens=cu_seqlens,
            )
        if cu_seqlens is None and q.shape[1] == 1:
            output, state = linear_attention_single(q, k, v, g, beta, rule=rule, **options)
            return output, state if return_state else None
        chunks: dict[str, Any] = {
            "is_packed": cu_seqlens is not None,
            "return_state": return_state,
            "chunk_size": chunk_size,
        }
        if rule == "delta" or (g is not None and g.dim() == 4):
            return linear_attention_general(q, k, v, g, beta, lengths, rule=rule, **chunks, **options)
        if beta is not None:
            # the normaliser sums what is written, so it has to be the keys that carry the factor
            if normalize:
                k = _scaled(k, beta)
            else:
                v = _scaled(v, beta)
        return linear_attention_torch(q, k, v, g, lengths, **chunks, **options)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x (B, T, H, D) times factor (B, T, H), in the accumulation dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) * factor[..., None]
