"""Linear attention whose value heads share queries and keys but decay each on its own, as in Mamba-2.

Inside a chunk the products q_i . k_j are made once for all value heads of a group, and the states of the
group are read and written by one product, as wide as all its values: decays scale values, never keys. With
G_i the sum of log-decays of a value head in a chunk up to and including token i, and S its state:

    P_ij = scale q_i . k_j   (j <= i)           o_i = exp(G_i) (scale q_i) S + sum_j P_ij exp(G_i - G_j) v_j
    S'   = exp(G_end) S + sum_j k_j (exp(G_end - G_j) v_j)^T

The states that enter the chunks are kept for the backward pass, K V / C numbers per token and value head,
which is less than its queries would take if they were not shared as long as C >= V. Decay factors and their
floor: log_sums.py. Log-decays get their gradient without another product: that of their running sum up to
token t is o_t . do_t - v_t . dv_t, because exp(G_t) is a factor of all that token t reads, and exp(-G_t) of
all that becomes of its value. These are summed inside a chunk only; what lies behind it is <dS, S>, so that
rounding does not pile up over the sequence.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import backward_without_autocast
from .log_sums import LogSums
from .types import LinearState

# Dimensions: B batch, T tokens, N sequences, Hk key heads, J value heads of a key head, K key width, V value
# width, X rows of key heads, M segments, C chunk length


class _Plan(NamedTuple):
    """How a call is cut up: bounds of the segments, tokens per chunk, and the plain arguments."""

    bounds: tuple[int, ...]
    chunk_size: int
    scale: float
    need_final: bool

    def segments(self) -> Iterator[list[tuple[int, int]]]:
        """First token and end of each chunk, segment by segment."""
        for start, end in pairwise(self.bounds):
            yield [(t, min(t + self.chunk_size, end)) for t in range(start, end, self.chunk_size)]

    def num_chunks(self) -> int:
        """Chunks of all segments."""
        return sum(map(len, self.segments()))


def linear_attention_shared_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    lengths: tuple[int, ...],
    *,
    is_packed: bool,
    scale: float,
    initial_state: LinearState | None,
    return_state: bool,
    chunk_size: int,
) -> tuple[Tensor, LinearState | None]:
    """Chunked form for g (B, T, HV) with fewer key heads than value heads; arguments are already checked."""
    batch_size, num_tokens, num_key_heads = k.shape[:3]
    q_rows, k_rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))  # (X, T, K)
    v_rows = v.unflatten(2, (num_key_heads, -1)).transpose(1, 2).flatten(0, 1)  # (X, T, J, V)
    g_rows = g.transpose(1, 2).unflatten(1, (num_key_heads, -1)).flatten(0, 1)  # (X, J, T)
    num_values, width = v_rows.shape[2:]
    memory = None
    if initial_state is not None:
        memory = initial_state.memory.unflatten(1, (num_key_heads, num_values)).transpose(2, 3)
        memory = memory.flatten(3)  # (N, Hk, K, J V)
        memory = memory if is_packed else memory.flatten(0, 1)[None]  # (M, X, K, J V)
    bounds = (0, *accumulate(lengths)) if is_packed else (0, num_tokens)
    plan = _Plan(bounds, chunk_size, scale, return_state)
    result, final = _SharedKeys.apply(q_rows, k_rows, v_rows, g_rows, memory, plan)
    output = result.unflatten(0, (batch_size, num_key_heads)).transpose(1, 2).flatten(2, 3).to(q.dtype)
    if not return_state:
        return output, None
    final = final if is_packed else final[0].unflatten(0, (batch_size, num_key_heads))  # (N, Hk, K, J V)
    final = final.unflatten(3, (num_values, width)).transpose(2, 3)
    return output, LinearState(final.flatten(1, 2))


class _Chunk:
    """Tensors of one chunk in the accumulation dtype, and its decay factors."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, t0: int, t1: int, scale: float):
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.k = q[:, t0:t1].to(acc), k[:, t0:t1].to(acc)  # (X, C, K)
        self.v = v[:, t0:t1].to(acc)  # (X, C, J, V)
        self.scale = scale
        self._sums = LogSums(g[:, :, t0:t1].to(acc))
        from_start = self._sums.from_start()  # (X, J, C)
        self.read = from_start.transpose(1, 2)[..., None]  # (X, C, J, 1)
        self.write = self._sums.to_end().transpose(1, 2)[..., None]
        self.whole = from_start[:, None, :, -1:]  # (X, 1, J, 1)

    def inside(self) -> Tensor:
        """Decay from token j to token i >= j, (X, J, C, C); what lies above the diagonal is meaningless."""
        return self._sums.between()

    def scores(self) -> Tensor:
        """P of the module docstring, (X, C, C)."""
        zero = self.q.new_zeros(())
        return torch.baddbmm(zero, self.q, self.k.transpose(1, 2), beta=0, alpha=self.scale).tril_()

    def written(self) -> Tensor:
        """Values as they arrive at the end of the chunk, (X, C, J V)."""
        return (self.v * self.write).flatten(2)

    def decay_state(self, state: Tensor) -> None:
        """Let a state (X, K, J V) decay over the chunk, in place."""
        state.unflatten(2, self.v.shape[2:]).mul_(self.whole)

    def advance(self, state: Tensor) -> None:
        """Let a state decay over the chunk and write the chunk into it, in place."""
        self.decay_state(state)
        state.baddbmm_(self.k.transpose(1, 2), self.written())


def _attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Tensor | None, *, plan: _Plan, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (X, T, J, V), final states (M, X, K, J V), and states before each chunk, or none of them."""
    states = _start(k, v, memory, plan)
    output = torch.empty_like(v, dtype=states.dtype)
    before = states.new_empty(plan.num_chunks() if keep else 0, *states.shape[1:])
    n = 0
    for m, chunks in enumerate(plan.segments()):
        state = states[m]
        for i, (t0, t1) in enumerate(chunks):
            if keep:
                before[n] = state
            n += 1
            chunk = _Chunk(q, k, v, g, t0, t1, plan.scale)
            weights = chunk.scores()[:, None] * chunk.inside()  # (X, J, C, C)
            out = (weights @ chunk.v.transpose(1, 2)).transpose(1, 2)  # (X, C, J, V)
            if i or memory is not None:
                out = torch.addcmul(
                    out, torch.bmm(chunk.q, state).view_as(chunk.v), chunk.read, value=plan.scale
                )
            output[:, t0:t1] = out
            if plan.need_final or i < len(chunks) - 1:
                chunk.advance(state)
    return output, states, before


def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    memory: Tensor | None,
    output: Tensor,
    final: Tensor,
    before: Tensor,
    d_output: Tensor | None,
    d_final: Tensor | None,
    *,
    plan: _Plan,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g and memory."""
    acc = final.dtype
    d_output = torch.zeros_like(output) if d_output is None else d_output
    dq, dk, dv = (torch.empty_like(x, dtype=acc) for x in (q, k, v))
    dg = torch.empty_like(g, dtype=acc)
    d_memory = torch.zeros_like(final) if d_final is None else d_final.clone()
    n = plan.num_chunks()
    for m, chunks in reversed(list(enumerate(plan.segments()))):
        d_state = d_memory[m]
        later = _overlap(d_state, final[m], v)
        for i, (t0, t1) in reversed(list(enumerate(chunks))):
            n -= 1
            chunk = _Chunk(q, k, v, g, t0, t1, plan.scale)
            inside = chunk.inside()
            weights = chunk.scores()[:, None] * inside  # (X, J, C, C)
            d_out = d_output[:, t0:t1]  # (X, C, J, V)
            d_heads = d_out.transpose(1, 2)
            d_weights = d_heads @ chunk.v.permute(0, 2, 3, 1)
            d_scores = d_weights.mul_(inside).sum(1).tril_().mul_(plan.scale)  # (X, C, C)
            grad_q = torch.bmm(d_scores, chunk.k)
            grad_k = torch.bmm(d_scores.transpose(1, 2), chunk.q)
            grad_v = (weights.transpose(2, 3) @ d_heads).transpose(1, 2)  # (X, C, J, V)
            if d_final is not None or i < len(chunks) - 1:
                grad_v = torch.addcmul(grad_v, torch.bmm(chunk.k, d_state).view_as(chunk.v), chunk.write)
                grad_k.baddbmm_(chunk.written(), d_state.transpose(1, 2))
            d_total = (output[:, t0:t1] * d_out).sum(3) - (chunk.v * grad_v).sum(3)  # (X, C, J)
            dg[:, :, t0:t1] = d_total.transpose(1, 2).flip(2).cumsum(2).flip(2).add_(later)
            if i or memory is not None:
                d_read = (d_out * chunk.read).flatten(2)  # (X, C, J V)
                grad_q.baddbmm_(d_read, before[n].transpose(1, 2), alpha=plan.scale)
                chunk.decay_state(d_state)
                d_state.baddbmm_(chunk.q.transpose(1, 2), d_read, alpha=plan.scale)
                later = _overlap(d_state, before[n], v)
            dq[:, t0:t1], dk[:, t0:t1], dv[:, t0:t1] = grad_q, grad_k, grad_v
    grads = (x.to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v), (dg, g)))
    return *grads, None if memory is None else d_memory


def _overlap(d_state: Tensor, state: Tensor, v: Tensor) -> Tensor:
    """<dS, S> of each value head, (X, J, 1): the gradient of each log-decay in front of the state, which is a
    factor of all of it.
    """
    return (d_state * state).unflatten(2, v.shape[2:]).sum((1, 3))[..., None]


class _SharedKeys(torch.autograd.Function):
    """`_attend` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, plan = arguments
        output, final, before = _attend(*tensors, plan=plan, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*tensors, output, final, before)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return output, final

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_attend_backward(*ctx.saved_tensors, *grads, plan=ctx.plan), None


def _start(k: Tensor, v: Tensor, memory: Tensor | None, plan: _Plan) -> Tensor:
    """A fresh copy (M, X, K, J V) of the initial states."""
    if memory is not None:
        return memory.clone(memory_format=torch.contiguous_format)
    acc = torch.float64 if k.dtype == torch.float64 else torch.float32
    num_segments = len(plan.bounds) - 1
    return k.new_zeros(num_segments, k.shape[0], k.shape[2], v.shape[2] * v.shape[3], dtype=acc)
