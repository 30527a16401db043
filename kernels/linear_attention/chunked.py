"""Linear attention chunk by chunk: matmuls inside a chunk, and one running state between chunks.

With G_i the sum of log-decays in a chunk up to and including token i, S the state entering the chunk and A
its C x C lower triangle (diagonal included):

    A_ij = (scale q_i . k_j) exp(G_i - G_j)        o_i = exp(G_i) (scale q_i) S + sum_j A_ij v_j
    S'   = exp(G_end) S + sum_j exp(G_end - G_j) k_j v_j^T

Only one chunk is worked on at a time, in the processor's cache, and the state is updated in place. The
backward pass runs the states again instead of storing them, so memory is O(T (K + V)) whatever the size of
the state. Decay factors and their floor: log_sums.py.

A token's own weight has no decay. It is left out of the gradients of log-decays, which are differences of
sums over the pairs of tokens: behind a strong decay it would be all that these sums hold.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import backward_without_autocast
from .log_sums import LogSums, kept_overlap, later_sums
from .shared_keys import linear_attention_shared_keys
from .types import LinearState

# Dimensions: B batch, T tokens, N sequences, H query heads, Hk key heads, HV value heads, R query heads per
# key head, K key width, V value width of a key head (grouped value heads lie side by side), X rows of heads,
# M segments, C chunk length


class _Plan(NamedTuple):
    """How a call is cut up: (start, length) of each segment, tokens per chunk, and the plain arguments."""

    segments: tuple[tuple[int, int], ...]
    chunk_size: int
    scale: float
    normalize: bool
    need_final: bool

    def chunks(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """First token and end of each chunk of a segment."""
        for t0 in range(start, start + length, self.chunk_size):
            yield t0, min(t0 + self.chunk_size, start + length)


def linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    lengths: tuple[int, ...],
    *,
    is_packed: bool,
    normalize: bool,
    scale: float,
    eps: float,
    initial_state: LinearState | None,
    return_state: bool,
    chunk_size: int,
) -> tuple[Tensor, LinearState | None]:
    """Chunked form of `memzoo.kernels.linear_attention`; arguments are already checked."""
    batch_size, num_tokens = q.shape[:2]
    out_shape = (batch_size, num_tokens, max(q.shape[2], v.shape[2]), v.shape[3])
    if g is not None and g.shape[2] != k.shape[2]:  # never normalised
        return linear_attention_shared_keys(
            q,
            k,
            v,
            g,
            lengths,
            is_packed=is_packed,
            scale=scale,
            initial_state=initial_state,
            return_state=return_state,
            chunk_size=chunk_size,
        )
    num_key_heads = k.shape[2]
    num_groups = v.shape[2] // num_key_heads

    # A dense batch is one segment with rows (b, h); a packed row has rows h and one segment per sequence.
    q_rows = q.unflatten(2, (num_key_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (X, R, T, K)
    k_rows = k.transpose(1, 2).flatten(0, 1)  # (X, T, K)
    v_rows = v.unflatten(2, (num_key_heads, -1)).flatten(3).transpose(1, 2).flatten(0, 1)  # (X, T, V)
    g_rows = None if g is None else g.transpose(1, 2).flatten(0, 1)  # (X, T)
    memory = normalizer = None
    if initial_state is not None:
        memory = initial_state.memory.unflatten(1, (num_key_heads, num_groups))
        memory = memory.transpose(2, 3).flatten(3)  # (N, Hk, K, V)
        memory = memory if is_packed else memory.flatten(0, 1)[None]  # (M, X, K, V)
        if normalize and initial_state.normalizer is not None:
            normalizer = initial_state.normalizer  # (N, Hk, K)
            normalizer = normalizer if is_packed else normalizer.flatten(0, 1)[None]  # (M, X, K)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    segments = tuple(zip(starts[:-1], lengths, strict=True)) if is_packed else ((0, num_tokens),)
    plan = _Plan(segments, chunk_size, scale, normalize, return_state)
    tensors = (q_rows, k_rows, v_rows, g_rows, memory, normalizer)
    result, weight, memory, normalizer = _ChunkedLinearAttention.apply(*tensors, plan)
    if normalize:
        result = result / (weight + eps)[..., None]
    # (X, R, T, V) -> (B, T, Hk, R, V); either R or the number of grouped value heads is 1
    output = (
        result.unflatten(0, (batch_size, num_key_heads)).permute(0, 3, 1, 2, 4).to(q.dtype).reshape(out_shape)
    )
    if not return_state:
        return output, None
    final_memory = (memory if is_packed else memory[0].unflatten(0, (batch_size, num_key_heads))).unflatten(
        3, (num_groups, -1)
    )
    final_normalizer = None
    if normalize:
        final_normalizer = (
            normalizer if is_packed else normalizer[0].unflatten(0, (batch_size, num_key_heads))
        )
    return output, LinearState(final_memory.transpose(2, 3).flatten(1, 2), final_normalizer)


class _Decay(NamedTuple):
    """Decay factors of one chunk."""

    inside: Tensor  # (X, 1, C, C) from token j to token i >= j; what lies above the diagonal is meaningless
    read: Tensor  # (X, 1, C, 1) from the start of the chunk to token i
    write: Tensor  # (X, C, 1) from token j to the end of the chunk
    whole: Tensor  # (X, 1, 1)


def _decay(g: Tensor) -> _Decay:
    """Factors from the log-decays (X, C) of a chunk."""
    sums = LogSums(g)
    from_start = sums.from_start()
    return _Decay(
        sums.between()[:, None],
        from_start[:, None, :, None],
        sums.to_end()[..., None],
        from_start[:, -1, None, None],
    )


class _Chunk:
    """Tensors of one chunk in the accumulation dtype, and the two quantities both passes need."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, t0: int, t1: int, scale: float):
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.grouped = q[:, :, t0:t1].to(acc)  # (X, R, C, K)
        self.q = self.grouped.flatten(1, 2)  # (X, R C, K)
        self.k = k[:, t0:t1].to(acc)  # (X, C, K)
        self.v = v[:, t0:t1].to(acc)  # (X, C, V)
        self.decay = None if g is None else _decay(g[:, t0:t1].to(acc))
        self.scale = scale

    def scores(self) -> Tensor:
        """A of the module docstring, (X, R, C, C)."""
        product = torch.baddbmm(
            self.q.new_zeros(()), self.q, self.k.transpose(1, 2), beta=0, alpha=self.scale
        )
        scores = product.unflatten(1, self.grouped.shape[1:3]).tril_()
        return scores if self.decay is None else scores.mul_(self.decay.inside)

    def q_read(self) -> Tensor:
        """Queries as they read the state entering the chunk, (X, R C, K)."""
        return self.q if self.decay is None else (self.grouped * self.decay.read).flatten(1, 2)

    def write(self, memory: Tensor, normalizer: Tensor | None) -> None:
        """Advance the state (X, K, V) and the sum of keys (X, K) over the chunk, in place."""
        k_write = self.k if self.decay is None else self.k * self.decay.write
        if self.decay is not None:
            memory.mul_(self.decay.whole)
        memory.baddbmm_(k_write.transpose(1, 2), self.v)
        if normalizer is not None:
            if self.decay is not None:
                normalizer.mul_(self.decay.whole[..., 0])
            normalizer.add_(k_write.sum(1))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    *,
    plan: _Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numerator (X, R, T, V), weight (X, R, T) or empty, final state and sum of keys or empty."""
    output, weight, *_ = _empty_results(q, k, v, plan=plan)
    final_memory, final_normalizer = _start(k, v, memory, normalizer, plan)
    for m, (start, length) in enumerate(plan.segments):
        state, key_sum = final_memory[m], final_normalizer[m] if plan.normalize else None
        for t0, t1 in plan.chunks(start, length):
            chunk = _Chunk(q, k, v, g, t0, t1, plan.scale)
            scores = chunk.scores()
            out = torch.bmm(scores.flatten(1, 2), chunk.v)  # (X, R C, V)
            is_empty = memory is None and t0 == start
            if not is_empty:
                q_read = chunk.q_read()
                out.baddbmm_(q_read, state, alpha=plan.scale)
            output[:, :, t0:t1] = out.unflatten(1, scores.shape[1:3])
            if key_sum is not None:
                key_weight = scores.sum(-1)  # (X, R, C)
                if not is_empty:
                    read = torch.bmm(q_read, key_sum[..., None]).view_as(key_weight)
                    key_weight.add_(read, alpha=plan.scale)
                weight[:, :, t0:t1] = key_weight
            if plan.need_final or t1 < start + length:
                chunk.write(state, key_sum)
    return output, weight, final_memory, final_normalizer


def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    final_memory: Tensor,
    final_normalizer: Tensor,
    d_output: Tensor | None,
    d_weight: Tensor | None,
    d_final_memory: Tensor | None,
    d_final_normalizer: Tensor | None,
    *,
    plan: _Plan,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, memory and normalizer."""
    acc = final_memory.dtype
    if d_output is None:
        d_output = q.new_zeros(*q.shape[:3], v.shape[2], dtype=acc)
    if not plan.normalize:
        d_weight = None
    elif d_weight is None:
        d_weight = q.new_zeros(q.shape[:3], dtype=acc)
    dq, dk, dv = (torch.zeros_like(x, dtype=acc) for x in (q, k, v))
    d_total = None if g is None else torch.zeros_like(g, dtype=acc)  # gradients of the running log-decays
    d_memory = torch.zeros_like(final_memory) if d_final_memory is None else d_final_memory.clone()
    d_normalizer = torch.zeros_like(final_normalizer)
    if d_final_normalizer is not None:
        d_normalizer.copy_(d_final_normalizer)
    has_final = d_final_memory is not None or d_final_normalizer is not None
    states, key_sums = _start(k, v, memory, normalizer, plan)
    for m, (start, length) in enumerate(plan.segments):
        bounds = list(plan.chunks(start, length))
        state, key_sum = states[m], key_sums[m] if plan.normalize else None
        # Forward over the states: gradients of the queries that read them.
        reads: list[Tensor | None] = []
        for t0, t1 in bounds:
            if memory is None and t0 == start:
                reads.append(None)
                if len(bounds) > 1:
                    _Chunk(q, k, v, g, t0, t1, plan.scale).write(state, key_sum)
                continue
            chunk = _Chunk(q, k, v, g, t0, t1, plan.scale)
            grad = torch.bmm(d_output[:, :, t0:t1].flatten(1, 2), state.transpose(1, 2))
            grad = grad.view_as(chunk.grouped)  # (X, R, C, K)
            if key_sum is not None and d_weight is not None:
                grad.addcmul_(d_weight[:, :, t0:t1, None], key_sum[:, None, None])
            grad.mul_(plan.scale if chunk.decay is None else chunk.decay.read * plan.scale)
            dq[:, :, t0:t1] = grad
            if d_total is not None:
                per_token = (grad * chunk.grouped).sum((1, 3))  # (X, C)
                d_total[:, t0:t1] += per_token
                reads.append(per_token.sum(-1))
            else:
                reads.append(None)
            if t1 < start + length:
                chunk.write(state, key_sum)
        # Backward over their gradients: everything else. `overlap` is <dS, S> after the chunk, and once less
        # what the chunk wrote, <dS, S> of what it kept.
        d_state, d_key_sum = d_memory[m], d_normalizer[m] if plan.normalize else None
        overlap = None
        if d_total is not None:
            overlap = (d_state * final_memory[m]).sum((1, 2))  # (X,)
            if d_key_sum is not None:
                overlap = overlap + (d_key_sum * final_normalizer[m]).sum(1)
        for i, (t0, t1) in reversed(list(enumerate(bounds))):
            chunk = _Chunk(q, k, v, g, t0, t1, plan.scale)
            scores = chunk.scores()
            d_out = d_output[:, :, t0:t1].flatten(1, 2)  # (X, R C, V)
            d_scores = torch.bmm(d_out, chunk.v.transpose(1, 2)).view_as(scores)
            if d_weight is not None:
                d_scores.add_(d_weight[:, :, t0:t1, None])
            if d_total is not None:
                pairs = (d_scores * scores).sum(1)  # (X, C, C)
                pairs.diagonal(dim1=1, dim2=2).zero_()
                d_total[:, t0:t1] += pairs.sum(2) - pairs.sum(1)
            d_scores.tril_()
            if chunk.decay is not None:
                d_scores.mul_(chunk.decay.inside)
            d_flat = d_scores.flatten(1, 2)  # (X, R C, C)
            grad_q = torch.baddbmm(chunk.q, d_flat, chunk.k, beta=0, alpha=plan.scale)
            dq[:, :, t0:t1] += grad_q.view_as(chunk.grouped)
            grad_k = torch.baddbmm(chunk.k, d_flat.transpose(1, 2), chunk.q, beta=0, alpha=plan.scale)
            grad_v = torch.bmm(scores.flatten(1, 2).transpose(1, 2), d_out)
            written = None
            if has_final or i < len(bounds) - 1:
                k_write = chunk.k if chunk.decay is None else chunk.k * chunk.decay.write
                grad_v.baddbmm_(k_write, d_state)
                grad_write = torch.bmm(chunk.v, d_state.transpose(1, 2))  # (X, C, K)
                if d_key_sum is not None:
                    grad_write.add_(d_key_sum[:, None])
                if chunk.decay is not None:
                    grad_write.mul_(chunk.decay.write)
                if d_total is not None:
                    written = (grad_write * chunk.k).sum(2)  # (X, C)
                grad_k.add_(grad_write)
            dk[:, t0:t1], dv[:, t0:t1] = grad_k, grad_v
            if d_total is not None and overlap is not None and chunk.decay is not None:
                d_total[:, t0:t1] = later_sums(d_total[:, t0:t1])
                if written is not None:
                    d_total[:, t0 + 1 : t1] += written[:, :-1].cumsum(1)
                    overlap = kept_overlap(overlap - written.sum(1), chunk.decay.whole[:, 0, 0])
                d_total[:, t0:t1] += overlap[:, None]
                read_by = reads[i]
                if read_by is not None:
                    overlap = overlap + read_by
            if i > 0 or memory is not None:
                q_read = chunk.q_read()
                if chunk.decay is not None:
                    d_state.mul_(chunk.decay.whole)
                d_state.baddbmm_(q_read.transpose(1, 2), d_out, alpha=plan.scale)
                if d_key_sum is not None and d_weight is not None:
                    if chunk.decay is not None:
                        d_key_sum.mul_(chunk.decay.whole[..., 0])
                    read = torch.bmm(d_weight[:, :, t0:t1].flatten(1)[:, None], q_read)[:, 0]
                    d_key_sum.add_(read, alpha=plan.scale)
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        None if g is None or d_total is None else d_total.to(g.dtype),
        None if memory is None else d_memory,
        None if normalizer is None else d_normalizer,
    )


class _ChunkedLinearAttention(torch.autograd.Function):
    """`_attend` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *tensors, plan = arguments
        results = _attend(*tensors, plan=plan)
        ctx.save_for_backward(*tensors, *results[2:])
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return results

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_attend_backward(*ctx.saved_tensors, *grads, plan=ctx.plan), None


def _empty_results(q: Tensor, k: Tensor, v: Tensor, *, plan: _Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (len(plan.segments), k.shape[0], k.shape[2])
    return (
        q.new_empty(*q.shape[:3], v.shape[2], dtype=acc),
        q.new_empty(q.shape[:3] if plan.normalize else 0, dtype=acc),
        q.new_empty(*shape, v.shape[2], dtype=acc),
        q.new_empty(shape if plan.normalize else 0, dtype=acc),
    )


def _start(
    k: Tensor, v: Tensor, memory: Tensor | None, normalizer: Tensor | None, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Fresh copies (M, X, K, V) and (M, X, K) of the initial state; the second is empty if not normalised."""
    acc = torch.float64 if k.dtype == torch.float64 else torch.float32
    shape = (len(plan.segments), k.shape[0], k.shape[2])
    if memory is None:
        memory = k.new_zeros(*shape, v.shape[2], dtype=acc)
        return memory, k.new_zeros(shape if plan.normalize else 0, dtype=acc)
    return memory.clone(), k.new_zeros(0, dtype=acc) if normalizer is None else normalizer.clone()
