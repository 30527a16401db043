"""Depthwise causal convolution over time with a carried tail."""

from torch import Tensor

from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import sequence_lengths
from .chunked import causal_conv_torch
from .reference import causal_conv_reference

__all__ = ["causal_conv"]

# Dimensions: B batch, T tokens, N sequences, D channels, K kernel size


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution: y_t = sum_{i=0..K-1} weight_i x_{t-K+1+i} + bias, per channel.

    Args:
        x: (B, T, D); T = 0 is allowed.
        weight: (D, K), the newest input last.
        bias: (D,) or None.
        activation: None or "silu", applied to the sum.
        tail: (N, K-1, D) inputs before the first token, oldest first, zeros where nothing was read; None for
            zeros.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed and return their tail unchanged.
        backend: "auto", "reference" or "torch".

    Returns:
        y (B, T, D) in the dtype of x, and the new tail (N, K-1, D): the last K-1 inputs of each sequence.

    Raises:
        ValueError: sizes or dtypes that do not agree, or an unknown activation.
    """
    check_rank("x", x, "(B, T, D)")
    check_rank("weight", weight, "(D, K)")
    check_dtypes(x=x, **({} if tail is None else {"tail": tail}))
    channels, kernel_size = weight.shape
    if channels != x.shape[2] or kernel_size < 1:
        raise ValueError(
            f"weight must have shape ({x.shape[2]}, K) with K at least 1, got {tuple(weight.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}.")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}.')
    lengths = sequence_lengths(cu_seqlens, x.shape[0], x.shape[1])
    expected = (len(lengths), kernel_size - 1, channels)
    if tail is None:
        tail = x.new_zeros(expected)
    elif tuple(tail.shape) != expected:
        raise ValueError(
            f"tail must have shape {expected} = (sequences, kernel size - 1, channels), got "
            f"{tuple(tail.shape)}."
        )
    if choose_backend("causal_conv", backend, ("torch",)) == "reference":
        return causal_conv_reference(x, weight, bias, activation, tail, lengths)
    return causal_conv_torch(x, weight, bias, activation, tail, None if cu_seqlens is None else lengths)
