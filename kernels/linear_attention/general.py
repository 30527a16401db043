"""Linear attention chunk by chunk for every decay and both rules of writing.

A token writes w_j = beta_j k_j times a value e_j: of the additive rule e = v; of the delta rule e is what v
differs by from the value that the memory holds under the key. With d_ij the decay from token j to i inside a
chunk (decays.py), s_i that from its start to i, t_j that from j to its end, and S the state entering it:

    A_ij = sum_c q_ic w_jc d_ijc   (i >= j)             L_ij = sum_c k_ic w_jc d_ijc   (i > j)
    e    = (I + L)^-1 (v - (s k) S) = U - W S           delta rule
    o    = scale ((s q) S + A e)                        S' = Diag(s_end) S + (t w)^T e

(the WY form of arXiv 2406.06484 and 2412.06464). A group of chunks is worked on together, small enough to
stay in cache: everything without S for all of them at once, then the states one after the other. Kept for the
backward pass are the state before each group and, of the delta rule, e and (I + L)^-1, which are slow to make
again; the rest is computed again. So memory is O(T (K + V + C)).

With D the gradient of S', do that of o times scale, y = (do, -de') the gradients of what q and k read, and
P = y e^T:

    de = A^T do + (t w) D                    de' = (I + L)^-T de = dv
    dS = Diag(s_end) D + (s q)^T do - W^T de
    d(q, k) = s y S^T + rows(P)              dw = t e D^T + columns(P)
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import backward_without_autocast
from .decays import make_decay
from .groups import Group, make_plan
from .triangular import unit_lower_inverse
from .types import LinearState

# Dimensions: B batch, T tokens, N sequences, H heads, Hk key heads, HV value heads, K key width, V value
# width, Y chunks of all rows and heads of a group, J chunks of a sequence in a group, X rows times heads,
# C chunk length, R what reads: queries and, with the delta rule, keys

# of shorter chunks matmuls are slow
_LEAST_CHUNK = 32


class _Options(NamedTuple):
    """What is the same for every group."""

    scale: float
    is_delta: bool
    wide_output: bool


def linear_attention_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    lengths: tuple[int, ...],
    *,
    is_packed: bool,
    rule: str,
    normalize: bool,
    scale: float,
    eps: float,
    initial_state: LinearState | None,
    return_state: bool,
    chunk_size: int,
) -> tuple[Tensor, LinearState | None]:
    """`memzoo.kernels.linear_attention` for any decay and rule; arguments are already checked."""
    batch_size, num_key_heads, num_value_heads = len(q), k.shape[2], v.shape[2]
    heads = max(q.shape[2], num_value_heads)
    memory = None if initial_state is None else initial_state.memory
    if normalize:
        # the sum of keys is what a value of 1 would have written
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], 3)
        if initial_state is not None and initial_state.normalizer is not None:
            normalizer = _repeat(initial_state.normalizer, 1, num_value_heads)
            memory = torch.cat([initial_state.memory, normalizer[..., None]], 3)
    if memory is not None:
        memory = _repeat(memory, 1, heads)  # (N, H, K, V)
        memory = memory if is_packed else memory.flatten(0, 1)[None]  # (M, X, K, V)
    # every head with all of its own; grouped ones repeat what they share
    q, k, v = (_repeat(x, 2, heads) for x in (q, k, v))
    g, beta = (None if x is None else _repeat(x, 2, heads) for x in (g, beta))
    # work inside chunks grows with their length, and work on states shrinks with it until they are as small
    # as the keys and values of a chunk
    balanced = k.shape[3] * v.shape[3] // max(1, k.shape[3] + v.shape[3])
    chunk_size = min(chunk_size, max(_LEAST_CHUNK, 1 << max(balanced - 1, 0).bit_length()))
    plan = make_plan(q, v, lengths, is_packed, chunk_size)
    options = _Options(scale, rule == "delta", normalize)
    result, final = _GeneralLinearAttention.apply(q, k, v, g, beta, memory, plan, options)
    output = result
    if normalize:
        output = result[..., :-1] / (result[..., -1:] + eps)
    output = output.to(q.dtype)
    if not return_state:
        return output, None
    final = final if is_packed else final[0].unflatten(0, (batch_size, heads))
    final = final[:, :: heads // num_value_heads]  # (N, HV, K, V)
    if not normalize:
        return output, LinearState(final)
    return output, LinearState(final[..., :-1], final[:, :: num_value_heads // num_key_heads, :, -1])


def _repeat(x: Tensor, axis: int, heads: int) -> Tensor:
    return x if x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], axis)


class _Group(Group):
    """A group of chunks: what both passes need, and the passes."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        bounds: tuple[int, int, int],
        options: _Options,
    ):
        super().__init__(q, bounds)
        self.scale = options.scale
        self.k = self.load(k)  # (Y, C, K)
        self.beta = None if beta is None else self.load(beta[..., None])  # (Y, C, 1)
        self.w = self.k if self.beta is None else self.k * self.beta
        self.x = self.k.new_empty(*self.k.shape[:2], 2 if options.is_delta else 1, self.k.shape[2])
        self.load(q, into=self.x[:, :, 0])
        if options.is_delta:
            self.x[:, :, 1] = self.k
        log_decay = None
        if g is not None:
            log_decay = self.load(g) if g.dim() == 4 else self.load(g[..., None]).squeeze(2)
        self.decay = make_decay(log_decay, self.w)
        self.x_start = self.decay.from_start(self.x)  # (Y, C, R, K)
        self.w_end = self.decay.to_end(self.w)  # (Y, C, K)
        self.whole = None if self.decay.whole is None else self.split(self.decay.whole)[..., None]

    def run(self, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Output and what is written, (Y, C, V), the state after the group, and (I + L)^-1 of the delta rule.

        Args:
            v: (B, T, H, V).
            state: (X, K, V), before the group.
        """
        scores = self.decay.scores(self.x, self.w)  # (Y, C, R, C)
        values, inverse, erase = self.load(v), None, None
        if self.x.shape[2] == 2:
            inverse = unit_lower_inverse(scores[:, :, 1])
            values, erase = torch.bmm(inverse, values), self._erase(inverse)
        states = self._states(values, state, erase)
        output = torch.bmm(scores[:, :, 0], values)
        output.baddbmm_(self.x_start[:, :, 0], states[:-1].flatten(0, 1), beta=self.scale, alpha=self.scale)
        return output, values, states[-1], inverse

    def _erase(self, inverse: Tensor) -> Tensor:
        """W of the module docstring, (J, X, C, K)."""
        return self.split(torch.bmm(inverse, self.x_start[:, :, 1]))

    def _states(self, values: Tensor, state: Tensor, erase: Tensor | None) -> Tensor:
        """States before each chunk and after the last, (J + 1, X, K, V).

        With `erase`, `values` (Y, C, V) are U and become what is written; without, they are it.
        """
        keys = self.split(self.w_end).transpose(2, 3)  # (J, X, K, C)
        parts = self.split(values)
        states = state.new_empty(len(parts) + 1, *state.shape)
        states[0] = state
        for j, (before, after) in enumerate(pairwise(states.unbind())):
            if erase is not None:
                parts[j].baddbmm_(erase[j], before, alpha=-1)
            if self.whole is None:
                after.copy_(before)
            else:
                torch.mul(before, self.whole[j], out=after)
            after.baddbmm_(keys[j], parts[j])
        return states

    def backward(
        self, values: Tensor, inverse: Tensor | None, state: Tensor, d_output: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """Gradients of q, k, v, g and beta, and of the state before the group.

        Args:
            values: what is written, from `run`.
            inverse: from `run`.
            state: (X, K, V), before the group.
            d_output: (B, T, H, V).
            d_state: (X, K, V), gradient of the state after the group.
        """
        states = self._states(values, state, None)
        d_reads = values.new_empty(*self.x.shape[:3], values.shape[2])  # (Y, C, R, V)
        d_output = self.load(d_output, into=d_reads[:, :, 0]).mul_(self.scale)
        scores = self.decay.scores(self.x[:, :, :1], self.w)[:, :, 0]  # (Y, C, C)
        d_values = torch.bmm(scores.transpose(1, 2), d_output)
        parts, keys = self.split(d_values), self.split(self.w_end)
        erase = None if inverse is None else self._erase(inverse).transpose(2, 3)  # (J, X, K, C)
        d_states = torch.empty_like(states)
        d_states[-1] = d_state
        d_states[:-1] = self.split(torch.bmm(self.x_start[:, :, 0].transpose(1, 2), d_output))
        for j in reversed(range(len(parts))):
            before, after = d_states[j], d_states[j + 1]
            parts[j].baddbmm_(keys[j], after)
            if self.whole is None:
                before.add_(after)
            else:
                before.addcmul_(self.whole[j], after)
            if erase is not None:
                before.baddbmm_(erase[j], parts[j], alpha=-1)
        if inverse is not None:
            d_values = torch.bmm(inverse.transpose(1, 2), d_values)
            d_reads[:, :, 1].copy_(d_values).neg_()
        flat = d_reads.flatten(1, 2)
        d_scores = torch.bmm(flat, values.transpose(1, 2)).view(*self.x.shape[:3], -1)
        # a token's own weight has no decay: it stays out until the gradients of the decays are there
        diagonal = d_scores[:, :, 0].diagonal(dim1=1, dim2=2)
        own = diagonal.clone()[..., None]  # (Y, C, 1)
        diagonal.zero_()
        dx, dw = self.decay.gradients(d_scores, self.x, self.w)
        before, after = states[:-1].flatten(0, 1), d_states[1:].flatten(0, 1)  # (Y, K, V)
        self.decay.add_from_start(dx, torch.bmm(flat, before.transpose(1, 2)).view_as(dx))
        d_end = self.decay.to_end(torch.bmm(values, after.transpose(1, 2)))  # (Y, C, K)
        dg = None
        if self.decay.whole is not None:
            # what passes a token was read behind it, was written before it, or crosses the whole chunk
            d_read = (self.x * dx).sum(2).sub_(self.w * dw)
            d_written = self.w * d_end
            d_whole = self.decay.whole * (before * after).sum(2)  # (Y, K)
            if self.decay.whole.shape[1] == 1:
                d_read, d_written, d_whole = (x.sum(-1, keepdim=True) for x in (d_read, d_written, d_whole))
            later = torch.ones(*self.w.shape[1:2] * 2, dtype=self.acc, device=self.w.device).triu_()
            dg = torch.matmul(later, d_read).add_(torch.matmul(1 - later, d_written)).add_(d_whole[:, None])
        dx[:, :, 0].addcmul_(own, self.w)
        dw.add_(d_end).addcmul_(own, self.x[:, :, 0])
        d_beta = None if self.beta is None else (dw * self.k).sum(2, keepdim=True)
        dk = dw if self.beta is None else dw * self.beta
        if inverse is not None:
            dk = dk.add_(dx[:, :, 1])
        return dx[:, :, 0], dk, d_values, dg, d_beta, d_states[0]


class _GeneralLinearAttention(torch.autograd.Function):
    """Output (B, T, H, V) and final state (M, X, K, V), with their gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta, memory, plan, options = arguments
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        output = v.new_empty(v.shape, dtype=acc if options.wide_output else q.dtype)
        if memory is None:
            rows = k.shape[0] * k.shape[2]
            final = k.new_zeros(len(plan.segments), rows, k.shape[3], v.shape[3], dtype=acc)
        else:
            final = memory.clone()
        needs_gradient = any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []  # of each group the state before it, what it writes, and (I + L)^-1
        for m, bounds in plan.groups():
            group = _Group(q, k, g, beta, bounds, options)
            before = final[m].clone()
            result, values, final[m], inverse = group.run(v, before)
            group.store(output, result)
            if needs_gradient:
                # what the additive rule writes are the values themselves
                kept += [before, values if options.is_delta else None, inverse]
        ctx.save_for_backward(q, k, v, g, beta, *kept)
        ctx.plan, ctx.options, ctx.has_memory = plan, options, memory is not None
        return output, final

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, *kept = ctx.saved_tensors
        d_output, d_memory = grads[0], grads[1].clone()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dg, d_beta = (None if x is None else torch.empty_like(x) for x in (g, beta))
        for n, (m, bounds) in reversed(list(enumerate(ctx.plan.groups()))):
            before, values, inverse = kept[3 * n : 3 * n + 3]
            group = _Group(q, k, g, beta, bounds, ctx.options)
            values = group.load(v) if values is None else values
            grad_q, grad_k, grad_v, grad_g, grad_beta, d_state = group.backward(
                values, inverse, before, d_output, d_memory[m]
            )
            d_memory[m] = d_state
            group.store(dq, grad_q)
            group.store(dk, grad_k)
            group.store(dv, grad_v)
            if dg is not None and grad_g is not None:
                group.store(dg if g.dim() == 4 else dg[..., None], grad_g)
            if d_beta is not None and grad_beta is not None:
                group.store(d_beta[..., None], grad_beta)
        return dq, dk, dv, dg, d_beta, d_memory if ctx.has_memory else None, None, None
