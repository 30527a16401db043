"""Probes: a cache that forgets on the token grid, and how its gates are trained (TRIM-KV, arXiv 2512.03324).

Both score each token once with g = log sigmoid(gate(x)) <= 0 per key/value head.

`RetentionCache`: plain softmax over what is kept; when the sequence has read a multiple of `buffer` tokens,
every head keeps the `budget` tokens of largest g * age. State: at most budget + buffer - 1 tokens per head,
in order of time, each head with positions of its own. `RetentionAttention`: nothing is dropped, g * age is
added to the logits; g comes out as an extra.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memzoo.layers import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer
from memzoo.layers.parts.rotary import Rotary

from .common import draw, no_tokens, softmax_read, stack_padded, wide_dtype

# Dimensions: N sequences, T tokens of one sequence, H query heads, G key/value heads, D head width, S slots


@dataclass(frozen=True, kw_only=True)
class RetentionConfig(MixerConfig):
    type: str = "probe_retention"
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class RetentionCacheConfig(RetentionConfig):
    type: str = "probe_retention_cache"
    budget: int
    buffer: int


@dataclass(kw_only=True)
class RetentionState(State):
    key: Tensor  # (N, S, G, D) in order of time, empty slots last
    value: Tensor  # (N, S, G, D)
    retention: Tensor  # (N, S, G) float32, g
    order: Tensor  # (N, S, G) int64, position + 1, 0 = empty


class RetentionBase(TokenMixer):
    """Projections, gate, and a loop over sequences."""

    def __init__(self, config: RetentionConfig) -> None:
        super().__init__(config)
        c = config
        self.q_proj = nn.Linear(c.d_model, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=False)
        self.gate_proj = nn.Linear(c.d_model, c.num_kv_heads)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.d_model, bias=False)
        self.rotary = Rotary(c.head_dim)
        self.init_weights()

    def init_weights(self) -> None:
        draw([self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj])

    def slots(self, num_tokens: int) -> int:
        raise NotImplementedError

    def read_sequence(self, q: Tensor, new: tuple[Tensor, ...], past: tuple[Tensor, ...], start: int):
        raise NotImplementedError

    def init_state(self, batch_size, *, device=None, dtype=None):
        c = self.config
        device, dtype = device or self.q_proj.weight.device, dtype or self.q_proj.weight.dtype
        shape = (batch_size, self.slots(0), c.num_kv_heads)
        return RetentionState(
            num_tokens=no_tokens(batch_size),
            key=torch.zeros(*shape, c.head_dim, device=device, dtype=dtype),
            value=torch.zeros(*shape, c.head_dim, device=device, dtype=dtype),
            retention=torch.zeros(*shape, device=device, dtype=wide_dtype(dtype)),
            order=torch.zeros(*shape, device=device, dtype=torch.int64),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: RetentionState | None) -> LayerOutput:
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        c = self.config
        q = self.rotary.rotate(self.q_proj(x).unflatten(-1, (c.num_heads, c.head_dim)), ctx)
        k = self.rotary.rotate(self.k_proj(x).unflatten(-1, (c.num_kv_heads, c.head_dim)), ctx)
        v = self.v_proj(x).unflatten(-1, (c.num_kv_heads, c.head_dim))
        retention = F.logsigmoid(self.gate_proj(x).to(wide_dtype(x.dtype)))
        order = (ctx.positions + 1)[..., None].expand(retention.shape)
        fields = [ctx.split(item) for item in (k, v, retention, order)]
        outputs, rows = [], []
        for row, (start, queries) in enumerate(zip(ctx.starts, ctx.split(q), strict=True)):
            held = self.held(start)
            past = (state.key, state.value, state.retention, state.order)
            out, kept = self.read_sequence(
                queries, tuple(f[row] for f in fields), tuple(p[row, :held] for p in past), start
            )
            outputs.append(out)
            rows.append(kept)
        hidden = self.o_proj(ctx.merge(outputs).flatten(-2))
        new_state = None
        if ctx.return_state:
            slots = self.slots(int(ctx.num_tokens_after.max()))
            key, value, kept_retention, kept_order = (
                stack_padded(list(column), slots) for column in zip(*rows, strict=True)
            )
            new_state = RetentionState(
                num_tokens=ctx.num_tokens_after,
                key=key,
                value=value,
                retention=kept_retention,
                order=kept_order,
            )
        extras = {"log_retention": retention} if ctx.return_extras else {}
        return LayerOutput(hidden, new_state, extras=extras)

    def held(self, num_tokens: int) -> int:
        """Tokens in the cache after `num_tokens` tokens."""
        raise NotImplementedError

    def projection_flops(self) -> int:
        c = self.config
        return 4 * c.d_model * (c.num_heads + c.num_kv_heads) * c.head_dim + 2 * c.d_model * c.num_kv_heads

    def state_num_bytes(self, num_tokens, batch_size=1, dtype=torch.float32):
        c = self.config
        per_slot = c.num_kv_heads * (2 * c.head_dim * dtype.itemsize + wide_dtype(dtype).itemsize + 8)
        return batch_size * (8 + self.slots(num_tokens) * per_slot)

    def flops_per_token(self, num_tokens: int) -> int:
        c = self.config
        return self.projection_flops() + 4 * c.num_heads * c.head_dim * (self.held(num_tokens) + 1)


class RetentionCache(RetentionBase):
    def slots(self, num_tokens: int) -> int:
        return self.config.budget + self.config.buffer - 1

    def held(self, num_tokens: int) -> int:
        grid = num_tokens // self.config.buffer * self.config.buffer
        return min(self.config.budget, grid) + num_tokens - grid

    def read_sequence(self, q, new, past, start):
        c, outputs, done = self.config, [], 0
        while done < q.shape[0]:
            end = min(q.shape[0], done + c.buffer - (start + done) % c.buffer)
            past = tuple(torch.cat([a.to(b.dtype), b[done:end]]) for a, b in zip(past, new, strict=True))
            key, value, retention, order = past
            queries = torch.arange(start + done, start + end, device=q.device)[:, None] + 1  # (T, 1)
            allowed = (order.T[:, None] <= queries).repeat_interleave(c.num_heads // c.num_kv_heads, dim=0)
            outputs.append(softmax_read(q[done:end], key, value, allowed))
            if (start + end) % c.buffer == 0 and order.shape[0] > c.budget:
                score = retention.detach() * (start + end - order)  # the newest token has age 0
                best = score.topk(c.budget, dim=0).indices.sort(dim=0).values  # (budget, G)
                wide = best[..., None].expand(-1, -1, c.head_dim)
                past = (key.gather(0, wide), value.gather(0, wide))
                past = (*past, retention.gather(0, best), order.gather(0, best))
            done = end
        return (torch.cat(outputs) if outputs else q), past

    @classmethod
    def small_configs(cls):
        heads = {"d_model": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
        grouped = {"d_model": 10, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
        return {**heads, "budget": 5, "buffer": 3}, {**grouped, "budget": 4, "buffer": 6}

    @property
    def span(self) -> int:
        return self.config.budget + self.config.buffer


class RetentionAttention(RetentionBase):
    def slots(self, num_tokens: int) -> int:
        return num_tokens

    def held(self, num_tokens: int) -> int:
        return num_tokens

    def read_sequence(self, q, new, past, start):
        c = self.config
        held = tuple(torch.cat([a.to(b.dtype), b]) for a, b in zip(past, new, strict=True))
        key, value, retention, order = held
        group = c.num_heads // c.num_kv_heads
        queries = torch.arange(start, start + q.shape[0], device=q.device)[:, None] + 1
        allowed = (order.T[:, None] <= queries).repeat_interleave(group, dim=0)  # (H, T, S)
        age = (queries - order.T[:, None]).clamp(min=0)  # (G, T, S)
        bias = (age * retention.T[:, None]).repeat_interleave(group, dim=0)
        return softmax_read(q, key, value, allowed, bias), held

    @classmethod
    def small_configs(cls):
        return (
            {"d_model": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
            {"d_model": 9, "num_heads": 3, "num_kv_heads": 3, "head_dim": 2},
        )
