"""mLSTM chunk by chunk: matmuls inside a chunk, and one running state between chunks.

With G_i the sum of logsigmoid(f) in a chunk up to and including token i, b_j = i_j - G_j, (C, n, m) the state
entering the chunk and M_i = max(m, max_{j <= i} b_j), the stabiliser of the recurrence is m_i = G_i + M_i and

    A_ij = (scale q_i . k_j) exp(b_j - M_i) for j <= i
    num_i = exp(m - M_i) (scale q_i) C + sum_j A_ij v_j,   weight_i likewise with n and 1 for C and v
    h_i = num_i / (max(|weight_i|, exp(-m_i)) + eps)
    C' = exp(m - M_end) C + sum_j exp(b_j - M_end) k_j v_j^T,   m' = G_end + M_end

Every row has its own M_i, which reads tokens up to i alone, so the result is causal to the bit and no
exponent is above 0. The normaliser is one more value column, of ones. As in linear attention, the backward
pass runs the states again instead of storing them: memory is O(T (K + V)). Exponents below a floor (a factor
that no sum of this precision can see) are raised to it, because denormal numbers are slow. b, M and G are
float64: behind closed forget gates they are large, and only their differences count.

Gradients. All weights are products of exp(i_j), of exp(logsigmoid f) and of exp(-m_i), and the last cancel
in h_i but for eps. So the sums are differentiated as if m were 0 everywhere, and the whole derivative by m_i
is -(dh_i . h_i) eps / (max(|weight_i|, exp(-m_i)) + eps), which goes to whichever term the maximum took.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import backward_without_autocast
from .reference import weight_floor
from .types import MLSTMState

# Dimensions: B batch, T tokens, N sequences, H heads, X rows of heads, K key width, V value width, S
# segments, C chunk length

# Log-decays below it forget everything, and sums of lower ones would lose the input gates.
_LOWEST = -1e6


class _Plan(NamedTuple):
    """How a call is cut up: (start, length) of each segment, tokens per chunk, and the plain arguments."""

    segments: tuple[tuple[int, int], ...]
    chunk_size: int
    scale: float
    eps: float

    def chunks(self, start: int, length: int) -> list[tuple[int, int]]:
        """First token and end of each chunk of a segment."""
        end = start + length
        return [(t0, min(t0 + self.chunk_size, end)) for t0 in range(start, end, self.chunk_size)]


def mlstm_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    lengths: tuple[int, ...],
    *,
    is_packed: bool,
    scale: float,
    eps: float,
    initial_state: MLSTMState | None,
    chunk_size: int,
) -> tuple[Tensor, MLSTMState]:
    """Chunked form of `memzoo.kernels.mlstm`; arguments are already checked."""
    batch_size, num_tokens, num_heads = q.shape[:3]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    # A dense batch is one segment with rows (b, h); a packed row has rows h and one segment per sequence.
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (X, T, K or V)
    gates = [x.to(acc).transpose(1, 2).flatten(0, 1) for x in (input_gate, forget_gate)]  # (X, T)
    shape = (len(lengths), num_heads, q.shape[3], v.shape[3] + 1)
    if initial_state is None:
        memory, stabilizer = q.new_zeros(shape, dtype=acc), q.new_zeros(shape[:2], dtype=acc)
    else:
        memory = torch.cat([initial_state.memory, initial_state.normalizer[..., None]], dim=-1)
        stabilizer = initial_state.stabilizer
    if not is_packed:
        memory, stabilizer = memory.flatten(0, 1)[None], stabilizer.flatten()[None]  # (S, X, ...)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    segments = tuple(zip(starts[:-1], lengths, strict=True)) if is_packed else ((0, num_tokens),)
    plan = _Plan(segments, chunk_size, scale, eps)
    output, memory, stabilizer = _ChunkedMLSTM.apply(*rows, *gates, memory, stabilizer, plan)
    output = output.unflatten(0, (batch_size, num_heads)).transpose(1, 2).to(q.dtype)
    memory, stabilizer = memory.reshape(shape), stabilizer.reshape(shape[:2])
    return output, MLSTMState(memory[..., :-1], memory[..., -1], stabilizer)


class _Chunk:
    """Tensors of one chunk in the accumulation dtype."""

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        bounds: tuple[int, int],
        stabilizer: Tensor,
        scale: float,
    ) -> None:
        q, k, v, input_gate, forget_gate = (x[:, bounds[0] : bounds[1]] for x in tensors)
        acc = input_gate.dtype
        self.scale = scale
        self.q, self.k = q.to(acc), k.to(acc)  # (X, C, K)
        self.v = F.pad(v.to(acc), (0, 1), value=1.0)  # (X, C, V + 1)
        self.floor = -700.0 if acc == torch.float64 else -60.0
        entering = stabilizer.double()[:, None]
        total = F.logsigmoid(forget_gate).double().clamp_(min=_LOWEST).cumsum(-1)  # (X, C), G
        self.source = input_gate - total  # b
        largest, self.winner = self.source.cummax(-1)
        self.from_state = entering >= largest  # (X, C), where M_i is the m of the state
        self.largest = torch.maximum(largest, entering)  # M
        self.stabilizer = (total + self.largest).to(acc)
        self.read = self._factor(entering - self.largest)[..., None]  # (X, C, 1)
        self.write = self._factor(self.source - self.largest[:, -1:])[..., None]  # (X, C, 1)
        self.whole = self.read[:, -1:]  # (X, 1, 1)

    def _factor(self, exponent: Tensor) -> Tensor:
        return exponent.clamp(self.floor, 0).to(self.q.dtype).exp_()

    def inside(self) -> Tensor:
        """exp(b_j - M_i), (X, C, C); what lies above the diagonal is meaningless."""
        return self._factor(self.source[:, None, :] - self.largest[:, :, None])

    def scores(self, inside: Tensor) -> Tensor:
        """A of the module docstring, (X, C, C)."""
        product = torch.bmm(self.q, self.k.transpose(1, 2)).mul_(self.scale)
        return product.tril_().mul_(inside)

    def advance(self, memory: Tensor) -> None:
        """The state (X, K, V + 1) after the chunk, in place."""
        memory.mul_(self.whole).baddbmm_((self.k * self.write).transpose(1, 2), self.v)

    def sums(self, scores: Tensor, memory: Tensor) -> Tensor:
        """Numerator and, in the last column, weight: (X, C, V + 1)."""
        sums = torch.bmm(scores, self.v)
        return sums.baddbmm_(self.q * self.read, memory, alpha=self.scale)

    def denominator(self, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The denominator (X, C), and where it is the weight itself."""
        bound = weight_floor(self.stabilizer)
        return torch.maximum(weight.abs(), bound) + eps, weight.abs() >= bound


def _attend(tensors: tuple[Tensor, ...], plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Output (X, T, V), final memory (S, X, K, V + 1) and stabiliser (S, X)."""
    *inputs, memory, stabilizer = tensors
    output = inputs[2].new_empty(inputs[2].shape, dtype=memory.dtype)
    memory, stabilizer = memory.clone(), stabilizer.clone()
    for s, (start, length) in enumerate(plan.segments):
        for t0, t1 in plan.chunks(start, length):
            chunk = _Chunk(tuple(inputs), (t0, t1), stabilizer[s], plan.scale)
            sums = chunk.sums(chunk.scores(chunk.inside()), memory[s])
            denominator, _ = chunk.denominator(sums[..., -1], plan.eps)
            output[:, t0:t1] = sums[..., :-1] / denominator[..., None]
            chunk.advance(memory[s])
            stabilizer[s] = chunk.stabilizer[:, -1]
    return output, memory, stabilizer


def _attend_backward(
    tensors: tuple[Tensor, ...],
    final_memory: Tensor,
    grads: tuple[Tensor, ...],
    plan: _Plan,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, the gates, memory and stabiliser from those of the three results."""
    d_output, d_final_memory, d_final_stabilizer = grads
    *given, first_memory, first_stabilizer = tensors
    inputs = tuple(given)
    dq, dk, dv, d_input, d_forget = (torch.zeros_like(x, dtype=first_memory.dtype) for x in inputs)
    d_memory, d_stabilizer = d_final_memory.clone(), d_final_stabilizer.clone()
    for s, (start, length) in enumerate(plan.segments):
        # Forward over the states: gradients of the sums, and of the queries that read the state.
        state, entering = first_memory[s].clone(), first_stabilizer[s]
        memos: list[_Memo] = []
        for bounds in plan.chunks(start, length):
            chunk = _Chunk(inputs, bounds, entering, plan.scale)
            sums = chunk.sums(chunk.scores(chunk.inside()), state)
            memo = _memo(chunk, sums, d_output[:, bounds[0] : bounds[1]], entering, plan.eps)
            grad = torch.bmm(memo.d_sums, state.transpose(1, 2)).mul_(chunk.read * plan.scale)
            dq[:, bounds[0] : bounds[1]] = grad
            memos.append(memo._replace(read=(grad * chunk.q).sum(-1)))
            chunk.advance(state)
            entering = chunk.stabilizer[:, -1]
        # Backward over their gradients. `overlap` is <dC, C> + <dn, n> after the chunk: what the state would
        # change by if all its decays did.
        d_state = d_memory[s]
        overlap = (d_state * final_memory[s]).sum((1, 2))  # (X,)
        d_leaving = d_stabilizer[s] - overlap  # what is kept is divided by exp(m)
        for (t0, t1), memo in reversed(list(zip(plan.chunks(start, length), memos, strict=True))):
            chunk = _Chunk(inputs, (t0, t1), memo.entering, plan.scale)
            inside = chunk.inside()
            scores = chunk.scores(inside)
            d_scores = torch.bmm(memo.d_sums, chunk.v.transpose(1, 2))  # (X, C, C)
            pairs = d_scores * scores
            d_total = pairs.sum(2) + memo.read  # gradient of G
            d_source = pairs.sum(1)  # gradient of b, but for the maxima
            d_scores.mul_(inside).tril_()
            dq[:, t0:t1].baddbmm_(d_scores, chunk.k, alpha=plan.scale)
            grad_k = torch.bmm(d_scores.transpose(1, 2), chunk.q).mul_(plan.scale)
            grad_write = torch.bmm(chunk.v, d_state.transpose(1, 2)).mul_(chunk.write)  # (X, C, K)
            written = (grad_write * chunk.k).sum(-1)  # (X, C)
            dk[:, t0:t1] = grad_k.add_(grad_write)
            grad_v = torch.bmm(scores.transpose(1, 2), memo.d_sums)
            dv[:, t0:t1] = grad_v.baddbmm_(chunk.k * chunk.write, d_state)[..., :-1]
            d_source = d_source + written
            d_total[:, -1] += overlap
            # The maxima: m_i = G_i + M_i, and M_i is b of the winner or the m of the state.
            d_rows = memo.d_stabilizer
            d_rows[:, -1] += d_leaving
            d_total += d_rows
            d_source = d_source.scatter_add(1, chunk.winner, d_rows.masked_fill(chunk.from_state, 0))
            d_leaving = (d_rows * chunk.from_state).sum(1)
            d_input[:, t0:t1] = d_source
            d_total -= d_source
            d_forget[:, t0:t1] = d_total.flip(1).cumsum(1).flip(1) * torch.sigmoid(-inputs[4][:, t0:t1])
            overlap = overlap - written.sum(1) + memo.read.sum(1)
            d_state.mul_(chunk.whole)
            d_state.baddbmm_((chunk.q * chunk.read).transpose(1, 2), memo.d_sums, alpha=plan.scale)
        d_stabilizer[s] = d_leaving + overlap
    found = zip((dq, dk, dv, d_input, d_forget), inputs, strict=True)
    return (*(grad.to(x.dtype) for grad, x in found), d_memory, d_stabilizer)


class _Memo(NamedTuple):
    """What the backward pass keeps of a chunk, O(C V)."""

    d_sums: Tensor  # (X, C, V + 1) gradients of numerator and weight
    d_stabilizer: Tensor  # (X, C) whole derivative by m_i
    read: Tensor  # (X, C) <d_sums_i, what row i read of the state>
    entering: Tensor  # (X,) m of the state before the chunk


def _memo(chunk: _Chunk, sums: Tensor, d_output: Tensor, entering: Tensor, eps: float) -> _Memo:
    """Gradients of one chunk's sums from those of its output (X, C, V)."""
    denominator, is_weight = chunk.denominator(sums[..., -1], eps)
    d_sums = torch.zeros_like(sums)
    d_sums[..., :-1] = d_output / denominator[..., None]
    overlap = (d_sums[..., :-1] * sums[..., :-1]).sum(-1) / denominator  # dh . h / denominator
    d_sums[..., -1] = -overlap * sums[..., -1].sign() * is_weight
    return _Memo(d_sums, -overlap * eps, overlap, entering)


class _ChunkedMLSTM(torch.autograd.Function):
    """`_attend` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, plan = arguments
        output, memory, stabilizer = _attend(tuple(tensors), plan)
        ctx.save_for_backward(*tensors, memory)
        ctx.plan = plan
        return output, memory, stabilizer

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, final_memory = ctx.saved_tensors
        return *_attend_backward(tuple(tensors), final_memory, grads, ctx.plan), None
