"""Depthwise causal convolution as K shifted multiply-adds over the row with the tail in front.

Some tokens are worked on at a time, in the processor's cache; the backward pass makes the sums before the
activation again instead of keeping them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ..autograd import backward_without_autocast
from ..pieces import piece_size

# Dimensions: B batch, T tokens, N sequences, D channels, K kernel size, L tokens of all sequences, C tokens
# worked on at once


def causal_conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    tail: Tensor,
    lengths: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Shifted form of `memzoo.kernels.causal_conv`; `lengths` is None for a dense batch."""
    num_before = weight.shape[1] - 1
    # what a compiler fuses by itself needs no pieces
    convolve = _convolve if is_compiling() else _Convolution.apply
    if lengths is None:
        padded = torch.cat([tail, x], 1)  # (B, K - 1 + T, D)
        y = convolve(padded, weight, bias, activation)
        new_tail = padded[:, padded.shape[1] - num_before :].clone()  # a view would keep the whole row alive
        return y, new_tail
    if not lengths:
        return x.clone(), tail.clone()
    # Every sequence with its tail in front; the outputs that start inside the next tail are dropped.
    own = zip(tail.unbind(0), x[0].split(list(lengths)), strict=True)
    rows = [part for pair in own for part in pair]
    padded = torch.cat(rows)[None]  # (1, L + N (K - 1), D)
    full = convolve(padded, weight, bias, activation)
    starts, ends, start = [], [], 0
    for length in lengths:
        starts.append(torch.arange(start, start + length))
        start += length + num_before
        ends.append(torch.arange(start - num_before, start))
    y = full.index_select(1, torch.cat(starts).to(x.device))
    new_tail = (
        padded[0].index_select(0, torch.cat(ends).to(x.device)).view(len(lengths), num_before, x.shape[2])
    )
    return y, new_tail


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """(B, K - 1 + T, D) to (B, T, D), by plain operations."""
    acc = torch.float64 if padded.dtype == torch.float64 else torch.float32
    y = _sums(padded.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    return (F.silu(y) if activation == "silu" else y).to(padded.dtype)


def _sums(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the activation is applied to."""
    length = max(0, padded.shape[1] - weight.shape[1] + 1)
    y = padded[:, :length] * weight[:, 0]
    for i in range(1, weight.shape[1]):
        y = torch.addcmul(y, padded[:, i : i + length], weight[:, i])
    return y if bias is None else y + bias


def _pieces(padded: Tensor, kernel_size: int) -> list[tuple[int, int]]:
    """First token and end of each piece of the output."""
    length = max(0, padded.shape[1] - kernel_size + 1)
    size = piece_size(padded)
    return [(t, min(t + size, length)) for t in range(0, length, size)]


class _Convolution(torch.autograd.Function):
    """`_convolve` piece by piece, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        ctx.save_for_backward(padded, weight, bias)
        ctx.activation = activation
        num_before = weight.shape[1] - 1
        rows, length, channels = padded.shape
        y = padded.new_empty(rows, max(0, length - num_before), channels)
        for t0, t1 in _pieces(padded, weight.shape[1]):
            y[:, t0:t1] = _convolve(padded[:, t0 : t1 + num_before], weight, bias, activation)
        return y

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias = ctx.saved_tensors
        acc = torch.float64 if padded.dtype == torch.float64 else torch.float32
        taps = weight.to(acc)
        wide_bias = None if bias is None else bias.to(acc)
        num_before = weight.shape[1] - 1
        d_padded = torch.zeros_like(padded, dtype=acc)
        d_weight = torch.zeros_like(weight, dtype=acc)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=acc)
        for t0, t1 in _pieces(padded, weight.shape[1]):
            piece = padded[:, t0 : t1 + num_before].to(acc)
            grad = d_y[:, t0:t1].to(acc)  # (B, C, D)
            if ctx.activation == "silu":
                grad = torch.ops.aten.silu_backward(grad, _sums(piece, taps, wide_bias))
            for i in range(weight.shape[1]):
                d_padded[:, t0 + i : t1 + i].addcmul_(grad, taps[:, i])
                d_weight[:, i] += (grad * piece[:, i : i + t1 - t0]).sum((0, 1))
            if d_bias is not None:
                d_bias += grad.sum((0, 1))
        return (
            d_padded.to(padded.dtype),
            d_weight.to(weight.dtype),
            None if bias is None or d_bias is None else d_bias.to(bias.dtype),
            None,
        )
