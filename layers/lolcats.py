"""LoLCATs: softmax over a window of recent keys, linear attention over all older ones, one common normaliser.

    o_t   = num_t / den_t
    num_t = gam sum_{j in Wn} exp(s q_t . k_j - c_t) v_j + lam phi_q(q_t) [sum_{j in Ln} phi_k(k_j)^T v_j]
    den_t = gam sum_{j in Wn} exp(s q_t . k_j - c_t)     + lam phi_q(q_t) . sum_{j in Ln} phi_k(k_j)
    c_t   = max_{j in Wn} s q_t . k_j,   s = D^-1/2

Eq. 7 of Zhang et al., arXiv 2410.10254. gam = sigmoid(window_factor) per head, lam = 1 (or 1 - gam). The near
keys Wn(t) and the far keys Ln(t) share no key and together hold every j <= t:

    sliding   Wn(t) = last w keys, the token itself included
    terrace   Wn(t) = own block of w tokens up to t and the block before it; blocks on absolute positions

The first `num_sinks` keys stay near for good (our addition). While nothing has left the window the layer *is*
softmax attention: gam cancels. phi = `hedgehog_lolcats`, per query head, after rotation and grouping.
State: keys and values of the window (2 w for terrace) and the sinks in the dtype of the activations; the
memory [sum phi_k^T v | sum phi_k^T], (2 F, D + 1) float32 per query head. Constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import AttentionOutput, KVPrefix, LinearState, attention, decode_attention, linear_attention
from .contract import LayerOutput, SequenceContext, State, check_choice, check_positive, record, tag_parameter
from .parts.attention_base import AttentionBase, HeadsConfig, check_window, overridden_window
from .parts.feature_maps import make_feature_map
from .parts.kv_cache import WindowCache, empty_tokens

# Dimensions: B batch, T tokens, N sequences, L tokens of all sequences, H query heads, G key/value heads,
# D head width, F feature_dim, W window, S sinks

# A logit has to travel by several units where entries of the maps move by hundredths.
WINDOW_FACTOR_LR_SCALE = 30.0


@dataclass(frozen=True, kw_only=True)
class LolcatsConfig(HeadsConfig):
    """Configuration of `Lolcats`; heads as in `HeadsConfig`.

    Attributes:
        window_size: w, tokens of the window, the own one included.
        num_sinks: first tokens of the sequence that stay in the softmax part.
        window: "sliding" or "terrace".
        feature_dim: F, half the number of features.
        is_affine: lam = 1 - gam instead of 1.
        initial_window_share: gam at initialisation: 0.1 as released; with `is_affine` and 0.99 the layer
            starts close to its window and sinks alone.
        memory_enabled: False leaves the linear part out (window and sinks only); weights keep their names.
        chunk_size: tokens per block of the parallel form of the linear part; changes speed, not numbers.
    """

    type: str = "lolcats"
    window_size: int = 64
    num_sinks: int = 0
    window: str = "sliding"
    feature_dim: int = 64
    is_affine: bool = False
    initial_window_share: float = 0.1
    memory_enabled: bool = True
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window_size, self.num_sinks)
        check_choice("window", self.window, ("sliding", "terrace"))
        if not 0 < self.initial_window_share < 1:
            raise ValueError(
                f"initial_window_share must lie between 0 and 1, got {self.initial_window_share}."
            )
        check_positive(self, "feature_dim", "chunk_size")


@dataclass(kw_only=True)
class LolcatsState(State):
    """Recent tokens verbatim, older ones in a matrix.

    Attributes:
        window: keys and values of the window and the sinks.
        memory: (N, H, 2 F, D + 1) float32; the last column is the sum of the features (the normaliser).
            None while the memory is switched off.
    """

    window: WindowCache
    memory: Tensor | None = None


class Lolcats(AttentionBase):
    """Window softmax and linear attention under one normaliser.

    `overrides` of a call may replace `window_size` and `num_sinks` while no state is given or asked for.
    Probe: `window_share`, the part of the softmax in den.

    Attributes:
        memory_enabled: as in the config; may be switched on a built layer.
    """

    config: LolcatsConfig
    overridable = frozenset({"window_size", "num_sinks"})

    def __init__(self, config: LolcatsConfig) -> None:
        super().__init__(config)
        self.window_size, self.num_sinks = config.window_size, config.num_sinks
        self.is_terrace = config.window == "terrace"
        self.memory_enabled = config.memory_enabled
        options = {"num_heads": self.num_heads, "feature_dim": config.feature_dim}
        self.q_map = make_feature_map("hedgehog_lolcats", self.head_dim, **options)
        self.k_map = make_feature_map("hedgehog_lolcats", self.head_dim, **options)
        self.window_factor = tag_parameter(
            nn.Parameter(torch.empty(self.num_heads)), weight_decay=False, lr_scale=WINDOW_FACTOR_LR_SCALE
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Projections as all attention layers, maps near the identity, gam as configured."""
        super().init_weights()
        self.q_map.init_weights()
        self.k_map.init_weights()
        share = self.config.initial_window_share
        nn.init.constant_(self.window_factor, math.log(share / (1 - share)))

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LolcatsState:
        """An empty window and a memory of zeros."""
        device, dtype = device or self.q_proj.weight.device, dtype or self.q_proj.weight.dtype
        slots = self.num_sinks + (2 if self.is_terrace else 1) * self.window_size
        width = self.head_dim
        memory = None
        if self.memory_enabled:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            memory = torch.zeros(
                batch_size, self.num_heads, self.q_map.out_dim, width + 1, device=device, dtype=wide
            )
        return LolcatsState(
            num_tokens=empty_tokens(batch_size),
            window=WindowCache.empty(
                batch_size, slots, self.num_kv_heads, width, width, device=device, dtype=dtype
            ),
            memory=memory,
        )

    def check_state(self, state: Any) -> None:
        """Raises unless the state fits this mixer and the switch of its memory."""
        if isinstance(state, LolcatsState):
            self._check_memory(state)
        super().check_state(state)

    def mix(self, x: Tensor, ctx: SequenceContext, state: LolcatsState | None) -> LayerOutput:
        """Attends to the window, reads and writes the memory, joins both."""
        window_size, num_sinks = overridden_window(ctx, state, self.window_size, self.num_sinks)
        q, k, v = self.project(x, ctx)
        prefix = None if state is None else state.window.prefix(ctx, num_sinks)
        memory = None if state is None else state.memory
        attend = self._terrace if self.is_terrace else self._sliding
        out, memory = attend(q, k, v, prefix, memory, ctx, window_size, num_sinks)  # (B, T, H, D)
        new_state = None
        if ctx.return_state:
            if state is None:
                state = self.init_state(ctx.batch_size, device=x.device, dtype=k.dtype)
            window = state.window.append(k, v, ctx, num_sinks)
            new_state = LolcatsState(num_tokens=ctx.num_tokens_after, window=window, memory=memory)
        return self.finish(out, ctx, new_state)

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: LolcatsState) -> LayerOutput:
        """One token: the ring holds just the keys it sees, and the slot it takes the key that leaves."""
        if self.is_terrace:
            return self.mix(x, ctx, state)
        q, k, v = self.project(x, ctx)
        row = torch.arange(ctx.batch_size, device=x.device)
        slot = self.num_sinks + (ctx.num_seen - self.num_sinks) % self.window_size  # (N,)
        slot = slot.to(x.device)
        leaving = state.window.key[row, slot][:, None], state.window.value[row, slot][:, None]  # (N, 1, G, D)
        window = state.window.append(k, v, ctx, self.num_sinks)
        near = decode_attention(
            q, window.key, window.value, valid=window.valid(x.device), return_stats=self.memory_enabled
        )
        out, memory = near.output, None
        if self.memory_enabled:
            far, memory = self._read_after_write(
                self.q_map(_wide(q)),
                *leaving,
                ctx.positions - self.window_size >= self.num_sinks,
                state.memory,
                True,
                None,
            )
            out = self._join(near, far)
        new_state = LolcatsState(num_tokens=ctx.num_tokens_after, window=window, memory=memory)
        return self.finish(out, ctx, new_state)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections, softmax over window and sinks, feature maps, writes and one read of the memory.

        A terrace writes nothing inside a block and w keys at its start.
        """
        heads, width, features = self.num_heads, self.head_dim, self.q_map.out_dim
        seen, places, chunk = self.num_sinks + self.window_size, 1, 1
        if self.is_terrace:
            own = num_tokens % self.window_size + 1
            first = max(num_tokens + 1 - own - self.window_size, 0)
            seen = num_tokens + 1 - first + min(self.num_sinks, first)
            if own == 1:
                places += max(first - max(first - self.window_size, self.num_sinks), 0)
            chunk = min(self.config.chunk_size, places)
        near = 4 * heads * width * seen
        if not self.memory_enabled:
            return self.projection_flops() + near
        slots = -(-places // chunk) * chunk
        maps = self.q_map.num_flops(heads) + places * self.k_map.num_flops(heads)
        far = 4 * heads * slots * features * (width + 1)
        if places > 1:  # chunks, whose tokens also see one another
            far += 2 * heads * slots * chunk * (features + width + 1)
        return self.projection_flops() + near + maps + far

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """A sliding window with sinks and grouped heads; a terrace."""
        return (
            {
                "d_model": 24,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "window_size": 5,
                "num_sinks": 3,
                "feature_dim": 3,
                "qk_norm": True,
                "qkv_bias": True,
                "chunk_size": 4,
            },
            {
                "d_model": 16,
                "num_heads": 2,
                "window_size": 3,
                "num_sinks": 2,
                "window": "terrace",
                "feature_dim": 5,
                "is_affine": True,
                "chunk_size": 6,
            },
        )

    def _sliding(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: KVPrefix | None,
        memory: Tensor | None,
        ctx: SequenceContext,
        window_size: int,
        num_sinks: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Window: the last keys. Memory: the same stream of keys, delayed by the window."""
        near = attention(
            q,
            k,
            v,
            window_size=window_size,
            num_sinks=num_sinks,
            prefix=prefix,
            cu_seqlens=ctx.cu_seqlens,
            return_stats=self.memory_enabled,
        )
        if not self.memory_enabled:
            return near.output, None
        past = (None, None) if prefix is None else (prefix.k, prefix.v)
        far, memory = self._read_after_write(
            self.q_map(_wide(q)),
            _delay(k, past[0], window_size, ctx),
            _delay(v, past[1], window_size, ctx),
            ctx.positions - window_size >= num_sinks,
            memory,
            ctx.return_state,
            ctx.cu_seqlens,
        )
        return self._join(near, far), memory

    def _terrace(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: KVPrefix | None,
        memory: Tensor | None,
        ctx: SequenceContext,
        window_size: int,
        num_sinks: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Window: own block and the one before. Memory: before a block reads, the one leaving is written."""
        near = attention(
            q,
            k,
            v,
            window_size=2 * window_size,
            window_grid=window_size,
            num_sinks=num_sinks,
            prefix=prefix,
            cu_seqlens=ctx.cu_seqlens,
            return_stats=self.memory_enabled,
        )
        if not self.memory_enabled:
            return near.output, None
        past = (None, None) if prefix is None else (prefix.k, prefix.v)
        is_uniform = ctx.cu_seqlens is None and ctx.uniform_num_seen is not None
        stream = _TerraceStream.make(
            ctx, is_uniform, 0 if prefix is None else prefix.k.shape[1], window_size, num_sinks
        )
        features = self.q_map(_wide(q))
        if not is_uniform:
            features = features.flatten(0, 1)[None]
        place = torch.tensor(stream.query_place, dtype=torch.int64, device=q.device)
        row = torch.tensor(stream.key_row, dtype=torch.int64, device=q.device)
        shape = (features.shape[0], row.shape[0], *features.shape[2:])
        far, memory = self._read_after_write(
            features.new_zeros(shape).index_copy(1, place, features),
            _store(past[0], k, is_uniform).index_select(1, row.clamp(min=0)),
            _store(past[1], v, is_uniform).index_select(1, row.clamp(min=0)),
            (row >= 0)[None],
            memory,
            ctx.return_state,
            stream.cu_seqlens,
        )
        far = far.index_select(1, place).reshape(*q.shape[:3], self.head_dim + 1)
        return self._join(near, far), memory

    def _read_after_write(
        self,
        reads: Tensor,
        keys: Tensor,
        values: Tensor,
        is_written: Tensor,
        memory: Tensor | None,
        return_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Writes each key where told, then reads: sums of weighted values and of weights.

        Args:
            reads: (B, T, H, 2 F) features of the queries.
            keys, values: (B, T, G, D) written at the same place of the stream.
            is_written: (B, T) bool.
            memory: (N, H, 2 F, D + 1) or None.

        Returns:
            (B, T, H, D + 1) float32 and the new memory.
        """
        groups = self.num_heads // self.num_kv_heads
        values = torch.cat([_wide(values), torch.ones_like(values[..., :1], dtype=reads.dtype)], dim=-1)
        values = (values * is_written[..., None, None]).repeat_interleave(groups, dim=2)  # (B, T, H, D + 1)
        out, new = linear_attention(
            reads,
            self.k_map(_wide(keys)),
            values,
            scale=1.0,
            initial_state=None if memory is None else LinearState(memory),
            return_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.config.chunk_size,
        )
        return out, None if new is None else new.memory

    def _join(self, near: AttentionOutput, far: Tensor) -> Tensor:
        """The common normaliser; far (B, T, H, D + 1) -> (B, T, H, D) in the dtype of the window part."""
        assert near.lse is not None
        assert near.row_max is not None
        gamma = self.window_factor.to(far.dtype).sigmoid()
        lam = 1 - gamma if self.config.is_affine else torch.ones_like(gamma)
        near_weight = gamma * (near.lse - near.row_max).exp()  # (B, T, H)
        far_weight = lam * far[..., -1]
        total = near_weight + far_weight
        share = near_weight / total  # exactly 1 while the memory is empty
        record("window_share", share)
        joined = share[..., None] * near.output + (lam / total)[..., None] * far[..., :-1]
        return joined.to(near.output.dtype)

    def _check_memory(self, state: LolcatsState) -> None:
        if self.memory_enabled != (state.memory is not None):
            raise ValueError(
                f"the memory of this layer is switched {'on' if self.memory_enabled else 'off'}, but the "
                "state was made "
                f"with it {'off' if self.memory_enabled else 'on'}. Start with state=None after changing "
                "memory_enabled."
            )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _delay(new: Tensor, past: Tensor | None, window_size: int, ctx: SequenceContext) -> Tensor:
    """For each token of the call the one `window_size` before it; anything where there is none.

    Args:
        new: (B, T, G, D) in internal form.
        past: (N, W, G, D) the last W tokens before the call in order of time, or None.
    """
    if past is None:
        past = new.new_zeros(ctx.batch_size, window_size, *new.shape[2:])
    if ctx.cu_seqlens is None:
        return torch.cat([past, new], dim=1)[:, : new.shape[1]]
    lengths = ctx.cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(ctx.batch_size), lengths)  # (L,)
    place = torch.arange(new.shape[1])
    local = place - ctx.cu_seqlens[sequence]
    in_past = sequence * window_size + local
    in_new = past.shape[0] * window_size + place - window_size
    source = torch.where(local < window_size, in_past, in_new).to(new.device)
    return torch.cat([past.flatten(0, 1), new[0]]).index_select(0, source)[None]


def _store(past: Tensor | None, new: Tensor, is_uniform: bool) -> Tensor:
    """Past (N, P, G, D) and new tokens in one row per sequence, (B, P + T, G, D), or in one row of all."""
    if not is_uniform:
        past, new = None if past is None else past.flatten(0, 1)[None], new.flatten(0, 1)[None]
    return new if past is None else torch.cat([past, new], dim=1)


@dataclass(frozen=True)
class _TerraceStream:
    """Order in which the memory is written and read: the block that leaves, a block of queries, and so on.

    Attributes:
        key_row: for every place of the stream the row of `_store` that is written there, -1 for none.
        query_place: the place of every new token.
        cu_seqlens: boundaries of the sequences in the stream, None where all rows share one stream.
    """

    key_row: list[int]
    query_place: list[int]
    cu_seqlens: Tensor | None

    @classmethod
    def make(
        cls, ctx: SequenceContext, is_uniform: bool, num_past: int, window_size: int, num_sinks: int
    ) -> _TerraceStream:
        """The stream of one call; `num_past` is the number of past tokens per sequence in the store."""
        key_row: list[int] = []
        query_place: list[int] = []
        bounds = [0]
        if is_uniform:
            assert ctx.uniform_num_seen is not None
            sequences = [(ctx.uniform_num_seen, ctx.input_shape[1])]
        else:
            sequences = list(zip(ctx.num_seen.tolist(), ctx.lengths, strict=True))
        first_new = num_past * len(sequences)
        for n, (seen, length) in enumerate(sequences):
            past_end = num_past * (n + 1)
            for position in range(seen, seen + length):
                if position % window_size == 0:
                    start = max(position - 2 * window_size, num_sinks)
                    for leaving in range(start, position - window_size):
                        key_row.append((past_end if leaving < seen else first_new) + leaving - seen)
                query_place.append(len(key_row))
                key_row.append(-1)
            first_new += length
            bounds.append(len(key_row))
        return cls(key_row, query_place, None if is_uniform else torch.tensor(bounds))
