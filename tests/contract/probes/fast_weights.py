"""Probe: a SwiGLU net whose weights learn while the sequence is read, chunk by chunk of its own token grid.

Per chunk, in this order (AllMem, arXiv 2602.13680): read with the weights as they are; renormalise their
rows; gradient of -sum <f(k), v> at the renormalised weights; momentum step at the end of the chunk. An open
chunk accumulates in the state.

State: weights, momentum, pending gradient and the pending sum of momentum gates, all in float32; constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memzoo.layers import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer

from .common import draw, no_tokens, wide_dtype

# Dimensions: N sequences, T tokens of one sequence, H heads, D head width, F hidden width of the net, C chunk


@dataclass(frozen=True, kw_only=True)
class FastWeightsConfig(MixerConfig):
    type: str = "probe_fast_weights"
    num_heads: int
    head_dim: int
    hidden_dim: int
    chunk_size: int


@dataclass(kw_only=True)
class FastWeightsState(State):
    weights: Tensor  # (N, H, 3, F, D) gate, up and transposed down
    momentum: Tensor  # (N, H, 3, F, D)
    pending: Tensor  # (N, H, 3, F, D) gradient of the open chunk
    pending_gate: Tensor  # (N, H) sum of the momentum gates of the open chunk


class FastWeights(TokenMixer):
    def __init__(self, config: FastWeightsConfig) -> None:
        super().__init__(config)
        c, width = config, config.num_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, width, bias=False) for _ in range(3))
        self.rate_proj = nn.Linear(c.d_model, 3 * c.num_heads)
        self.momentum_proj = nn.Linear(c.d_model, c.num_heads)
        self.o_proj = nn.Linear(width, c.d_model, bias=False)
        self.initial = nn.Parameter(torch.empty(c.num_heads, 3, c.hidden_dim, c.head_dim))
        self.init_weights()

    def init_weights(self) -> None:
        draw([self.q_proj, self.k_proj, self.v_proj, self.rate_proj, self.momentum_proj, self.o_proj])
        nn.init.normal_(self.initial, std=self.config.head_dim**-0.5)
        # rates of about 0.05; far larger ones make the net chaotic, and rounding then grows with every chunk
        nn.init.constant_(self.rate_proj.bias, -3.0)

    def init_state(self, batch_size, *, device=None, dtype=None):
        wide = wide_dtype(dtype or self.initial.dtype)
        weights = self.initial.to(device or self.initial.device, wide).expand(batch_size, -1, -1, -1, -1)
        return FastWeightsState(
            num_tokens=no_tokens(batch_size),
            weights=weights.clone(),  # an empty memory is the learned net: gradients reach it from here
            momentum=torch.zeros_like(weights),
            pending=torch.zeros_like(weights),
            pending_gate=weights.new_zeros(batch_size, self.config.num_heads),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: FastWeightsState | None) -> LayerOutput:
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        wide, heads = wide_dtype(x.dtype), (self.config.num_heads, self.config.head_dim)
        q, k = (F.normalize(p(x).unflatten(-1, heads).to(wide), dim=-1) for p in (self.q_proj, self.k_proj))
        v = F.silu(self.v_proj(x)).unflatten(-1, heads).to(wide)
        rate = F.softplus(self.rate_proj(x).to(wide)).unflatten(-1, (3, heads[0]))
        gate = self.momentum_proj(x).to(wide).sigmoid()
        parts = [ctx.split(item) for item in (q, k, v, rate, gate)]
        outputs, rows = [], []
        for row, start in enumerate(ctx.starts):
            memory = (state.weights[row], state.momentum[row], state.pending[row], state.pending_gate[row])
            out, memory = self._read_sequence(*(part[row] for part in parts), memory, start)
            outputs.append(out)
            rows.append(memory)
        hidden = self.o_proj(ctx.merge(outputs).flatten(-2).to(x.dtype))
        new_state = None
        if ctx.return_state:
            columns = [torch.stack(column) for column in zip(*rows, strict=True)]
            new_state = FastWeightsState(
                num_tokens=ctx.num_tokens_after,
                weights=columns[0],
                momentum=columns[1],
                pending=columns[2],
                pending_gate=columns[3],
            )
        return LayerOutput(hidden, new_state)

    def _read_sequence(self, q, k, v, rate, gate, memory, start):
        """q, k, v (T, H, D), rate (T, 3, H), gate (T, H); `start` tokens of this sequence came before."""
        weights, momentum, pending, pending_gate = memory
        chunk, outputs, done = self.config.chunk_size, [], 0
        while done < q.shape[0]:
            phase = (start + done) % chunk
            end = min(done + chunk - phase, q.shape[0])
            piece = slice(done, end)
            outputs.append(self._read_net(q[piece], weights))
            normal = self._renormalised(weights)
            pending = pending + self._gradient(k[piece], v[piece], rate[piece], normal)
            pending_gate = pending_gate + gate[piece].sum(0)
            if (start + end) % chunk == 0:
                momentum = (pending_gate / chunk)[:, None, None, None] * momentum + pending
                weights = normal + momentum
                pending, pending_gate = torch.zeros_like(pending), torch.zeros_like(pending_gate)
            done = end
        out = torch.cat(outputs) if outputs else q
        return out, (weights, momentum, pending, pending_gate)

    def _renormalised(self, weights: Tensor) -> Tensor:
        target = self.initial.to(weights.dtype).norm(dim=-1, keepdim=True)
        return weights * target / (weights.norm(dim=-1, keepdim=True) + 1e-5)

    @staticmethod
    def _read_net(x: Tensor, weights: Tensor) -> Tensor:
        rows = x.transpose(0, 1)  # (H, T, D)
        gate, up, down = weights.unbind(1)  # (H, F, D)
        hidden = F.silu(rows @ gate.transpose(1, 2)) * (rows @ up.transpose(1, 2))
        return (hidden @ down + rows).transpose(0, 1)

    @staticmethod
    def _gradient(k: Tensor, v: Tensor, rate: Tensor, weights: Tensor) -> Tensor:
        """The descent step -rate * dL/dW summed over tokens, (H, 3, F, D)."""
        keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (H, T, D)
        gate, up, down = weights.unbind(1)
        rate_gate, rate_up, rate_down = rate.permute(1, 2, 0)[..., None]  # (H, T, 1)
        a, b = keys @ gate.transpose(1, 2), keys @ up.transpose(1, 2)  # (H, T, F)
        error = values @ down.transpose(1, 2)
        slope = a.sigmoid() * (1 + a * (1 - a.sigmoid()))
        step_gate = (error * b * slope).transpose(1, 2) @ (rate_gate * keys)
        step_up = (error * F.silu(a)).transpose(1, 2) @ (rate_up * keys)
        step_down = (F.silu(a) * b).transpose(1, 2) @ (rate_down * values)
        return torch.stack([step_gate, step_up, step_down], dim=1)

    def flops_per_token(self, num_tokens: int) -> int:
        c = self.config
        width = c.num_heads * c.head_dim
        return 8 * c.d_model * width + 8 * c.d_model * c.num_heads + 18 * width * c.hidden_dim

    @classmethod
    def small_configs(cls):
        return (
            {"d_model": 8, "num_heads": 2, "head_dim": 4, "hidden_dim": 5, "chunk_size": 4},
            {"d_model": 10, "num_heads": 1, "head_dim": 7, "hidden_dim": 6, "chunk_size": 7},
        )
