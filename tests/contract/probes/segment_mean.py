"""Probe of the exactness class "segment": every token sees its whole segment, and a memory of earlier ones.

    s_n = mean of x over segment n,   m_n = tanh(A m_{n-1} + B s_n),   y_t = W (x_t + s_n + m_{n-1})

A call may end inside a segment only if the sequence ends there: the state is that of the last whole segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memzoo.layers import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer

from .common import draw, no_tokens, wide_dtype

# Dimensions: N sequences, T tokens of one sequence, M model width


@dataclass(frozen=True, kw_only=True)
class SegmentMeanConfig(MixerConfig):
    type: str = "probe_segment_mean"
    segment_size: int


@dataclass(kw_only=True)
class SegmentMeanState(State):
    memory: Tensor  # (N, M) float32


class SegmentMean(TokenMixer):
    exact = "segment"

    def __init__(self, config: SegmentMeanConfig) -> None:
        super().__init__(config)
        self.keep_proj, self.write_proj, self.o_proj = (
            nn.Linear(config.d_model, config.d_model, bias=False) for _ in range(3)
        )
        self.init_weights()

    @property
    def segment_size(self) -> int:
        return self.config.segment_size

    def init_weights(self) -> None:
        draw([self.keep_proj, self.write_proj, self.o_proj])

    def init_state(self, batch_size, *, device=None, dtype=None):
        weight = self.o_proj.weight
        memory = torch.zeros(
            batch_size, self.d_model, device=device or weight.device, dtype=wide_dtype(dtype or weight.dtype)
        )
        return SegmentMeanState(num_tokens=no_tokens(batch_size), memory=memory)

    def mix(self, x: Tensor, ctx: SequenceContext, state: SegmentMeanState | None) -> LayerOutput:
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        wide, size, outputs, memories = state.memory.dtype, self.segment_size, [], []
        for row, tokens in enumerate(ctx.split(x)):
            memory, pieces = state.memory[row], []
            for segment in tokens.split(size):
                if segment.shape[0] == 0:
                    continue
                mean = segment.to(wide).mean(0)
                pieces.append(segment + (mean + memory).to(x.dtype))
                if segment.shape[0] == size:
                    written = self.write_proj(mean[None].to(x.dtype))[0].to(wide)
                    memory = torch.tanh(self.keep_proj(memory[None].to(x.dtype))[0].to(wide) + written)
            outputs.append(torch.cat(pieces) if pieces else tokens)
            memories.append(memory)
        hidden = self.o_proj(ctx.merge(outputs))
        new_state = None
        if ctx.return_state:
            new_state = SegmentMeanState(num_tokens=ctx.num_tokens_after, memory=torch.stack(memories))
        return LayerOutput(hidden, new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        return 2 * self.d_model**2 * (3 if self.segment_size == 1 else 1)

    @classmethod
    def small_configs(cls):
        return {"d_model": 8, "segment_size": 4}, {"d_model": 6, "segment_size": 5}
