"""Softmax attention over a bounded cache whose entries a policy chooses.

    after every `interval` tokens of a sequence:   kept = the best `budget` entries of every head
    o_t = sum over entries i read up to t of  softmax_i(q_t . k_i / sqrt(D)) v_i

Each policy names its source (`memzoo.layers.policies`). The cache is the one that `PolicyCache` puts under
transformers models; the weights are those of `attention`.
State: at most budget + interval - 1 entries per head, and what the policy accumulates; constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .contract import LayerOutput, SequenceContext, check_positive, record
from .parts.attention_base import AttentionBase, HeadsConfig
from .parts.retention_gate import RetentionGate, check_gates
from .policies import EvictionPolicy, LayerMemory, Place, PolicyState, make_policy

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, D head width, S slots

MANY = 2**31 - 1  # tokens of a text without end


@dataclass(frozen=True, kw_only=True)
class PolicyAttentionConfig(HeadsConfig):
    """Configuration of `PolicyAttention`; heads as in `HeadsConfig`.

    Attributes:
        policy: `{"type": "tova", "budget": 256, ...}`, see `memzoo.layers.policies.make_policy`.
        gate: kind of the retention gates that the policy "retention" asks, as in `GatedAttentionConfig`.
        gate_width, gate_activation, gate_bias, train_length: of these gates, likewise.
    """

    type: str = "policy_attention"
    policy: Mapping[str, Any] = field(default_factory=lambda: {"type": "streaming_llm", "budget": 1024})
    gate: str = "mlp"
    gate_width: int = 512
    gate_activation: str = "silu"
    gate_bias: float | str = "auto"
    train_length: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gates(self.gate, self.gate_activation, self.gate_bias)
        check_positive(self, "gate_width", "train_length")
        policy = make_policy(self.policy)
        if not policy.is_exact:
            raise ValueError(
                f"policy {policy.name!r} compresses when a prompt has been read whole: its result depends on "
                "how a text is cut into calls, which no mixer may do. Use it with PolicyCache in a model of "
                "transformers, or set prefill: grid where the policy has it."
            )
        if policy.rerotate and self.rope_theta is None:
            raise ValueError("rerotate turns rotary positions, but rope_theta is null. Set one of the two.")


class PolicyAttention(AttentionBase):
    """Causal attention with a bounded cache; equals full attention while a sequence fits the budget."""

    config: PolicyAttentionConfig

    def __init__(self, config: PolicyAttentionConfig) -> None:
        super().__init__(config)
        self.policy: EvictionPolicy = make_policy(config.policy)
        self.budget = self.policy.allocator.layer_budgets(1, MANY)[0]
        self.width = self.policy.width(self.budget, self.num_kv_heads)
        self.num_slots = self.width + self.policy.interval - 1
        self.retention_gate = None
        if self.policy.scorer.has_extra:
            self.retention_gate = RetentionGate(
                config.d_model,
                config.kv_heads,
                config.width,
                width=config.gate_width,
                activation=config.gate_activation,
                bias_init=config.gate_bias,
                kind=config.gate,
                train_length=config.train_length,
            )
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        if self.retention_gate is not None:
            self.retention_gate.init_weights()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PolicyState:
        weight = self.q_proj.weight
        return self.policy.empty_state(
            batch_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            budget=self.budget,
            slots=self.num_slots,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: PolicyState | None) -> LayerOutput:
        q, k, v = self.project(x, ctx)
        tokens = [q, k, v]
        if self.retention_gate is not None:
            tokens.append(self.retention_gate(x, k, v))  # (B, T, G)
            record("log_retention", tokens[-1])
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        outputs, memories = [], []
        if ctx.cu_seqlens is None and ctx.uniform_num_seen is not None:
            memory = self.memory(state, slice(0, ctx.batch_size), ctx.uniform_num_seen)
            out, memory = self.read(memory, *tokens)
            memories.append(memory)
        else:
            parts = zip(*(ctx.split(part) for part in tokens), strict=True)
            for row, own in enumerate(parts):
                memory = self.memory(state, slice(row, row + 1), ctx.starts[row])
                out, memory = self.read(memory, *(part[None] for part in own))
                outputs.append(out[0])
                memories.append(memory)
            out = ctx.merge(outputs)
        new_state = PolicyState.of(memories, slots=self.num_slots) if ctx.return_state else None
        return self.finish(out, ctx, new_state)

    def memory(self, state: PolicyState, rows: slice, num_seen: int) -> LayerMemory:
        """The working form of rows of a state that have read equally many tokens."""
        return state.memory(rows, num_seen=num_seen, budget=self.budget, held=self.held(num_seen))

    def read(
        self, memory: LayerMemory, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None
    ) -> tuple[Tensor, LayerMemory]:
        """Attention of new tokens (B, T, ...), and the memory after them; gates give `extra` (B, T, G)."""
        rotation = None
        if self.policy.rerotate and self.rotary is not None:
            rotation = self.rotary.frequencies(q.device)
        return self.policy.read(memory, q, k, v, extra=extra, place=Place(rotation=rotation))

    def held(self, num_tokens: int) -> int:
        """Slots in use after `num_tokens` tokens."""
        grid = num_tokens // self.policy.interval * self.policy.interval
        return min(self.width, grid) + num_tokens - grid

    def flops_per_token(self, num_tokens: int) -> int:
        slots = self.held(num_tokens) + 1
        flops = self.projection_flops() + 4 * self.num_heads * self.head_dim * slots
        if self.retention_gate is not None:
            flops += self.retention_gate.flops_per_token()
        is_due = (num_tokens + 1) % self.policy.interval == 0 and slots > self.budget
        window = min(max(self.policy.scorer.window, self.policy.scorer.looks_at), num_tokens + 1)
        if is_due and window:
            flops += 2 * self.num_heads * window * slots * (self.head_dim + 1)
        if is_due and self.policy.merger is not None and self.policy.merger.compares:
            flops += 2 * self.num_kv_heads * self.head_dim * (slots - self.budget) * self.budget
        return flops

    @property
    def span(self) -> int:
        return self.budget + self.policy.interval

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        heads = {"d_model": 18, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": True}
        return (
            {"d_model": 16, "num_heads": 2, "policy": {"type": "streaming_llm", "budget": 5, "n_sink": 2}},
            {**heads, "policy": {"type": "key_norm", "budget": 7, "sinks": 1, "recent": 4, "interval": 3}},
        )
