"""Linear attention chunk by chunk for every decay and both rules of writing.

A token writes w_j = beta_j k_j times a value e_j: of the additive rule e = v; of the delta rule e is what v
differs by from the value that the memory holds under the key. With d_ij the decay from token j to i inside a
chunk (decays.py), s_i that from its start to i, t_j that from j to its end, and S the state entering it:

    A_ij = sum_c scale q_ic w_jc d_ijc   (i >= j)       L_ij = sum_c k_ic w_jc d_ijc   (i > j)
    e    = (I + L)^-1 (v - (s k) S) = U - W S           delta rule
    o    = (scale s q) S + A e                          S' = Diag(s_end) S + (t w)^T e

(the WY form of arXiv 2406.06484 and 2412.06464). A group of chunks is worked on together, small enough to
stay in cache: everything without S for all of them at once, then the states one after the other. Only the
state before each group is kept for the backward pass, which computes the rest again; so memory is
O(T (K + V)).

With D the gradient of S', y = (do, -de') the gradients of what q and k read, and P = y e^T:

    de = A^T do + (t w) D                    de' = (I + L)^-T de = dv
    dS = Diag(s_end) D + (scale s q)^T do - W^T de
    d(q, k) = s y S^T + rows(P)              dw = t e D^T + columns(P)
"""

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
    """A group of chunks: first everything that does not depend on the state."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        bounds: tuple[int, int, int],
        options: _Options,
    ):
        super().__init__(q, bounds)
        self.k, self.v = self.load(k), self.load(v)  # (Y, C, K), (Y, C, V)
        self.beta = None if beta is None else self.load(beta[..., None])  # (Y, C, 1)
        self.w = self.k if self.beta is None else self.k * self.beta
        self.x = self.k.new_empty(*self.k.shape[:2], 2 if options.is_delta else 1, self.k.shape[2])
        self.x[:, :, 0] = self.load(q) * options.scale
        if options.is_delta:
            self.x[:, :, 1] = self.k
        log_decay = None
        if g is not None:
            log_decay = self.load(g) if g.dim() == 4 else self.load(g[..., None]).squeeze(2)
        self.decay = make_decay(log_decay, self.w)
        self.scores = self.decay.scores(self.x, self.w)  # (Y, C, R, C)
        self.x_start = self.decay.from_start(self.x)  # (Y, C, R, K)
        self.w_end = self.decay.to_end(self.w)  # (Y, C, K)
        self.whole = None if self.decay.whole is None else self.split(self.decay.whole)[..., None]
        self.values, self.inverse, self.erase = self.v, None, None
        if options.is_delta:
            self.inverse = unit_lower_inverse(self.scores[:, :, 1])
            self.values = torch.bmm(self.inverse, self.v)
            self.erase = self.split(torch.bmm(self.inverse, self.x_start[:, :, 1]))  # (J, X, C, K)

    def run(self, state: Tensor) -> Tensor:
        """States before each chunk and after the last, (J + 1, X, K, V); `values` become what is written."""
        values, keys = self.split(self.values), self.split(self.w_end)
        states = state.new_empty(len(values) + 1, *state.shape)
        states[0] = state
        for j in range(len(values)):
            if self.erase is not None:
                values[j].baddbmm_(self.erase[j], states[j], alpha=-1)
            states[j + 1] = states[j]
            if self.whole is not None:
                states[j + 1].mul_(self.whole[j])
            states[j + 1].baddbmm_(keys[j].transpose(1, 2), values[j])
        return states

    def read(self, states: Tensor) -> Tensor:
        """Output (Y, C, V)."""
        output = torch.bmm(self.scores[:, :, 0], self.values)
        return output.baddbmm_(self.x_start[:, :, 0], states[:-1].flatten(0, 1))

    def backward(
        self, states: Tensor, d_output: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """Gradients of q (scaled), k, v, g and beta, and of the state before the group.

        Args:
            states: from `run`.
            d_output: (Y, C, V).
            d_state: (X, K, V), gradient of the state after the group.
        """
        keys = self.split(self.w_end)
        d_values = torch.bmm(self.scores[:, :, 0].transpose(1, 2), d_output)
        parts = self.split(d_values)
        d_states = torch.empty_like(states)
        d_states[-1] = d_state
        d_states[:-1] = self.split(torch.bmm(self.x_start[:, :, 0].transpose(1, 2), d_output))
        for j in reversed(range(len(parts))):
            parts[j].baddbmm_(keys[j], d_states[j + 1])
            if self.whole is None:
                d_states[j].add_(d_states[j + 1])
            else:
                d_states[j].addcmul_(self.whole[j], d_states[j + 1])
            if self.erase is not None:
                d_states[j].baddbmm_(self.erase[j].transpose(1, 2), parts[j], alpha=-1)
        d_reads = d_output[:, :, None]  # (Y, C, R, V)
        if self.inverse is not None:
            d_values = torch.bmm(self.inverse.transpose(1, 2), d_values)
            d_reads = torch.stack([d_output, -d_values], 2)
        before, after = states[:-1].flatten(0, 1), d_states[1:].flatten(0, 1)  # (Y, K, V)
        flat = d_reads.flatten(1, 2)
        d_scores = torch.bmm(flat, self.values.transpose(1, 2)).view_as(self.scores)
        # a token's own weight has no decay: it stays out until the gradients of the decays are there
        diagonal = d_scores[:, :, 0].diagonal(dim1=1, dim2=2)
        own = diagonal.clone()[..., None]  # (Y, C, 1)
        diagonal.zero_()
        dx, dw = self.decay.gradients(d_scores, self.x, self.w)
        dx.add_(self.decay.from_start(torch.bmm(flat, before.transpose(1, 2)).view_as(dx)))
        d_end = self.decay.to_end(torch.bmm(self.values, after.transpose(1, 2)))  # (Y, C, K)
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
        dk = dw if self.beta is None else dw * self.beta
        if self.inverse is not None:
            dk = dk + dx[:, :, 1]
        d_beta = None if self.beta is None else (dw * self.k).sum(2, keepdim=True)
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
        before = []  # states before each group
        for m, bounds in plan.groups():
            before.append(final[m].clone())
            group = _Group(q, k, v, g, beta, bounds, options)
            states = group.run(final[m])
            group.store(output, group.read(states))
            final[m] = states[-1]
        ctx.save_for_backward(q, k, v, g, beta, *before)
        ctx.plan, ctx.options, ctx.has_memory = plan, options, memory is not None
        return output, final

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, *before = ctx.saved_tensors
        d_output, d_memory = grads[0], grads[1].clone()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dg, d_beta = (None if x is None else torch.empty_like(x) for x in (g, beta))
        for n, (m, bounds) in reversed(list(enumerate(ctx.plan.groups()))):
            group = _Group(q, k, v, g, beta, bounds, ctx.options)
            states = group.run(before[n])
            grad_q, grad_k, grad_v, grad_g, grad_beta, d_state = group.backward(
                states, group.load(d_output), d_memory[m]
            )
            d_memory[m] = d_state
            group.store(dq, grad_q * ctx.options.scale)
            group.store(dk, grad_k)
            group.store(dv, grad_v)
            if dg is not None and grad_g is not None:
                group.store(dg if g.dim() == 4 else dg[..., None], grad_g)
            if d_beta is not None and grad_beta is not None:
                group.store(d_beta[..., None], grad_beta)
        return dq, dk, dv, dg, d_beta, d_memory if ctx.has_memory else None, None, None
