"""Depthwise causal convolution by the definition, token by token.

y_t = sum_{i=0..K-1} w_i x_{t-K+1+i} + bias,   x = 0 (or the tail) before the first token
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: B batch, T tokens, N sequences, D channels, K kernel size


def causal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    tail: Tensor,
    lengths: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """The definition of `memzoo.kernels.causal_conv` on checked arguments; `tail` is always given."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel_size = weight.shape[1]
    outputs, tails = [], []
    for n, row in enumerate(x.flatten(0, 1).split(list(lengths))):
        history = [*tail[n].unbind(0), *row.unbind(0)]
        for t in range(lengths[n]):
            y = torch.zeros_like(x[0, 0], dtype=acc) if bias is None else bias.to(acc)
            for i in range(kernel_size):
                y = y + weight[:, i].to(acc) * history[t + i].to(acc)
            outputs.append(F.silu(y) if activation == "silu" else y)
        last = history[len(history) - kernel_size + 1 :]
        tails.append(torch.stack(last) if last else tail[n])
    y = torch.stack(outputs).reshape(x.shape) if outputs else torch.zeros_like(x)
    return y.to(x.dtype), torch.stack(tails)
