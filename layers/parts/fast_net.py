"""A net per head that learns while the sequence is read, with what decides how much it learns.

    rates_t    = softplus(x_t W_rates + b)     one per head and matrix of the net
    momentum_t = sigmoid(x_t W_momentum + b)   one per head

The recurrence is `memzoo.kernels.fast_weight_scan`; the initial net is learned as any parameter is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import FastWeightState, empty_fast_weights, fast_weight_scan, fast_weight_shapes
from ..contract import (
    MixerConfig,
    SequenceContext,
    State,
    check_choice,
    check_positive,
    is_probing,
    record,
    tag_parameter,
)

# Dimensions: B batch, T tokens, N sequences, H heads, D width of a head, F hidden width, R matrices of the
# net, P numbers in them, M model width

NETS = ("swiglu", "mlp", "linear")
FAST_NORMS = ("internal", "post", "pre", "none")


@dataclass(frozen=True, kw_only=True)
class FastNetConfig(MixerConfig):
    """What learns while the sequence is read, and how.

    Attributes:
        net: "swiglu", "mlp" or "linear".
        hidden_mult: hidden width of the net as a multiple of the width of a head.
        low_rank: rank of the initial gate and up matrices, added to half the identity; null for full ones.
        residual: whether the net adds its input.
        loss: "dot" for the inner product of answer and value, "l2" for their distance.
        momentum: carry momentum from one inner step to the next.
        muon: orthogonalise every inner step.
        fast_norm: when rows of the net are brought back to their initial lengths: "internal", "post", "pre"
            or "none".
        chunk_size: tokens per inner step. It decides what the memory computes.
        max_grad_norm: limit on the inner gradient per head and matrix, or null.
        ns_steps: Newton-Schulz iterations of muon, at most 5.
        detach_norm: no gradient through the initial row lengths.
        bptt_chunks: cut gradients through the net after so many chunks, or null for never.
        recompute: run chunks again in the backward pass instead of keeping what they made.
        lr_init: inner learning rate at initialisation.
    """

    net: str = "swiglu"
    hidden_mult: float = 2.0
    low_rank: int | None = None
    residual: bool = True
    loss: str = "dot"
    momentum: bool = True
    muon: bool = False
    fast_norm: str = "internal"
    chunk_size: int = 2048
    max_grad_norm: float | None = None
    ns_steps: int = 5
    detach_norm: bool = False
    bptt_chunks: int | None = None
    recompute: bool = True
    lr_init: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("net", NETS),
            ("loss", ("dot", "l2")),
            ("fast_norm", FAST_NORMS),
        ):
            check_choice(name, getattr(self, name), known)
        check_positive(self, "chunk_size", "ns_steps")
        for name in ("low_rank", "bptt_chunks"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        for name in ("hidden_mult", "lr_init", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        if self.low_rank is not None and self.net != "swiglu":
            raise ValueError(f'low_rank is for the gate and up matrices of net="swiglu", got {self.net!r}.')

    def hidden_width(self, head_dim: int) -> int:
        """F for heads of a width."""
        return max(1, round(self.hidden_mult * head_dim))

    @property
    def optimizer(self) -> str:
        """As `fast_weight_scan` calls it."""
        return "muon" if self.muon else "momentum" if self.momentum else "sgd"


@dataclass(kw_only=True)
class FastNetState(State):
    """What the net has become, float32 (float64 for float64 activations).

    Attributes:
        weights: (N, H, P) its matrices after the last complete chunk.
        pending: (N, H, P) steps of the open chunk.
        momentum: (N, H, P), None without momentum.
        momentum_sum: (N, H) of the tokens of the open chunk, None without momentum.
    """

    weights: Tensor
    pending: Tensor
    momentum: Tensor | None = None
    momentum_sum: Tensor | None = None


class FastNet(nn.Module):
    """The initial net, its rates and its momentum.

    Probes: `fast_rate` and `fast_momentum` per token; `fast_weight_norm` and, with momentum, `fast_step_norm`
    (N, H) after the call.

    Args:
        config: what learns and how.
        num_heads, head_dim: H and D.
    """

    def __init__(self, config: FastNetConfig, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        self.shapes = fast_weight_shapes(config.net, head_dim, config.hidden_width(head_dim))
        num_factored = 0 if config.low_rank is None else 2  # gate and up
        self.left, self.right, self.full = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for rows, columns in self.shapes[:num_factored]:
            assert config.low_rank is not None
            self.left.append(_matrix(num_heads, rows, config.low_rank))
            self.right.append(_matrix(num_heads, config.low_rank, columns))
        for rows, columns in self.shapes[num_factored:]:
            self.full.append(_matrix(num_heads, rows, columns))
        self.rates = nn.Linear(config.d_model, num_heads * len(self.shapes))
        self.momentum = nn.Linear(config.d_model, num_heads) if config.momentum else None
        for linear in (self.rates, self.momentum):
            if linear is not None:
                tag_parameter(linear.bias, weight_decay=False)

    def init_weights(self) -> None:
        """Matrices N(0, 1 / columns), rates at `lr_init`, momentum at 1/2 (the LaCT code)."""
        for left, right in zip(self.left, self.right, strict=True):
            nn.init.normal_(left, std=0.5 * left.shape[2] ** -0.5)
            nn.init.normal_(right, std=0.5 * right.shape[2] ** -0.5)
        for matrix in self.full:
            nn.init.normal_(matrix, std=matrix.shape[2] ** -0.5)
        nn.init.normal_(self.rates.weight, std=0.02)
        nn.init.constant_(self.rates.bias, math.log(math.expm1(self.config.lr_init)))
        if self.momentum is not None:
            nn.init.normal_(self.momentum.weight, std=0.02)
            nn.init.zeros_(self.momentum.bias)

    def initial_net(self) -> list[Tensor]:
        """The matrices (H, rows, columns) of the net before the first token."""
        factored = []
        for left, right in zip(self.left, self.right, strict=True):
            half = 0.5 * torch.eye(left.shape[1], right.shape[2], device=left.device, dtype=left.dtype)
            factored.append(left @ right + half)
        return [*factored, *self.full]

    def init_state(
        self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> FastNetState:
        """The initial net for every sequence, with its gradient."""
        if torch.device(device or self.rates.weight.device).type == "meta":  # sizes alone are asked for
            net = [torch.empty(self.num_heads, *shape, device="meta") for shape in self.shapes]
        else:
            net = [matrix.to(device) for matrix in self.initial_net()]
        return _as_state(
            empty_fast_weights(net, batch_size, has_momentum=self.momentum is not None, dtype=dtype)
        )

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, ctx: SequenceContext, state: FastNetState | None
    ) -> tuple[Tensor, FastNetState | None]:
        """Answers queries and learns values.

        Args:
            x: (B, T, M), for rates and momentum.
            q, k, v: (B, T, H, D).

        Returns:
            (B, T, H, D) and, where the call wants it, the new state.

        Raises:
            ValueError: another chunk size for a call with a state.
        """
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        rates = F.softplus(self.rates(x).to(wide)).unflatten(-1, (self.num_heads, -1))  # (B, T, H, R)
        momentum = None if self.momentum is None else self.momentum(x).to(wide).sigmoid()  # (B, T, H)
        record("fast_rate", rates)
        if momentum is not None:
            record("fast_momentum", momentum)
        out, after = fast_weight_scan(
            q,
            k,
            v,
            rates,
            momentum,
            self.initial_net(),
            net=c.net,
            residual=c.residual,
            loss=c.loss,
            optimizer=c.optimizer,
            fast_norm=c.fast_norm,
            chunk_size=self._chunk_size(ctx, state),
            max_grad_norm=c.max_grad_norm,
            ns_steps=c.ns_steps,
            detach_norm=c.detach_norm,
            bptt_chunks=c.bptt_chunks,
            recompute=c.recompute,
            initial_state=None if state is None else _as_kernel_state(state),
            return_state=ctx.return_state or is_probing(),
            cu_seqlens=ctx.cu_seqlens,
        )
        if after is not None and is_probing():
            record("fast_weight_norm", torch.linalg.vector_norm(after.weights.detach(), dim=-1))
            if after.momentum is not None:
                record("fast_step_norm", torch.linalg.vector_norm(after.momentum.detach(), dim=-1))
        return out, None if after is None or not ctx.return_state else _as_state(after)

    def num_flops(self) -> int:
        """Matrix-product FLOPs of one token: rates, one answer, one step."""
        size = sum(rows * columns for rows, columns in self.shapes)
        heads = self.rates.weight.numel() + (0 if self.momentum is None else self.momentum.weight.numel())
        inner = size - (self.shapes[-1][0] * self.shapes[-1][1] if self.config.loss == "dot" else 0)
        back = 0 if len(self.shapes) == 1 else self.shapes[-1][0] * self.shapes[-1][1]
        factors = sum(
            left.shape[1] * right.numel() for left, right in zip(self.left, self.right, strict=True)
        )
        return 2 * (heads + factors + self.num_heads * (size + inner + back + size))

    def _chunk_size(self, ctx: SequenceContext, state: FastNetState | None) -> int:
        chunk_size = ctx.overrides.get("chunk_size", self.config.chunk_size)
        if chunk_size != self.config.chunk_size and (state is not None or ctx.return_state):
            raise ValueError(
                "the chunk size of fast weights decides what they learn, so it can be overridden only in "
                f"calls without a state; got {chunk_size} for {self.config.chunk_size}. Drop it, or call "
                "with state=None and return_state=False."
            )
        return chunk_size


def unit_length(x: Tensor) -> Tensor:
    """x / (|x| + 1e-5) over the last dimension, the epsilon of the LaCT code."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + 1e-5)).to(x.dtype)


def _matrix(*shape: int) -> nn.Parameter:
    """Decay would pull the row lengths that the net is brought back to."""
    return tag_parameter(nn.Parameter(torch.empty(*shape)), weight_decay=False)


def _as_state(state: FastWeightState) -> FastNetState:
    return FastNetState(**state._asdict())


def _as_kernel_state(state: FastNetState) -> FastWeightState:
    return FastWeightState(state.weights, state.pending, state.num_tokens, state.momentum, state.momentum_sum)
