"""Selective scan of one token per sequence: the recurrence itself, for decoding."""

from torch import Tensor

from .chunked import exponent_floor

# Dimensions: S sequences, D channels, N state per channel, G groups of channels


def selective_scan_single(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_scan_reference` for T = 1 without packing."""
    acc, channels = state.dtype, x.shape[2]
    step = delta.squeeze(1)  # (S, D)
    write, read = (_per_channel(t.to(acc), channels) for t in (B, C))  # (S, D, N) or (D, N)
    decay = (step[..., None] * A).clamp(min=exponent_floor(acc)).exp_()  # (S, D, N)
    state = decay * state + (step * x.squeeze(1).to(acc))[..., None] * write
    y = (state[:, :, None] @ read.expand_as(state)[..., None]).flatten(1)  # (S, D)
    return y[:, None], state


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """(S, 1, G, N) -> (S, D, N); a constant (D, N) stays as it is."""
    return x if x.dim() == 2 else x.squeeze(1).repeat_interleave(channels // x.shape[2], 1)
