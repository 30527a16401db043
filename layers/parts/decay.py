"""Log-decays of a recurrence: how much of the past a token leaves.

A part maps the input of a layer (B, T, M) to g, at most 0: (B, T, H) with one decay per head, or (B, T, H, K)
with one per key channel. Log-decays are float32, float64 for float64 activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .projection import init_projections, make_projection
from .state_space import Float32Parameters, decay_rates, fill, init_step_bias, undecayed

# Dimensions: B batch, T tokens, H heads of the memory, K key channels, M model width

DECAYS = ("none", "fixed", "sigmoid_head", "sigmoid_channel", "softplus_head", "softplus_channel")
SIGMOID_TEMPERATURE = 16  # tau of arXiv 2312.06635, section 4.4
SIGMOID_RANK = 16  # of the projection to one decay per channel (the same paper)
STEP_RANGE = (1e-3, 1e-1)  # of the first steps softplus(dt_bias), as in Mamba-2 (arXiv 2405.21060)
STEP_FLOOR = 1e-4
HEAD_RATES = (0.01, 16.0)  # of the first exp(A_log); the papers begin at 0, whose logarithm is not finite
CHANNEL_RATES = (1.0, 16.0)


class Decay(nn.Module):
    """Base of all decays: (B, T, M) -> log-decays, at most 0."""

    def init_weights(self) -> None:
        """Initialises the weights, if there are any."""


class FixedDecay(Decay):
    """g_h = log(1 - 2^(-5 - h)) for head h, whatever the token (RetNet, arXiv 2307.08621)."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        rates = [math.log1p(-(2.0 ** (-5 - head))) for head in range(self.num_heads)]
        g = torch.tensor(rates, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return g.expand(*x.shape[:2], -1)


class SigmoidDecay(Decay):
    """g = logsigmoid(x W + b) / 16 (GLA, arXiv 2312.06635), one per head or, with W of rank 16, per channel.

    Args:
        d_model: M.
        num_heads: H.
        width: K for one decay per key channel, None for one per head.
    """

    def __init__(self, d_model: int, num_heads: int, width: int | None = None) -> None:
        super().__init__()
        self.shape = (num_heads,) if width is None else (num_heads, width)
        rank = None if width is None else SIGMOID_RANK
        self.proj = make_projection(d_model, math.prod(self.shape), rank, bias=True)

    def init_weights(self) -> None:
        """As all projections."""
        init_projections(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.proj(x).unflatten(-1, self.shape)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.logsigmoid(wide) / SIGMOID_TEMPERATURE


class SoftplusDecay(Float32Parameters, Decay):
    """g = -exp(A_log) softplus(x W + dt_bias), one per head or per channel; A_log always per head.

    Mamba-2 (arXiv 2405.21060) and Gated DeltaNet (2412.06464) have one per head, Kimi Delta Attention
    (2510.26692) one per channel, optionally bounded: g = bound sigmoid(exp(A_log) (x W + dt_bias)).
    `A_log` and `dt_bias` take no weight decay and stay float32 in a layer of half precision. They are
    parameters of their own, not the bias of a linear map, so that whoever sets all those to zero leaves the
    first steps as they are.

    Args:
        d_model: M.
        num_heads: H.
        width: K for one decay per key channel, None for one per head.
        rank: of W, None for full.
        bound: below 0, what g stays above; None for no bound.
    """

    float32_parameters = ("A_log", "dt_bias")

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        width: int | None = None,
        rank: int | None = None,
        bound: float | None = None,
    ) -> None:
        super().__init__()
        self.shape = (num_heads,) if width is None else (num_heads, width)
        self.bound = bound
        self.proj = make_projection(d_model, math.prod(self.shape), rank)
        self.A_log = undecayed(num_heads)
        self.dt_bias = undecayed(math.prod(self.shape))

    def init_weights(self) -> None:
        """Rates exp(A_log) uniform (1 with a bound), first steps softplus(dt_bias) log-uniform."""
        init_projections(self.proj)
        rates = HEAD_RATES if len(self.shape) == 1 else CHANNEL_RATES
        bounded = self.bound is not None
        fill(self.A_log, lambda empty: empty.zero_() if bounded else empty.uniform_(*rates).log_())
        init_step_bias(self.dt_bias, *STEP_RANGE, STEP_FLOOR)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.proj(x).unflatten(-1, self.shape)
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(wide) + self.dt_bias.to(wide).view(self.shape)
        rate = -decay_rates(self.A_log, wide)
        if len(self.shape) == 2:
            rate = rate[:, None]
        if self.bound is not None:
            return self.bound * torch.sigmoid(rate * logits)
        # softplus(a) = -logsigmoid(-a); torch.compile lays out the gradient of softplus itself wrongly
        return rate * F.logsigmoid(-logits)


def make_decay(
    name: str,
    d_model: int,
    num_heads: int,
    *,
    key_width: int = 0,
    value_width: int = 0,
    bound: float | None = None,
) -> Decay | None:
    """Builds a decay.

    Args:
        name: one of `DECAYS`; None is returned for "none".
        d_model, num_heads: widths of the input and heads of the memory.
        key_width: channels that a decay per channel has.
        value_width: rank of the projection of "softplus_channel".
        bound: what the log-decays of "softplus_channel" stay above, None for no bound.
    """
    if name == "none":
        return None
    if name == "fixed":
        return FixedDecay(num_heads)
    width = key_width if name.endswith("channel") else None
    if name.startswith("sigmoid"):
        return SigmoidDecay(d_model, num_heads, width)
    rank = value_width if name.endswith("channel") else None
    return SoftplusDecay(d_model, num_heads, width, rank, bound)
