"""Mamba-3, single input and output: trapezoidal steps and a rotating state (arXiv 2603.15569).

    [z | x | B | C | dt | a | trap | angle] = W_in u
    delta = softplus(dt + dt_bias),   A = -max(h(a), floor),   lambda = sigmoid(trap),   g = delta A
    phi_t = phi_{t-1} + delta_t pi tanh(angle_t) mod 2 pi
    k = rotate(norm(B) + B_bias, phi),   q = rotate(norm(C) + C_bias, phi)
    S_t = e^g_t (S_{t-1} + (1 - lambda_t) delta_t k_{t-1}^T x_{t-1}) + lambda_t delta_t k_t^T x_t
    y_t = q_t S_t + D x_t,   o = W_out (y silu(z))

with h(a) = 1 + a for a >= 0 and 1 / (1 - a) below. A token is written twice, the second time with the step
of the token behind it. Let U_t be S_t with that second write. Then U_t = e^g_t U_{t-1} + w_t k_t^T x_t with
w_t = lambda_t delta_t + (1 - lambda_{t+1}) delta_{t+1}, which is linear attention; and

    y_t = e^g_t q_t U_{t-1} + lambda_t delta_t (q_t . k_t) x_t + D x_t

reads only what token t knows. So keys and values are shifted by one token in front of the kernel.
State: S (d_state, head_dim) and the angles phi per head in float32, and the last k and x in the dtype of the
activations. Constant. There is no convolution.
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
from .contract import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer, check_positive
from .parts.kv_cache import empty_tokens
from .parts.norm import GatedRMSNorm, RMSNorm
from .parts.state_space import (
    Float32Parameters,
    check_step_range,
    init_linear,
    init_step_bias,
    is_number,
    undecayed,
)

# Dimensions: B batch, T tokens, S sequences, D channels, H heads, P channels of a head, G groups of heads, N
# state per channel, R rotated pairs of a head


@dataclass(frozen=True, kw_only=True)
class Mamba3Config(MixerConfig):
    """Configuration of `Mamba3`.

    Attributes:
        d_state: width of B and C, and numbers kept per channel.
        head_dim: channels of a head, a divisor of expand * d_model.
        num_groups: groups of heads that share B and C, a divisor of the heads.
        expand: channels per unit of d_model.
        rope_fraction: share of d_state that is rotated, from 0 to 1.
        rate_floor: the slowest decay rate.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_floor: no initial step size is below it.
        norm_output: RMS-normalise every head in front of the gate.
        norm_eps: epsilon of the norms.
        num_residuals: additions to the residual stream in the whole model (its layers; twice as many with
            MLPs): the initial output projection is divided by its square root.
        chunk_size: tokens per block of the parallel form; changes speed, not numbers.
    """

    type: str = "mamba3"
    d_state: int = 128
    head_dim: int = 64
    num_groups: int = 1
    expand: int = 2
    rope_fraction: float = 0.5
    rate_floor: float = 1e-4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    norm_output: bool = False
    norm_eps: float = 1e-5
    num_residuals: int = 1
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "d_state", "head_dim", "num_groups", "expand", "num_residuals", "chunk_size")
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
        if not is_number(self.rope_fraction) or not 0 <= self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction must be a number from 0 to 1, got {self.rope_fraction!r}.")
        for name in ("rate_floor", "norm_eps"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < 1:
                raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}.")

    @property
    def num_heads(self) -> int:
        """Heads, expand * d_model / head_dim."""
        return self.expand * self.d_model // self.head_dim

    @property
    def num_pairs(self) -> int:
        """Rotated pairs of neighbouring numbers of B and C."""
        return int(self.d_state * self.rope_fraction) // 2


@dataclass(kw_only=True)
class Mamba3State(State):
    """What the recurrence keeps of the past.

    Attributes:
        memory: (S, H, N, P) float32 (float64 for float64 activations), without the second write of the last
            token.
        angle: (S, H, R) in [0, 2 pi), the same dtype.
        key: (S, 1, H, N) rotated key of the last token, zeros where none was read.
        value: (S, 1, H, P) its x.
    """

    memory: Tensor
    angle: Tensor
    key: Tensor
    value: Tensor


class Mamba3(Float32Parameters, TokenMixer):
    """Linear attention with a decay per head and token, rotated keys and trapezoidal writes."""

    config: Mamba3Config
    overridable = frozenset({"chunk_size"})
    float32_parameters = ("D", "dt_bias")

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__(config)
        c = config
        self.channels = c.num_heads * c.head_dim
        group_width = c.num_groups * c.d_state
        self.widths = [
            self.channels,
            self.channels,
            group_width,
            group_width,
            *[c.num_heads] * 3,
            c.num_pairs,
        ]
        self.in_proj = nn.Linear(c.d_model, sum(self.widths), bias=False)
        self.B_norm = RMSNorm(c.d_state, c.norm_eps)
        self.C_norm = RMSNorm(c.d_state, c.norm_eps)
        self.B_bias = undecayed(c.num_heads, 1, c.d_state)
        self.C_bias = undecayed(c.num_heads, 1, c.d_state)
        self.dt_bias = undecayed(c.num_heads)
        self.D = undecayed(c.num_heads)
        self.norm: GatedRMSNorm | None = None
        if c.norm_output:
            self.norm = GatedRMSNorm(self.channels, c.num_heads, c.norm_eps, norm_before_gate=True)
        self.out_proj = nn.Linear(self.channels, c.d_model, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Step sizes log-uniform, biases of B and C one, projections as torch, the last one scaled."""
        c = self.config
        init_linear(self.in_proj)
        init_linear(self.out_proj, c.num_residuals**-0.5)
        init_step_bias(self.dt_bias, c.dt_min, c.dt_max, c.dt_floor)
        for norm in (self.B_norm, self.C_norm, self.norm):
            if norm is not None:
                norm.reset_parameters()
        for parameter in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(parameter)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba3State:
        """Zeros."""
        weight, c = self.in_proj.weight, self.config
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = (batch_size, c.num_heads)
        return Mamba3State(
            num_tokens=empty_tokens(batch_size),
            memory=torch.zeros(*rows, c.d_state, c.head_dim, device=device, dtype=wide),
            angle=torch.zeros(*rows, c.num_pairs, device=device, dtype=wide),
            key=torch.zeros(batch_size, 1, *rows[1:], c.d_state, device=device, dtype=dtype),
            value=torch.zeros(batch_size, 1, *rows[1:], c.head_dim, device=device, dtype=dtype),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: Mamba3State | None) -> LayerOutput:
        """Projects, normalises, and runs the recurrence."""
        c = self.config
        z, x, write, read, steps, rates, trap, angle = self.in_proj(x).split(self.widths, dim=-1)
        x = x.unflatten(-1, (c.num_heads, c.head_dim))  # (B, T, H, P)
        write = self.B_norm(write.unflatten(-1, (c.num_groups, c.d_state)))  # (B, T, G, N)
        read = self.C_norm(read.unflatten(-1, (c.num_groups, c.d_state)))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        steps, rates, trap, angle = (part.to(wide) for part in (steps, rates, trap, angle))
        delta = F.softplus(steps + self.dt_bias.to(wide))  # (B, T, H)
        # h, whose branches meet at 1 for 0; each sees only the numbers that it is for
        rates = rates.clamp(min=0) + 1 / (1 - rates.clamp(max=0))
        y, new_state = self.recur(
            read, write, x, delta, -rates.clamp(min=c.rate_floor), torch.sigmoid(trap), angle, ctx, state
        )
        y = y.flatten(-2)  # (B, T, D)
        y = (y * F.silu(z.to(wide))).to(z.dtype) if self.norm is None else self.norm(y, z)
        return LayerOutput(self.out_proj(y), new_state)

    def recur(
        self,
        read: Tensor,
        write: Tensor,
        x: Tensor,
        delta: Tensor,
        rates: Tensor,
        trap: Tensor,
        angle: Tensor,
        ctx: SequenceContext,
        state: Mamba3State | None,
    ) -> tuple[Tensor, Mamba3State | None]:
        """The recurrence of the module docstring, between projections and gate.

        Args:
            read, write: C and B (B, T, G, N), normalised.
            x: (B, T, H, P).
            delta: (B, T, H) step sizes.
            rates: (B, T, H), A below 0.
            trap: (B, T, H), lambda.
            angle: (B, T, R) before tanh, shared by the heads.
            ctx: of the call.
            state: the incoming state, or None for an empty memory.

        Returns:
            y (B, T, H, P) in the accumulation dtype, and the new state when `ctx.return_state`.
        """
        c, wide = self.config, delta.dtype
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        # in float64: the sum of thousands of steps would lose the angle in float32
        turns = (delta[..., None] * (math.pi * torch.tanh(angle))[:, :, None]).double()  # (B, T, H, R)
        phi = _angles(turns, state.angle, ctx)
        turn = torch.complex(phi.cos().to(wide), phi.sin().to(wide))
        query, key = (
            self._rotated_heads(coefficient.to(wide), bias.to(wide), turn).to(x.dtype)
            for coefficient, bias in ((read, self.C_bias), (write, self.B_bias))
        )  # (B, T, H, N)
        decay, first = delta * rates, trap * delta  # (B, T, H) log-decay, weight of the first write
        nothing = delta.new_zeros(ctx.batch_size, 1, c.num_heads)
        past_key, last_key = _shift(key, state.key.to(key.dtype), ctx)
        past_x, last_x = _shift(x, state.value.to(x.dtype), ctx)
        past_decay, last_decay = _shift(decay, nothing, ctx)
        past_first, last_first = _shift(first, nothing, ctx)
        weight = past_first + (1 - trap) * delta
        seen, memory = linear_attention(
            query,
            past_key,
            (past_x.to(wide) * weight[..., None]).to(x.dtype),
            g=past_decay,
            scale=1.0,
            initial_state=LinearState(state.memory),
            return_state=ctx.return_state,
            cu_seqlens=ctx.cu_seqlens,
            chunk_size=ctx.overrides.get("chunk_size", c.chunk_size),
        )  # (B, T, H, P)
        own = first * (query.to(wide) * key.to(wide)).sum(-1) + self.D.to(wide)  # (B, T, H)
        y = decay.exp()[..., None] * seen + own[..., None] * x.to(wide)
        if memory is None:
            return y, None
        # a sequence without tokens has a log-decay and a weight of 0 here: its memory keeps every bit
        written = (last_first[..., None] * last_key).squeeze(1)[..., None] * last_x.squeeze(1)[:, :, None]
        new_state = Mamba3State(
            num_tokens=ctx.num_tokens_after,
            memory=last_decay.exp().squeeze(1)[..., None, None] * memory.memory + written,
            angle=_shift(phi, state.angle[:, None].double(), ctx)[1].squeeze(1).to(wide),
            key=last_key,
            value=last_x,
        )
        return y, new_state

    def flops_per_token(self, num_tokens: int) -> int:
        """The projections, one write and one read of the memory."""
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * projections + 4 * self.channels * self.config.d_state

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Two groups, few angles; odd sizes, all pairs rotated, a norm in front of the gate."""
        return (
            {"d_model": 8, "d_state": 6, "head_dim": 4, "num_groups": 2, "chunk_size": 5},
            {
                "d_model": 6,
                "d_state": 5,
                "head_dim": 3,
                "expand": 1,
                "rope_fraction": 1.0,
                "norm_output": True,
                "chunk_size": 7,
            },
        )

    def _rotated_heads(self, coefficient: Tensor, bias: Tensor, turn: Tensor) -> Tensor:
        """Adds the bias of each head and turns neighbouring pairs of numbers; the rest stays as it is.

        Args:
            coefficient: (B, T, G, N).
            bias: (H, 1, N).
            turn: (B, T, H, R) complex, of length 1.

        Returns:
            (B, T, H, N).
        """
        bias = bias.view(self.config.num_groups, -1, self.config.d_state)  # (G, H / G, N)
        width = 2 * turn.shape[-1]
        pairs, rest = (
            (coefficient[:, :, :, None, part] + bias[..., part]).flatten(2, 3)
            for part in (slice(width), slice(width, None))
        )  # (B, T, H, 2 R), (B, T, H, N - 2 R)
        turned = torch.view_as_real(torch.view_as_complex(pairs.unflatten(-1, (-1, 2))) * turn)
        return torch.cat([turned.flatten(-2), rest], -1)


def _angles(turns: Tensor, start: Tensor, ctx: SequenceContext) -> Tensor:
    """Running sums of (B, T, H, R) in each sequence, from `start` (S, H, R), in [0, 2 pi)."""
    if ctx.cu_seqlens is None:
        phi = start[:, None] + turns.cumsum(1)
    else:  # one by one, so that no rounding and no gradient passes a boundary
        parts = [begin + part.cumsum(0) for part, begin in zip(ctx.split(turns), start, strict=True)]
        phi = ctx.merge(parts)
    return torch.remainder(phi, 2 * math.pi)


def _shift(x: Tensor, before: Tensor, ctx: SequenceContext) -> tuple[Tensor, Tensor]:
    """Every token gets what the token in front of it had.

    Args:
        x: (B, T, ...) in internal form.
        before: (S, 1, ...) of the last token of the calls before.

    Returns:
        (B, T, ...), and (S, 1, ...) of the last token so far.
    """
    if ctx.cu_seqlens is None:
        row = torch.cat([before, x], 1)  # (B, 1 + T, ...)
        return row[:, :-1], row[:, -1:]
    rows = [torch.cat([first, part]) for first, part in zip(before, ctx.split(x), strict=True)]
    return ctx.merge([row[:-1] for row in rows]), torch.stack([row[-1:] for row in rows])
