"""Long-term eidetic memory: old tokens that were hard to predict, kept verbatim (B'MOJO, arXiv 2407.06324).

    e_j   innovation of token j: distance of the fading stream from a weighted average of its last outputs
    M_c   what the queries of chunk c see: of all tokens j <= c C - W with e_j > threshold the m of largest
          e_j (the earlier of equals), and the first tokens of the sequence where sinks are wanted

With a half-life, tokens are ranked by log2 e_j + j / half-life: older ones lose, the order never changes.
A token is judged at the first chunk boundary behind every window that holds it; until then it waits in the
ring of the window. State: m slots with key, value, score and position, or as many as passed the test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import KVPrefix, SlotStream, innovation_scores, select_eidetic
from ...kernels.innovation import predictor_weights
from ..contract import MixerConfig, SequenceContext, State, check_choice, check_positive, tag_parameter
from .kv_cache import empty_tokens, read_ring, write_ring
from .state_space import is_number
from .tiles import Tiles, pool

# Dimensions: B batch, T tokens, N sequences, M model width, W window, C chunk, R = W + C - 1 slots of the
# ring, S slots of the store, P order of the predictor, G key/value heads, D head width, K tiles, U chunks of
# the longest sequence, J slots of a tile


@dataclass(frozen=True, kw_only=True)
class EideticConfig(MixerConfig):
    """Fields of a store of surprising tokens.

    Attributes:
        eidetic_size: tokens in the store; 0 for none, null for every token that passes the threshold.
        eidetic_chunk_size: tokens between two updates of the store (default: the window).
        eidetic_sinks: first tokens of the sequence that are always stored, in addition to `eidetic_size`.
        eidetic_rope: "absolute", stored keys keep their positions; "fixed", all are read at the same
            distance, just behind window and fading stream, however long ago they were.
        innovation_threshold: only tokens that score above it are stored; null for no threshold.
        innovation_half_life: tokens after which a score counts half; null for no decay.
        predictor: "ema", fixed weights that decay geometrically; "learned", weights per channel, trained by
            the loss `prediction` alone.
        predictor_order: outputs of the fading stream that the predictor sees.
        predictor_decay: ratio of two neighbouring weights.
    """

    eidetic_size: int | None = 0
    eidetic_chunk_size: int | None = None
    eidetic_sinks: int = 0
    eidetic_rope: str = "absolute"
    innovation_threshold: float | None = None
    innovation_half_life: float | None = None
    predictor: str = "ema"
    predictor_order: int = 4
    predictor_decay: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eidetic_size", "eidetic_sinks"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not is_count and not (value is None and name == "eidetic_size"):
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}.")
        if self.eidetic_chunk_size is not None:
            check_positive(self, "eidetic_chunk_size")
        check_choice("eidetic_rope", self.eidetic_rope, ("absolute", "fixed"))
        check_choice("predictor", self.predictor, ("ema", "learned"))
        check_positive(self, "predictor_order")
        if not is_number(self.predictor_decay) or not 0 < self.predictor_decay <= 1:
            raise ValueError(f"predictor_decay must be above 0 and at most 1, got {self.predictor_decay!r}.")
        if self.innovation_threshold is not None and not is_number(self.innovation_threshold):
            raise ValueError(
                f"innovation_threshold must be a number, got {self.innovation_threshold!r}. "
                "Use null for no threshold."
            )
        life = self.innovation_half_life
        if life is not None and (not is_number(life) or not 0 < life < math.inf):
            raise ValueError(f"innovation_half_life must be a positive number, got {life!r}.")

    @property
    def has_store(self) -> bool:
        """Whether any token is stored."""
        return self.eidetic_size != 0 or self.eidetic_sinks > 0

    @property
    def num_slots(self) -> int | None:
        """Slots of the store, None without a bound."""
        return None if self.eidetic_size is None else self.eidetic_size + self.eidetic_sinks


@dataclass(kw_only=True)
class EideticStoreState(State):
    """The store, and what is needed to judge the tokens to come.

    Attributes:
        recent: (N, P, M) float32 last inputs of the predictor, oldest first.
        score: (N, R) float32 innovation of the last tokens; position p in slot p mod R.
        waiting: (N, R, G, D) their keys as they were before the rotation; None where the store takes the
            rotated keys of the window.
        key, value: (N, S, G, D) stored tokens in order of position, unused slots last.
        stored_score: (N, S) float32.
        order: (N, S) int64, position + 1, zero where unused.
    """

    recent: Tensor
    score: Tensor
    waiting: Tensor | None
    key: Tensor
    value: Tensor
    stored_score: Tensor
    order: Tensor


class EideticMemory(nn.Module):
    """Scores tokens, decides what is stored, and says where each query finds it.

    Args:
        config: its fields; `eidetic_chunk_size` must be set.
        window_size: W.
    """

    def __init__(self, config: EideticConfig, window_size: int) -> None:
        super().__init__()
        assert config.eidetic_chunk_size is not None
        self.config, self.window_size, self.chunk_size = config, window_size, config.eidetic_chunk_size
        self.predictor: nn.Parameter | None = None
        if config.predictor == "learned":
            weights = nn.Parameter(torch.empty(config.d_model, config.predictor_order))
            self.predictor = tag_parameter(weights, weight_decay=False)

    @property
    def ring_size(self) -> int:
        """R, last tokens of which keys, values and scores are kept."""
        return max(1, self.window_size + self.chunk_size - 1)

    def init_weights(self) -> None:
        """The geometric weights, also where they are learned."""
        if self.predictor is not None:
            with torch.no_grad():
                self.predictor.copy_(self._geometric(self.predictor).expand_as(self.predictor))

    def empty(
        self, batch_size: int, num_heads: int, width: int, device: torch.device | str, dtype: torch.dtype
    ) -> EideticStoreState:
        """Nothing stored, nothing read."""
        c, slots = self.config, self.config.num_slots or 0
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        is_fixed = c.eidetic_rope == "fixed"
        return EideticStoreState(
            num_tokens=empty_tokens(batch_size),
            recent=zeros(c.predictor_order, c.d_model),
            score=zeros(self.ring_size),
            waiting=zeros(self.ring_size, num_heads, width, dtype=dtype) if is_fixed else None,
            key=zeros(slots, num_heads, width, dtype=dtype),
            value=zeros(slots, num_heads, width, dtype=dtype),
            stored_score=zeros(slots),
            order=zeros(slots, dtype=torch.int64),
        )

    def score(
        self, fading: Tensor, ctx: SequenceContext, state: EideticStoreState | None
    ) -> tuple[Tensor, Tensor]:
        """Innovation (B, T) of tokens with the fading stream (B, T, M), and the last inputs of the predictor.

        Differentiable with respect to a learned predictor, and to nothing else.
        """
        weights = self.predictor
        return innovation_scores(
            fading,
            self._geometric(fading).expand(self.config.d_model, -1) if weights is None else weights,
            tail=None if state is None else state.recent,
            cu_seqlens=ctx.cu_seqlens,
        )

    def store(
        self,
        key: Tensor,
        value: Tensor,
        past: tuple[Tensor, Tensor] | None,
        scores: Tensor,
        tiles: Tiles,
        state: EideticStoreState | None,
    ) -> Stored:
        """Decides what the chunks of a call find in the store.

        Args:
            key, value: (B, T, G, D) of the tokens of the call, as they are to be stored.
            past: the same (N, R, G, D) of the last tokens before it in order of time; None without a state.
            scores: (B, T) their innovation, detached.
            tiles: the chunks of the call.
            state: the store so far.
        """
        ctx = tiles.ctx
        ring = 0 if past is None else past[0].shape[1]
        slots = 0 if state is None else state.key.shape[1]
        num_rows, num_tokens = ctx.batch_size, key.shape[0] * key.shape[1]
        offset = torch.arange(1 - self.chunk_size, 1) - self.window_size
        positions = tiles.boundaries[..., None] + offset  # (N, U, C), judged where a chunk begins
        places = torch.where(tiles.is_begun()[..., None], tiles.places(positions, ring), -1)
        has_offers = self._has_offers(ctx)
        device = key.device
        # the pools: what the ring holds, the tokens of the call, and what is stored already
        pools = [pool(None if past is None else past[i], x) for i, x in enumerate((key, value))]
        score_pool = pool(None if state is None else read_ring(state.score, ctx), scores)
        order_pool = pool(
            None if state is None else (ctx.num_seen[:, None] - ring + torch.arange(ring) + 1).to(device),
            ctx.positions + 1,
        )
        stored = torch.arange(num_rows * slots, device=device).view(num_rows, 1, slots)
        stored = stored + num_rows * ring + num_tokens
        rank = scores.new_zeros(num_rows, 0)
        if state is not None:
            held = (state.key, state.value)
            pools = [torch.cat([a, b.flatten(0, 1).to(a.dtype)]) for a, b in zip(pools, held, strict=True)]
            score_pool = torch.cat([score_pool, state.stored_score.flatten()])
            order_pool = torch.cat([order_pool, state.order.flatten()])
            rank = self._rank(state.stored_score, state.order)
        if has_offers:
            place = places.to(device)
            offered = self._rank(
                score_pool[place.clamp(min=0)], torch.where(place < 0, 0, order_pool[place.clamp(min=0)])
            )
            kept = select_eidetic(rank, offered, self.config.num_slots)  # (N, U, J)
            everything = torch.cat([stored, place.flatten(1)[:, None]], -1).expand(-1, kept.shape[1], -1)
            index = torch.where(kept < 0, -1, everything.gather(2, kept.clamp(min=0)))
        else:
            index = torch.where(rank > -torch.inf, stored[:, 0], -1)[:, None]
            index = index.expand(-1, tiles.boundaries.shape[1], -1)
        return Stored(pools[0], pools[1], score_pool, order_pool, index, stored[:, 0], has_offers)

    def judge(
        self,
        fading: Tensor,
        key: Tensor,
        value: Tensor,
        past: KVPrefix | None,
        tiles: Tiles,
        state: EideticStoreState | None,
        *,
        is_step: bool = False,
    ) -> Judged:
        """Scores the tokens of a call and decides what its chunks find in the store.

        Args:
            fading: (B, T, M).
            key, value: (B, T, G, D) as they are to be stored.
            past: what the ring of the window holds; None without a state.
            tiles: the chunks of the call.
            state: the store so far.
            is_step: nothing is looked up in the store unless a chunk begins.
        """
        ctx, found, held = tiles.ctx, None, None
        loss, recent = self.score(fading, ctx, state)
        scores = loss.detach()
        if not is_step or any(start % self.chunk_size == 0 for start in ctx.starts):
            if state is not None and past is not None:
                held = (past.k if state.waiting is None else read_ring(state.waiting, ctx), past.v)
            found = self.store(key, value, held, scores, tiles, state)
        return Judged(loss, scores, recent, found)

    def after(
        self, judged: Judged, waiting: Tensor | None, tiles: Tiles, state: EideticStoreState
    ) -> EideticStoreState:
        """The state after a call.

        Args:
            judged: from `judge`.
            waiting: (B, T, G, D) keys of the call for the ring of `EideticStoreState.waiting`.
            state: before the call; an empty one where the call had none.
        """
        ctx, found = tiles.ctx, judged.found
        assert judged.scores is not None
        assert judged.recent is not None
        if found is not None and found.has_offers:
            stored = self._stored_after(found, tiles)
        else:
            stored = (state.key, state.value, state.stored_score, state.order)
        return EideticStoreState(
            num_tokens=ctx.num_tokens_after,
            recent=judged.recent,
            score=write_ring(state.score, judged.scores, ctx),
            waiting=None
            if state.waiting is None or waiting is None
            else write_ring(state.waiting, waiting, ctx),
            **dict(zip(("key", "value", "stored_score", "order"), stored, strict=True)),
        )

    def num_bytes(self, num_tokens: int, heads: int, width: int, dtype: torch.dtype) -> int:
        """Bytes of one stored sequence beyond an empty state: at most all that were judged."""
        if self.config.eidetic_size is not None or num_tokens == 0:
            return 0
        boundary = (num_tokens - 1) // self.chunk_size * self.chunk_size
        slots = max(0, boundary - self.window_size + 1)
        return slots * (2 * heads * width * dtype.itemsize + (8 if dtype == torch.float64 else 4) + 8)

    def _stored_after(self, found: Stored, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Key, value, score and order (N, S, ...) of what the last chunk of each sequence finds."""
        counts, index = tiles.layout.num_chunks, found.index
        if all(counts):
            last = torch.tensor(counts, device=index.device)[:, None, None] - 1
            index = index.gather(1, last.expand(-1, 1, index.shape[2])).squeeze(1)
        else:
            width = index.shape[2]
            before = nn.functional.pad(found.before, (0, width - found.before.shape[1]), value=-1)
            before = torch.where(found.order[before.clamp(min=0)] > 0, before, -1)
            rows = [index[n, count - 1] if count else before[n] for n, count in enumerate(counts)]
            index = torch.stack(rows)
        front = (index < 0).to(torch.int8).sort(dim=1, stable=True).indices  # unused slots last
        index = index.gather(1, front)
        if self.config.num_slots is None and not index.is_meta:  # without numbers all could be stored
            index = index[:, : int((index >= 0).sum(1).max())]
        is_unused, place = index < 0, index.clamp(min=0)
        pools = (found.key, found.value, found.score, found.order)
        taken = (x.index_select(0, place.flatten()).unflatten(0, place.shape) for x in pools)
        key, value, score, order = (
            x.masked_fill(is_unused.view(*place.shape, *(1,) * (x.dim() - 2)), 0) for x in taken
        )
        return key, value, score, order

    def _has_offers(self, ctx: SequenceContext) -> bool:
        """Whether any token is judged in a call."""
        chunk = self.chunk_size
        first = (-(-max(start, self.window_size) // chunk) * chunk for start in ctx.starts)
        ends = (start + length for start, length in zip(ctx.starts, ctx.lengths, strict=True))
        return any(boundary < end for boundary, end in zip(first, ends, strict=True))

    def _geometric(self, like: Tensor) -> Tensor:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        weights = predictor_weights(self.config.predictor_order, self.config.predictor_decay)
        return torch.tensor(weights, device=like.device, dtype=wide)

    def _rank(self, score: Tensor, order: Tensor) -> Tensor:
        """Ranks of entries with order = position + 1: sinks first, -inf for what is not to be stored."""
        c, rank = self.config, score
        if c.innovation_half_life is not None:
            tiny = torch.finfo(score.dtype).tiny
            rank = score.clamp(min=tiny).log2() + (order - 1) / c.innovation_half_life
        if c.innovation_threshold is not None:
            rank = rank.masked_fill(score <= c.innovation_threshold, -torch.inf)
        rank = rank.masked_fill(order <= c.eidetic_sinks, torch.inf)
        return rank.masked_fill(order <= 0, -torch.inf)


@dataclass(frozen=True)
class Stored:
    """What the chunks of one call find in the store.

    Attributes:
        key, value: pools (P, G, D) of everything that is or was a candidate.
        score, order: (P,) innovation, and position + 1.
        index: (N, U, J) place in the pool of what each chunk finds, negative for nothing.
        before: (N, S) places of what was stored before the call.
        has_offers: whether anything was judged in this call.
    """

    key: Tensor
    value: Tensor
    score: Tensor
    order: Tensor
    index: Tensor
    before: Tensor
    has_offers: bool

    def stream(self, q: Tensor, tiles: Tiles) -> SlotStream:
        """The memory, for queries q (K, C, H, D)."""
        return SlotStream(q, self.key, self.value, tiles.of_tiles(self.index))

    def positions(self) -> Tensor:
        """(N, U, J) positions that each chunk finds, -1 for nothing."""
        return torch.where(self.index < 0, -1, self.order[self.index.clamp(min=0)] - 1)


@dataclass(frozen=True)
class Judged:
    """What was decided about the tokens of a call; all None without a store.

    Attributes:
        loss: (B, T) innovation, with the gradient of a learned predictor.
        scores: the same without gradient.
        recent: last inputs of the predictor.
        found: what the chunks find in the store; None in a step in which no chunk begins.
    """

    loss: Tensor | None = None
    scores: Tensor | None = None
    recent: Tensor | None = None
    found: Stored | None = None
