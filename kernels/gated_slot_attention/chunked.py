"""The scores of gated slot attention chunk by chunk: a memory whose value channels decay.

    P_t = P_{t-1} Diag(exp(g_t)) + k_t^T s_t        o_t = scale q_t P_t

With d_ij the decay of each slot from token j to token i inside a chunk (linear_attention/decays.py), a_i that
from its start to i, z_j that from j to its end, D the gradient of the state after the chunk, and

    A_ij = scale q_i . k_j  (i >= j)

    o_i = a_i (scale q_i P) + sum_j A_ij s_j d_ij          P' = P Diag(a_end) + k^T (z s)
    dA_ij = sum_m do_im s_jm d_ijm                         ds = columns(A, do) + z (k D)
    d(scale q) = dA k + (a do) P^T                         dk = dA^T scale q + (z s) D^T

As in linear attention, groups of chunks are worked on together and only the states before groups are kept.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import backward_without_autocast
from ..linear_attention.decays import ChannelDecay, NoDecay
from ..linear_attention.groups import Group, make_plan

# Dimensions: B batch, T tokens, N sequences, H heads, K key width, M slots, Y chunks of all rows and heads of
# a group, J chunks of a sequence in a group, X rows times heads, C chunk length


def slot_scores_torch(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    g: Tensor,
    lengths: tuple[int, ...],
    *,
    is_packed: bool,
    scale: float,
    initial_keys: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Scores (B, T, H, M) in the accumulation dtype and the state (N, H, K, M) after the last token.

    All tensors have the same heads.
    """
    memory = initial_keys
    if memory is not None:
        memory = memory if is_packed else memory.flatten(0, 1)[None]  # (segments, X, K, M)
    plan = make_plan(k, slots, lengths, is_packed, chunk_size)
    scores, final = _SlotScores.apply(q, k, slots, g, memory, plan, scale)
    return scores, final if is_packed else final[0].unflatten(0, (q.shape[0], q.shape[2]))


class _Group(Group):
    """A group of chunks with the states before each of them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        slots: Tensor,
        g: Tensor,
        bounds: tuple[int, int, int],
        scale: float,
        state: Tensor,
    ):
        super().__init__(q, bounds)
        self.q, self.k, self.slots = self.load(q) * scale, self.load(k), self.load(slots)
        self.decay, self.pairs = ChannelDecay(self.load(g)), NoDecay(self.k)
        self.scores = self.pairs.scores(self.q[:, :, None], self.k)  # (Y, C, 1, C)
        self.slots_end = self.decay.to_end(self.slots)  # (Y, C, M)
        self.whole = self.split(self.decay.whole)[:, :, None]  # (J, X, 1, M)
        written = self.split(torch.bmm(self.k.transpose(1, 2), self.slots_end))  # (J, X, K, M)
        states = state.new_empty(len(written) + 1, *state.shape)
        states[0] = state
        for j in range(len(written)):
            states[j + 1] = states[j]
            states[j + 1].mul_(self.whole[j]).add_(written[j])
        self.states = states

    def read(self) -> Tensor:
        """Scores of the slots, (Y, C, M)."""
        inside = self.decay.rows(self.scores, self.slots)  # (Y, C, 1, M)
        before = torch.bmm(self.q, self.states[:-1].flatten(0, 1))
        return inside.add_(self.decay.from_start(before[:, :, None]))[:, :, 0]

    def backward(self, d_output: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the scaled q, k, slots and g, and of the state before the group.

        Args:
            d_output: (Y, C, M).
            d_state: (X, K, M), gradient of the state after the group.
        """
        d_rows = d_output[:, :, None]  # (Y, C, 1, M)
        d_start = self.decay.from_start(d_rows)[:, :, 0]
        d_states = torch.empty_like(self.states)
        d_states[-1] = d_state
        d_states[:-1] = self.split(torch.bmm(self.q.transpose(1, 2), d_start))
        for j in reversed(range(len(d_states) - 1)):
            d_states[j].addcmul_(self.whole[j], d_states[j + 1])
        before, after = self.states[:-1].flatten(0, 1), d_states[1:].flatten(0, 1)  # (Y, K, M)
        dq, dk = self.pairs.gradients(self.decay.scores(d_rows, self.slots), self.q[:, :, None], self.k)
        dq = torch.baddbmm(dq[:, :, 0], d_start, before.transpose(1, 2))
        dk = dk.baddbmm_(self.slots_end, after.transpose(1, 2))
        d_end = self.decay.to_end(torch.bmm(self.k, after))  # (Y, C, M)
        # a token's own weight has no decay: it stays out until the gradients of the decays are there
        diagonal = self.scores[:, :, 0].diagonal(dim1=1, dim2=2)
        own = diagonal.clone()[..., None]  # (Y, C, 1)
        diagonal.zero_()
        d_slots = self.decay.columns(self.scores, d_rows)
        # what passes a token was read behind it, was written before it, or crosses the whole chunk
        d_read = (self.read() * d_output).sub_(self.slots * d_slots)
        d_whole = self.decay.whole * (before * after).sum(1)  # (Y, M)
        later = torch.ones(*self.k.shape[1:2] * 2, dtype=self.acc, device=self.k.device).triu_()
        dg = torch.matmul(later, d_read).add_(torch.matmul(1 - later, self.slots * d_end))
        d_slots.add_(d_end).addcmul_(own, d_output)
        return dq, dk, d_slots, dg.add_(d_whole[:, None]), d_states[0]


class _SlotScores(torch.autograd.Function):
    """Scores (B, T, H, M) and final state (segments, X, K, M), with their gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, slots, g, memory, plan, scale = arguments
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        output = slots.new_empty(slots.shape, dtype=acc)
        if memory is None:
            rows = k.shape[0] * k.shape[2]
            final = k.new_zeros(len(plan.segments), rows, k.shape[3], slots.shape[3], dtype=acc)
        else:
            final = memory.clone()
        before = []  # states before each group
        for m, bounds in plan.groups():
            before.append(final[m].clone())
            group = _Group(q, k, slots, g, bounds, scale, final[m])
            group.store(output, group.read())
            final[m] = group.states[-1]
        ctx.save_for_backward(q, k, slots, g, *before)
        ctx.plan, ctx.scale, ctx.has_memory = plan, scale, memory is not None
        return output, final

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, slots, g, *before = ctx.saved_tensors
        d_output, d_memory = grads[0], grads[1].clone()
        results = [torch.empty_like(x) for x in (q, k, slots, g)]
        for n, (m, bounds) in reversed(list(enumerate(ctx.plan.groups()))):
            group = _Group(q, k, slots, g, bounds, ctx.scale, before[n])
            dq, dk, d_slots, dg, d_state = group.backward(group.load(d_output), d_memory[m])
            d_memory[m] = d_state
            for result, grad in zip(results, (dq * ctx.scale, dk, d_slots, dg), strict=True):
                group.store(result, grad)
        return *results, d_memory if ctx.has_memory else None, None, None
