"""Mamba-1: a selective state-space layer (Gu and Dao, arXiv 2312.00752).

    [u | z] = W_in x,   u = silu(conv(u)),   [r | B | C] = W_x u,   delta = softplus(W_dt r + b_dt)
    S_t = exp(delta_t A) * S_{t-1} + (delta_t u_t) B_t^T,   y_t = S_t C_t + D u_t,   A = -exp(A_log)
    o_t = W_out (y_t silu(z_t))

Every channel has `d_state` numbers with decays of their own, and the token decides how far all of them move.
The names of the parameters are those of state-spaces checkpoints.
State: the last conv_size - 1 inputs of the convolution, in the dtype of the activations, and S (expand *
d_model, d_state) in float32. Constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import selective_scan
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
from .parts.short_conv import ShortConv
from .parts.state_space import (
    Float32Parameters,
    check_step_range,
    decay_rates,
    fill,
    init_linear,
    init_step_bias,
    undecayed,
)

# Dimensions: B batch, T tokens, S sequences, M model width, D channels, N state per channel, R width of the
# step sizes before their projection, K taps


@dataclass(frozen=True, kw_only=True)
class Mamba1Config(MixerConfig):
    """Configuration of `Mamba1`.

    Attributes:
        d_state: numbers kept per channel.
        conv_size: taps of the convolution, the token itself included.
        expand: channels per unit of d_model.
        dt_rank: width of the bottleneck of the step sizes (default: d_model / 16, rounded up).
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_floor: no initial step size is below it.
        use_bias: biases of the input and output projections.
        use_conv_bias: bias of the convolution.
        num_residuals: additions to the residual stream in the whole model (its layers; twice as many with
            MLPs): the initial output projection is divided by its square root.
    """

    type: str = "mamba1"
    d_state: int = 16
    conv_size: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    use_bias: bool = False
    use_conv_bias: bool = True
    num_residuals: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", -(-self.d_model // 16))
        check_positive(self, "d_state", "conv_size", "expand", "dt_rank", "num_residuals")
        check_step_range(self)

    @property
    def step_width(self) -> int:
        """The `dt_rank`, resolved."""
        assert self.dt_rank is not None
        return self.dt_rank


@dataclass(kw_only=True)
class Mamba1State(State):
    """What the convolution and the scan keep of the past.

    Attributes:
        tail: (S, K - 1, D) last inputs of the convolution, oldest first, zeros where none was read.
        memory: (S, D, N) float32 (float64 for float64 activations).
    """

    tail: Tensor
    memory: Tensor


class Mamba1(Float32Parameters, TokenMixer):
    """Selective scan behind a short convolution, with a gate."""

    config: Mamba1Config
    float32_parameters = ("A_log", "D", "dt_proj.bias")

    def __init__(self, config: Mamba1Config) -> None:
        super().__init__(config)
        c = config
        self.channels = c.expand * c.d_model
        self.in_proj = nn.Linear(c.d_model, 2 * self.channels, bias=c.use_bias)
        self.conv1d = ShortConv(self.channels, c.conv_size, use_bias=c.use_conv_bias)
        self.x_proj = nn.Linear(self.channels, c.step_width + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(c.step_width, self.channels)
        self.A_log = undecayed(self.channels, c.d_state)
        self.D = undecayed(self.channels)
        self.out_proj = nn.Linear(self.channels, c.d_model, bias=c.use_bias)
        for bias in (self.in_proj.bias, self.dt_proj.bias, self.out_proj.bias):
            if bias is not None:
                tag_parameter(bias, weight_decay=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Rates 1 .. N per channel, step sizes log-uniform, projections as torch, the last one scaled."""
        c = self.config
        init_linear(self.in_proj)
        init_linear(self.x_proj)
        init_linear(self.out_proj, c.num_residuals**-0.5)
        self.conv1d.init_weights()
        init_linear(self.dt_proj)
        init_step_bias(self.dt_proj.bias, c.dt_min, c.dt_max, c.dt_floor)
        fill(self.A_log, lambda rates: rates.copy_(torch.arange(1, c.d_state + 1)).log_())
        nn.init.ones_(self.D)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba1State:
        """Zeros."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Mamba1State(
            num_tokens=empty_tokens(batch_size),
            tail=self.conv1d.empty_tail(batch_size, device, dtype),
            memory=torch.zeros(batch_size, self.channels, self.config.d_state, device=device, dtype=wide),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: Mamba1State | None) -> LayerOutput:
        """Convolves, chooses step sizes, writes and reads, and scans."""
        c = self.config
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, D) each
        u, tail = self.conv1d(u, ctx, None if state is None else state.tail)
        steps, write, read = self.x_proj(u).split([c.step_width, c.d_state, c.d_state], dim=-1)
        y, memory = selective_scan(
            u,
            F.linear(steps, self.dt_proj.weight),  # the scan adds the bias, in float32
            decay_rates(self.A_log, u.dtype),
            write[:, :, None],  # (B, T, 1, N)
            read[:, :, None],
            D=self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            initial_state=None if state is None else state.memory,
            return_state=ctx.return_state,
            cu_seqlens=ctx.cu_seqlens,
        )
        new_state = None
        if memory is not None:
            new_state = Mamba1State(num_tokens=ctx.num_tokens_after, tail=tail, memory=memory)
        return LayerOutput(self.out_proj(y), new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """The projections, and one read of the state."""
        linears = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        return 2 * (sum(linear.weight.numel() for linear in linears) + self.A_log.numel())

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Odd sizes; biases the other way round."""
        return (
            {"d_model": 8, "d_state": 3, "conv_size": 4},
            {
                "d_model": 6,
                "d_state": 5,
                "conv_size": 3,
                "expand": 1,
                "dt_rank": 2,
                "use_bias": True,
                "use_conv_bias": False,
            },
        )
