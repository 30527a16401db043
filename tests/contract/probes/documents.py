"""Probe: documents read alone, stored as pooled chunks, and selected by a question (MSA, arXiv 2603.23516).

The stream `roles` says what a token is: n >= 1 document n, 0 question, -1 response, -2 template. Documents
see themselves only, from position 0. Chunks of C tokens are mean-pooled (key, value, routing key) when their
document ends. A question scores all chunks before it, S = max over its tokens of the mean over heads of
cosines, and selects the `top_k` best documents (ties: lower number). It and all later active tokens (roles <=
0) attend to the pooled chunks selected and to the active tokens so far.

Two forms that must agree: a loop over runs of equal role with a state, and, for training without a state, one
dense mask. Extras: `routing_scores` (B, T, max_documents), at each question token its own score of every
document so far, else -1.

State: active tokens, pooled chunks, the raw tokens of the open document, the selection. Its size depends on
the roles. What is counted from roles lives beside the data (`num_active`); only what follows from lengths is
a host counter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memzoo.layers import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer
from memzoo.layers.parts.rotary import Rotary

from .common import draw, no_tokens, softmax_read, stack_padded, wide_dtype

# Dimensions: N sequences, T tokens, H query heads, G key/value heads, D head width,
# A active tokens, S chunks, O open tokens

NOT_READ = -1.0  # score of a document that has not been read: the lowest cosine


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig(MixerConfig):
    type: str = "probe_documents"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int
    top_k: int
    max_documents: int = 4


@dataclass(kw_only=True)
class DocumentsState(State):
    active_key: Tensor  # (N, A, G, D)
    active_value: Tensor  # (N, A, G, D)
    num_active: Tensor  # (N,) int64
    past_head: Tensor  # (N,) int64, 1 after the first token that is not template
    chunk_key: Tensor  # (N, S, G, D)
    chunk_value: Tensor  # (N, S, G, D)
    chunk_route: Tensor  # (N, S, G, D) float32, unit length
    chunk_document: Tensor  # (N, S) int64, 0 = empty
    open_key: Tensor  # (N, O, G, D)
    open_value: Tensor  # (N, O, G, D)
    open_route: Tensor  # (N, O, G, D)
    open_document: Tensor  # (N, O) int64, number of the open document at each of its tokens, 0 = empty
    selected: Tensor  # (N, max_documents) int64, 1 = selected by the last question


class Documents(TokenMixer):
    exact = "question"
    needs = frozenset({"roles"})
    data_dependent = True

    def __init__(self, config: DocumentsConfig) -> None:
        super().__init__(config)
        c = config
        self.q_proj = nn.Linear(c.d_model, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=False)
        self.route_q_proj = nn.Linear(c.d_model, c.num_heads * c.head_dim, bias=False)
        self.route_k_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.d_model, bias=False)
        self.rotary = Rotary(c.head_dim)
        self.init_weights()

    def init_weights(self) -> None:
        linears = [self.q_proj, self.k_proj, self.v_proj, self.route_q_proj, self.route_k_proj, self.o_proj]
        draw(linears)

    def init_state(self, batch_size, *, device=None, dtype=None):
        c = self.config
        device, dtype = device or self.q_proj.weight.device, dtype or self.q_proj.weight.dtype

        def none(dtype=dtype):
            return torch.zeros(batch_size, 0, c.num_kv_heads, c.head_dim, device=device, dtype=dtype)

        def count(*shape):
            return torch.zeros(batch_size, *shape, device=device, dtype=torch.int64)

        return DocumentsState(
            num_tokens=no_tokens(batch_size),
            active_key=none(),
            active_value=none(),
            num_active=count(),
            past_head=count(),
            chunk_key=none(),
            chunk_value=none(),
            chunk_route=none(wide_dtype(dtype)),
            chunk_document=count(0),
            open_key=none(),
            open_value=none(),
            open_route=none(),
            open_document=count(0),
            selected=count(c.max_documents),
        )

    def mix(self, x: Tensor, ctx: SequenceContext, state: DocumentsState | None) -> LayerOutput:
        c = self.config
        heads, groups = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        q, k, v = self.q_proj(x).unflatten(-1, heads), self.k_proj(x).unflatten(-1, groups), self.v_proj(x)
        route_q, route_k = self.route_q_proj(x).unflatten(-1, heads), self.route_k_proj(x)
        # the mean over heads of cosines as one inner product of width G * D
        route_q = F.normalize(route_q.to(wide_dtype(x.dtype)), dim=-1)
        route_q = route_q.unflatten(-2, (c.num_kv_heads, -1)).sum(-2) / c.num_heads
        fields = [q, k, v.unflatten(-1, groups), route_q, route_k.unflatten(-1, groups), ctx.streams["roles"]]
        parts = [list(p) for p in zip(*(ctx.split(item) for item in fields), strict=True)]
        new_state = None
        if state is None and not ctx.return_state:
            results = [self._masked(*part) for part in parts]
        else:
            if state is None:
                state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
            results, rows = [], []
            for row, part in enumerate(parts):
                old = {name: tensor[row] for name, tensor in state.named_tensors() if name != "num_tokens"}
                old |= {name: old[name][: int(old["num_active"])] for name in ("active_key", "active_value")}
                for prefix in ("chunk", "open"):
                    used = int((old[f"{prefix}_document"] > 0).sum())
                    old |= {name: tensor[:used] for name, tensor in old.items() if name.startswith(prefix)}
                out, scores, new = self._read_sequence(*part, old)
                results.append((out, scores))
                rows.append(new)
            stacked = {}
            for name in rows[0]:
                is_growing = name.startswith(("active_", "chunk_", "open_"))
                stacked[name] = (stack_padded if is_growing else torch.stack)([row[name] for row in rows])
            new_state = DocumentsState(num_tokens=ctx.num_tokens_after, **stacked)
        outputs = [out for out, _ in results]
        hidden = self.o_proj(ctx.merge(outputs).flatten(-2))
        extras = {}
        if ctx.return_extras:
            extras = {"routing_scores": ctx.merge([scores for _, scores in results])}
        return LayerOutput(hidden, new_state if ctx.return_state else None, extras=extras)

    # ------------------------------------------------------------------ the loop over runs of equal role

    def _read_sequence(self, q, k, v, route_q, route_k, roles, old):
        state, outputs, scores = dict(old), [], []
        numbers = roles.tolist()
        start = 0
        for t in range(1, len(numbers) + 1):
            if t < len(numbers) and numbers[t] == numbers[start]:
                continue
            piece, role = slice(start, t), numbers[start]
            if state["open_document"].shape[0] and int(state["open_document"][0]) != role:
                self._close(state)
            score = q.new_full((t - start, self.config.max_documents), NOT_READ, dtype=route_q.dtype)
            if role >= 1:
                out = self._read_document(state, q[piece], k[piece], v[piece], route_k[piece], role)
            else:
                if role == 0:
                    score = self._route(state, route_q[piece])
                out = self._read_active(state, q[piece], k[piece], v[piece], role)
            outputs.append(out)
            scores.append(score)
            start = t
        if not outputs:
            return q, route_q.new_zeros(0, self.config.max_documents), state
        return torch.cat(outputs), torch.cat(scores), state

    def _read_document(self, state, q, k, v, route_k, role):
        read = state["open_key"].shape[0]
        place = torch.arange(read, read + q.shape[0], device=q.device)
        q, k = self._rotate(q, place), self._rotate(k, place)
        state["open_key"] = torch.cat([state["open_key"].to(k.dtype), k])
        state["open_value"] = torch.cat([state["open_value"].to(v.dtype), v])
        state["open_route"] = torch.cat([state["open_route"].to(route_k.dtype), route_k])
        state["open_document"] = torch.full((read + q.shape[0],), role, device=q.device)
        state["past_head"] = torch.ones_like(state["past_head"])
        allowed = torch.arange(read + q.shape[0], device=q.device) <= place[:, None]
        return softmax_read(q, state["open_key"], state["open_value"], allowed)

    def _close(self, state):
        """Pools the open document into chunks."""
        for chunk in range(0, state["open_key"].shape[0], self.config.chunk_size):
            piece = slice(chunk, chunk + self.config.chunk_size)
            for name in ("key", "value", "route"):
                tokens, store = state[f"open_{name}"][piece], state[f"chunk_{name}"]
                pooled = tokens.to(wide_dtype(tokens.dtype)).mean(0, keepdim=True)
                if name == "route":
                    pooled = F.normalize(pooled, dim=-1)
                else:
                    pooled = pooled.to(tokens.dtype)
                state[f"chunk_{name}"] = torch.cat([store.to(pooled.dtype), pooled])
            number = state["open_document"][:1]
            state["chunk_document"] = torch.cat([state["chunk_document"], number])
        for name in ("key", "value", "route", "document"):
            state[f"open_{name}"] = state[f"open_{name}"][:0]

    def _route(self, state, route_q):
        """Scores (T, max_documents) of the tokens of a question; their maximum selects the documents."""
        c, document = self.config, state["chunk_document"]
        by_chunk = route_q.flatten(1) @ state["chunk_route"].to(route_q.dtype).flatten(1).T  # (T, S)
        scores = []
        for number in range(1, c.max_documents + 1):
            here = by_chunk[:, document == number]
            scores.append(here.amax(1) if here.shape[1] else torch.full_like(route_q[:, 0, 0], NOT_READ))
        score = torch.stack(scores, dim=1)
        known = (document[:, None] == torch.arange(1, c.max_documents + 1, device=document.device)).any(0)
        state["selected"] = self._best(score.amax(0), known).to(torch.int64)
        return score

    def _best(self, score, known):
        """(..., max_documents) bool, the `top_k` known documents of highest score."""
        ranked = (
            score.detach().masked_fill(~known, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        )
        best = torch.zeros_like(known).scatter(-1, ranked[..., : self.config.top_k], True)
        return best & known

    def _read_active(self, state, q, k, v, role):
        if role != -2:
            state["past_head"] = torch.ones_like(state["past_head"])
        place = state["num_active"] + torch.arange(q.shape[0], device=q.device)
        position = place + self.config.top_k * state["past_head"]
        q, k = self._rotate(q, position), self._rotate(k, position)
        state["active_key"] = torch.cat([state["active_key"].to(k.dtype), k])
        state["active_value"] = torch.cat([state["active_value"].to(v.dtype), v])
        state["num_active"] = state["num_active"] + q.shape[0]
        selected = state["selected"][state["chunk_document"] - 1] > 0  # (S,)
        causal = torch.arange(state["active_key"].shape[0], device=q.device) <= place[:, None]
        allowed = torch.cat([selected.expand(q.shape[0], -1), causal], dim=1)
        keys = torch.cat([state["chunk_key"].to(k.dtype), state["active_key"]])
        values = torch.cat([state["chunk_value"].to(v.dtype), state["active_value"]])
        return softmax_read(q, keys, values, allowed)

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        cos, sin = self.rotary.tables(position, wide_dtype(x.dtype))
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    # ------------------------------------------------------------------ the dense mask, without a past

    def _masked(self, q, k, v, route_q, route_k, roles):
        c, length = self.config, q.shape[0]
        if length == 0:
            return q, route_q.new_zeros(0, c.max_documents)
        index = torch.arange(length, device=q.device)
        begins = torch.ones_like(roles, dtype=torch.bool)
        begins[1:] = roles[1:] != roles[:-1]
        run = begins.cumsum(0)
        local = index - torch.where(begins, index, 0).cummax(0).values
        in_document, active = roles >= 1, roles <= 0
        past_head = (roles != -2).cumsum(0).clamp(max=1)
        position = torch.where(in_document, local, active.cumsum(0) - 1 + c.top_k * past_head)
        q, k = self._rotate(q, position), self._rotate(k, position)

        # pooled chunks stand at their first token
        leader = in_document & (local % c.chunk_size == 0)
        member = leader[:, None] & (run[:, None] == run) & (local[:, None] == local - local % c.chunk_size)
        share = member.to(wide_dtype(q.dtype)) / member.sum(1, keepdim=True).clamp(min=1)

        def pool(tokens):
            return (share @ tokens.to(share.dtype).flatten(1)).unflatten(1, tokens.shape[1:])

        route = F.normalize(pool(route_k), dim=-1).flatten(1)
        by_chunk = route_q.flatten(1) @ route.to(route_q.dtype).T  # (T, T)
        numbers = torch.arange(1, c.max_documents + 1, device=q.device)
        asks = roles == 0
        known = (leader & (index < index[:, None]))[..., None] & (
            roles[:, None] == numbers
        )  # (T, T, documents)
        score = by_chunk[..., None].masked_fill(~known, NOT_READ).amax(1)  # (T, documents)
        score = score.masked_fill(~asks[:, None], NOT_READ)
        together = (run[:, None] == run) & asks
        of_run = score.expand(length, -1, -1).masked_fill(~together[..., None], NOT_READ).amax(1)
        best = self._best(of_run, known.any(1) & asks[:, None])
        last_question = torch.where(asks, index, -1).cummax(0).values
        selected = best[last_question.clamp(min=0)] & (last_question >= 0)[:, None]  # (T, documents)

        by_document = (selected[:, :, None] & (roles == numbers[:, None])).any(1)  # (T, T)
        sees_chunk = active[:, None] & leader & by_document & (index < index[:, None])
        sees_raw = (index <= index[:, None]) & torch.where(
            active[:, None], active.expand(length, -1), run[:, None] == run
        )
        keys, values = torch.cat([pool(k).to(k.dtype), k]), torch.cat([pool(v).to(v.dtype), v])
        return softmax_read(q, keys, values, torch.cat([sees_chunk, sees_raw], dim=1)), score

    def state_num_bytes(self, num_tokens, batch_size=1, dtype=torch.float32):
        """Upper bound: every token of the longest sequence waits in an open document."""
        c = self.config
        element = max(dtype.itemsize, wide_dtype(dtype).itemsize)
        per_token = 3 * c.num_kv_heads * c.head_dim * element + 8
        return batch_size * (24 + 8 * c.max_documents + num_tokens * per_token)

    def flops_per_token(self, num_tokens: int) -> int:
        """Upper bound: every token read is active."""
        c = self.config
        return (
            4 * c.d_model * c.num_heads * c.head_dim
            + 2 * c.d_model * c.num_heads * c.head_dim
            + 6 * c.d_model * c.num_kv_heads * c.head_dim
            + 4 * c.num_heads * c.head_dim * (num_tokens + 1)
        )

    @classmethod
    def small_configs(cls):
        return (
            {
                "d_model": 8,
                "num_heads": 2,
                "num_kv_heads": 2,
                "head_dim": 4,
                "chunk_size": 3,
                "top_k": 1,
            },
            {
                "d_model": 10,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "chunk_size": 4,
                "top_k": 2,
            },
        )
