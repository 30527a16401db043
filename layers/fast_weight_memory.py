"""A memory whose weights learn while it reads: test-time training with large chunks, as in LaCT and AllMem.

    x'      = s * x                                           per channel, 1 at first
    q, k, v = silu(conv([W_q x' | W_k x' | W_v x']))          n heads of width mem_dim / n
    q, k    = l2(norm(q)), l2(norm(k))                        per head, l2(z) = z / (|z| + 1e-5)
    o       = f(q) with the net f as earlier chunks left it   parts/fast_net.py
    y       = W_o [sigmoid(w_g x') norm(o)]

Equations of AllMem's memory branch (arXiv 2602.13680, section 3.2) with the closed-form steps of LaCT
(2505.23884); widths of the convolution, gate and rates are ours, as no code is published. The factor s in
place of a norm of its own gives the same functions: a norm is a division by the length and such a factor.
State: the net, its momentum and its open chunk (parts/fast_net.py), float32; the last inputs of the
convolution. Constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contract import (
    LayerOutput,
    SequenceContext,
    State,
    TokenMixer,
    check_choice,
    check_positive,
    tag_parameter,
)
from .parts.fast_net import FastNet, FastNetConfig, FastNetState, unit_length
from .parts.kv_cache import empty_tokens
from .parts.norm import RMSNorm
from .parts.projection import init_projections, projection_flops
from .parts.short_conv import ShortConv

# Dimensions: B batch, T tokens, N sequences, H heads, D width of a head, W all heads together, K taps


@dataclass(frozen=True, kw_only=True)
class FastWeightMemoryConfig(FastNetConfig):
    """Configuration of `FastWeightMemory`; the learning net as in `FastNetConfig`.

    Attributes:
        num_heads: heads, each with its own net.
        mem_dim: width of all heads together, a multiple of num_heads.
        conv_size: taps of the convolution over queries, keys and values; 0 for none.
        gate: "head" for one output gate per head, "channel" for one per channel, "none".
        norm_eps: of the norms of queries, keys and output.
    """

    type: str = "fast_weight_memory"
    num_heads: int
    mem_dim: int = 512
    conv_size: int = 4
    gate: str = "head"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "mem_dim")
        if self.conv_size:
            check_positive(self, "conv_size")
        check_choice("gate", self.gate, ("head", "channel", "none"))
        if self.mem_dim % self.num_heads:
            raise ValueError(
                f"mem_dim must be a multiple of num_heads, got {self.mem_dim} and {self.num_heads}."
            )
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be between 0 and 1, got {self.norm_eps}.")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.mem_dim // self.num_heads


@dataclass(kw_only=True)
class FastWeightMemoryState(State):
    """What the net has become, and the tail of the convolution.

    Attributes:
        net: see `FastNetState`.
        tail: (N, K - 1, 3 W) last inputs of the convolution, in the dtype of the activations; None without
            convolution.
    """

    net: FastNetState
    tail: Tensor | None = None


class FastWeightMemory(TokenMixer):
    """Stores values under keys in the weights of a net, by gradient steps, one per chunk.

    `overrides` of a call may replace `chunk_size` while no state is given or asked for.
    """

    config: FastWeightMemoryConfig
    overridable = frozenset({"chunk_size"})

    def __init__(self, config: FastWeightMemoryConfig) -> None:
        super().__init__(config)
        c = config
        self.input_scale = tag_parameter(nn.Parameter(torch.empty(c.d_model)), weight_decay=False)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(c.d_model, c.mem_dim, bias=False) for _ in range(3)
        )
        self.conv = ShortConv(3 * c.mem_dim, c.conv_size) if c.conv_size else None
        self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
        self.net = FastNet(c, c.num_heads, c.head_dim)
        self.o_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.gate = None
        if c.gate != "none":
            self.gate = nn.Linear(c.d_model, c.num_heads if c.gate == "head" else c.mem_dim)
            tag_parameter(self.gate.bias, weight_decay=False)
        self.o_proj = nn.Linear(c.mem_dim, c.d_model, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Projections N(0, 0.02), the convolution near the identity, gates at 1/2, factors at 1."""
        nn.init.ones_(self.input_scale)
        init_projections(self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate)
        if self.conv is not None:
            self.conv.init_identity()
            if not self.conv.weight.is_meta:
                with torch.no_grad():
                    self.conv.weight.add_(torch.empty_like(self.conv.weight).normal_(std=0.02))
        self.net.init_weights()
        for norm in (self.q_norm, self.k_norm, self.o_norm):
            norm.reset_parameters()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FastWeightMemoryState:
        """The initial net, with its gradient."""
        weight = self.o_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return FastWeightMemoryState(
            num_tokens=empty_tokens(batch_size),
            net=self.net.init_state(batch_size, device, dtype),
            tail=None if self.conv is None else self.conv.empty_tail(batch_size, device, dtype),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: FastWeightMemoryState | None) -> LayerOutput:
        """Project, convolve, normalise; read and train the net; normalise and gate."""
        x = x * self.input_scale.to(x.dtype)
        heads = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)  # (B, T, 3 W)
        tail = None
        if self.conv is None:
            heads = torch.nn.functional.silu(heads)
        else:
            heads, tail = self.conv(heads, ctx, None if state is None else state.tail)
        q, k, v = heads.unflatten(-1, (3, self.config.num_heads, -1)).unbind(-3)  # (B, T, H, D)
        out, net = self.net(
            x,
            unit_length(self.q_norm(q)),
            unit_length(self.k_norm(k)),
            v,
            ctx,
            None if state is None else state.net,
        )
        out = self.o_norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid().unflatten(-1, (self.config.num_heads, -1))
        new_state = None
        if net is not None:
            new_state = FastWeightMemoryState(num_tokens=ctx.num_tokens_after, net=net, tail=tail)
        return LayerOutput(self.o_proj(out.flatten(-2)), new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections, gate, and the net."""
        return projection_flops(self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate) + (
            self.net.num_flops()
        )

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """AllMem's memory; another net, norm, loss and gate, without momentum and convolution."""
        return (
            {"d_model": 12, "num_heads": 2, "mem_dim": 8, "chunk_size": 5, "lr_init": 0.1},
            {
                "d_model": 10,
                "num_heads": 3,
                "mem_dim": 9,
                "net": "mlp",
                "hidden_mult": 1.5,
                "residual": False,
                "loss": "l2",
                "momentum": False,
                "fast_norm": "post",
                "max_grad_norm": 0.5,
                "conv_size": 0,
                "gate": "channel",
                "chunk_size": 7,
                "lr_init": 0.1,
            },
        )
