"""B'MOJO: window, fading stream and stored tokens under one softmax (Zancato et al., arXiv 2407.06324).

    f_i       fading token: what an inner mixer, a state-space layer for one, makes of x_0 .. x_i
    window    keys and values of x_j,  i - W < j <= i
    fading    keys and values of f_j,  i - W - V < j <= i - W
    eidetic   keys and values of x_j that were hard to predict from f, parts/eidetic.py
    y_i     = W_o (sum over all three of exp(q_i . k_j / sqrt(D)) v_j) / (sum of the same exp)

B'MOJO-F is the form without the store. Up to W tokens it is full causal attention. Key, value and query maps
of the fading stream are those of the window, or their own (as in awslabs/hybrid-model-factory).
State: rings of the last W + C - 1 tokens and the last W + V fading tokens, the store, and the state of the
inner mixer. Constant where the store has a bound.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import KVPrefix
from .contract import (
    LayerOutput,
    MixerConfig,
    SequenceContext,
    State,
    TokenMixer,
    check_choice,
    check_size,
    is_probing,
    record,
    tag_parameter,
)
from .parts.attention_base import AttentionBase, HeadsConfig
from .parts.eidetic import EideticConfig, EideticMemory, EideticStoreState, Judged
from .parts.kv_cache import WindowCache, empty_tokens
from .parts.norm import RMSNorm
from .parts.projection import init_projections
from .parts.tiles import Tiles
from .parts.union import Reach, Streams, read_concatenated, read_merged, read_rings

# Dimensions: B batch, T tokens, N sequences, H query heads, G key/value heads, D head width, M model width,
# W window, V fading window, C chunk of the store, R slots of a ring, S slots of the store, K tiles


@dataclass(frozen=True, kw_only=True)
class BMojoConfig(HeadsConfig, EideticConfig):
    """Configuration of `BMojoMixer`; heads as in `HeadsConfig`, the store as in `EideticConfig`.

    Attributes:
        mixers: the one inner mixer that makes the fading tokens; empty for the tokens themselves.
        window_size: tokens seen verbatim, the own one included; 0 for none.
        fading_window_size: fading tokens seen behind the window (default: as many; 0 for none).
        num_fading: null, or this many fading tokens before the chunk of a query in place of those behind its
            window; chunks are then as long as the window.
        tie_weights: the fading stream shares queries, and the maps to keys and values, with the window.
        fading_norm: RMS-normalise fading tokens; the published layer does not.
        zero_gate: f = x + g * mixer(x) with g per channel, 0 at first: the layer then begins as a window of
            window_size + fading_window_size.
        form: "merged", each memory is read alone and the results are weighted by their log-sum-exp; or
            "concatenated", one softmax over the slots of all. The same numbers, another speed.
    """

    type: str = "bmojo"
    mixers: tuple[MixerConfig, ...] = ()
    window_size: int = 2048
    fading_window_size: int | None = None
    num_fading: int | None = None
    tie_weights: bool = True
    fading_norm: bool = False
    zero_gate: bool = False
    form: str = "merged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fading_window_size is None:
            object.__setattr__(self, "fading_window_size", self.window_size)
        for name in ("window_size", "fading_window_size", "num_fading"):
            value = getattr(self, name)
            if name == "num_fading" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}.")
            check_size(name, value)
        if self.eidetic_chunk_size is None:
            chunk = self.window_size or self.fading_reach or 1
            object.__setattr__(self, "eidetic_chunk_size", chunk)
        check_choice("form", self.form, ("merged", "concatenated"))
        self._check_inner()
        self._check_reach()

    @property
    def fading_reach(self) -> int:
        """Fading tokens that a query sees."""
        assert self.fading_window_size is not None
        return self.fading_window_size if self.num_fading is None else self.num_fading

    @property
    def reach(self) -> Reach:
        """What a query sees of window and fading stream."""
        return Reach(self.window_size, self.fading_reach, on_grid=self.num_fading is not None)

    @property
    def store_chunk(self) -> int:
        """C."""
        assert self.eidetic_chunk_size is not None
        return self.eidetic_chunk_size

    def _check_inner(self) -> None:
        if len(self.mixers) > 1:
            raise ValueError(
                f"mixers holds the one mixer that makes the fading tokens, got {len(self.mixers)}. "
                "Join several with a parallel or sequential mixer."
            )
        for inner in self.mixers:
            if not isinstance(inner, MixerConfig):
                raise ValueError(
                    f"mixers[0] must be a config, got {type(inner).__name__}. "
                    "Build the whole from plain data with memzoo.layers.mixer_config."
                )
            if inner.d_model != self.d_model:
                raise ValueError(
                    f"mixers[0] ({inner.type!r}) has d_model={inner.d_model}, the {self.type!r} mixer around "
                    f"it has {self.d_model}. Leave out the inner d_model to inherit it."
                )
        if self.zero_gate and not self.mixers:
            raise ValueError("zero_gate needs an inner mixer to gate. Name one under mixers.")

    def _check_reach(self) -> None:
        if not self.window_size and not self.fading_reach and not self.has_store:
            raise ValueError(
                "window_size, fading_window_size and eidetic_size are all 0, so no token would see any. "
                "Set one of them."
            )
        if self.num_fading is not None and self.store_chunk != self.window_size:
            raise ValueError(
                "with num_fading the chunks are as long as the window, so eidetic_chunk_size must equal "
                f"window_size, got {self.store_chunk} and {self.window_size}. Leave eidetic_chunk_size out."
            )
        if self.num_fading is None and self.has_store and 0 < self.fading_reach < self.store_chunk:
            warnings.warn(
                f"eidetic_chunk_size={self.store_chunk} exceeds fading_window_size={self.fading_reach}: "
                "tokens that wait for the store are invisible for a while. Use smaller chunks.",
                stacklevel=4,
            )


@dataclass(kw_only=True)
class BMojoState(State):
    """What the memories keep; a part is None where the config has no use for it.

    Attributes:
        fading: state of the inner mixer.
        window: keys and values of the last tokens, and of those that wait for the store.
        images: keys and values of the last fading tokens.
        store: see `EideticStoreState`.
    """

    fading: Any  # the State of the inner mixer, or None
    window: WindowCache | None
    images: WindowCache | None
    store: EideticStoreState | None

    def stored_positions(self) -> Tensor:
        """(N, S) positions of the stored tokens, ascending, -1 in unused slots."""
        if self.store is None:
            return self.num_tokens.new_zeros(self.batch_size, 0)
        return self.store.order - 1


class BMojoMixer(AttentionBase):
    """Attention over a window, a fading stream and stored tokens; receives its inner mixer already built.

    Probes: `window_mass`, `fading_mass`, `eidetic_mass` (B, T, H), shares of the softmax; `innovation`
    (B, T); `stored_positions` (N, U, S), what each chunk of the call finds in the store.
    """

    config: BMojoConfig

    def __init__(self, config: BMojoConfig, mixers: Sequence[TokenMixer] = ()) -> None:
        super().__init__(config)
        c = config
        if [inner.config for inner in mixers] != list(c.mixers):
            raise ValueError(
                f"the config lists the inner mixers {[inner.type for inner in c.mixers]}, given are "
                f"{[inner.config.type for inner in mixers]}. Use memzoo.layers.build_mixer."
            )
        for inner in mixers:
            if inner.owns_norm or inner.exact != "token":
                raise ValueError(
                    f"{inner.config.type!r} cannot make fading tokens: it normalises its own input or cannot "
                    "be cut at every token. Use a state-space or linear mixer."
                )
        self.mixers = nn.ModuleList(mixers)
        self.needs = frozenset[str]().union(*(inner.needs for inner in mixers))
        self.data_dependent = c.eidetic_size is None or any(inner.data_dependent for inner in mixers)
        self.memory_enabled = True  # off: the window alone
        if not c.tie_weights:
            self.fading_q_proj = nn.Linear(c.d_model, c.num_heads * c.width, bias=c.qkv_bias)
            self.fading_k_proj = nn.Linear(c.d_model, c.kv_heads * c.width, bias=c.qkv_bias)
            self.fading_v_proj = nn.Linear(c.d_model, c.kv_heads * c.width, bias=c.qkv_bias)
            self.fading_q_norm = RMSNorm(c.width, c.norm_eps) if c.qk_norm else None
            self.fading_k_norm = RMSNorm(c.width, c.norm_eps) if c.qk_norm else None
        self.fading_norm = RMSNorm(c.d_model, c.norm_eps) if c.fading_norm else None
        self.gate: nn.Parameter | None = None
        if c.zero_gate:
            self.gate = tag_parameter(nn.Parameter(torch.empty(c.d_model)), weight_decay=False)
        self.eidetic = EideticMemory(c, c.window_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Attention as all attention layers, gate at 0; the inner mixer initialises itself."""
        super().init_weights()
        if not self.config.tie_weights:
            init_projections(self.fading_q_proj, self.fading_k_proj, self.fading_v_proj)
            for norm in (self.fading_q_norm, self.fading_k_norm):
                if norm is not None:
                    norm.reset_parameters()
        if self.fading_norm is not None:
            self.fading_norm.reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate)
        self.eidetic.init_weights()

    def set_eidetic_size(self, size: int | None) -> None:
        """Gives the store another capacity, after training for instance; earlier states no longer fit.

        Args:
            size: as `eidetic_size` of the config.
        """
        self.config = dataclasses.replace(self.config, eidetic_size=size)
        self.eidetic.config = self.config
        self.data_dependent = size is None or any(inner.data_dependent for inner in self._inner())
        self._state_type = self._state_layout = None

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BMojoState:
        """Empty memories."""
        weight, c = self.q_proj.weight, self.config
        device, dtype = device or weight.device, dtype or weight.dtype

        def ring(slots: int) -> WindowCache | None:
            if not slots:
                return None
            sizes = (batch_size, slots, c.kv_heads, c.width, c.width)
            return WindowCache.empty(*sizes, device=device, dtype=dtype)

        inner = [mixer.init_state(batch_size, device=device, dtype=dtype) for mixer in self._inner()]
        store = None
        if c.has_store:
            store = self.eidetic.empty(batch_size, c.kv_heads, c.width, device, dtype)
        return BMojoState(
            num_tokens=empty_tokens(batch_size),
            fading=inner[0] if inner and self._uses_fading else None,
            window=ring(self.eidetic.ring_size if c.has_store else c.window_size),
            images=ring(self._image_slots),
            store=store,
        )

    def check_state(self, state: Any) -> None:
        """Raises unless this mixer, its inner one included, can have returned the state."""
        super().check_state(state)
        for mixer in self._inner():
            if state.fading is not None:
                mixer.check_state(state.fading)

    def mix(self, x: Tensor, ctx: SequenceContext, state: BMojoState | None) -> LayerOutput:
        """Makes fading tokens, decides what is stored, and reads the three memories."""
        c = self.config
        fading, inner = self._fade(x, ctx, state, [mixer.mix for mixer in self._inner()])
        streams = self._project(x, fading, ctx, state)
        tiles = Tiles.make(ctx, c.store_chunk)
        judged = self._judge(fading, streams, tiles, state)
        found = judged.found
        if found is not None and is_probing():
            record("stored_positions", found.positions())
        read = read_merged if c.form == "merged" else read_concatenated
        heads = read(self._readable(streams), c.reach, tiles, found if self.memory_enabled else None)
        new_state = None
        if ctx.return_state:
            old = state or self.init_state(ctx.batch_size, device=x.device, dtype=streams.k.dtype)
            new_state = self._state_after(streams, inner, judged, tiles, old)
        return self._finished(heads, ctx, new_state, inner, judged)

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: BMojoState) -> LayerOutput:
        """One token of every sequence: what it sees lies in the rings and the store as they are after it."""
        c = self.config
        fading, inner = self._fade(x, ctx, state, [mixer.mix_step for mixer in self._inner()])
        streams = self._project(x, fading, ctx, state)
        tiles = Tiles.make(ctx, c.store_chunk)
        judged = self._judge(fading, streams, tiles, state, is_step=True)
        after = self._state_after(streams, inner, judged, tiles, state)
        store = after.store if self.memory_enabled else None
        heads = read_rings(self._readable(streams), c.reach, after.window, after.images, store)
        return self._finished(heads, ctx, after, inner, judged)

    def state_num_bytes(
        self, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        """Rings, store, and the inner mixer; without a bound on the store, the most it can hold."""
        c = self.config
        empty = self.init_state(batch_size, device="meta", dtype=dtype)
        total = empty.num_bytes()
        if empty.fading is not None:
            inner = self._inner()[0]
            total += inner.state_num_bytes(num_tokens, batch_size, dtype) - empty.fading.num_bytes()
        if not c.has_store:
            return total
        return total + batch_size * self.eidetic.num_bytes(num_tokens, c.kv_heads, c.width, dtype)

    def flops_per_token(self, num_tokens: int) -> int:
        """Projections, the inner mixer, and all slots of rings and store."""
        c = self.config
        flops = self.projection_flops()
        slots = 0
        if c.window_size:
            slots += self.eidetic.ring_size if c.has_store else c.window_size
        if c.fading_reach:
            slots += self._image_slots
            flops += 4 * self.d_model * c.kv_heads * c.width
            flops += 0 if c.tie_weights else 2 * self.d_model * c.num_heads * c.width
        if c.has_store:
            judged = max(0, num_tokens // c.store_chunk * c.store_chunk - c.window_size + 1)
            slots += judged if c.num_slots is None else c.num_slots
        if self._uses_fading:
            flops += sum(inner.flops_per_token(num_tokens) for inner in self._inner())
        return flops + 4 * c.num_heads * c.width * slots

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """A bounded store; maps of its own for the fading stream, and a store without bound."""
        return (
            {
                "d_model": 12,
                "num_heads": 2,
                "num_kv_heads": 1,
                "window_size": 5,
                "eidetic_size": 4,
                "eidetic_chunk_size": 4,
                "eidetic_sinks": 1,
                "qk_norm": True,
                "predictor": "learned",
                "mixers": [{"type": "mamba2", "d_state": 4, "head_dim": 4, "expand": 1, "chunk_size": 5}],
            },
            {
                "d_model": 10,
                "num_heads": 3,
                "head_dim": 6,
                "window_size": 4,
                "fading_window_size": 7,
                "eidetic_size": None,
                "eidetic_chunk_size": 6,
                "eidetic_rope": "fixed",
                "innovation_threshold": 0.9,
                "tie_weights": False,
                "fading_norm": True,
                "zero_gate": True,
                "qkv_bias": True,
                "form": "concatenated",
                "mixers": [{"type": "base_conv", "conv_size": 3}],
            },
        )

    @property
    def _uses_fading(self) -> bool:
        return bool(self.config.fading_reach) or self.config.has_store

    @property
    def _image_slots(self) -> int:
        """Fading tokens that are kept."""
        c = self.config
        return c.window_size + c.fading_reach if c.fading_reach else 0

    def _inner(self) -> list[TokenMixer]:
        return [cast(TokenMixer, mixer) for mixer in self.mixers]

    def _fade(
        self,
        x: Tensor,
        ctx: SequenceContext,
        state: BMojoState | None,
        calls: list[Callable[..., LayerOutput]],
    ) -> tuple[Tensor, LayerOutput]:
        """Fading tokens (B, T, M), and the output of the inner mixer."""
        inner = LayerOutput(x)
        if calls and self._uses_fading:
            inner = calls[0](x, ctx, None if state is None else state.fading)
        fading = inner.hidden
        if self.gate is not None:
            fading = x + self.gate.to(x.dtype) * fading
        return (fading if self.fading_norm is None else self.fading_norm(fading)), inner

    def _project(self, x: Tensor, fading: Tensor, ctx: SequenceContext, state: BMojoState | None) -> Streams:
        c = self.config
        raw_q, raw_k = self._heads(x, "q"), self._heads(x, "k")
        streams = Streams(ctx, self._turned(raw_q, ctx), self._turned(raw_k, ctx), self._heads(x, "v"))
        if c.fading_reach:
            own = "" if c.tie_weights else "fading_"
            streams.fading_q = streams.q if c.tie_weights else self._turned(self._heads(x, own + "q"), ctx)
            streams.fading_k = self._turned(self._heads(fading, own + "k"), ctx)
            streams.fading_v = self._heads(fading, own + "v")
        if c.has_store:
            streams.stored_q, streams.stored_k = streams.q, streams.k
            if c.eidetic_rope == "fixed":
                streams.stored_k = raw_k
                if self.rotary is not None:
                    streams.stored_q = self.rotary.rotate_by(raw_q, c.window_size + c.fading_reach)
        if state is not None:
            streams.window_prefix = _prefix(state.window, ctx, streams.k)
            streams.image_prefix = _prefix(state.images, ctx, streams.k)
        return streams

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """(B, T, M) -> (B, T, H or G, D) by one of the projections, normed where there is a norm."""
        heads: Tensor = getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, self.head_dim))
        norm = None if name.endswith("v") else getattr(self, f"{name}_norm")
        return heads if norm is None else norm(heads)

    def _turned(self, x: Tensor, ctx: SequenceContext) -> Tensor:
        return x if self.rotary is None else self.rotary.rotate(x, ctx)

    def _readable(self, streams: Streams) -> Streams:
        """The streams that are read: the window alone where the memory is switched off."""
        if self.memory_enabled:
            return streams
        return dataclasses.replace(streams, fading_q=None)

    def _judge(
        self, fading: Tensor, streams: Streams, tiles: Tiles, state: BMojoState | None, is_step: bool = False
    ) -> Judged:
        """Scores the tokens of a call and decides what its chunks find in the store."""
        if not self.config.has_store:
            return Judged()
        assert streams.stored_k is not None
        store = None if state is None else state.store
        judged = self.eidetic.judge(
            fading, streams.stored_k, streams.v, streams.window_prefix, tiles, store, is_step=is_step
        )
        if judged.scores is not None:
            record("innovation", judged.scores)
        return judged

    def _state_after(
        self, streams: Streams, inner: LayerOutput, judged: Judged, tiles: Tiles, old: BMojoState
    ) -> BMojoState:
        ctx, window, images, store = tiles.ctx, old.window, old.images, old.store
        if window is not None:
            window = window.append(streams.k, streams.v, ctx, 0)
        if images is not None:
            assert streams.fading_k is not None
            assert streams.fading_v is not None
            images = images.append(streams.fading_k, streams.fading_v, ctx, 0)
        if store is not None:
            store = self.eidetic.after(judged, streams.stored_k, tiles, store)
        return BMojoState(
            num_tokens=ctx.num_tokens_after, fading=inner.state, window=window, images=images, store=store
        )

    def _finished(
        self,
        heads: Tensor,
        ctx: SequenceContext,
        state: BMojoState | None,
        inner: LayerOutput,
        judged: Judged,
    ) -> LayerOutput:
        """The output of the layer, with the losses and extras of the inner mixer."""
        out = self.finish(heads, ctx, state)
        out.aux.update({f"fading.{name}": value for name, value in inner.aux.items()})
        out.extras.update({f"fading.{name}": value for name, value in inner.extras.items()})
        if judged.loss is not None and self.config.predictor == "learned":
            sums = torch.stack([part.sum() for part in ctx.split(judged.loss)])
            out.aux["prediction"] = (sums, torch.tensor(ctx.lengths, device=sums.device, dtype=sums.dtype))
        return out


def _prefix(ring: WindowCache | None, ctx: SequenceContext, like: Tensor) -> KVPrefix | None:
    """What a ring holds, for the attention kernels, in the dtype of the call."""
    if ring is None:
        return None
    past = ring.prefix(ctx, 0)
    return past._replace(k=past.k.to(like.dtype), v=past.v.to(like.dtype))
