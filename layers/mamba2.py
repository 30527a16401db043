"""Mamba-2: a state-space layer with one decay per head (Dao and Gu, arXiv 2405.21060).

    [z | x | B | C | dt] = W_in u,   [x | B | C] = silu(conv([x | B | C])),   delta = softplus(dt + dt_bias)
    S_t = exp(delta_t A_h) S_{t-1} + B_t^T (delta_t x_t),   y_t = C_t S_t + D_h x_t,   A = -exp(A_log)
    o = W_out norm(y silu(z))

That is linear attention with queries C, keys B, values delta x and log-decay delta A; heads of a group share
B and C. The chunk size of the parallel form is free: it changes no number.
The names of the parameters are those of state-spaces checkpoints.
State: the last conv_size - 1 inputs of the convolution, in the dtype of the activations, and S (d_state,
head_dim) per head in float32. Constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import LinearState, linear_attention
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_positive,
    tag_parameter,
)
from .parts.kv_cache import empty_tokens
from .parts.norm import GatedRMSNorm
from .parts.short_conv import ShortConv
from .parts.state_space import (
    Float32Parameters,
    check_pair,
    check_step_range,
    decay_rates,
    fill,
    init_linear,
    init_step_bias,
    is_number,
    undecayed,
)

# Dimensions: B batch, T tokens, S sequences, D channels, H heads, P channels of a head, G groups of heads, N
# state per channel, K taps


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Configuration of `Mamba2`.

    Attributes:
        d_state: width of B and C, and numbers kept per channel.
        head_dim: channels of a head, a divisor of expand * d_model.
        num_groups: groups of heads that share B and C, a divisor of the heads.
        conv_size: taps of the convolution, the token itself included.
        expand: channels per unit of d_model.
        rate_range: initial decay rates are uniform between these.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_floor: no initial step size is below it.
        dt_limit: step sizes are clamped to this range, or null for no limit.
        use_bias: biases of the input and output projections.
        use_conv_bias: bias of the convolution.
        norm_before_gate: normalise before the gate instead of after it.
        norm_eps: epsilon of the gated norm, whose groups are those of the heads.
        num_residuals: additions to the residual stream in the whole model (its layers; twice as many with
            MLPs): the initial output projection is divided by its square root.
        chunk_size: tokens per block of the parallel form; changes speed, not numbers.
    """

    type: str = "mamba2"
    d_state: int = 128
    head_dim: int = 64
    num_groups: int = 1
    conv_size: int = 4
    expand: int = 2
    rate_range: tuple[float, float] = (1.0, 16.0)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float] | None = None
    use_bias: bool = False
    use_conv_bias: bool = True
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    num_residuals: int = 1
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "d_state", "head_dim", "num_groups", "conv_size", "expand", "num_residuals")
        check_positive(self, "chunk_size")
        check_step_range(self)
        if self.expand * self.d_model % self.head_dim:
            raise ValueError(
                f"head_dim must divide expand * d_model, got {self.head_dim} and {self.expand} * "
                f"{self.d_model}."
            )
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"num_groups must divide the heads, got {self.num_groups} groups for {self.num_heads} heads "
                "(expand * d_model / head_dim)."
            )
        check_pair("rate_range", self.rate_range, 1e-6)
        if self.rate_range[1] == math.inf:
            raise ValueError(f"rate_range must be finite, got {self.rate_range}.")
        if self.dt_limit is not None:
            check_pair("dt_limit", self.dt_limit, 0)
        if not is_number(self.norm_eps) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a number between 0 and 1, got {self.norm_eps!r}.")

    @property
    def num_heads(self) -> int:
        """Heads, expand * d_model / head_dim."""
        return self.expand * self.d_model // self.head_dim


@dataclass(kw_only=True)
class Mamba2State(State):
    """What the convolution and the recurrence keep of the past.

    Attributes:
        tail: (S, K - 1, D + 2 G N) last inputs of the convolution, oldest first, zeros where none was read.
        memory: (S, H, N, P) float32 (float64 for float64 activations).
    """

    tail: Tensor
    memory: Tensor


class Mamba2(Float32Parameters, TokenMixer):
    """Linear attention with a decay per head and token, behind a short convolution, with a gated norm."""

    config: Mamba2Config
    overridable = frozenset({"chunk_size"})
    float32_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        c = config
        self.channels = c.num_heads * c.head_dim
        self.conv_channels = self.channels + 2 * c.num_groups * c.d_state
        self.in_proj = nn.Linear(c.d_model, self.channels + self.conv_channels + c.num_heads, bias=c.use_bias)
        self.conv1d = ShortConv(self.conv_channels, c.conv_size, use_bias=c.use_conv_bias)
        self.dt_bias = undecayed(c.num_heads)
        self.A_log = undecayed(c.num_heads)
        self.D = undecayed(c.num_heads)
        self.norm = GatedRMSNorm(self.channels, c.num_groups, c.norm_eps, norm_before_gate=c.norm_before_gate)
        self.out_proj = nn.Linear(self.channels, c.d_model, bias=c.use_bias)
        for bias in (self.in_proj.bias, self.out_proj.bias):
            if bias is not None:
                tag_parameter(bias, weight_decay=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Rates uniform, step sizes log-uniform, projections as torch, the last one scaled."""
        c = self.config
        init_linear(self.in_proj)
        init_linear(self.out_proj, c.num_residuals**-0.5)
        self.conv1d.init_weights()
        self.norm.reset_parameters()
        init_step_bias(self.dt_bias, c.dt_min, c.dt_max, c.dt_floor)
        fill(self.A_log, lambda rates: rates.uniform_(*c.rate_range).log_())
        nn.init.ones_(self.D)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """Zeros."""
        weight, c = self.in_proj.weight, self.config
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Mamba2State(
            num_tokens=empty_tokens(batch_size),
            tail=self.conv1d.empty_tail(batch_size, device, dtype),
            memory=torch.zeros(batch_size, c.num_heads, c.d_state, c.head_dim, device=device, dtype=wide),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: Mamba2State | None) -> LayerOutput:
        """Convolves, chooses step sizes, and runs the recurrence."""
        c = self.config
        z, u, steps = self.in_proj(x).split([self.channels, self.conv_channels, c.num_heads], dim=-1)
        u, tail = self.conv1d(u, ctx, None if state is None else state.tail)
        group_width = c.num_groups * c.d_state
        u, write, read = u.split([self.channels, group_width, group_width], dim=-1)
        u = u.unflatten(-1, (c.num_heads, c.head_dim))  # (B, T, H, P)
        rates = decay_rates(self.A_log, u.dtype)  # (H,)
        delta = F.softplus(steps.to(rates.dtype) + self.dt_bias.to(rates.dtype))  # (B, T, H)
        if c.dt_limit is not None:
            delta = delta.clamp(*c.dt_limit)
        y, memory = linear_attention(
            read.unflatten(-1, (c.num_groups, c.d_state)),  # (B, T, G, N)
            write.unflatten(-1, (c.num_groups, c.d_state)),
            u,
            g=delta * rates,
            beta=delta,
            scale=1.0,
            initial_state=None if state is None else LinearState(state.memory),
            return_state=ctx.return_state,
            cu_seqlens=ctx.cu_seqlens,
            chunk_size=ctx.overrides.get("chunk_size", c.chunk_size),
        )  # (B, T, H, P)
        skip = (u.flatten(-2), self.D.repeat_interleave(c.head_dim))
        new_state = None
        if memory is not None:
            new_state = Mamba2State(num_tokens=ctx.num_tokens_after, tail=tail, memory=memory.memory)
        return LayerOutput(self.out_proj(self.norm(y.flatten(-2), z, skip)), new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """The projections, one write and one read of the memory."""
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * projections + 4 * self.channels * self.config.d_state

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Two groups; odd sizes, a limit of the steps, and the other order of norm and gate."""
        return (
            {
                "d_model": 8,
                "d_state": 3,
                "head_dim": 4,
                "num_groups": 2,
                "conv_size": 4,
                "chunk_size": 5,
            },
            {
                "d_model": 6,
                "d_state": 5,
                "head_dim": 3,
                "conv_size": 2,
                "expand": 1,
                "dt_limit": [0.01, 1.5],
                "use_bias": True,
                "use_conv_bias": False,
                "norm_before_gate": True,
                "chunk_size": 7,
            },
        )
