"""mLSTM: a matrix memory with an exponential input gate (xLSTM, Beck et al., arXiv 2405.04517).

    C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t^T v_t,   n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
    h_t = s q_t C_t / max(|s q_t . n_t|, 1),   y_t = W_o (norm(h_t) * sigmoid(x_t W_g))

computed with the stabiliser m of the paper, so that no exponential overflows. Projections, soft caps and
first biases as in xLSTM 7B (arXiv 2503.13427); the norm is RMSNorm per head.
State: C (K x E), n (K) and m per head, float32. Constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import MLSTMState, mlstm
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_positive,
    record,
    tag_parameter,
)
from .parts.heads import head_width
from .parts.kv_cache import empty_tokens
from .parts.norm import RMSNorm
from .parts.output_gate import OutputGate
from .parts.projection import init_projections, projection_flops
from .parts.state_space import is_number

# Dimensions: B batch, T tokens, N sequences, H heads, K key width, E value width

FORGET_BIAS = (3.0, 6.0)  # first biases of the forget gates, spread over the heads


@dataclass(frozen=True, kw_only=True)
class MLSTMConfig(MixerConfig):
    """Configuration of `MLSTM`.

    Attributes:
        num_heads: heads of queries, keys and values.
        head_dim: width of a query, key and value head (default: from `expand_k` and `expand_v`).
        value_dim: width of a value head, where it is another.
        expand_k: width of all query heads together, as a multiple of d_model; without head_dim.
        expand_v: width of all value heads together, likewise.
        gate_soft_cap: c of the gates' soft cap c tanh(x / c), null for none.
        input_gate_bias: first bias of the input gates; low, so that a fresh layer writes little.
        norm_eps: added to the mean square in the norm of the output.
        chunk_size: tokens per block of the parallel form; changes speed, not numbers.
    """

    type: str = "mlstm"
    num_heads: int
    head_dim: int | None = None
    value_dim: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_soft_cap: float | None = 15.0
    input_gate_bias: float = -10.0
    norm_eps: float = 1e-6
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "chunk_size")
        for field, name in (("value_dim", "expand_v"), ("head_dim", "expand_k")):
            if getattr(self, field) is None:
                width = self.head_dim or head_width(
                    self.d_model, getattr(self, name), self.num_heads, name=name, instead=field
                )
                object.__setattr__(self, field, width)
        check_positive(self, "head_dim", "value_dim")
        for field in ("gate_soft_cap", "norm_eps"):
            value = getattr(self, field)
            is_left_out = field == "gate_soft_cap" and value is None
            if not is_left_out and (not is_number(value) or not 0 < value < math.inf):
                raise ValueError(f"{field} must be above 0 and finite, got {value!r}.")
        if not is_number(self.input_gate_bias) or not math.isfinite(self.input_gate_bias):
            raise ValueError(f"input_gate_bias must be a finite number, got {self.input_gate_bias!r}.")

    @property
    def key_width(self) -> int:
        """K, resolved."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def value_width(self) -> int:
        """E, resolved."""
        assert self.value_dim is not None
        return self.value_dim


@dataclass(kw_only=True)
class MLSTMLayerState(State):
    """The matrix memory, divided by exp(stabilizer).

    Attributes:
        memory: (N, H, K, E) float32 (float64 for float64 activations).
        normalizer: (N, H, K), likewise.
        stabilizer: (N, H), likewise.
    """

    memory: Tensor
    normalizer: Tensor
    stabilizer: Tensor


class MLSTM(TokenMixer):
    """Matrix memory with exponential input gates."""

    config: MLSTMConfig
    overridable = frozenset({"chunk_size"})

    def __init__(self, config: MLSTMConfig) -> None:
        super().__init__(config)
        c = config
        self.q_proj = nn.Linear(c.d_model, c.num_heads * c.key_width, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.num_heads * c.key_width, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.num_heads * c.value_width, bias=False)
        self.input_gate, self.forget_gate = (
            nn.Linear(c.d_model, c.num_heads),
            nn.Linear(c.d_model, c.num_heads),
        )
        for gate in (self.input_gate, self.forget_gate):
            tag_parameter(gate.bias, weight_decay=False)
        self.o_norm = RMSNorm(c.value_width, c.norm_eps)
        self.gate = OutputGate(c.d_model, c.num_heads, c.value_width, "sigmoid")
        self.o_proj = nn.Linear(c.num_heads * c.value_width, c.d_model, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Projections N(0, 0.02); gates begin with their biases alone."""
        init_projections(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        for gate in (self.input_gate, self.forget_gate):
            nn.init.zeros_(gate.weight)
        nn.init.constant_(self.input_gate.bias, self.config.input_gate_bias)
        with torch.no_grad():
            bias = self.forget_gate.bias
            bias.copy_(torch.linspace(*FORGET_BIAS, len(bias), device=bias.device))
        self.gate.init_weights()
        self.o_norm.reset_parameters()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MLSTMLayerState:
        """Zeros."""
        c, weight = self.config, self.o_proj.weight
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        shape = (batch_size, c.num_heads, c.key_width, c.value_width)
        memory, normalizer, stabilizer = (
            torch.zeros(shape[:rank], device=device or weight.device, dtype=wide) for rank in (4, 3, 2)
        )
        return MLSTMLayerState(
            num_tokens=empty_tokens(batch_size),
            memory=memory,
            normalizer=normalizer,
            stabilizer=stabilizer,
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: MLSTMLayerState | None) -> LayerOutput:
        """Project, run the recurrence, normalise and gate."""
        c = self.config
        q, k, v = (
            proj(x).unflatten(-1, (c.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, H, K or E)
        input_gate, forget_gate = self._capped(self.input_gate(x)), self._capped(self.forget_gate(x))
        record("input_gate", input_gate)
        record("forget_gate", forget_gate)
        out, memory = mlstm(
            q,
            k,
            v,
            input_gate,
            forget_gate,
            initial_state=(
                None if state is None else MLSTMState(state.memory, state.normalizer, state.stabilizer)
            ),
            return_state=ctx.return_state,
            cu_seqlens=ctx.cu_seqlens,
            chunk_size=ctx.overrides.get("chunk_size", c.chunk_size),
        )  # (B, T, H, E)
        new_state = None
        if memory is not None:
            new_state = MLSTMLayerState(num_tokens=ctx.num_tokens_after, **memory._asdict())
        return LayerOutput(self.o_proj(self.gate(out, x, self.o_norm)), new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections, and one write and one read per head."""
        c = self.config
        linears = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.input_gate, self.forget_gate)
        return projection_flops(*linears, self.gate) + 4 * c.num_heads * c.key_width * c.value_width

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Capped gates with odd widths; gates without cap."""
        return (
            {"d_model": 12, "num_heads": 2, "value_dim": 5, "input_gate_bias": 0.0, "chunk_size": 5},
            {
                "d_model": 10,
                "num_heads": 3,
                "head_dim": 4,
                "gate_soft_cap": None,
                "input_gate_bias": 1.0,
                "chunk_size": 7,
            },
        )

    def _capped(self, logits: Tensor) -> Tensor:
        """Gates before their activation, (B, T, H) float32, within the soft cap."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.gate_soft_cap
        return wide if cap is None else cap * torch.tanh(wide / cap)
