"""Linear attention: a matrix state per head, decay none or per head, optional normaliser."""

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import sequence_lengths
from .chunked import linear_attention_torch
from .external import can_run_fla, linear_attention_fla
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
    normalize: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, LinearState | None]:
    """Linear attention with the additive write rule.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = (scale q_t) S_t
        with normalize:  n_t = exp(g_t) n_{t-1} + k_t,   o_t = (scale q_t) S_t / ((scale q_t) . n_t + eps)

    Heads may be grouped on one side: several value heads per query and key head (H = Hk, HV a multiple of
    it), or several query heads per key and value head (Hk = HV, H a multiple of it). Sums are float32
    (float64 for float64 input).

    Args:
        q: (B, T, H, K); T = 0 is allowed.
        k: (B, T, Hk, K).
        v: (B, T, HV, V).
        g: (B, T, Hk) or (B, T, HV) log-decay, at most 0, or None for no decay.
        normalize: divide by the weight of the read keys; needs feature maps that keep it positive.
        scale: factor on q, default K ** -0.5.
        eps: added to the weight before the division.
        initial_state: state of the tokens read before, one row per sequence; None for none.
        return_state: also return the state after the last token.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed and return their state unchanged.
        chunk_size: tokens handled by one block of matmuls; changes speed, not the result.
        backend: "auto", "reference", "torch" or "fla".

    Returns:
        The output (B, T, max(H, HV), V) in the dtype of q, and the state or None.

    Raises:
        ValueError: sizes that do not agree, g above 0, a state of another number of sequences, or a
            normalised call that continues a state without normaliser.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, T, H, K)")
    check_dtypes(q=q, k=k, v=v)
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(
            "q, k and v must agree in batch and tokens, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one width per head, got {q.shape[3]} and {k.shape[3]}.")
    num_heads, num_key_heads, num_value_heads = q.shape[2], k.shape[2], v.shape[2]
    if (
        num_key_heads < 1
        or num_heads % num_key_heads
        or num_value_heads % num_key_heads
        or num_key_heads not in (num_heads, num_value_heads)
    ):
        raise ValueError(
            "the number of key heads must divide the heads of q and v and equal one of them, got "
            f"q {num_heads}, k {num_key_heads} and v {num_value_heads} heads."
        )
    if g is not None:
        _check_decay(g, q, k, v, normalize)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}.")
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is not None:
        _check_state(initial_state, k, v, len(lengths), acc, normalize)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    eligible = ("fla", "torch") if can_run_fla(q, k, v, normalize) else ("torch",)
    chosen = choose_backend("linear_attention", backend, eligible)
    # sums stay in the accumulation dtype: autocast must not round the matmuls that make them
    with without_autocast(q.device):
        if chosen == "reference":
            output, state = linear_attention_reference(
                q, k, v, g, lengths, normalize=normalize, scale=scale, eps=eps, initial_state=initial_state
            )
            return output, state if return_state else None
        if chosen == "fla":
            return linear_attention_fla(
                q,
                k,
                v,
                g,
                scale=scale,
                initial_state=initial_state,
                return_state=return_state,
                cu_seqlens=cu_seqlens,
            )
        if cu_seqlens is None and q.shape[1] == 1:
            output, state = linear_attention_single(
                q, k, v, g, normalize=normalize, scale=scale, eps=eps, initial_state=initial_state
            )
            return output, state if return_state else None
        return linear_attention_torch(
            q,
            k,
            v,
            g,
            lengths,
            is_packed=cu_seqlens is not None,
            normalize=normalize,
            scale=scale,
            eps=eps,
            initial_state=initial_state,
            return_state=return_state,
            chunk_size=chunk_size,
        )


def _check_decay(g: Tensor, q: Tensor, k: Tensor, v: Tensor, normalize: bool) -> None:
    num_key_heads, num_value_heads = k.shape[2], v.shape[2]
    if g.dim() != 3 or g.shape[:2] != q.shape[:2] or g.shape[2] not in (num_key_heads, num_value_heads):
        raise ValueError(
            f"g must have shape {(*q.shape[:2], num_key_heads)} or {(*q.shape[:2], num_value_heads)}: one "
            "log-decay per "
            f"token and key or value head, got {tuple(g.shape)}."
        )
    if normalize and g.shape[2] != num_key_heads:
        raise ValueError(
            f"normalize needs one decay per key head ({num_key_heads}), because the normaliser is a sum of "
            "keys, "
            f"got {g.shape[2]}."
        )
    if not torch.compiler.is_compiling() and g.device.type == "cpu" and g.numel() and g.detach().amax() > 0:
        raise ValueError(
            f"g is a log-decay and must be at most 0, got a maximum of {g.detach().amax().item():.6g}."
        )


def _check_state(
    state: LinearState, k: Tensor, v: Tensor, num_sequences: int, acc: torch.dtype, normalize: bool
) -> None:
    expected = (num_sequences, v.shape[2], k.shape[3], v.shape[3])
    if tuple(state.memory.shape) != expected:
        raise ValueError(
            f"initial_state.memory must have shape {expected} = (sequences, value heads, key width, value "
            "width), got "
            f"{tuple(state.memory.shape)}. Select the rows of the state that continue in this call."
        )
    if normalize and state.normalizer is None:
        raise ValueError(
            "normalize=True continues a sum of keys, but initial_state has only its memory. "
            "Give LinearState(memory, normalizer), or start with initial_state=None."
        )
    expected_normalizer = (num_sequences, k.shape[2], k.shape[3])
    if normalize and state.normalizer is not None and tuple(state.normalizer.shape) != expected_normalizer:
        raise ValueError(
            f"initial_state.normalizer must have shape {expected_normalizer} = "
            f"(sequences, key heads, key width), got {tuple(state.normalizer.shape)}."
        )
    if state.memory.dtype != acc or (
        normalize and state.normalizer is not None and state.normalizer.dtype != acc
    ):
        raise ValueError(
            f"the state of a call with {k.dtype} inputs must be {acc}, got {state.memory.dtype}."
        )
