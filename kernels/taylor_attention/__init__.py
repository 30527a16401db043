"""Linear attention with the features of the second-order Taylor expansion of exp, as in BASED."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import without_autocast
from ..backend import TRITON_INTERPRETED, choose_backend
from ..checks import check_rank
from ..linear_attention import LinearState, linear_attention
from .features import LAYOUTS, from_powers, num_features, taylor_features, to_powers

__all__ = ["num_features", "taylor_attention", "taylor_features"]

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, d width of a query or key
# head, K features, V value width

_TRITON_WIDTH = 16


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "compact",
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, LinearState | None]:
    """Attention whose weights are the second-order Taylor expansion of exp (BASED, arXiv 2402.18668).

        w_tj = 1 + u + u^2 / 2,   u = q_t . k_j / sqrt(d)
        o_t  = sum_{j <= t} w_tj v_j / (sum_{j <= t} w_tj + eps)        (normalize=False: the numerator)

    The same numbers and states as `linear_attention` on `taylor_features` of q and k with scale 1; sums are
    float32 (float64 for float64 input). Query heads may share key/value heads.

    Args:
        q: (B, T, H, d); T = 0 is allowed.
        k: (B, T, G, d), H a multiple of G.
        v: (B, T, G, V).
        layout: of the features in the state, "compact" (K = 1 + d + d (d + 1) / 2) or "expanded"
            (K = 1 + d + d^2).
        normalize: divide by the sum of the weights.
        eps: added to that sum.
        initial_state: memory (N, G, K, V) and normalizer (N, G, K) of the tokens read before.
        return_state: also return the state after the last token.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary.
        chunk_size: tokens per block of matmuls of the torch form; changes speed, not the result.
        backend: "auto", "reference", "torch" or "triton" (heads of width 16 at most; on CUDA, or in Triton's
            interpreter).

    Returns:
        The output (B, T, H, V) in the dtype of q, and the state or None.

    Raises:
        ValueError: sizes that do not agree, an unknown layout, or a backend that cannot do this call.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, T, H, d)")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one width per head, got {q.shape[3]} and {k.shape[3]}.")
    can_run_triton = (
        (q.is_cuda or TRITON_INTERPRETED)
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and q.shape[3] <= _TRITON_WIDTH
        and q.shape[1] > 1
        and k.shape[2] == v.shape[2] > 0
        and q.shape[2] % k.shape[2] == 0
        and q.numel() > 0
    )
    eligible = (
        ("triton", "torch") if q.is_cuda else ("torch", "triton")
    )  # its interpreter only when asked for
    chosen = choose_backend("taylor_attention", backend, eligible if can_run_triton else ("torch",))
    if chosen == "triton":
        with without_autocast(q.device):
            return _by_triton(q, k, v, layout, normalize, eps, initial_state, return_state, cu_seqlens)
    with without_autocast(q.device):
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys = (taylor_features(x.to(acc), layout).to(x.dtype) for x in (q, k))
    return linear_attention(
        queries,
        keys,
        v,
        normalize=normalize,
        scale=1.0,
        eps=eps,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend="reference" if chosen == "reference" else "auto",
    )


def _by_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    normalize: bool,
    eps: float,
    initial_state: LinearState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, LinearState | None]:
    """Carries the state to and from the sums of the kernels."""
    from .triton_kernels import weighted_sums

    (batch_size, num_tokens, _, d), (groups, width) = q.shape, v.shape[2:]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, batch_size * num_tokens + 1, num_tokens)
    num_sequences, padding = len(cu_seqlens) - 1, _TRITON_WIDTH - d
    columns = width + 1 if normalize else width
    if initial_state is None:
        before = q.new_zeros(
            num_sequences, groups, 1 + _TRITON_WIDTH + _TRITON_WIDTH**2, columns, dtype=torch.float32
        )
    else:
        memory = initial_state.memory
        if normalize:
            assert initial_state.normalizer is not None
            memory = torch.cat([memory, initial_state.normalizer[..., None]], dim=3)
        constant, linear, square = to_powers(memory, d, layout)
        linear = F.pad(linear, (0, 0, 0, padding))
        square = F.pad(square, (0, 0, 0, padding, 0, padding)).flatten(2, 3)
        before = torch.cat([constant[:, :, None], linear, square], dim=2)
    wide_q, wide_k = (F.pad(x.flatten(0, 1), (0, padding)).contiguous() for x in (q, k))
    sums, after = weighted_sums(
        wide_q,
        wide_k,
        v.flatten(0, 1).contiguous(),
        cu_seqlens.to(q.device),
        before.contiguous(),
        scale=d**-0.5,
        weigh=normalize,
    )
    output = sums[..., :width] / (sums[..., width:] + eps) if normalize else sums
    output = output.unflatten(0, (batch_size, num_tokens)).to(q.dtype)
    if not return_state:
        return output, None
    constant, linear, square = after.split([1, _TRITON_WIDTH, _TRITON_WIDTH**2], dim=2)
    square = square.unflatten(2, (_TRITON_WIDTH, _TRITON_WIDTH))[:, :, :d, :d]
    final = from_powers(constant[:, :, 0], linear[:, :, :d], square, layout)
    if initial_state is not None and layout == "expanded":
        # what no query can read of a given state is passed on
        final = final + memory - from_powers(*to_powers(memory, d, layout), layout)
    if not normalize:
        return output, LinearState(final)
    return output, LinearState(final[..., :width], final[..., width])
