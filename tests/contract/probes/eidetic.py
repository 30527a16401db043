"""Probe: window, fading stream and a store of surprising tokens under one softmax (B'MOJO, arXiv 2407.06324).

    f_t = a f_{t-1} + (1 - a) W x_t                     the fading stream; here a plain decayed average
    e_j = mean (u_j - sum_i kappa_i u_{j-i})^2          innovation of u = f / rms(f); e_0 = 1
    query i of chunk c = floor(i / C) sees tokens (i-W, i] verbatim, fading images of (i-2W, i-W], and the
    store M_c: the m tokens j <= cC - W of largest e_j > threshold (ties: smaller j), or all of them with m =
    None.

State: two rings, the running average, the last predictor inputs, the store. With m = None the store grows,
and how much depends on the data. Empty slots are zero; `store_order` holds position + 1 so that zero means
empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memzoo.layers import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer

from .common import draw, no_tokens, ring_after, ring_past, softmax_read, stack_padded, wide_dtype

# Dimensions: N sequences, T tokens of one sequence, H heads, D head width, M model width,
# W window, C chunk, S slots of the store


@dataclass(frozen=True, kw_only=True)
class EideticConfig(MixerConfig):
    type: str = "probe_eidetic"
    num_heads: int
    head_dim: int
    window_size: int
    chunk_size: int
    capacity: int | None
    threshold: float = -1.0
    order: int = 3
    decay: float = 0.8


@dataclass(kw_only=True)
class EideticState(State):
    key: Tensor  # (N, W + C, H, D) ring: the window, and tokens that wait for the next boundary
    value: Tensor  # (N, W + C, H, D)
    surprise: Tensor  # (N, W + C) float32
    fading_key: Tensor  # (N, 2 W, H, D) ring
    fading_value: Tensor  # (N, 2 W, H, D)
    average: Tensor  # (N, M) float32
    recent: Tensor  # (N, order, M) float32 ring of predictor inputs
    store_key: Tensor  # (N, S, H, D) sorted by position, empty slots last
    store_value: Tensor  # (N, S, H, D)
    store_surprise: Tensor  # (N, S) float32
    store_order: Tensor  # (N, S) int64, position + 1


class Eidetic(TokenMixer):
    def __init__(self, config: EideticConfig) -> None:
        super().__init__(config)
        width = config.num_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(config.d_model, width, bias=False) for _ in range(3)
        )
        self.fading_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)
        self.data_dependent = config.capacity is None
        self.init_weights()

    def init_weights(self) -> None:
        draw([self.q_proj, self.k_proj, self.v_proj, self.fading_proj, self.o_proj])

    def init_state(self, batch_size, *, device=None, dtype=None):
        c = self.config
        device, dtype = device or self.q_proj.weight.device, dtype or self.q_proj.weight.dtype
        wide, heads = wide_dtype(dtype), (c.num_heads, c.head_dim)

        def zeros(*shape, dtype=wide):
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        ring, store = c.window_size + c.chunk_size, c.capacity or 0
        return EideticState(
            num_tokens=no_tokens(batch_size),
            key=zeros(ring, *heads, dtype=dtype),
            value=zeros(ring, *heads, dtype=dtype),
            surprise=zeros(ring),
            fading_key=zeros(2 * c.window_size, *heads, dtype=dtype),
            fading_value=zeros(2 * c.window_size, *heads, dtype=dtype),
            average=zeros(c.d_model),
            recent=zeros(c.order, c.d_model),
            store_key=zeros(store, *heads, dtype=dtype),
            store_value=zeros(store, *heads, dtype=dtype),
            store_surprise=zeros(store),
            store_order=zeros(store, dtype=torch.int64),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: EideticState | None) -> LayerOutput:
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        q = self.q_proj(x).unflatten(-1, (self.config.num_heads, self.config.head_dim))
        inputs = [ctx.split(item) for item in (x, q, *self._keys(x))]
        outputs, rows, losses = [], [], []
        for row, start in enumerate(ctx.starts):
            old = {name: tensor[row] for name, tensor in state.named_tensors() if name != "num_tokens"}
            out, new, loss = self._read_sequence(
                *(item[row] for item in inputs), old, start, ctx.return_state
            )
            outputs.append(out)
            rows.append(new)
            losses.append(loss)
        hidden = self.o_proj(ctx.merge(outputs).flatten(-2))
        counts = torch.tensor(ctx.lengths, device=x.device, dtype=state.average.dtype)
        aux = {"prediction": (torch.stack(losses), counts)}
        new_state = None
        if ctx.return_state:
            stacked = {name: stack_padded([new[name] for new in rows]) for name in rows[0]}
            new_state = EideticState(num_tokens=ctx.num_tokens_after, **stacked)
        return LayerOutput(hidden, new_state, aux)

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.config.num_heads, self.config.head_dim)
        return self.k_proj(x).unflatten(-1, heads), self.v_proj(x).unflatten(-1, heads)

    def _read_sequence(self, x, q, k, v, old, start, keep_state):
        """x (T, M); q, k, v (T, H, D); `old` the row of the state; `start` tokens came before."""
        c = self.config
        end, wide = start + x.shape[0], old["average"].dtype
        fading, surprise, inputs = self._fade(x, old, start)
        fading_key, fading_value = self._keys(fading.to(x.dtype))

        # everything a query of this call may see, with the position of each slot (-1 = empty)
        def joined(name, new):
            return torch.cat([ring_past(old[name], start).to(new.dtype), new])

        key, value, error = joined("key", k), joined("value", v), joined("surprise", surprise.detach())
        fading_key, fading_value = joined("fading_key", fading_key), joined("fading_value", fading_value)
        place = torch.arange(end - key.shape[0], end, device=x.device)
        fading_place = torch.arange(end - fading_key.shape[0], end, device=x.device)
        pool_key = torch.cat([old["store_key"].to(k.dtype), key])
        pool_value = torch.cat([old["store_value"].to(v.dtype), value])
        pool_error = torch.cat([old["store_surprise"], error])
        pool_place = torch.cat([old["store_order"] - 1, place])
        in_store = torch.arange(pool_place.shape[0], device=x.device) < old["store_order"].shape[0]
        last_boundary = (start - 1) // c.chunk_size * c.chunk_size if start else -c.window_size
        fresh = in_store | (
            pool_place > last_boundary - c.window_size
        )  # judged already, or still to be judged

        keys = torch.cat([key, fading_key, pool_key])
        values = torch.cat([value, fading_value, pool_value])
        outputs, kept = [], in_store & (pool_place >= 0)
        for chunk in range(start // c.chunk_size, -(-end // c.chunk_size)):
            boundary = chunk * c.chunk_size
            kept = fresh & (pool_place >= 0) & (pool_place <= boundary - c.window_size)
            kept = kept & (pool_error > c.threshold)
            if c.capacity is not None:
                ranked = (
                    pool_error.masked_fill(~kept, -torch.inf)
                    .sort(dim=-1, descending=True, stable=True)
                    .indices
                )
                best = torch.zeros_like(kept).index_fill(0, ranked[: c.capacity], True)
                kept = kept & best
            first, last = max(boundary, start), min(boundary + c.chunk_size, end)
            queries = torch.arange(first, last, device=x.device)[:, None]
            near = (place <= queries) & (place > queries - c.window_size)
            far = (fading_place <= queries - c.window_size) & (fading_place > queries - 2 * c.window_size)
            allowed = torch.cat([near, far, kept.expand(last - first, -1)], dim=1)
            outputs.append(softmax_read(q[first - start : last - start], keys, values, allowed))
        out = torch.cat(outputs) if outputs else q
        loss = surprise.sum()
        if not keep_state:
            return out, None, loss
        slots = kept.nonzero().squeeze(-1)
        if c.capacity is not None:
            slots = slots[: c.capacity]
        fill = c.capacity or slots.shape[0]
        new = {
            "key": ring_after(key, c.window_size + c.chunk_size, end),
            "value": ring_after(value, c.window_size + c.chunk_size, end),
            "surprise": ring_after(error, c.window_size + c.chunk_size, end),
            "fading_key": ring_after(fading_key, 2 * c.window_size, end),
            "fading_value": ring_after(fading_value, 2 * c.window_size, end),
            "average": fading[-1].to(wide) if fading.shape[0] else old["average"],
            "recent": ring_after(inputs, c.order, end),
        }
        for name, pool in (
            ("key", pool_key), ("value", pool_value), ("surprise", pool_error), ("order", pool_place + 1),
        ):  # fmt: skip
            new[f"store_{name}"] = stack_padded([pool[slots]], fill)[0]
        return out, new, loss

    def _fade(self, x: Tensor, old: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor, Tensor]:
        """The fading stream (T, M), the innovation (T,) and the predictor inputs, past ones first."""
        c, average = self.config, old["average"]
        steps = self.fading_proj(x).to(average.dtype)
        fading = []
        for step in steps.unbind(0):
            average = c.decay * average + (1 - c.decay) * step
            fading.append(average)
        stream = torch.stack(fading) if fading else steps
        inputs = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)
        past = ring_past(old["recent"], start)
        history = torch.cat([past.new_zeros(c.order - past.shape[0], c.d_model), past, inputs])
        weights = [0.5**lag for lag in range(1, c.order + 1)]
        guess = sum(
            weight / sum(weights) * history[c.order - lag : history.shape[0] - lag]
            for lag, weight in enumerate(weights, start=1)
        )
        surprise = (inputs - guess).square().mean(-1)
        if start == 0 and surprise.shape[0]:
            surprise = torch.cat([torch.ones_like(surprise[:1]), surprise[1:]])
        return stream, surprise, torch.cat([past, inputs])

    def state_num_bytes(self, num_tokens, batch_size=1, dtype=torch.float32):
        c = self.config
        fixed = self.init_state(batch_size, device="meta", dtype=dtype).num_bytes()
        if c.capacity is not None or num_tokens == 0:
            return fixed
        boundary = (num_tokens - 1) // c.chunk_size * c.chunk_size
        slots = max(0, boundary - c.window_size + 1)  # at most all that are eligible
        return fixed + batch_size * slots * (
            2 * c.num_heads * c.head_dim * dtype.itemsize + wide_dtype(dtype).itemsize + 8
        )

    def flops_per_token(self, num_tokens: int) -> int:
        c, width = self.config, self.config.num_heads * self.config.head_dim
        ring = min(num_tokens, c.window_size + c.chunk_size) + 1
        slots = 2 * ring + min(num_tokens, 2 * c.window_size) + 1
        slots += c.capacity if c.capacity is not None else max(0, num_tokens - c.window_size)
        return 2 * c.d_model * c.d_model + 12 * c.d_model * width + 4 * slots * width

    @classmethod
    def small_configs(cls):
        return (
            {"d_model": 8, "num_heads": 2, "head_dim": 4, "window_size": 3, "chunk_size": 2, "capacity": 4},
            {
                "d_model": 10,
                "num_heads": 1,
                "head_dim": 7,
                "window_size": 4,
                "chunk_size": 6,
                "capacity": None,
                "threshold": 0.3,
            },
        )
