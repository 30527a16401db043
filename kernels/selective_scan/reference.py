"""Selective scan by the definition, token by token.

S_t = exp(delta_t A) * S_{t-1} + (delta_t x_t) B_t^T,   y_t = S_t C_t
"""

import torch
from torch import Tensor

# Dimensions: B batch, T tokens, D channels, N state per channel, G groups of channels, S sequences


def selective_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The definition of `memzoo.kernels.selective_scan` without skip and gate, on checked arguments.

    `delta` holds step sizes, `state` is always given; y is returned in its dtype.
    """
    acc, channels = state.dtype, x.shape[2]
    rows_x, rows_delta = (t.to(acc).flatten(0, 1).split(list(lengths)) for t in (x, delta))
    rows_b, rows_c = (_rows(t.to(acc), lengths) for t in (B, C))
    outputs, states = [], []
    for n, length in enumerate(lengths):
        memory = state[n]
        for t in range(length):
            x_t, delta_t = rows_x[n][t], rows_delta[n][t]  # (D,)
            b_t, c_t = (_per_channel(rows[n][t], channels) for rows in (rows_b, rows_c))  # (D, N)
            memory = torch.exp(delta_t[:, None] * A) * memory + (delta_t * x_t)[:, None] * b_t
            outputs.append((memory * c_t).sum(1))
        states.append(memory)
    y = torch.stack(outputs).reshape(x.shape) if outputs else torch.zeros_like(x, dtype=acc)
    return y, torch.stack(states) if states else state


def _rows(x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """The tokens of each sequence, (T, G, N); a constant (D, N) counts for every token."""
    if x.dim() == 2:
        return [x.expand(length, *x.shape) for length in lengths]
    return list(x.flatten(0, 1).split(list(lengths)))


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """(G, N) -> (D, N)."""
    return x.repeat_interleave(channels // x.shape[0], 0)
