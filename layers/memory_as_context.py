"""Memory as context (MAC): attention inside segments, over learned tokens and what a memory recalls.

    h_i = M(x_i)                        M as the segments before left it, read only
    y_i = attention of x_i over p, h_1 .. h_i and x_1 .. x_i of its segment     one softmax, one W_q, W_k, W_v
    M   reads and writes y              M_i is what token i reads: `titans`
    o_i = n(y_i) * sigmoid(n'(M_i(y_i)))      n, n' RMS norms with learned weights

Titans (Behrouz et al., arXiv 2501.00663, section 4.1); p are learned persistent tokens. A segment is one
chunk of the memory. The paper leaves three things open, which here are: a token sees what is recalled for
itself and earlier tokens of its segment, so that no later token reaches it; M_i is the memory as its own rule
has it at token i, and not after the whole segment; rotary positions are places in [p | h | x].
State: that of the memory, and keys and values of the last segment's h and x. Constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import KVPrefix, attention, decode_attention
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    record,
    tag_parameter,
)
from .parts.attention_base import AttentionBase, HeadsConfig
from .parts.kv_cache import WindowCache, empty_tokens
from .parts.norm import RMSNorm
from .parts.segments import SegmentPieces
from .titans import Titans, TitansConfig, TitansLayerState

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, D head width, C tokens of a
# segment, P persistent tokens, M model width


@dataclass(frozen=True, kw_only=True)
class MemoryAsContextConfig(HeadsConfig):
    """Configuration of `MemoryAsContext`; heads of the attention as in `HeadsConfig`.

    Attributes:
        mixers: the config of one `titans` mixer of width d_model without convolution; its chunk_size is the
            length of a segment.
        num_persistent: learned tokens that every segment sees; 0 for none.
    """

    type: str = "memory_as_context"
    mixers: tuple[MixerConfig, ...]
    num_persistent: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mixers) != 1 or not isinstance(self.mixers[0], TitansConfig):
            given = [getattr(inner, "type", inner) for inner in self.mixers]
            raise ValueError(f"mixers must hold the config of one titans mixer, got {given}.")
        if self.memory.d_model != self.d_model:
            raise ValueError(
                f"the memory has d_model={self.memory.d_model}, the mixer around it {self.d_model}. Leave "
                "out the inner d_model to inherit it."
            )
        if self.memory.conv_size:
            raise ValueError(
                "the memory answers tokens and stores others, so it cannot convolve over them, got conv_size "
                f"{self.memory.conv_size}. Use conv_size: 0."
            )
        count = self.num_persistent
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"num_persistent must be an integer of at least 0, got {count!r}.")

    @property
    def memory(self) -> TitansConfig:
        """Of the memory."""
        inner = self.mixers[0]
        assert isinstance(inner, TitansConfig)
        return inner


@dataclass(kw_only=True)
class MemoryAsContextState(State):
    """What the memory has become, and the open segment.

    Attributes:
        memory: see `TitansLayerState`.
        segment: keys and values (N, C, 2 G, D) of the last C tokens, position p in slot p mod C: those of the
            tokens, then those of what was recalled for them.
    """

    memory: TitansLayerState
    segment: WindowCache


class MemoryAsContext(AttentionBase):
    """Attends inside a segment to its tokens, to what a memory recalls for them, and to learned tokens.

    Probes: `recall_share`, the part of the softmax that goes to recalled tokens; `memory_gate`.
    """

    config: MemoryAsContextConfig

    def __init__(self, config: MemoryAsContextConfig, mixers: Sequence[TokenMixer]) -> None:
        super().__init__(config)
        if [inner.config for inner in mixers] != list(config.mixers):
            raise ValueError("the mixer given has another config. Use memzoo.layers.build_mixer.")
        memory = mixers[0]
        assert isinstance(memory, Titans)
        self.memory = memory
        self.persistent = None
        if config.num_persistent:
            tokens = nn.Parameter(torch.empty(config.num_persistent, config.d_model))
            self.persistent = tag_parameter(tokens, weight_decay=False)
        self.context_norm, self.memory_norm = (RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
        self.init_weights()

    def init_weights(self) -> None:
        """As attention; persistent tokens N(0, 1), as long as normalised ones. The memory does its own."""
        super().init_weights()
        if self.persistent is not None:
            nn.init.normal_(self.persistent)
        self.context_norm.reset_parameters()
        self.memory_norm.reset_parameters()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MemoryAsContextState:
        """The learned net, no open segment."""
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        heads, width = 2 * self.num_kv_heads, self.head_dim
        return MemoryAsContextState(
            num_tokens=empty_tokens(batch_size),
            memory=self.memory.init_state(batch_size, device=device, dtype=dtype),
            segment=WindowCache.empty(
                batch_size, self._length, heads, width, width, device=device, dtype=dtype
            ),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: MemoryAsContextState | None) -> LayerOutput:
        """Segment by segment: recall, attend, and let the memory read what came out."""
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        memory = state.memory
        pieces = SegmentPieces.make(ctx, self._length)
        outputs, keys, values = [], [], []
        for index, (part, own) in enumerate(zip(pieces.split(x), pieces.contexts, strict=True)):
            recalled = self.memory.answer(part, own, memory)  # (B, T', M)
            q, k, v = self._project(part, recalled, own)
            # segments after the first of a call begin in it
            past = state.segment.prefix(own, 0) if index == 0 and any(own.starts) else None
            near = self._attend(q, k, v, own, past)
            out, memory = self._write(near, own, memory)
            outputs.append(out)
            keys.append(k)
            values.append(v)
        hidden = pieces.join(outputs, x) if outputs else torch.zeros_like(x)
        if not ctx.return_state:
            return LayerOutput(hidden)
        if not outputs:
            return LayerOutput(hidden, state.clone())
        segment = state.segment.append(pieces.join(keys, x), pieces.join(values, x), ctx, 0)
        return LayerOutput(hidden, self._state(ctx, memory, segment))

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: MemoryAsContextState) -> LayerOutput:
        """One token of every sequence, over the slots of the open segment."""
        recalled = self.memory.answer(x, ctx, state.memory)
        q, k, v = self._project(x, recalled, ctx)
        segment = state.segment.append(k, v, ctx, 0)
        places = torch.tensor([seen % self._length for seen in ctx.starts])
        valid = (torch.arange(self._length) <= places[:, None]).to(x.device)
        found = decode_attention(
            torch.cat([q, q], dim=2), segment.key, segment.value, valid=valid, return_stats=True
        )
        near = self._merge(q, found.output, found.lse)
        own = dataclasses.replace(ctx, return_state=True)
        out, memory = self._write(near, own, state.memory)
        return LayerOutput(out, self._state(ctx, memory, segment))

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections of a token, of what is recalled for it and of the persistent tokens; scores; memory."""
        count, width = self.config.num_persistent, self.head_dim
        keys = 4 * self.d_model * self.num_kv_heads * width
        scores = 4 * self.num_heads * width * (2 * self._length + count)
        memory = self.memory.answer_flops() + self.memory.flops_per_token(num_tokens)
        return self.projection_flops() + keys * (1 + count) + scores + memory

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Gates per chunk and grouped heads; gates per token, without persistent tokens and positions."""
        memory = {"type": "titans", "max_lr": 0.02, "decay_init": 0.001}
        return (
            {
                "d_model": 8,
                "num_heads": 2,
                "num_kv_heads": 1,
                "num_persistent": 3,
                "mixers": [
                    {
                        **memory,
                        "num_heads": 2,
                        "chunk_size": 5,
                        "expansion": 2.0,
                        "qk_norm": "rms",
                        "out_norm": True,
                    }
                ],
            },
            {
                "d_model": 6,
                "num_heads": 2,
                "num_persistent": 0,
                "rope_theta": None,
                "mixers": [
                    {
                        **memory,
                        "num_heads": 1,
                        "chunk_size": 4,
                        "gates": "token",
                        "expansion": 1.5,
                        "qk_norm": "l2",
                    }
                ],
            },
        )

    @property
    def _length(self) -> int:
        """C."""
        return self.config.memory.chunk_size

    def _project(self, x: Tensor, recalled: Tensor, ctx: SequenceContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D); keys and values (B, T, 2 G, D) of tokens and of what is recalled for them."""
        count = self.config.num_persistent
        places = ctx.positions % self._length + count
        q, k, v = self.project(x, _at(ctx, places + self._length))
        k_recalled, v_recalled = self._keys(recalled, _at(ctx, places))
        return q, torch.cat([k, k_recalled], dim=2), torch.cat([v, v_recalled], dim=2)

    def _keys(self, x: Tensor, ctx: SequenceContext) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, G, D), normed and rotated."""
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        k = k if self.k_norm is None else self.k_norm(k)
        return k if self.rotary is None else self.rotary.rotate(k, ctx), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: SequenceContext, past: KVPrefix | None) -> Tensor:
        """Outputs of the heads (B, T, H, D) of tokens of one segment per sequence."""
        found = attention(
            torch.cat([q, q], dim=2),
            k,
            v,
            window_size=self._length,
            window_grid=self._length,
            prefix=past,
            cu_seqlens=ctx.cu_seqlens,
            return_stats=True,
        )
        return self._merge(q, found.output, found.lse)

    def _merge(self, q: Tensor, outputs: Tensor, lse: Tensor | None) -> Tensor:
        """One softmax over tokens and what was recalled, (B, T, 2 H, ...) each alone, and learned tokens."""
        assert lse is not None
        parts = [*outputs.to(lse.dtype).chunk(2, dim=2)]  # (B, T, H, D)
        sums = [*lse.chunk(2, dim=2)]  # (B, T, H)
        if self.persistent is not None:
            tokens = torch.stack([self.persistent.to(q.dtype)])
            positions = torch.arange(tokens.shape[1], device=q.device)[None]
            ctx = SequenceContext(
                lengths=(tokens.shape[1],),
                num_seen=empty_tokens(1),
                uniform_num_seen=0,
                positions=positions,
                input_shape=(1, tokens.shape[1]),
            )
            keys, values = (item[0].to(lse.dtype) for item in self._keys(tokens, ctx))  # (P, G, D)
            grouped = q.to(lse.dtype).unflatten(2, (self.num_kv_heads, -1))
            scores = torch.einsum("btghd,pgd->btghp", grouped, keys) * self.head_dim**-0.5
            answers = torch.einsum("btghp,pgd->btghd", scores.softmax(-1), values)
            parts.append(answers.flatten(2, 3))
            sums.append(scores.logsumexp(-1).flatten(2, 3))
        shares = torch.stack(sums).softmax(0)  # (2 or 3, B, T, H)
        record("recall_share", shares[1])
        return (shares[..., None] * torch.stack(parts)).sum(0).to(q.dtype)

    def _write(
        self, heads: Tensor, ctx: SequenceContext, memory: TitansLayerState
    ) -> tuple[Tensor, TitansLayerState]:
        """The output of a piece, and the memory after it."""
        y = self.o_proj(heads.flatten(-2))
        out = self.memory.mix(y, ctx, memory)
        gate = self.memory_norm(out.hidden).sigmoid()
        record("memory_gate", gate)
        return self.context_norm(y) * gate, out.state

    def _state(
        self, ctx: SequenceContext, memory: TitansLayerState, segment: WindowCache
    ) -> MemoryAsContextState:
        return MemoryAsContextState(num_tokens=ctx.num_tokens_after, memory=memory, segment=segment)


def _at(ctx: SequenceContext, positions: Tensor) -> SequenceContext:
    """The same tokens at other positions."""
    return dataclasses.replace(ctx, positions=positions, tables={})
