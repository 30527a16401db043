"""The neural memory of Titans: a net per head that learns what surprises it (arXiv 2501.00663).

    x_s, x_r = norm_s(x), norm_r(x)
    q = W_q x_r,   k = W_k x_s,   v = W_v x_s      with optional convolution, SiLU and norms of q and k
    S_j = e_j S_{j-1} - sum over chunk j of rate_t * gradient of |f(k_t; base) - v_t|^2 / F
    M_j = (1 - a_j) M_{j-1} + S_j
    o_t = f(q_t; M),   y = W_o [sigmoid(w_g x_r) o]      heads and gate only with several heads
    rate_t = max_lr sigmoid(w x_s,t + b);   a_j, e_j = sigmoid of linear maps of the mean of x_s over chunk j

This is the form of the code of titans-pytorch: the last token of a chunk reads what the chunk wrote, and
gradients are taken at the first net, or at M as it was at the last multiple of `batch_size` tokens. With
`gates="token"` it is that of the paper's text: gates per token, the loss summed over channels, every token
reads M_t with its own write, gradients at M as the last chunk left it.

State: M, the net of the gradients, S and what the open chunk has written, float32; with a convolution its
last inputs. Constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import TitansState, titans, titans_read
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_choice,
    check_positive,
    record,
    tag_parameter,
)
from .parts.fast_net import unit_length
from .parts.kv_cache import empty_tokens
from .parts.norm import RMSNorm
from .parts.projection import init_projections, projection_flops
from .parts.short_conv import ShortConv
from .parts.state_space import is_number, undecayed

# Dimensions: B batch, T tokens, N sequences, H heads, F head width, P numbers of a head's net, D model width,
# K taps

RATE_BIAS = -2.0  # first rates near max_lr / 8


@dataclass(frozen=True, kw_only=True)
class TitansConfig(MixerConfig):
    """Configuration of `Titans`.

    Attributes:
        num_heads: heads, each with a net of its own.
        head_dim: width of a head; None for d_model / num_heads.
        chunk_size: tokens whose gradients are taken at the same net.
        batch_size: tokens after which gradients are taken at the net as it is then, a multiple of chunk_size;
            None for the first net throughout. Only with gates per chunk.
        gates: "chunk" for the form of the published code, "token" for that of the paper's text.
        use_momentum: carry on what was written before, with a learned share.
        depth: matrices of the net.
        expansion: hidden width of the net, in head widths.
        max_lr: the highest rate.
        decay_init: share of the net that a chunk (a token, with gates per token) forgets at first.
        max_grad_norm: soft bound on the norm of what a chunk writes into a matrix; None for none. Only with
            gates per chunk.
        orthogonalize: write the momentum's matrices with singular values near 1. Only with gates per chunk.
        qk_norm: "rms" for RMS norms of queries and keys with a gain, "l2" for unit length, "none".
        out_norm: an RMS norm with a gain over the output of every head.
        conv_size: taps of a convolution with SiLU over queries, keys and values; 0 for none.
        norm_eps: of all RMS norms.
    """

    type: str = "titans"
    num_heads: int
    head_dim: int | None = None
    chunk_size: int = 64
    batch_size: int | None = None
    gates: str = "chunk"
    use_momentum: bool = True
    depth: int = 2
    expansion: float = 4.0
    max_lr: float = 1.0
    decay_init: float = 0.02
    max_grad_norm: float | None = None
    orthogonalize: bool = False
    qk_norm: str = "none"
    out_norm: bool = False
    conv_size: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "chunk_size", "depth")
        for name in ("head_dim", "batch_size", "conv_size"):
            if getattr(self, name):
                check_positive(self, name)
        check_choice("gates", self.gates, ("chunk", "token"))
        check_choice("qk_norm", self.qk_norm, ("none", "rms", "l2"))
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads must divide d_model, got {self.num_heads} heads and d_model {self.d_model}. "
                "Or set head_dim."
            )
        for name in ("max_lr", "expansion", "max_grad_norm"):
            value = getattr(self, name)
            if name == "max_grad_norm" and value is None:
                continue
            if not is_number(value) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")
        for name in ("decay_init", "norm_eps"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value!r}.")
        if self.batch_size is not None and self.batch_size % self.chunk_size:
            raise ValueError(
                f"batch_size must be a multiple of chunk_size {self.chunk_size}, got {self.batch_size}."
            )
        chunk_only = {
            "batch_size": self.batch_size is not None,
            "max_grad_norm": self.max_grad_norm is not None,
            "orthogonalize": self.orthogonalize,
        }
        for name, is_set in chunk_only.items():
            if self.gates == "token" and is_set:
                raise ValueError(
                    f'{name} works with gates per chunk only. Leave it out, or set gates="chunk".'
                )

    @property
    def width(self) -> int:
        """F, the width of a head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def net_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the tensors of one head's net: gain, then matrices."""
        hidden = max(1, int(self.width * self.expansion))
        widths = (self.width, *(hidden for _ in range(self.depth - 1)), self.width)
        return (1, self.width), *zip(widths, widths[1:], strict=False)


@dataclass(kw_only=True)
class TitansLayerState(State):
    """What the nets keep, each as one row of numbers; float32 but for the tail (float64 for float64).

    Attributes:
        weights: (N, H, P) the net as it is read.
        base: (N, H, P) the net at which gradients are taken.
        momentum: (N, H, P) the running sum of writes; None without momentum.
        pending: (N, H, P) what the open chunk has written; None with gates per token.
        gates: (N, H, 2) sums of the gates' logits over the open chunk; None with gates per token.
        tail: (N, K - 1, 3 H F) last inputs of the convolution, in the dtype of the activations; None without.
    """

    weights: Tensor
    base: Tensor
    momentum: Tensor | None = None
    pending: Tensor | None = None
    gates: Tensor | None = None
    tail: Tensor | None = None


class Titans(TokenMixer):
    """Writes into the weights of a net what the net did not expect, with momentum and forgetting."""

    config: TitansConfig

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        c, inner = config, config.num_heads * config.width
        self.store_norm, self.retrieve_norm = RMSNorm(c.d_model, c.norm_eps), RMSNorm(c.d_model, c.norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, inner, bias=False) for _ in range(3))
        self.rate_proj, self.decay_proj = (nn.Linear(c.d_model, c.num_heads) for _ in range(2))
        self.momentum_proj = nn.Linear(c.d_model, c.num_heads) if c.use_momentum else None
        for linear in (self.rate_proj, self.decay_proj, self.momentum_proj):
            if linear is not None:
                tag_parameter(linear.bias, weight_decay=False)
        self.conv = ShortConv(3 * inner, c.conv_size) if c.conv_size else None
        shape = (c.num_heads, c.width)
        self.q_gain, self.k_gain = (undecayed(*shape) if c.qk_norm == "rms" else None for _ in range(2))
        self.out_gain = undecayed(*shape) if c.out_norm else None
        self.names = ("gain", *(f"w{index + 1}" for index in range(c.depth)))
        for name, size in zip(self.names, c.net_shapes, strict=True):
            initial = nn.Parameter(torch.empty(c.num_heads, *size))
            setattr(self, name, tag_parameter(initial, weight_decay=name != "gain"))
        self.gate_proj = nn.Linear(c.d_model, c.num_heads, bias=False) if c.num_heads > 1 else None
        needs_output = c.num_heads > 1 or inner != c.d_model
        self.o_proj = nn.Linear(inner, c.d_model, bias=False) if needs_output else None
        self.init_weights()

    def init_weights(self) -> None:
        """Projections N(0, 0.02), first rates small, decays at `decay_init`, nets as Glorot's, gains at 1."""
        init_projections(self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj)
        init_projections(self.rate_proj, self.decay_proj, self.momentum_proj)
        nn.init.constant_(self.rate_proj.bias, RATE_BIAS)
        decay = self.config.decay_init
        nn.init.constant_(self.decay_proj.bias, math.log(decay / (1 - decay)))
        if self.conv is not None:
            self.conv.init_weights()
        self.store_norm.reset_parameters()
        self.retrieve_norm.reset_parameters()
        for name in ("q_gain", "k_gain", "out_gain", "gain"):
            gain = getattr(self, name)
            if gain is not None:
                nn.init.zeros_(gain)
        for name in self.names[1:]:
            weight = getattr(self, name)
            bound = (6 / sum(weight.shape[1:])) ** 0.5
            nn.init.uniform_(weight, -bound, bound)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TitansLayerState:
        """The learned nets, nothing written."""
        c, weight = self.config, self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        net = _flat(tuple(getattr(self, name)[None].to(device, wide) for name in self.names))
        net = net.expand(batch_size, -1, -1)
        is_chunked = c.gates == "chunk"
        return TitansLayerState(
            num_tokens=empty_tokens(batch_size),
            weights=net.clone(),
            base=net.clone(),
            momentum=torch.zeros_like(net) if c.use_momentum else None,
            pending=torch.zeros_like(net) if is_chunked else None,
            gates=net.new_zeros(batch_size, c.num_heads, 2) if is_chunked else None,
            tail=None if self.conv is None else self.conv.empty_tail(batch_size, device, dtype),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: TitansLayerState | None) -> LayerOutput:
        """Normalise, project, read with the nets that learn, gate."""
        c = self.config
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        stored, retrieved = self.store_norm(x), self.retrieve_norm(x)
        q, k, v = self.q_proj(retrieved), self.k_proj(stored), self.v_proj(stored)
        tail = None
        if self.conv is not None:
            joined, tail = self.conv(torch.cat([q, k, v], dim=-1), ctx, state.tail)
            q, k, v = joined.chunk(3, dim=-1)
        q, k = self._heads(q, self.q_gain), self._heads(k, self.k_gain)  # (B, T, H, F)
        v = v.unflatten(-1, (c.num_heads, -1))  # (B, T, H, F)
        rate = _wide(self.rate_proj(stored)).sigmoid() * c.max_lr  # (B, T, H)
        decay = _wide(self.decay_proj(stored))
        keep = decay if self.momentum_proj is None else _wide(self.momentum_proj(stored))
        record("inner_rate", rate)
        record("decay_logit", decay)
        out, memory = titans(
            q,
            k,
            v,
            rate,
            torch.stack([decay, keep], dim=-1),
            self._memory(state, ctx),
            chunk_size=c.chunk_size,
            rebase_size=c.batch_size,
            use_momentum=c.use_momentum,
            per_token=c.gates == "token",
            loss_scale=1.0 if c.gates == "token" else 1 / c.width,
            max_grad_norm=c.max_grad_norm,
            orthogonalize=c.orthogonalize,
            return_state=ctx.return_state,
            cu_seqlens=ctx.cu_seqlens,
        )  # (B, T, H, F)
        new_state = None
        if memory is not None:
            new_state = TitansLayerState(
                num_tokens=ctx.num_tokens_after,
                weights=_flat(memory.weights),
                base=_flat(memory.base),
                momentum=_flat(memory.momentum) if memory.momentum else None,
                pending=_flat(memory.pending) if memory.pending else None,
                gates=memory.gates,
                tail=tail,
            )
        return LayerOutput(self._merged(out, retrieved), new_state)

    def answer(self, x: Tensor, ctx: SequenceContext, state: TitansLayerState) -> Tensor:
        """What the memory as the last whole chunk left it answers to tokens; nothing is written.

        Args:
            x: (B, T, M) in internal form.
            state: between two tokens of a chunk, or of its start.

        Returns:
            (B, T, M).

        Raises:
            ValueError: the mixer convolves its queries, which belong to the tokens that it reads and writes.
        """
        if self.conv is not None:
            raise ValueError(
                f"answer needs queries of single tokens, got conv_size {self.config.conv_size}. Use "
                "conv_size: 0."
            )
        retrieved = self.retrieve_norm(x)
        q = self._heads(self.q_proj(retrieved), self.q_gain)
        # with gates per token, `weights` moves at every token and `base` at the ends of chunks
        net = state.base if self.config.gates == "token" else state.weights
        return self._merged(titans_read(q, self._net(net), cu_seqlens=ctx.cu_seqlens), retrieved)

    @property
    def span(self) -> int:
        """The longest of chunk, batch and convolution."""
        return max(self.config.chunk_size, self.config.batch_size or 1, self.config.conv_size)

    def answer_flops(self) -> int:
        """Matrix-product FLOPs of one token in `answer`."""
        maps = sum(rows * columns for rows, columns in self.config.net_shapes[1:])
        return projection_flops(self.q_proj, self.o_proj, self.gate_proj) + 2 * self.config.num_heads * maps

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections; per matrix of the net one pass of keys, one of queries, and the way back through every
        matrix but the first; a token's share of the Newton-Schulz steps.
        """
        c = self.config
        linears = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj)
        gates = (self.rate_proj, self.decay_proj, self.momentum_proj)
        maps = [rows * columns for rows, columns in c.net_shapes[1:]]
        products = 2 * sum(maps) + sum(maps[1:])
        if c.orthogonalize:
            sides = [sorted(shape) for shape in c.net_shapes[1:]]
            products += 5 * sum(2 * a * a * b + a**3 for a, b in sides) // c.chunk_size
        return projection_flops(*linears, *gates) + 2 * c.num_heads * products

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Gates per chunk, gradients at a net that moves, all norms; gates per token with a convolution."""
        return (
            {
                "d_model": 8,
                "num_heads": 2,
                "chunk_size": 3,
                "batch_size": 6,
                "expansion": 2.0,
                # a net that forgets as fast as it learns turns rounding into errors above the bound
                "max_lr": 0.1,
                "decay_init": 0.001,
                "max_grad_norm": 0.2,
                "qk_norm": "rms",
                "out_norm": True,
            },
            {
                "d_model": 6,
                "num_heads": 1,
                "head_dim": 5,
                "chunk_size": 4,
                "gates": "token",
                "expansion": 2.0,
                "max_lr": 0.02,
                "decay_init": 0.001,
                "qk_norm": "l2",
                "conv_size": 3,
            },
        )

    def _memory(self, state: TitansLayerState, ctx: SequenceContext) -> TitansState:
        """The kernel's state."""
        c = self.config
        return TitansState(
            self._net(state.weights),
            self._net(state.base),
            self._net(state.momentum),
            self._net(state.pending),
            state.gates,
            tuple(seen % (c.batch_size or c.chunk_size) for seen in ctx.starts),
        )

    def _net(self, flat: Tensor | None) -> tuple[Tensor, ...]:
        """The tensors (N, H, ...) of nets (N, H, P)."""
        if flat is None:
            return ()
        shapes = self.config.net_shapes
        parts = flat.split([rows * columns for rows, columns in shapes], dim=-1)
        return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))

    def _heads(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """Queries or keys (B, T, H, F) of their projection (B, T, H F), normalised as configured."""
        x = x.unflatten(-1, (self.config.num_heads, -1))
        if self.config.qk_norm == "l2":
            return unit_length(x)
        return x if gain is None else self._normed(x, gain)

    def _merged(self, out: Tensor, retrieved: Tensor) -> Tensor:
        """The output (B, T, M) of those of the heads (B, T, H, F)."""
        if self.out_gain is not None:
            out = self._normed(out, self.out_gain)
        if self.gate_proj is not None:
            out = out * self.gate_proj(retrieved).sigmoid()[..., None]
        out = out.flatten(-2)
        return out if self.o_proj is None else self.o_proj(out)

    def _normed(self, x: Tensor, gain: Tensor) -> Tensor:
        """x (B, T, H, F) over its root mean square, times 1 + gain (H, F)."""
        wide = _wide(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return (wide * (1 + gain.to(wide.dtype))).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(net: tuple[Tensor, ...]) -> Tensor:
    """(N, H, P) of the tensors (N, H, ...) of a net."""
    return torch.cat([part.flatten(2) for part in net], dim=-1)
