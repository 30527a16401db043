"""Depthwise causal convolution as K shifted multiply-adds over the row with the tail in front."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: B batch, T tokens, N sequences, D channels, K kernel size, L tokens of all sequences


def causal_conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    tail: Tensor,
    lengths: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Shifted form of `memzoo.kernels.causal_conv`; `lengths` is None for a dense batch."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel_size = weight.shape[1]
    num_before = kernel_size - 1
    if lengths is None:
        padded = torch.cat([tail, x], 1)  # (B, K - 1 + T, D)
        y = _shifted_sum(padded, weight, x.shape[1], acc)
        new_tail = padded[:, padded.shape[1] - num_before :].clone()  # a view would keep the whole row alive
    else:
        # Every sequence with its tail in front; the outputs that start inside the next tail are dropped.
        own = zip(tail.unbind(0), x[0].split(list(lengths)), strict=True)
        rows = [part for pair in own for part in pair]
        padded = torch.cat(rows)[None]  # (1, L + N (K - 1), D)
        full = _shifted_sum(padded, weight, max(0, padded.shape[1] - num_before), acc)
        starts, ends, start = [], [], 0
        for length in lengths:
            starts.append(torch.arange(start, start + length))
            start += length + num_before
            ends.append(torch.arange(start - num_before, start))
        keep = torch.cat(starts).to(x.device)
        y = full.index_select(1, keep)
        new_tail = (
            padded[0].index_select(0, torch.cat(ends).to(x.device)).view(len(lengths), num_before, x.shape[2])
        )
    if bias is not None:
        y = y + bias.to(acc)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), new_tail


def _shifted_sum(padded: Tensor, weight: Tensor, length: int, acc: torch.dtype) -> Tensor:
    y = padded[:, :length].to(acc) * weight[:, 0].to(acc)
    for i in range(1, weight.shape[1]):
        y = torch.addcmul(y, padded[:, i : i + length].to(acc), weight[:, i].to(acc))
    return y
