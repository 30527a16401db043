"""How many tokens a cache holds whose entries fade: the soft cache size of retention gates (TRIM-KV)."""

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import TRITON_INTERPRETED, choose_backend
from ..checks import check_rank
from ..layout import sequence_lengths
from .chunked import soft_cache_size_torch
from .reference import soft_cache_size_reference

__all__ = ["soft_cache_size"]

# Dimensions: B batch, T tokens, N sequences, L tokens of all sequences, H heads

LOWEST = -1e4  # of g, so that an age of 0 times it is 0


def soft_cache_size(
    log_retention: Tensor, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Sum of what is left of all tokens so far, when token i fades by a factor of its own per token.

        S_t = sum_{i <= t} exp((t - i) g_i)        (arXiv 2512.03324, the sum under its capacity loss)

    Every token has a decay of its own, so no recurrence of constant size gives S: time is O(T^2), memory
    O(T), forward and backward. Sums are float32 (float64 for float64 input).

    Args:
        log_retention: (B, T, H), g, at most 0 (below -1e4 it counts as that); T = 0 is allowed.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); no sum passes a boundary.
        backend: "auto", "reference", "torch" or "triton" (on CUDA, or in Triton's interpreter).

    Returns:
        (B, T, H), float32 (float64 for float64 input), between 1 and the tokens read.

    Raises:
        ValueError: a wrong shape or dtype, boundaries that do not fit, or a backend that cannot do this call.
    """
    check_rank("log_retention", log_retention, "(B, T, H)")
    if not log_retention.is_floating_point():
        raise ValueError(f"log_retention must be a floating-point tensor, got {log_retention.dtype}.")
    batch_size, num_tokens, num_heads = log_retention.shape
    lengths = sequence_lengths(cu_seqlens, batch_size, num_tokens)
    is_double = log_retention.dtype == torch.float64
    can_run_triton = (log_retention.is_cuda or TRITON_INTERPRETED) and not is_double
    can_run_triton = can_run_triton and log_retention.numel() > 0
    eligible: tuple[str, ...] = ("torch",)
    if can_run_triton:  # its interpreter only when asked for
        eligible = ("triton", "torch") if log_retention.is_cuda else ("torch", "triton")
    chosen = choose_backend("soft_cache_size", backend, eligible)
    with without_autocast(log_retention.device):
        g = (log_retention if is_double else log_retention.float()).clamp(min=LOWEST)
        if cu_seqlens is None:  # rows of a batch are as good as heads
            rows, lengths = g.transpose(0, 1).flatten(1), lengths[:1] or (num_tokens,)  # (T, B H)
        else:
            rows = g[0]  # (L, H), all sequences one after the other
        if chosen == "reference":
            sizes = soft_cache_size_reference(rows, lengths)
        elif chosen == "triton":
            from .triton_kernels import soft_cache_size_triton

            sizes = soft_cache_size_triton(rows, lengths)
        else:
            sizes = soft_cache_size_torch(rows, lengths)
    if cu_seqlens is None:
        return sizes.unflatten(1, (batch_size, num_heads)).transpose(0, 1)
    return sizes[None]
