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

DECAYS = ("none", "fixed", "sigmoid_head", "softplus_head")
SIGMOID_TEMPERATURE = 16  # tau of arXiv 2312.06635, section 4.4
STEP_RANGE = (1e-3, 1e-1)  # of the first steps softplus(dt_bias), as in Mamba-2 (arXiv 2405.21060)
STEP_FLOOR = 1e-4
RATE_RANGE = (0.01, 16.0)  # of the first exp(A_log); the papers begin at 0, whose logarithm is not finite


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
    """g = logsigmoid(x W + b) / 16 (GLA, arXiv 2312.06635), one per head."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.proj = make_projection(d_model, num_heads, bias=True)

    def init_weights(self) -> None:
        """As all projections."""
        init_projections(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.proj(x)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.logsigmoid(wide) / SIGMOID_TEMPERATURE


class SoftplusDecay(Float32Parameters, Decay):
    """g = -exp(A_log) softplus(x W + dt_bias), one per head (Mamba-2; Gated DeltaNet, arXiv 2412.06464).

    `A_log` and `dt_bias` take no weight decay and stay float32 in a layer of half precision. They are
    parameters of their own, not the bias of a linear map, so that whoever sets all those to zero leaves the
    first steps as they are.
    """

    float32_parameters = ("A_log", "dt_bias")

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.proj = make_projection(d_model, num_heads)
        self.A_log = undecayed(num_heads)
        self.dt_bias = undecayed(num_heads)

    def init_weights(self) -> None:
        """Rates exp(A_log) uniform, first steps softplus(dt_bias) log-uniform."""
        init_projections(self.proj)
        fill(self.A_log, lambda empty: empty.uniform_(*RATE_RANGE).log_())
        init_step_bias(self.dt_bias, *STEP_RANGE, STEP_FLOOR)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.proj(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        # softplus(a) = -logsigmoid(-a); torch.compile lays out the gradient of softplus itself wrongly
        return -decay_rates(self.A_log, wide) * F.logsigmoid(-(logits.to(wide) + self.dt_bias.to(wide)))


def make_decay(name: str, d_model: int, num_heads: int) -> Decay | None:
    """Builds a decay; `name` is one of `DECAYS`, None for "none"."""
    if name == "none":
        return None
    if name == "fixed":
        return FixedDecay(num_heads)
    return (SigmoidDecay if name.startswith("sigmoid") else SoftplusDecay)(d_model, num_heads)
